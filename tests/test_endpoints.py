"""Where things go, and what is known of it: what an answer, a person or a clock changes, and what it does not."""

from typing import Any

import pytest

from crmbridge.events import instant
from crmbridge.health import Limits
from crmbridge.sandbox import wire
from crmbridge.store import accounts, deliveries, endpoints, turn
from crmbridge.store.deliveries import Outcome, Verdict
from tests.rig import Rig

DAY_S, HOUR_S = 86_400, 3600


def look_at_nothing(rig: Rig) -> None:
    """Have a turn in which there is nothing to look at, as there is one each second beside a call that hangs."""
    rig.engine.drain()


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_is_set_while_there_is_nothing_to_do_delays_and_kills_nothing(rig: Rig, hours: int) -> None:
    rig.account()
    rig.crm.answer_always(503)
    rig.say("hello", "mid-1")
    rig.live_through(HOUR_S)
    rig.engine.drain()
    look_at_nothing(rig)
    rig.crm.answer_always(None)
    rig.clock_is_wrong_by_s = hours * HOUR_S
    rig.now_s += HOUR_S
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_paced_endpoint_goes_on_by_itself(rig: Rig) -> None:
    rig.engine.stop(0)
    rig.engine = rig.make_engine(Limits(slots=3, for_first_tries=1, probe_s=(5.0,), per_s={"instagram": 2.0}))
    account = rig.account()
    for number in range(9):
        rig.send(account, f"{number}", contact=f"90000000000010{number}")
    next_s = rig.engine.drain()
    while next_s is not None and len(rig.meta.sent) < 9:  # nobody rings meanwhile
        rig.now_s = max(next_s, rig.now_s + 0.001)
        next_s = rig.engine.drain()
    assert len(rig.meta.sent) == 9


def test_a_clock_that_is_set_makes_nothing_that_waits_go_last(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(503)
    for number in range(5):
        rig.say("old", f"mid-{number}", contact=f"90000000000010{number}")
    rig.drain()
    rig.clock_is_wrong_by_s = 120
    rig.drain()
    rig.crm.answer_always(None)
    rig.now_s += HOUR_S
    rows = [deliveries.due(rig.db, "crm", account["id"], rank, 99) for rank in range(3)]
    assert [len(one) for one in rows] == [0, 5, 0]


def test_what_a_person_let_go_while_rows_were_being_given_up_lives(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    account = rig.account()
    rig.crm.answer(410)
    rig.say("first", "mid-0", contact="900000000000100")
    rig.drain()
    for number in range(1, 5):
        rig.say("hello", f"mid-{number}", contact=f"90000000000010{number}")
    rig.now_s += 8 * DAY_S
    monkeypatch.setattr(turn, "_EXPIRE_AT_ONCE", 2)
    in_steps = rig.db.in_steps

    def and_resume(pages: Any, step: Any, **how: Any) -> int:
        def after_the_first(tx: Any, rows: Any) -> int:
            done: int = step(tx, rows)
            row = endpoints.find(tx, account["id"], "crm")
            if done and row is not None and row["held_by"] is not None:
                endpoints.release(tx, row, by_person=True)
            return done

        return in_steps(pages, after_the_first, **how)

    monkeypatch.setattr(rig.db, "in_steps", and_resume)
    assert rig.expire() == {("crm", "held_too_long", account["id"]): 2}
    rig.drain()
    assert rig.events() == ["message.received"] * 3


def test_a_401_to_a_new_secret_holds_though_the_old_one_was_taken_meanwhile(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(500, times=4)
    for number in range(4):
        rig.say("late", f"mid-{number}", contact=f"90000000000010{number}")
    rig.drain()
    rig.say("fine", "mid-9", contact="900000000000109")
    rig.drain()
    rig.change_account(account, secret="whsec_" + "QUFB" * 8)  # the CRM does not have it
    rig.crm.answer_always(401)
    rig.live_through(60)
    assert rig.held(account)["deliveries"]["by"] == "unauthorized"
    assert len(rig.dead()) <= 3  # one for each slot


def test_a_crm_without_a_url_is_not_asked(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(401)
    rig.say("hello", "mid-1")
    rig.drain()
    rig.change_account(account, url=None)
    asked = len(rig.crm.received)
    rig.live_through(HOUR_S)
    assert (len(rig.crm.received), [kind for kind, _ in rig.alerts]) == (asked, ["crm_unauthorized", "dead_letter"])


def test_a_new_secret_counts_the_releases_by_a_test_anew(rig: Rig) -> None:
    account = rig.account()
    rig.by_hand("UPDATE endpoints SET trials = 2, trial_since = aged_from WHERE kind = 'crm'")
    rig.change_account(account, secret="whsec_" + "QUFB" * 8)
    rig.crm.answer(401)
    rig.say("hello", "mid-1")
    rig.drain()
    assert rig.held(account)["deliveries"]["asked_again_at"] is not None


def test_a_window_that_ends_ends_a_send_that_is_held(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    rig.pause(account, "sends")
    message_id = rig.send(account, "waits")
    rig.now_s += 2 * DAY_S
    assert rig.expire() == {("instagram", "window_closed", account["id"]): 1}
    assert rig.status(message_id)["error"]["code"] == "window_closed"


def test_a_401_of_a_secret_that_was_changed_meanwhile_tells_of_no_dead_letter(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    (row,) = rig.due("crm", account)
    claimed = rig.claim(row, account)
    rig.change_account(account, secret="whsec_" + "QUFB" * 8)
    refused = Outcome("refused", "crm_unauthorized", http_status=401, stops="crm_unauthorized")
    found = rig.settle(turn.Finished(claimed, refused, Verdict("dead", instant(rig.now_s))))
    assert [entry.verdict.state for entry in found.recorded] == ["pending"]
    assert rig.held(account)["deliveries"] is None


def test_an_old_secret_that_does_not_open_stops_nothing(rig: Rig) -> None:
    account = rig.account()
    rig.call("PUT", f"/api/v1/accounts/{account['id']}", {"webhook_secret": "another-secret-of-the-crm"})
    rig.by_hand("UPDATE endpoints SET old_secret_sealed = 'gAAAAABnot-a-seal' WHERE kind = 'crm'")
    rig.crm.secret = "another-secret-of-the-crm"
    rig.say("hello", "mid-1")
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_secret_that_does_not_open_is_mended_by_a_new_one(rig: Rig) -> None:
    account = rig.account()
    rig.break_seal("crm")
    status, _ = rig.call("PUT", f"/api/v1/accounts/{account['id']}", {"webhook_secret": "another-secret-of-the-crm"})
    assert status == 200
    found = accounts.found(rig.db, account["id"])
    assert accounts.webhook_secrets(rig.rooms.vault, found, rig.now_s) == ["another-secret-of-the-crm"]


def test_a_secret_opens_in_its_own_row_alone(rig: Rig) -> None:
    ours, theirs = rig.account(), rig.account("17841400000000009", token="IGAAtheirs")
    stolen = accounts.found(rig.db, theirs["id"])["access_token_sealed"]
    rig.by_hand("UPDATE endpoints SET secret_sealed = ? WHERE id = ?", (stolen, ours["instagram_id"]))
    message_id = rig.send(ours, "hello")
    rig.drain()
    assert rig.meta.sent == []
    assert rig.status(message_id)["status"] == "pending"
    assert [kind for kind, _ in rig.alerts] == ["system_fault"]


def test_an_account_that_instagram_stops_was_changed_then(rig: Rig) -> None:
    account = rig.account()
    rig.now_s += 60
    rig.meta.fault("messages", status=400, body=wire.error_body(190, "expired", subcode=463))
    rig.send(account)
    rig.drain()
    _, shown = rig.call("GET", f"/api/v1/accounts/{account['id']}")
    assert (shown["status"], shown["updated_at"]) == ("error", instant(rig.now_s))
