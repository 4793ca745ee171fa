"""A token that Instagram does not renew is told of in time, and never called dead on an assumption alone."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from crmbridge.events import epoch_s, instant
from crmbridge.sandbox import wire
from crmbridge.tending.tokens import Tokens
from tests.rig import START_S, Recorder, Rig
from tests.shop import SHOP_ID, SHOP_SCOPED_ID, TOKEN, Shop
from tests.typed import typed

DAY_S, HOUR_S = 86_400.0, 3600.0
RENEW = "refresh_access_token"


class Shopkeeper:
    """An account as the API makes it, on a set clock, with all that looks after its token."""

    def __init__(self, rig: Rig, letters: Path) -> None:
        self.rig, self.letters = rig, letters
        rig.alarm = Recorder(rig.db, lambda: rig.now_s, command=f"cat >> '{letters}'")
        created = {"instagram_account_id": SHOP_ID, "access_token": TOKEN}
        status, self.account = rig.call("POST", "/api/v1/accounts", created)
        assert status == 201
        self.id = self.account["account_id"]
        self.tokens = Tokens(rig.db, rig.rooms.client, rig.rooms.vault, rig.alarm, clock=lambda: rig.now_s)
        self.watch = rig.watch()

    def live(self, days: float) -> list[str]:
        """Let days pass, six hours at a time; return the kinds of alerts that were raised, or told something new."""
        told = set(self.rig.alerts)
        begin = len(self.rig.alerts)
        for _ in range(round(days * 4)):
            self.rig.now_s += 6 * HOUR_S
            self.tokens.refresh()
            self.watch.listen()
            self.watch.look()
            self.rig.alarm.pass_on()
        new = [entry for entry in dict.fromkeys(self.rig.alerts[begin:]) if entry not in told]
        return [kind for kind, _ in new]

    def shown(self) -> dict[str, Any]:
        return self.rig.call("GET", f"/api/v1/accounts/{self.id}")[1]

    def put(self, token: str) -> None:
        self.rig.meta.accounts[SHOP_ID].tokens[token] = self.rig.now_s
        assert self.rig.call("PUT", f"/api/v1/accounts/{self.id}", {"access_token": token})[0] == 200

    def refuse(self, times: int, code: int = 10, subcode: int | None = None) -> None:
        self.rig.meta.fault(RENEW, times=times, status=400, body=wire.error_body(code, subcode=subcode))

    def fail(self, times: int) -> None:
        self.rig.meta.fault(RENEW, times=times, status=503, body="")

    @property
    def asked(self) -> int:
        return sum(call.path.endswith(RENEW) for call in self.rig.meta.calls)


@pytest.fixture
def keeper(rig: Rig, tmp_path: Path) -> Shopkeeper:
    return Shopkeeper(rig, tmp_path / "letters")


# --- refusals ---


@pytest.mark.parametrize(
    ("code", "subcode", "slug"),
    [(10, None, "permission_missing"), (100, None, "invalid_parameter"), (190, 463, "token_expired"),
     (200, None, "permission_missing"), (99999, None, "instagram_refused")],
)  # fmt: skip
def test_the_second_refusal_running_is_told_with_what_to_do_and_by_when(
    keeper: Shopkeeper, code: int, subcode: int | None, slug: str
) -> None:
    keeper.refuse(2, code, subcode)
    assert keeper.live(1.5) == []
    assert keeper.asked == 1
    assert keeper.live(1) == ["token_not_renewed"]
    said = f"Instagram refuses to renew the access token, {slug}; it ends by 2027-03-16T08:00Z at the latest"
    assert keeper.rig.alerts[-1] == ("token_not_renewed", said)
    (todo,) = [line for line in keeper.letters.read_text().splitlines() if line.startswith("What to do: ")]
    renewed = (
        f"make a new token in Meta's console and set it: crmbridge account set {keeper.id} --token -, by 2027-03-16"
    )
    assert todo.endswith(renewed)
    assert keeper.shown()["status"] == "active"
    assert keeper.live(0.25) == []
    assert keeper.rig.cleared == []
    assert keeper.live(0.5) == []  # Instagram renews it
    assert keeper.rig.cleared == ["token_not_renewed"]
    assert keeper.shown()["token_expires_at"] > instant(keeper.rig.now_s + 59 * DAY_S)


def test_it_is_told_once_however_long_it_goes_on_and_a_new_token_ends_it(keeper: Shopkeeper) -> None:
    keeper.refuse(1000)
    assert keeper.live(40) == ["token_not_renewed"]
    assert keeper.asked == 40
    keeper.put("IGAAnew")
    assert keeper.live(0.25) == []
    assert keeper.rig.cleared == ["token_not_renewed"]
    assert keeper.live(1) == []  # the first refusal of the new one
    assert keeper.live(1) == ["token_not_renewed"]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("refuse fail refuse", True),
        ("fail refuse fail fail refuse", True),
        ("refuse renew refuse", False),
        ("fail fail fail fail", False),
        ("limit limit limit", False),
        ("busy busy busy", False),
        ("drop drop drop", False),
        ("empty empty empty", False),
    ],
)
def test_what_instagram_did_not_decide_is_no_refusal(keeper: Shopkeeper, script: str, told: bool) -> None:
    steps = {
        "fail": {"status": 503, "body": ""},
        "limit": {"status": 400, "body": wire.error_body(4)},
        "busy": {"status": 500, "body": wire.error_body(2, is_transient=True)},
        "drop": {"drop": True},
        "empty": {"status": 200, "body": {}},
        "refuse": {"status": 400, "body": wire.error_body(10)},
        "renew": {"status": 200, "after_effect": True},
    }  # fmt: skip
    for step in script.split():
        keeper.rig.meta.fault(RENEW, **steps[step])  # type: ignore[arg-type]
    kinds = keeper.live(9 if "renew" in script else 4)
    assert ("token_not_renewed" in kinds) == told
    assert keeper.asked >= len(script.split())


def test_a_token_that_is_refused_everywhere_is_dead_and_nothing_less(keeper: Shopkeeper) -> None:
    keeper.rig.meta.accounts[SHOP_ID].tokens.clear()
    assert keeper.live(3) == ["token_dead"]
    assert keeper.shown()["status"] == "error"
    keeper.put("IGAAnew")
    keeper.live(0.25)
    assert keeper.rig.cleared == ["token_dead"]


def test_an_account_without_a_token_has_none_that_ends(keeper: Shopkeeper) -> None:
    keeper.refuse(2)
    assert keeper.live(2.25) == ["token_not_renewed"]
    keeper.rig.by_hand("UPDATE endpoints SET secret_sealed = NULL WHERE kind = 'instagram'")
    assert keeper.live(70) == []
    assert keeper.rig.cleared == ["token_not_renewed"]
    assert keeper.shown()["token_expires_at"] is None


# --- the end that is assumed ---


def test_while_nothing_can_be_renewed_the_assumed_end_is_told_three_times_and_never_as_a_fact(
    keeper: Shopkeeper,
) -> None:
    assert keeper.account["token_checked_at"] == instant(START_S)
    assert keeper.account["token_expires_at"] == keeper.shown()["token_expires_at"] == instant(START_S + 60 * DAY_S)
    keeper.fail(10_000)
    assert keeper.live(45.75) == []
    assert keeper.live(0.5) == ["token_expiring"]
    said = "the access token ends by 2027-03-16T08:00Z at the latest, in less than"
    assert keeper.rig.alerts[-1][1] == f"{said} 14 days"
    assert keeper.live(7) == ["token_expiring"]
    assert keeper.rig.alerts[-1][1] == f"{said} 7 days"
    assert keeper.live(6) == ["token_expiring"]
    assert keeper.rig.alerts[-1][1] == f"{said} 1 day"
    assert keeper.live(20) == ["token_expiring"]
    assert keeper.rig.alerts[-1][1].startswith("the access token was to end by 2027-03-16T08:00Z at the latest")
    assert keeper.shown()["status"] == "active"
    keeper.put("IGAAnew")
    keeper.live(0.25)
    assert keeper.rig.cleared == ["token_expiring"]
    assert keeper.shown()["token_expires_at"] > instant(keeper.rig.now_s + 59 * DAY_S)


def test_a_first_renewal_turns_the_assumed_end_into_a_known_one(keeper: Shopkeeper) -> None:
    assert keeper.live(60) == []
    expires_at = keeper.shown()["token_expires_at"]
    assert epoch_s(expires_at) > keeper.rig.now_s + 50 * DAY_S
    keeper.fail(10_000)
    kinds = keeper.live(61)
    assert kinds == ["token_expiring"] * 3 + ["token_dead"]
    assert keeper.rig.alerts[-1][1] == f"the access token ended at {expires_at[:16]}Z"


# --- by the command line ---


def test_check_and_doctor_tell_of_it_without_a_call(fresh_shop: Shop) -> None:
    shop, one = fresh_shop, fresh_shop.account_id
    shop.bridge.stop()

    def told() -> tuple[str, dict[str, Any]]:
        found = json.loads(typed(shop.bridge.folder, "doctor", "--no-calls", "--json")[1])["findings"]
        slugs = ("token_not_renewed", "token_expiring")
        return typed(shop.bridge.folder, "check")[1], {
            entry["slug"]: entry for entry in found if entry["slug"] in slugs
        }

    shop.change("UPDATE accounts SET token_refusals = 1")
    checked, found = told()
    assert found == {}
    assert "access token" not in checked

    set_at = time.time() - 47 * DAY_S
    shop.change(f"UPDATE accounts SET token_refusals = 2, token_checked_at = '{instant(set_at)}'")
    checked, found = told()
    ends = f"it ends by {instant(set_at + 60 * DAY_S)[:16]}Z at the latest"
    refused = f"{one} (your_shop): Instagram refused 2 times running to renew the access token; {ends}"
    expiring = f"{one} (your_shop): the access token has 13 day(s) left: {ends}"
    assert (found["token_not_renewed"]["what"], found["token_expiring"]["what"]) == (refused, expiring)
    for entry in found.values():
        assert (entry["level"], entry["account_id"]) == ("warning", one)
        assert entry["why"]
    todo = f"make a new token in Meta's console, then: crmbridge account set {one} --token -"
    assert {entry["todo"] for entry in found.values()} == {todo}
    for what in (refused, expiring):
        assert f"warning: {what}; {todo}" in checked.splitlines()
    said = shop.bridge.command("explain", one)
    assert re.search(rf"token expires at +{re.escape(instant(set_at + 60 * DAY_S))} at the latest\n", said)

    shop.change(f"UPDATE accounts SET token_refusals = 0, token_expires_at = '{instant(time.time() - DAY_S)}'")
    checked, found = told()
    assert re.search(r"the access token has 0 day\(s\) left: it ends at \d", found["token_expiring"]["what"])
    shop.change("UPDATE endpoints SET secret_sealed = NULL WHERE kind = 'instagram'")
    assert told()[1] == {}


def test_a_new_token_begins_anew(fresh_shop: Shop) -> None:
    shop = fresh_shop
    shop.change("UPDATE accounts SET token_refusals = 5, token_expires_at = '2026-01-01T00:00:00.000Z'")
    shop.meta.add_account(SHOP_ID, token="IGAAnew", app_scoped_id=SHOP_SCOPED_ID, username="your_shop")
    answer = shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"access_token": "IGAAnew"})
    shown = answer.json()
    assert epoch_s(shown["token_expires_at"]) - epoch_s(shown["token_checked_at"]) == 60 * DAY_S
    assert shop.rows("SELECT token_refusals, token_expires_at FROM accounts") == [(0, None)]
