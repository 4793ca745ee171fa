"""What the bridge asks Instagram by itself, on a set clock, against the sandbox over real HTTP."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from crmbridge.errors import Misconfigured
from crmbridge.events import epoch_s, instant
from crmbridge.ops import backfill
from crmbridge.sandbox import wire
from crmbridge.store import accounts, contacts, database, privacy, questions, turn, vitals
from crmbridge.tending.backfill import OUTAGE_S, Backfill
from crmbridge.tending.names import Names
from crmbridge.tending.subscriptions import Subscriptions
from crmbridge.tending.tokens import DAY_S, Tokens
from tests.rig import Rig
from tests.shop import CUSTOMER, OTHER_ID, OTHER_TOKEN, QUICK, SHOP_ID, TOKEN, opened
from tests.waiting import PATIENCE_S

HOUR_S = 3600.0


class Tended:
    """A rig with everything that asks Instagram by itself; calls begin when `run_calls` is called, or at once."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.waiting: list[Callable[[], None]] = []
        db, client, vault = rig.db, rig.rooms.client, rig.rooms.vault

        def clock() -> float:
            return rig.now_s

        client.pause = self.pause
        rig.patience = replace(rig.patience, ask_s=1.0)
        self.wakes = 0
        self.names = Names(db, client, vault, 1.0, self.wake, self.waiting.append, clock=clock)
        self.tokens = Tokens(db, client, vault, rig.alarm, clock=clock)
        self.subscriptions = Subscriptions(db, client, vault, rig.alarm, clock=clock)
        self.backfill = Backfill(db, client, vault, self.wake, clock=clock, pause=self.pause)

    def wake(self, _: Any) -> None:
        self.wakes += 1

    def pause(self, seconds: float) -> None:
        self.rig.now_s += max(seconds, 0)

    def run_calls(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def ask(self) -> None:
        """Ask all that may be asked now."""
        self.names.look()
        while self.waiting:
            self.run_calls()
            self.pause(0.1)
            self.names.look()

    def last(self) -> dict[str, Any]:
        event: dict[str, Any] = self.rig.taken()[-1].event
        return event

    def asked(self, ending: str) -> int:
        return sum(call.path.endswith(ending) for call in self.rig.meta.calls)


@pytest.fixture
def tended(rig: Rig) -> Tended:
    return Tended(rig)


# --- names ---


def test_a_first_message_waits_for_its_senders_name(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.add_customer(CUSTOMER, username="lamp_lover", name="Lena")
    rig.say("hello", "m1")
    rig.drain()
    assert rig.events() == []
    tended.ask()
    assert tended.wakes == 1
    rig.drain()
    assert (tended.last()["sender_username"], tended.last()["sender_name"]) == ("lamp_lover", "Lena")
    rig.say("and the next", "m2")
    rig.drain()
    assert tended.last()["sender_username"] == "lamp_lover"
    assert tended.asked(f"/{CUSTOMER}") == 1


def test_it_waits_no_longer_than_the_bound_and_holds_up_no_other_lane(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    known = "900000000000002"
    rig.say("known", "k1", contact=known)
    tended.ask()
    rig.drain()
    rig.say("from the unknown one", "m1")
    rig.say("and one more", "m2")
    rig.say("from the known one", "k2", contact=known)
    assert rig.drain() == pytest.approx(1.0)
    assert [event["message"] for event in (entry.event for entry in rig.taken())] == ["known", "from the known one"]
    rig.pass_s(1.0)
    assert [entry.event["message"] for entry in rig.taken()][2:] == ["from the unknown one", "and one more"]
    assert tended.last()["sender_username"] is None
    assert contacts.find(rig.db, account["id"], CUSTOMER)["username"] is None


@pytest.mark.parametrize(("error", "later_s"), [("551", 7 * DAY_S), ("2", HOUR_S)], ids=["refused", "failed"])
def test_a_failure_lets_the_message_go_and_is_remembered(tended: Tended, error: str, later_s: float) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.fault(CUSTOMER, times=9, status=400, body=wire.error_body(int(error)))
    rig.say("hello", "m1")
    tended.ask()
    rig.drain()
    assert tended.last()["sender_name"] is None
    for number, (passed_s, asked) in enumerate([(1, 1), (later_s - 60, 1), (120, 2)]):
        rig.now_s += passed_s
        rig.say("again", f"again-{number}")
        assert rig.drain() is None  # a second message does not wait
        tended.ask()
        assert tended.asked(f"/{CUSTOMER}") == asked
    assert len(rig.taken()) == 4


@pytest.mark.parametrize("next_one", ["message", "postback"])
def test_who_had_not_consented_is_asked_for_when_they_write_again(tended: Tended, next_one: str) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.configure(profile="no_consent")
    rig.say("hello", "m1")
    tended.ask()
    rig.drain()
    assert tended.last()["sender_username"] is None
    rig.hear(rig.item({"reaction": {"mid": "m1", "action": "react", "reaction": "love"}}))
    tended.ask()
    assert tended.asked(f"/{CUSTOMER}") == 1
    rig.meta.configure(profile="told")
    rig.meta.add_customer(CUSTOMER, username="lamp_lover")
    rig.hear(rig.item({next_one: {"mid": "m2", "text": "again", "title": "again", "payload": "AGAIN"}}))
    tended.ask()
    assert tended.asked(f"/{CUSTOMER}") == 2
    rig.say("and again", "m3")
    tended.ask()
    rig.drain()
    assert tended.last()["sender_username"] == "lamp_lover"
    assert tended.asked(f"/{CUSTOMER}") == 2


def test_while_names_are_not_told_nobody_waits_for_them(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.configure(profile="fails")
    rig.say("hello", "m1")
    tended.ask()
    rig.say("hello", "m2", contact="900000000000002")
    rig.drain()
    assert len(rig.taken()) == 2
    tended.ask()
    assert len(rig.meta.calls) == 1
    rig.now_s += 31
    rig.meta.configure(profile="told")
    rig.say("hello", "m3", contact="900000000000003")
    rig.drain()
    assert len(rig.taken()) == 2
    tended.ask()
    rig.drain()
    assert len(rig.taken()) == 3
    assert len(rig.meta.calls) == 2  # the second one's next message asks for them


def test_failures_are_asked_for_at_growing_distances(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    rig.meta.configure(profile="fails")
    distances = []
    for number in range(8):
        rig.say("hello", f"m{number}")
        tended.ask()
        known = contacts.profile(rig.db, account["id"], CUSTOMER)
        distances.append(round(epoch_s(known["profile_due"]) - epoch_s(known["profile_checked_at"])) // 3600)
        rig.now_s = epoch_s(known["profile_due"]) + 1
    assert distances == [1, 2, 4, 8, 16, 24, 24, 24]
    rig.meta.configure(profile="told")
    rig.meta.add_customer(CUSTOMER)
    rig.say("hello", "last")
    tended.ask()
    rig.drain()
    assert tended.last()["sender_username"] == f"customer_{CUSTOMER[-4:]}"


def test_names_grow_old_and_old_ones_are_told_meanwhile(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.add_customer(CUSTOMER, username="before")
    rig.say("hello", "m1")
    tended.ask()
    rig.meta.add_customer(CUSTOMER, username="after")
    rig.now_s += DAY_S + 60
    rig.say("hello", "m2")
    rig.drain()
    assert tended.last()["sender_username"] == "before"
    tended.ask()
    rig.say("hello", "m3")
    rig.drain()
    assert tended.last()["sender_username"] == "after"


def test_the_shops_own_messages_and_receipts_ask_for_nobody(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.echo("typed in the app", "e1")
    rig.hear(rig.item({"read": {"mid": "e1"}}))
    tended.ask()
    assert not rig.meta.calls
    rig.drain()
    assert (tended.last()["sender_username"], tended.last()["sender_name"]) == ("your_shop", None)


def test_nothing_is_asked_for_an_account_that_is_held(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    rig.fail_account(account)
    rig.say("hello", "m1")
    tended.ask()
    rig.pass_s(1)
    assert rig.events() == ["message.received"]
    assert not rig.meta.calls
    rig.change_account(account, status="active")
    rig.now_s += 61
    rig.say("hello again", "m2")
    tended.ask()
    assert tended.asked(f"/{CUSTOMER}") == 1
    rig.pause(account, "sends")
    rig.say("hello", "x1", contact="900000000000003")
    tended.ask()
    assert tended.asked("/900000000000003") == 0
    rig.now_s += 2 * HOUR_S
    tended.names.forget()
    assert questions.due(rig.db, instant(rig.now_s), but=(), limit=9) == []


def test_a_dead_token_gives_its_account_a_rest_and_leaves_others_alone(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.add_account(OTHER_ID, token=OTHER_TOKEN, app_scoped_id="24000000000000002", username="other_shop")
    rig.account(OTHER_ID, token=OTHER_TOKEN)
    rig.meta.accounts[SHOP_ID].tokens.clear()
    for number in range(5):
        rig.say("hello", f"m{number}", contact=f"90000000000000{number}")
    rig.hear(
        {
            "sender": {"id": "800000000000001"},
            "recipient": {"id": OTHER_ID},
            "timestamp": int(rig.now_s * 1000),
            "message": {"mid": "o1", "text": "hello"},
        },
        account=OTHER_ID,
    )
    rig.meta.add_customer("800000000000001", username="of_the_other")
    tended.ask()
    assert tended.asked("/800000000000001") == 1
    assert len(rig.meta.calls) <= 3  # two of the dead one at most were on their way
    rig.pass_s(1)
    assert {entry.event["sender_username"] for entry in rig.taken()} == {None, "of_the_other"}
    rig.meta.accounts[SHOP_ID].tokens[TOKEN] = rig.now_s
    for number in range(5):
        rig.meta.add_customer(f"90000000000000{number}")
    rig.now_s += 901
    tended.ask()
    assert sum(call.status == 200 for call in rig.meta.calls) >= 3


def test_one_account_takes_no_more_than_two_of_three_threads(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    for number in range(5):
        rig.say("hello", f"m{number}", contact=f"90000000000000{number}")
    for _ in range(5):
        tended.names.look()
        tended.pause(0.1)
    assert len(tended.waiting) == 2
    tended.run_calls()
    tended.ask()
    assert len(rig.meta.calls) == 5


# --- messages that are only announced ---


def test_an_announced_message_is_fetched_and_told_in_its_place(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.callback_url = None
    with pytest.raises(ValueError, match="callback_url"):
        rig.meta.customer_says(SHOP_ID, CUSTOMER, "is it there?", mid="m1", told="edit")
    announcement = {"timestamp": int(rig.now_s * 1000), "message_edit": {"mid": "m1", "num_edit": 0}}
    rig.hear(announcement)
    rig.drain()
    assert rig.events() == []
    tended.ask()
    rig.pass_s(2)
    assert rig.events() == ["message.received"]
    told = tended.last()
    assert (told["message"], told["sender_id"], told["recovered"]) == ("is it there?", CUSTOMER, True)
    rig.say("is it there?", "m1")
    rig.hear(announcement)
    rig.pass_s(2)
    assert rig.events() == ["message.received"]


def test_what_cannot_be_fetched_stays_announced(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.hear({"timestamp": int(rig.now_s * 1000), "message_edit": {"mid": "m9", "num_edit": 0}})
    rig.drain()
    assert rig.events() == []  # it waits for the answer, but no longer
    tended.ask()
    rig.drain()
    assert rig.events() == ["message.unsupported"]
    assert tended.last()["instagram_message_id"] == "m9"
    assert questions.due(rig.db, instant(rig.now_s + DAY_S), but=(), limit=9) == []


def test_a_fetch_is_tried_again_while_instagram_is_down(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "is it there?", mid="m1", told="never")
    rig.meta.fault("/m1", times=2, status=503)
    rig.hear({"timestamp": int(rig.now_s * 1000), "message_edit": {"mid": "m1", "num_edit": 0}})
    for _ in range(3):
        tended.ask()
        rig.pass_s(31)
    assert rig.events() == ["message.unsupported", "message.received"]


# --- tokens ---


def with_token(rig: Rig, age_s: float, refresh_in_s: float = DAY_S) -> dict[str, Any]:
    scoped = "24000000000000001"
    rig.meta.add_account(SHOP_ID, token=TOKEN, app_scoped_id=scoped, username="your_shop", token_age_s=age_s)
    return rig.account(app_scoped_id=scoped, token_refresh_at=instant(rig.now_s + refresh_in_s))


def token(rig: Rig, account: dict[str, Any]) -> str:
    found = accounts.find(rig.db, account["id"])
    assert found is not None
    return accounts.token(rig.rooms.vault, found)


def test_a_token_lives_on_for_a_year_by_weekly_refreshing(tended: Tended) -> None:
    rig = tended.rig
    account = with_token(rig, age_s=0)
    seen = set()
    for _ in range(365):
        tended.tokens.refresh()
        seen.add(token(rig, account))
        rig.now_s += DAY_S
    assert 50 <= len(seen) <= 54
    assert rig.alerts == []
    rig.rooms.client.whoami(token(rig, account))
    found = accounts.found(rig.db, account["id"])
    assert epoch_s(found["token_expires_at"]) - rig.now_s > 50 * DAY_S


def test_a_token_that_is_too_young_is_no_alert(tended: Tended) -> None:
    rig = tended.rig
    account = with_token(rig, age_s=0, refresh_in_s=0)
    tended.tokens.refresh()
    assert (token(rig, account), rig.alerts) == (TOKEN, [])
    rig.now_s += DAY_S
    tended.tokens.refresh()
    assert token(rig, account) != TOKEN


def test_the_old_token_is_kept_until_a_new_one_is_there(tended: Tended) -> None:
    rig = tended.rig
    account = with_token(rig, age_s=DAY_S, refresh_in_s=0)
    rig.meta.fault("refresh_access_token", times=1, status=500)
    rig.meta.fault("refresh_access_token", times=1, status=200, body={"expires_in": 5})
    for _ in range(2):
        tended.tokens.refresh()
        assert token(rig, account) == TOKEN
        rig.now_s += HOUR_S
    tended.tokens.refresh()
    assert token(rig, account) != TOKEN
    assert rig.alerts == []


def test_a_dead_token_is_an_alert_and_a_fresh_one_its_end(tended: Tended) -> None:
    rig = tended.rig
    account = with_token(rig, age_s=60 * DAY_S + 1, refresh_in_s=0)
    tended.tokens.refresh()
    assert [kind for kind, _ in rig.alerts] == ["token_dead"]
    [(_, said)] = rig.alerts
    assert said.startswith("Instagram does not renew the access token, token_")
    assert said.endswith(f"then: crmbridge account set {account['id']} --token -")
    assert TOKEN not in rig.alerts[0][1]
    assert accounts.found(rig.db, account["id"])["status"] == "error"
    rig.meta.accounts[SHOP_ID].tokens["IGAAnew"] = rig.now_s - DAY_S
    rig.change_account(account, token="IGAAnew", token_refresh_at=None, status="active")
    tended.tokens.refresh()
    assert rig.cleared == ["token_dead"]


def test_a_token_that_was_put_meanwhile_is_not_overwritten(tended: Tended) -> None:
    rig = tended.rig
    account = with_token(rig, age_s=DAY_S)
    now = instant(rig.now_s)
    rig.change_account(account, token="IGAAput")
    fresh = accounts.seal(rig.rooms.vault, account["instagram_id"], "IGAAfresh")
    assert not accounts.renew_token(rig.db, account, fresh, expires_at=now, refresh_at=now)
    accounts.refresh_later(rig.db, account, now)
    assert token(rig, account) == "IGAAput"


# --- subscriptions ---


def test_a_lost_subscription_is_renewed(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    tended.subscriptions.check()
    assert "messages" in rig.meta.accounts[SHOP_ID].subscribed
    rig.meta.subscribe(SHOP_ID, ["comments"])
    tended.subscriptions.check()
    assert set(rig.rooms.client.fields) <= set(rig.meta.accounts[SHOP_ID].subscribed)
    rig.meta.calls.clear()
    tended.subscriptions.check()
    assert [call.method for call in rig.meta.calls] == ["GET"]
    assert accounts.found(rig.db, account["id"])["subscription_ok"] == 1
    assert rig.alerts == []


def test_one_that_cannot_be_renewed_is_an_alert_until_it_can(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    rig.meta.fault("subscribed_apps", times=1, status=200, body={"data": []})
    rig.meta.fault("subscribed_apps", times=1, status=400, body={"error": {"code": 10, "message": "no", "type": "x"}})
    tended.subscriptions.check()
    assert [kind for kind, _ in rig.alerts] == ["subscription_lost"]
    assert accounts.found(rig.db, account["id"])["subscription_ok"] == 0
    tended.subscriptions.check()
    assert rig.cleared == ["subscription_lost"]
    assert accounts.found(rig.db, account["id"])["subscription_ok"] == 1


def test_while_instagram_is_down_nothing_is_said_of_subscriptions(tended: Tended) -> None:
    rig = tended.rig
    rig.account()
    rig.meta.fault("subscribed_apps", times=1, status=503)
    tended.subscriptions.check()
    assert rig.alerts == []
    tended.subscriptions.check(renew=True)
    assert [call.method for call in rig.meta.calls] == ["GET", "GET", "POST"]


# --- what was missed ---


def test_an_outage_of_ours_is_noticed_and_filled(tended: Tended) -> None:
    rig = tended.rig
    rig.account(app_scoped_id="24000000000000001")
    assert tended.backfill.notice() == 0
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "before", mid="m0", told="never")
    rig.say("before", "m0")
    rig.pass_s(60)
    assert tended.backfill.notice() == 0
    rig.now_s += 30 * 60
    missed_s = rig.now_s
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "while nobody listened", mid="m1", told="never")
    rig.meta.shop_says(SHOP_ID, CUSTOMER, "we are back soon", told=False)
    rig.now_s += 30 * 60
    assert tended.backfill.notice() == pytest.approx(3600)
    tended.backfill.fill()
    rig.pass_s(2)
    told = [(entry.event["event"], entry.event["message"], entry.event["recovered"]) for entry in rig.taken()]
    assert told == [
        ("message.received", "before", False),
        ("message.received", "while nobody listened", True),
        ("message.echo", "we are back soon", True),
    ]
    assert rig.taken()[1].event["timestamp"] == instant(missed_s)
    rig.say("while nobody listened", "m1")  # Meta tells it all the same
    tended.backfill.fill()
    rig.pass_s(2)
    assert len(rig.taken()) == 3
    assert questions.backfills(rig.db, instant(rig.now_s)) == []


def test_own_sends_are_confirmed_and_never_doubled(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    message_id = rig.send(account, "from the CRM")
    rig.drain()
    lost = rig.send(account, "its answer is lost")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - 60))
    tended.backfill.fill()
    assert [rig.status(one)["status"] for one in (message_id, lost)] == ["delivered", "delivered"]
    rig.live_through(HOUR_S)
    assert len(rig.meta.sent) == 2
    assert "message.echo" not in rig.events()


def test_a_backfill_keeps_to_two_calls_a_second_and_reads_all_pages(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    rig.meta.configure(conversations_page=3)
    for number in range(10):
        rig.meta.customer_says(SHOP_ID, f"90000000000001{number}", "hello", told="never")
        rig.now_s += 60
    began_s = rig.now_s
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - HOUR_S))
    tended.backfill.fill()
    times = [call.at for call in rig.meta.calls]
    assert len(times) == 4 + 10
    assert all(later - sooner >= 0.499 for sooner, later in itertools.pairwise(times))
    assert rig.now_s - began_s < 8
    rig.pass_s(2)
    assert len(rig.taken()) == 10


def test_a_conversation_with_more_than_instagram_shows_is_named(
    tended: Tended, caplog: pytest.LogCaptureFixture
) -> None:
    rig = tended.rig
    account = rig.account()
    began_s = rig.now_s
    for number in range(21):
        rig.now_s += 1
        rig.meta.customer_says(SHOP_ID, CUSTOMER, f"hello {number}", told="never")
    rig.meta.customer_says(SHOP_ID, "900000000000002", "only this", told="never")
    questions.ask_backfill(rig.db, account["id"], instant(began_s))
    tended.backfill.fill()
    named = [
        record.facts  # type: ignore[attr-defined]
        for record in caplog.records
        if record.getMessage() == "backfill.incomplete"
    ]
    assert named == [{"account": account["id"], "contact": CUSTOMER, "since": instant(began_s)}]


def test_it_stops_at_conversations_that_are_older_than_the_gap(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    rig.meta.configure(conversations_page=2)
    for number in range(10):
        rig.meta.customer_says(SHOP_ID, f"90000000000001{number}", "hello", told="never")
        rig.now_s += HOUR_S
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - 1.5 * HOUR_S))
    tended.backfill.fill()
    rig.pass_s(2)
    assert len(rig.taken()) == 1
    assert len(rig.meta.calls) == 2 + 1


def test_every_kind_of_content_is_recovered_in_the_webhooks_shape(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "first", mid="m1", told="never")
    url = "https://lookaside.fbsbx.com/x"
    kinds = ["image", "video", "audio", "file", "share", "story_mention"]
    for number, kind in enumerate(kinds):
        rig.now_s += 1
        attachment = {"type": kind, "payload": {"url": f"{url}{number}"}}
        rig.meta.customer_says(SHOP_ID, CUSTOMER, mid=f"a{number}", attachments=[attachment], told="never")
    rig.now_s += 1
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "that one", mid="r1", reply_to="m1", told="never")
    rig.now_s += 1
    story = {"story": {"url": "https://s", "id": "178"}}
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "your story!", mid="r2", reply_to=story, told="never")
    rig.now_s += 1
    rig.meta.customer_says(SHOP_ID, CUSTOMER, attachments=[{"type": "like_heart"}], mid="h1", told="never")
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - 60))
    tended.backfill.fill()
    rig.pass_s(2)
    events = [entry.event for entry in rig.taken()]
    assert [event["instagram_message_id"] for event in events] == ["m1", *(f"a{n}" for n in range(6)), "r1", "r2", "h1"]
    media = [(event["message_type"], event["attachments"][0]["url"]) for event in events[1:7]]
    assert media == [(kind, f"{url}{number}") for number, kind in enumerate(kinds)]
    assert events[7]["reply_to"]["message_id"] == events[0]["message_id"]
    assert events[8]["reply_to"]["story"] == {"id": "178", "url": "https://s", "other": None}
    assert events[9]["event"] == "message.unsupported"
    assert all(event["recovered"] and event["sender_id"] == CUSTOMER for event in events)
    # What was told in another form is not told again.
    rig.hear(rig.item({"message": {"mid": "p1", "attachments": [{"type": "like_heart"}]}}))
    rig.meta.customer_says(SHOP_ID, CUSTOMER, attachments=[{"type": "like_heart"}], mid="p1", told="never")
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - 60))
    tended.backfill.fill()
    rig.pass_s(2)
    assert [entry.event["instagram_message_id"] for entry in rig.taken()].count("p1") == 1


def test_a_backfill_that_fails_is_tried_again_and_given_up_in_the_end(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "hello", told="never")
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - 60))
    rig.meta.fault("conversations", times=1, status=503)
    tended.backfill.fill()
    tended.backfill.fill()
    assert tended.asked("conversations") == 1
    rig.now_s += 61
    tended.backfill.fill()
    rig.pass_s(2)
    assert rig.events() == ["message.received"]
    rig.meta.fault("conversations", times=99, status=503)
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - 60))
    for _ in range(30):
        tended.backfill.fill()
        rig.now_s += HOUR_S
    assert questions.backfills(rig.db, instant(rig.now_s + DAY_S)) == []


def test_short_gaps_need_no_backfill_and_two_gaps_are_one(tended: Tended) -> None:
    rig = tended.rig
    account = rig.account()
    tended.backfill.notice()
    first = instant(rig.now_s)
    rig.now_s += OUTAGE_S
    assert tended.backfill.notice() == 0
    assert questions.backfills(rig.db, instant(rig.now_s)) == []
    second = instant(rig.now_s)
    rig.now_s += OUTAGE_S + 1
    tended.backfill.notice()
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s))
    assert [row["since"] for row in questions.backfills(rig.db, instant(rig.now_s))] == [second]
    questions.ask_backfill(rig.db, account["id"], first)
    assert [row["since"] for row in questions.backfills(rig.db, instant(rig.now_s))] == [first]


def test_while_the_disk_is_full_nobody_listens(tended: Tended, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = tended.rig
    rig.account()
    tended.backfill.notice()
    began = vitals.last_beat(rig.db, "listening")
    monkeypatch.setattr(database.Database, "is_full", property(lambda _: True))
    for _ in range(10):
        rig.now_s += 60
        assert tended.backfill.notice() == 0
    monkeypatch.undo()
    assert tended.backfill.notice() == pytest.approx(600)
    assert [row["since"] for row in questions.backfills(rig.db, instant(rig.now_s))] == [began]


def test_a_running_bridge_names_new_customers_and_backfills_when_it_is_told_to(tmp_path: Path) -> None:
    with opened(tmp_path, QUICK, instagram="profile_wait_s = 10\n") as shop:
        shop.meta.add_customer(CUSTOMER, username="lamp_lover", name="Lena")
        shop.meta.customer_says(SHOP_ID, CUSTOMER, "hello")
        event = shop.crm.wait(1)[0].event
        assert (event["sender_username"], event["sender_name"]) == ("lamp_lover", "Lena")
        shop.meta.customer_says(SHOP_ID, CUSTOMER, "nobody tells", told="never")
        printed = shop.bridge.command("backfill", shop.account_id, "--since", "1h")
        assert printed.startswith(f"asked    {shop.account_id}")
        event = shop.crm.wait(2)[1].event
        assert (event["message"], event["recovered"]) == ("nobody tells", True)
        shop.wait_log(r"backfill\.done .*recovered=1")
        shop.wait_rows("SELECT * FROM backfills", [])


@pytest.mark.parametrize(
    ("account", "since"), [(None, "yesterday"), ("acc_unknown", "2h"), (None, "2999-01-01T00:00:00Z")]
)
def test_a_backfill_of_nothing_is_refused(rig: Rig, account: str | None, since: str) -> None:
    rig.account()
    with pytest.raises(Misconfigured):
        backfill.ask(rig.db, account, since, rig.now_s)
    assert questions.backfills(rig.db, instant(rig.now_s)) == []


def test_the_sandbox_can_be_told_so_over_http(rig: Rig) -> None:
    control = f"{rig.sandbox.url}/sandbox"
    put = requests.put(f"{control}/settings", json={"profile": "fails", "conversations_page": 2}, timeout=PATIENCE_S)
    assert put.json()["profile"] == "fails"
    assert requests.put(f"{control}/settings", json={"profile": "?"}, timeout=PATIENCE_S).status_code == 400
    lost = requests.put(f"{control}/accounts/{SHOP_ID}/subscription", json={"fields": []}, timeout=PATIENCE_S)
    assert lost.json() == {"user_id": SHOP_ID, "subscribed": []}
    quiet = {"text": "hello", "told": "never"}
    assert (
        requests.post(f"{control}/customers/{CUSTOMER}/messages", json=quiet, timeout=PATIENCE_S).json()["status"] == 0
    )
    reply = {"text": "hello", "told": False}
    assert (
        requests.post(f"{control}/customers/{CUSTOMER}/replies", json=reply, timeout=PATIENCE_S).json()["status"] == 0
    )
    assert len(rig.meta.messages) == 2
    requests.delete(f"{control}/accounts/{SHOP_ID}/tokens", timeout=PATIENCE_S)
    assert rig.meta.accounts[SHOP_ID].tokens == {}


def test_nothing_is_asked_about_who_was_erased_or_for_who_left(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "m1")
    rig.say("hello", "m2", contact="900000000000002")
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    left = questions.due(rig.db, instant(rig.now_s), but=(), limit=9)
    assert [question["subject"] for question in left] == ["900000000000002"]
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s))
    turn.delete_account(rig.db, account["id"])
    assert questions.due(rig.db, instant(rig.now_s), but=(), limit=9) == []
    assert questions.backfills(rig.db, instant(rig.now_s)) == []
