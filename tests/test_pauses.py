"""Holds on a set clock: an account's deliveries or sends wait, and nothing of it ages, is lost or changes its order."""

import threading

import pytest

from crmbridge.events import instant
from crmbridge.sandbox import wire
from crmbridge.store import accounts, endpoints, turn
from crmbridge.store.contacts import Target
from crmbridge.store.deliveries import Outcome, Verdict
from crmbridge.upkeep import Upkeep
from tests import waiting
from tests.rig import START_S, Rig

DAY_S, HOUR_S = 86_400, 3600
NAMES = {kind: name for name, kind in endpoints.WHAT.items()}


def upkeep(rig: Rig) -> Upkeep:
    return Upkeep(
        rig.db,
        rig.settings.retention,
        rig.patience,
        rig.alarm,
        clock=rig.clock,
    )


def test_thirty_hours_of_pause_lose_and_kill_nothing_and_keep_the_order(rig: Rig) -> None:
    account, contacts = rig.account(), [f"90000000000000{number}" for number in range(10)]
    rig.pause(account)
    wanted: dict[str, list[str]] = {contact: [] for contact in contacts}
    for number in range(500):
        contact = contacts[number % 10]
        rig.say(f"in {number}", f"mid-{number}", contact=contact)
        rig.send(account, f"out {number}", contact=contact)
        wanted[contact].append(str(number))
        if number % 50 == 0:
            rig.live_through(3 * HOUR_S)
            assert rig.expire() == {}
    assert rig.now_s == START_S + 30 * HOUR_S
    assert (rig.crm.received, rig.meta.sent) == ([], [])
    assert rig.unpause(account) == [True, True]
    rig.live_through(60)
    assert rig.expire() == {}
    assert rig.db.rows("SELECT DISTINCT state FROM deliveries") == [{"state": "done"}]
    for contact in contacts:
        heard = [
            entry.event["message"].split()[1]
            for entry in rig.taken()
            if entry.event["event"] == "message.received" and entry.event["sender_id"] == contact
        ]
        assert heard == wanted[contact]
        sent = [str(entry.text).split()[1] for entry in rig.meta.sent if entry.recipient_id == contact]
        assert sent == wanted[contact]


@pytest.mark.parametrize("target", endpoints.KINDS)
def test_one_is_held_and_the_other_goes_on(rig: Rig, target: Target) -> None:
    account = rig.account()
    rig.pause(account, NAMES[target])
    rig.say("hello", "mid-1")
    rig.send(account, "reply")
    assert rig.drain() is None
    assert bool(rig.crm.received) == (target == "instagram")
    assert bool(rig.meta.sent) == (target == "crm")
    rig.unpause(account, NAMES[target])
    rig.drain()
    assert rig.events()[0] == "message.received"
    assert len(rig.meta.sent) == 1


@pytest.mark.parametrize("ended", ["pause", "hold", "status"])
def test_what_is_let_go_gets_its_full_time_and_no_more(rig: Rig, ended: str) -> None:
    account = rig.account()
    rig.crm.answer_always(503)
    rig.say("hello", "mid-1")
    rig.live_through(23 * HOUR_S)
    if ended == "pause":
        rig.pause(account, "deliveries")
    elif ended == "status":
        rig.change_account(account, status="inactive")
    else:
        rig.crm.answer_always(410)
        rig.live_through(2 * HOUR_S)
        rig.crm.answer_always(503)
        assert rig.held(account)["deliveries"]["by"] == "gone"
    rig.now_s += 50 * HOUR_S
    assert rig.expire() == {}
    if ended == "pause":
        rig.unpause(account, "deliveries")
    elif ended == "status":
        rig.change_account(account, status="active")
    else:
        rig.resume(account, "deliveries")
    rig.live_through(24 * HOUR_S - 60)
    assert rig.db.value("SELECT state FROM deliveries") == "pending"
    rig.live_through(HOUR_S)
    assert rig.db.value("SELECT state FROM deliveries") == "dead"


def test_two_locks_open_one_by_one(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(410)
    rig.say("hello", "mid-1")
    rig.drain()
    rig.pause(account, "deliveries", reason="stocktaking")
    shown = rig.call("GET", f"/api/v1/accounts/{account['id']}")[1]
    assert (shown["paused"]["deliveries"]["reason"], shown["held"]["deliveries"]["by"]) == ("stocktaking", "gone")
    assert rig.unpause(account, "deliveries") == [True]
    assert rig.held(account)["deliveries"]["by"] == "gone"
    assert rig.drain() is None
    rig.resume(account, "deliveries")
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_stronger_cause_takes_a_weaker_ones_place_and_is_ended_by_its_own_remedy(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(410)
    rig.say("hello", "mid-1")
    rig.drain()
    rig.change_account(account, status="inactive")
    assert rig.held(account)["deliveries"]["by"] == "inactive"
    rig.resume(account, held=True)  # only an activation ends it
    assert rig.held(account)["deliveries"]["by"] == "inactive"
    assert rig.drain() is None
    rig.change_account(account, status="active")
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_hold_keeps_nothing_longer_than_a_week_after_the_last_act_of_a_person(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(410)
    rig.say("hello", "mid-1")
    rig.drain()
    rig.now_s += 6 * DAY_S
    assert rig.expire() == {}
    rig.resume(account, "deliveries")  # and the CRM is gone again
    rig.drain()
    rig.now_s += 6 * DAY_S
    assert rig.expire() == {}
    rig.pause(account, "deliveries")
    rig.now_s += 30 * DAY_S
    assert rig.expire() == {}  # a person's pause stops that clock
    rig.unpause(account, "deliveries")
    rig.now_s += 7 * DAY_S + 1
    assert rig.expire() == {("crm", "held_too_long", account["id"]): 1}


def test_a_pause_ends_by_itself_when_its_time_has_come(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    rig.pause(account, until_s=rig.now_s + 30 * HOUR_S)
    rig.live_through(30 * HOUR_S - 1)
    assert not upkeep(rig).resume()
    rig.now_s += 1
    assert upkeep(rig).resume()
    rig.drain()
    assert rig.events() == ["message.received"]
    assert not upkeep(rig).resume()


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_pause_follows_a_clock_that_is_set(rig: Rig, hours: int) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    rig.pause(account, until_s=rig.now_s + 40 * HOUR_S)
    rig.live_through(20 * HOUR_S)
    rig.clock_is_wrong_by_s = hours * HOUR_S
    rig.live_through(20 * HOUR_S - 1)
    assert not upkeep(rig).resume()
    rig.now_s += 1
    assert upkeep(rig).resume()
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_new_pause_keeps_the_beginning_of_the_old_one(rig: Rig) -> None:
    account, began = rig.account(), instant(rig.now_s)
    rig.pause(account, "deliveries")
    rig.now_s += 60
    rig.pause(account, "deliveries", until_s=rig.now_s + 60)
    _, shown = rig.call("GET", f"/api/v1/accounts/{account['id']}")
    until = instant(rig.now_s + 60)
    assert shown["paused"] == {"deliveries": {"reason": "test", "since": began, "until": until}, "sends": None}


def test_a_resumed_crm_that_was_down_is_asked_at_once(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(503)
    for number in range(3):
        rig.say(f"{number}", f"mid-{number}", contact=f"90000000000000{number}")
    rig.live_through(HOUR_S)
    wait_s = rig.drain()
    assert wait_s is not None
    rig.pass_s(wait_s)  # the next probe is a minute away
    rig.pause(account)
    assert rig.pass_s(1) is None
    rig.crm.answer_always(None)
    asked = len(rig.crm.received)
    rig.unpause(account)
    rig.drain()
    assert len(rig.crm.received) - asked == 3
    assert rig.events() == ["message.received"] * 3


def test_a_call_in_flight_finishes_and_its_echo_settles_a_held_send(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    (row,) = rig.due("instagram", account)
    rig.claim(row, account)
    rig.pause(account)
    rig.engine.recover()  # the worker died in the call
    rig.live_through(HOUR_S)
    assert rig.status(message_id)["status"] == "pending"
    rig.echo("hello", "mid-9")
    assert rig.status(message_id)["status"] == "delivered"
    rig.unpause(account)
    rig.live_through(HOUR_S)
    assert rig.meta.sent == []


def test_a_worker_that_starts_while_paused_goes_on_after_it(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    rig.pause(account)
    rig.drain()
    rig.engine.stop(0)
    rig.engine = rig.make_engine()
    rig.engine.recover()
    rig.live_through(30 * HOUR_S)
    assert rig.crm.received == []
    rig.unpause(account)
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_deleted_account_leaves_no_pause(rig: Rig) -> None:
    account = rig.account()
    rig.pause(account)
    turn.delete_account(rig.db, account["id"])
    assert rig.db.rows("SELECT * FROM endpoints") == []


# --- what stops an account ---


def test_a_crm_that_is_gone_pauses_the_deliveries_and_loses_nothing(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(410)
    for number in range(5):
        rig.say(f"{number}", f"mid-{number}", contact=f"90000000000000{number % 2}")
    rig.drain()
    called = len(rig.crm.received)
    assert called <= 2  # one for each lane
    held = rig.held(account)
    assert (held["deliveries"]["by"], held["sends"]) == ("gone", None)
    assert [kind for kind, _ in rig.alerts] == ["crm_gone"]
    rig.live_through(30 * HOUR_S)
    assert rig.expire() == {}
    assert len(rig.crm.received) == called
    rig.send(account, "sends go on", contact="900000000000009")
    rig.drain()
    assert len(rig.meta.sent) == 1
    rig.crm.answer_always(None)
    rig.resume(account, "deliveries")
    rig.drain()
    heard = [entry.event["message"] for entry in rig.taken() if entry.event["event"] == "message.received"]
    assert sorted(heard) == ["0", "1", "2", "3", "4"]
    assert [text for text in heard if int(text) % 2] == ["1", "3"]
    assert rig.cleared == ["crm_gone"]


def answer_after_the_other(rig: Rig) -> None:
    """Let the CRM's held answer go once another event is done."""
    waiting.until(lambda: rig.db.value("SELECT COUNT(*) FROM deliveries WHERE state = 'done'"))
    rig.db.close_thread()
    rig.crm.close()


def test_a_410_to_one_message_alone_pauses_once_and_then_is_an_ordinary_refusal(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(410, event="message.reaction")
    rig.crm.answer(410, event="message.reaction", delay_s=600)  # until the other message's answer was there
    rig.crm.answer(410, times=1000, event="message.reaction")
    rig.hear(rig.item({"reaction": {"mid": "mid-0", "action": "react", "emoji": "❤"}}))
    rig.drain()
    assert rig.held(account)["deliveries"]["by"] == "gone"
    for number in range(5):
        rig.now_s += HOUR_S
        rig.say(f"{number}", f"mid-{number}", contact="900000000000002")
        if number == 0:
            rig.resume(account, "deliveries")
            other = threading.Thread(target=answer_after_the_other, args=(rig,))
            other.start()
        rig.live_through(60)
        other.join()
        assert rig.held(account)["deliveries"] is None
    rig.say("behind it", "mid-9")
    rig.live_through(60)
    heard = [entry.event["message"] for entry in rig.taken()]
    assert heard == ["0", "1", "2", "3", "4", "behind it"]
    assert [kind for kind, _ in rig.alerts if kind == "crm_gone"] == ["crm_gone"]
    row = rig.db.row("SELECT retries, last_code, last_http_status, place FROM deliveries WHERE state = 'pending'")
    assert row
    assert (row["last_code"], row["last_http_status"], row["place"]) == ("crm_error", 410, "aside")
    assert row["retries"] > 5


def test_a_410_of_a_url_that_was_changed_meanwhile_pauses_nothing(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    (row,) = rig.due("crm", account)
    claimed = rig.claim(row, account)
    rig.change_account(account, url="https://new.example/")
    gone = Outcome("retry", "crm_gone", http_status=410, counts=False, stops="crm_gone")
    finished = turn.Finished(claimed, gone, Verdict("pending", instant(rig.now_s)))
    rig.settle(finished)
    assert rig.held(account)["deliveries"] is None


@pytest.mark.parametrize(("code", "subcode", "alert"), [(190, 463, "token_dead"), (200, 2534041, "account_error")])
def test_an_account_error_holds_all_sends_as_they_are(rig: Rig, code: int, subcode: int, alert: str) -> None:
    account = rig.account()
    first = rig.send(account, "one")
    rig.meta.fault(times=100, status=400, body=wire.error_body(code, subcode=subcode))
    rig.drain()
    second = rig.send(account, "two")
    rig.say("deliveries go on", "mid-1", contact="900000000000009")
    rig.live_through(30 * HOUR_S)
    assert rig.expire() == {}
    assert len([call for call in rig.meta.calls if call.method == "POST"]) == 1
    assert rig.events() == ["message.received"]
    assert [kind for kind, _ in rig.alerts] == [alert]
    shown = accounts.found(rig.db, account["id"])
    assert shown["status"] == "error"
    assert f"code {code}/{subcode}, " in shown["status_reason"]
    assert rig.status(first)["held"]["reason"] == shown["status_reason"]
    assert rig.status(second)["status"] == "pending"
    assert rig.db.rows("SELECT DISTINCT retries, waits FROM deliveries") == [{"retries": 0, "waits": 0}]
    rig.meta.clear_faults()
    rig.change_account(account, status="active")
    rig.drain()
    assert [entry.text for entry in rig.meta.sent] == ["one", "two"]
    assert rig.cleared == [alert]


@pytest.mark.parametrize(("code", "subcode"), [(10, 9_999_999), (200, 9_999_999), (3, 1)])
def test_what_may_be_about_one_person_or_message_holds_no_other(rig: Rig, code: int, subcode: int | None) -> None:
    account = rig.account()
    rig.meta.fault("messages", status=400, body=wire.error_body(code, subcode=subcode))
    rig.send(account, "to one")
    rig.drain()
    rig.send(account, "to another", contact="900000000000009")
    rig.drain()
    assert accounts.found(rig.db, account["id"])["status"] == "active"
    assert [entry.text for entry in rig.meta.sent] == ["to another"]
    assert rig.alerts == []


def test_an_error_of_a_token_that_was_changed_meanwhile_stops_nothing(rig: Rig) -> None:
    account = rig.account()
    rig.send(account, "hello")
    (row,) = rig.due("instagram", account)
    claimed = rig.claim(row, account)
    rig.change_account(account, token="another")
    dead = Outcome("retry", "token_expired", counts=False, stops="token_dead")
    finished = turn.Finished(claimed, dead, Verdict("pending", instant(rig.now_s)))
    assert rig.settle(finished).stopped == []
    assert accounts.found(rig.db, account["id"])["status"] == "active"
