"""The engine on a set clock, against the sandbox: schedules, lanes, endpoints, dead letters, the clock."""

import contextlib
import socket
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crmbridge.delivery import Schedule, decide
from crmbridge.errors import Unavailable
from crmbridge.events import epoch_s, instant
from crmbridge.sandbox import wire
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.store import deliveries, turn, vitals
from crmbridge.store.deliveries import Claimed, Outcome, Patience
from tests import rig as rigs
from tests.rig import SCHEDULE, START_S, Rig
from tests.waiting import PATIENCE_S, until

DAY_S = 86_400
OTHER_CUSTOMER = "900000000000002"
TRANSIENT = wire.error_body(2, "An unexpected error has occurred. Please retry your request later.")
schedule = Schedule(**SCHEDULE, patience=Patience(DAY_S, DAY_S))  # type: ignore[arg-type]


def claimed(target: str, *, retries: int = 0, waits: int = 0, age_s: float = 0, **changes: Any) -> Claimed:
    known: dict[str, Any] = {
        "id": "dlv_1",
        "claim_id": "clm_1",
        "target": target,
        "account_id": "acc_1",
        "contact": "c",
        "event": "message.received",
        "event_id": "evt_1",
        "message_id": None,
        "body": "{}",
        "kind": "call",
        "number": retries + waits + 1,
        "place": "head",
        "retries": retries,
        "waits": waits,
        "look_ups": 0,
        "previous_at": None,
        "accepted_at": instant(START_S - age_s),
        "expires_at": instant(START_S - age_s + DAY_S),
        "correlation_id": "x",
        "account": {},
        "revision": 0,
        "is_revived": False,
    }
    return Claimed(**{**known, **changes})


def delay_s(row: Claimed, outcome: Outcome) -> float | None:
    verdict = decide(row, outcome, schedule, START_S, lambda: 1.0)
    return round(epoch_s(verdict.due) - START_S, 3) if verdict.state == "pending" else None


@pytest.mark.parametrize(
    ("target", "counts", "delays"),
    [
        ("crm", True, [1, 2, 4, 8, 16, 60, 300, 900, 1800, 3600, 3600, 3600]),
        ("instagram", True, [2, 10, 60, None]),
        ("instagram", False, [5, 15, 60, 300, 900, 900]),
    ],
)
def test_failures_follow_the_visible_lists(target: str, counts: bool, delays: list[float | None]) -> None:
    found = [
        delay_s(claimed(target, **{"retries" if counts else "waits": past}), Outcome("retry", "x", counts=counts))
        for past in range(len(delays))
    ]
    assert found == delays


@pytest.mark.parametrize(("hint_s", "wanted_s"), [(0, 1), (30, 30), (10**9, 21_600)])
def test_retry_after_wins_within_bounds(hint_s: float, wanted_s: float) -> None:
    assert delay_s(claimed("crm"), Outcome("retry", "x", after_s=hint_s)) == wanted_s


@given(
    target=st.sampled_from(["crm", "instagram"]),
    retries=st.integers(0, 200),
    waits=st.integers(0, 200),
    counts=st.booleans(),
    hint_s=st.none() | st.floats(0, 1e9),
    age_s=st.floats(0, 2 * DAY_S),
    jitter=st.floats(0.8, 1.2),
)
def test_no_row_is_stranded_or_tried_beyond_its_end(
    target: str, retries: int, waits: int, counts: bool, hint_s: float | None, age_s: float, jitter: float
) -> None:
    row = claimed(target, retries=retries, waits=waits, age_s=age_s)
    verdict = decide(row, Outcome("retry", "x", counts=counts, after_s=hint_s), schedule, START_S, lambda: jitter)
    if age_s >= DAY_S + 0.001:
        assert verdict.state == "dead"
    if verdict.state == "pending":
        assert epoch_s(verdict.due) + 0.001 > START_S
        assert verdict.due <= row.expires_at
        assert epoch_s(verdict.due) - START_S <= 21_600.001


def test_a_crm_that_recovers_gets_the_event_with_the_same_bytes_and_id(rig: Rig) -> None:
    rig.account()
    rig.crm.answer(500, times=3)
    rig.say("hello", "mid-1")
    rig.live_through(60)
    assert [entry.answered for entry in rig.crm.received] == [500, 500, 500, 200]
    assert len({entry.body for entry in rig.crm.received}) == 1
    assert len({entry.headers["Webhook-Id"] for entry in rig.crm.received}) == 1
    assert all(entry.verified for entry in rig.crm.received)


def test_a_crm_down_for_25_hours_ends_in_the_dead_letter_queue_with_an_alert(rig: Rig) -> None:
    rig.account()
    rig.crm.answer_always(503)
    rig.say("hello", "mid-1")
    rig.live_through(25 * 3600)
    row = rig.db.row("SELECT * FROM deliveries")
    assert row is not None
    assert (row["state"], row["last_code"], row["last_http_status"]) == ("dead", "crm_error", 503)
    assert epoch_s(row["finished_at"]) - START_S == pytest.approx(DAY_S, abs=1)
    assert len(rig.crm.received) == row["attempts"] == 34
    assert [kind for kind, _ in rig.alerts if kind != "crm_down"] == ["dead_letter"]


def _outage(rig: Rig, hours: float, *, crm: bool) -> list[str]:
    """Have ten messages of four customers come and go while a far side is away; return the ids of the sends."""
    account = rig.account()
    if crm:
        rig.crm.answer_always(503)
    else:
        rig.meta.fault(times=1_000_000, status=503, body="")
    sends = []
    for number in range(10):
        rig.say(f"in {number}", f"mid-{number}", contact=f"80{number % 4}")
        sends.append(rig.send(account, f"out {number}", contact=f"80{number % 4}"))
        rig.live_through(hours * 360)
    rig.crm.answer_always(None)
    rig.meta.clear_faults()
    return sends


@pytest.mark.parametrize("crm", [True, False], ids=["CRM", "Instagram"])
@pytest.mark.parametrize("hours", [10 / 3600, 1])
def test_an_outage_loses_nothing(rig: Rig, hours: float, crm: bool) -> None:
    sends = _outage(rig, hours, crm=crm)
    rig.live_through(2 * 3600)
    received = [entry.event for entry in rig.taken() if entry.event["event"] == "message.received"]
    assert sorted(event["message"] for event in received) == [f"in {number}" for number in range(10)]
    assert sorted(str(entry.text) for entry in rig.meta.sent) == [f"out {number}" for number in range(10)]
    assert {rig.status(message_id)["status"] for message_id in sends} == {"sent"}
    for contact in range(4):
        for texts in (
            [event["message"] for event in received if event["sender_id"] == f"80{contact}"],
            [str(entry.text) for entry in rig.meta.sent if entry.recipient_id == f"80{contact}"],
        ):
            assert texts == sorted(texts)


@pytest.mark.parametrize("crm", [True, False], ids=["CRM", "Instagram"])
def test_what_died_in_an_outage_of_25_hours_can_be_revived(rig: Rig, crm: bool) -> None:
    sends = _outage(rig, 25, crm=crm)
    rig.expire()
    gone = [row["id"] for row in rig.dead()]
    assert gone
    refused = {entry.event["event_id"]: entry.body for entry in rig.crm.received if entry.answered == 503}
    for delivery_id in gone:
        rig.revive(delivery_id, force=True)
    rig.live_through(2 * 3600)
    received = [entry.event for entry in rig.taken() if entry.event["event"] == "message.received"]
    assert sorted(event["message"] for event in received) == [f"in {number}" for number in range(10)]
    assert sorted(str(entry.text) for entry in rig.meta.sent) == [f"out {number}" for number in range(10)]
    assert {rig.status(message_id)["status"] for message_id in sends} == {"sent"}
    if crm:
        taken = {entry.event["event_id"]: entry.body for entry in rig.taken()}
        assert refused
        assert {event_id: taken.get(event_id) for event_id in refused} == refused  # the same id and bytes as before
        for contact in range(4):
            texts = [event["message"] for event in received if event["sender_id"] == f"80{contact}"]
            assert texts == sorted(texts)
    assert rig.dead() == []


def test_a_401_is_final_at_once_and_alerts(rig: Rig) -> None:
    rig.account()
    rig.crm.answer(401)
    rig.say("hello", "mid-1")
    rig.drain()
    assert rig.db.value("SELECT state FROM deliveries") == "dead"
    assert [kind for kind, _ in rig.alerts] == ["crm_unauthorized", "dead_letter"]


@pytest.mark.parametrize("status", [301, 302, 400, 403, 404, 429, 500, 502, 503])
def test_everything_else_is_tried_again(rig: Rig, status: int) -> None:
    rig.account()
    rig.crm.answer(status, headers={"Location": rig.sandbox.url})
    rig.say("hello", "mid-1")
    rig.live_through(31)  # 429 has a floor of 30 s
    assert [entry.answered for entry in rig.crm.received] == [status, 200]


def test_a_failing_head_holds_its_lane_in_order_then_steps_aside(rig: Rig) -> None:
    rig.account()
    for number in range(3):
        rig.say(f"text {number}", f"mid-{number}")
    rig.crm.answer(500, times=8, containing="text 0")  # the first try, the quick retries, and two more
    rig.live_through(30)
    assert rig.taken() == []
    rig.live_through(10)
    assert [entry.event["message"] for entry in rig.taken()] == ["text 1", "text 2"]
    rig.live_through(1300)
    assert [entry.event["message"] for entry in rig.taken()] == ["text 1", "text 2", "text 0"]
    assert [entry.event["sequence"] for entry in rig.taken()] == [2, 3, 1]


def test_a_message_that_the_crm_cannot_take_holds_up_no_later_one(rig: Rig) -> None:
    rig.account()
    rig.crm.answer(500, times=1000, containing="poison")
    rig.say("poison", "mid-0")
    rig.live_through(7200)
    rig.say("a day later", "mid-1")
    rig.live_through(1)
    assert [entry.event["message"] for entry in rig.taken()] == ["a day later"]


def test_what_waited_behind_a_head_that_died_of_age_has_its_own_quick_retries(rig: Rig) -> None:
    rig.account()
    rig.crm.answer_always(500)
    rig.say("text 0", "mid-0")
    rig.live_through(DAY_S - 70)
    for number in range(1, 5):
        rig.say(f"text {number}", f"mid-{number}")
    rig.live_through(69)
    tried = [entry.event["message"] for entry in rig.crm.received].count("text 1")
    assert 0 < tried < 5  # as the one behind a probe
    rig.crm.answer_always(None)
    rig.crm.answer(500, times=1000, containing="text 0")
    rig.crm.answer(500, times=5 - tried, containing="text 1")
    rig.live_through(3600)
    assert [entry.event["message"] for entry in rig.taken()] == ["text 1", "text 2", "text 3", "text 4"]
    assert rig.db.rows("SELECT last_code FROM deliveries WHERE place = 'dead'") == [{"last_code": "crm_error"}]


@pytest.mark.parametrize("status", [500, 503])
def test_an_outage_changes_no_order_and_is_asked_by_single_probes(rig: Rig, status: int) -> None:
    rig.account()
    rig.crm.answer_always(status)
    for number in range(40):
        rig.say(f"{number}", f"mid-{number}", contact=f"80{number % 4}")
    rig.live_through(1800)
    during = len(rig.crm.received)
    rig.say("40", "mid-40", contact="800")
    rig.live_through(600)
    assert during < 80
    assert len(rig.crm.received) - during < 20
    rig.crm.answer_always(None)
    rig.live_through(3700)
    assert len(rig.taken()) == 41
    for contact in range(4):
        texts = [int(entry.event["message"]) for entry in rig.taken() if entry.event["sender_id"] == f"80{contact}"]
        assert texts == sorted(texts)
    assert rig.db.value("SELECT COUNT(*) FROM deliveries WHERE place = 'aside'") == 0


def test_a_success_after_a_restart_releases_all_that_failed_before_it(rig: Rig) -> None:
    rig.account()
    rig.crm.answer_always(503)
    for number in range(5):
        rig.say(f"old {number}", f"mid-{number}", contact=f"80{number}")
    rig.live_through(3600)
    rig.engine = rig.make_engine()
    rig.crm.answer_always(None)
    rig.say("new", "mid-new", contact="805")
    rig.live_through(1)
    assert len(rig.taken()) == 6


def test_a_new_message_finds_out_that_the_crm_is_back(rig: Rig) -> None:
    rig.account()
    rig.crm.answer_always(503)
    rig.say("old", "mid-1")
    rig.live_through(7000)  # the next try of its own is most of an hour away
    rig.crm.answer_always(None)
    rig.say("new", "mid-2")
    rig.live_through(1)
    assert [entry.event["message"] for entry in rig.taken()] == ["old", "new"]


def test_what_could_never_be_tried_ends_after_a_day(rig: Rig) -> None:
    rig.account()
    rig.crm.answer_always(503)
    for number in range(5):
        rig.say(f"{number}", f"mid-{number}")
    rig.live_through(DAY_S + 60)
    assert turn.expire(rig.db, rig.now_s + 121, rig.patience)
    assert rig.db.rows("SELECT DISTINCT state FROM deliveries") == [{"state": "dead"}]


def test_time_while_inactive_does_not_age_what_is_owed(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(503)
    rig.say("hello", "mid-1")
    rig.live_through(60)
    rig.change_account(account, status="inactive")
    rig.live_through(30 * 3600)
    assert rig.expire() == {}
    rig.crm.answer_always(None)
    rig.change_account(account, status="active")
    rig.live_through(10)
    assert rig.events() == ["message.received"]


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_is_set_neither_delays_nor_kills_what_is_owed(rig: Rig, hours: int) -> None:
    rig.account()
    rig.crm.answer(503, times=3)
    rig.say("hello", "mid-1")
    rig.live_through(5)
    rig.clock_is_wrong_by_s = hours * 3600.0
    rig.now_s += 3
    rig.drain()
    assert rig.events() == ["message.received"]
    assert turn.expire(rig.db, rig.now_s + rig.clock_is_wrong_by_s, rig.patience) == {}


def test_what_came_after_the_clock_was_set_is_right_already(rig: Rig) -> None:
    rig.account()
    rig.drain()
    rig.clock_is_wrong_by_s = 3600.0
    rig.say("hello", "mid-1")  # it is accepted by the new clock
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_start_before_the_clock_is_right_delays_nothing(rig: Rig) -> None:
    rig.account()
    rig.crm.answer(503)
    rig.say("hello", "mid-1")
    rig.drain()
    vitals.beat(rig.db, "worker", rig.now_s)
    rig.now_s -= 40 * DAY_S  # no battery, no network yet
    rig.engine = rig.make_engine()
    rig.engine.recover()
    rig.live_through(5)
    assert rig.events() == ["message.received"]


def test_an_outcome_survives_a_turn_that_fails(rig: Rig) -> None:
    """The database is away while the CRM's answer is to be recorded; nothing is lost, and no slot leaks."""
    rig.account()
    for number in range(8):
        rig.say(f"{number}", f"mid-{number}", contact=f"80{number}")
    rig.crm.answer_always(200, delay_s=600)
    failures: list[Unavailable] = []

    def drain() -> None:
        try:
            rig.drain()
        except Unavailable as error:
            failures.append(error)
        finally:
            rig.db.close_thread()

    drained = threading.Thread(target=drain)
    with contextlib.closing(sqlite3.connect(rig.db.path, isolation_level=None, timeout=PATIENCE_S)) as shell:
        drained.start()
        until(lambda: rig.db.value("SELECT COUNT(*) FROM deliveries WHERE claim_id IS NOT NULL"))
        shell.execute("BEGIN IMMEDIATE")
        rig.crm.close()  # it answers at last
        drained.join(PATIENCE_S)
        shell.execute("ROLLBACK")
    assert failures
    rig.drain()
    assert sorted(entry.event["message"] for entry in rig.taken()) == [f"{number}" for number in range(8)]


def test_lanes_do_not_wait_for_each_other(rig: Rig) -> None:
    rig.account()
    rig.crm.answer(500, times=1)
    rig.say("blocked", "mid-1")
    rig.drain()
    rig.say("behind it", "mid-2")
    rig.say("free", "mid-3", contact=OTHER_CUSTOMER)
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()] == ["free"]
    rig.live_through(5)
    assert [entry.event["message"] for entry in rig.taken()] == ["free", "blocked", "behind it"]


def test_what_arrives_together_is_ordered_by_its_own_time(rig: Rig) -> None:
    rig.account()
    rig.hear(
        *(rig.item({"message": {"mid": f"mid-{late}", "text": str(late)}}, at_s=START_S + late) for late in (3, 1, 2))
    )
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()] == ["1", "2", "3"]


def test_three_crms_that_hang_leave_senders_for_a_fourth(tmp_path: Path) -> None:
    patient = f"timeout_s = {2 * PATIENCE_S}\n"
    with rigs.opened(tmp_path, patient) as rig, socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        for number in range(3):
            external = f"1784140000000001{number}"
            rig.account(external, url=f"http://127.0.0.1:{silent.getsockname()[1]}/")
            for contact in range(6):
                item = rig.item({"message": {"mid": f"hang-{number}-{contact}", "text": "x"}}, contact=f"90{contact}")
                rig.hear(item, account=external)

        def work() -> None:
            rig.drain()
            rig.db.close_thread()

        drain = threading.Thread(target=work)
        drain.start()
        rig.account()
        rig.say("healthy", "mid-1")
        rig.engine.tell()
        rig.crm.wait(1)
        assert rig.db.value("SELECT COUNT(*) FROM deliveries WHERE last_code IS NOT NULL") == 0  # they still hang
        silent.close()
        rig.engine.stop(PATIENCE_S)
        drain.join(PATIENCE_S)


def test_questions_to_an_instagram_that_hangs_leave_senders_for_a_crm(tmp_path: Path) -> None:
    with rigs.opened(tmp_path) as rig:
        refusal = wire.error_body(10, "x")
        rig.meta.fault("messages", times=99, status=400, body=refusal)
        for number in range(12):
            user_id = f"1784140000000010{number:02}"
            rig.meta.add_account(user_id, token=f"IGAA{user_id}", app_scoped_id=f"9{user_id}", username="a")
            rig.send(rig.account(user_id, token=f"IGAA{user_id}"))
        rig.drain()
        rig.meta.fault("conversations", times=99, status=503, body="", delay_s=PATIENCE_S)
        rig.now_s += 16 * 60  # they are asked whether they are well

        def work() -> None:
            rig.drain()
            rig.db.close_thread()

        drain = threading.Thread(target=work)
        drain.start()
        until(lambda: rig.engine._asking)
        rig.account()
        rig.say("healthy", "mid-1")
        rig.engine.tell()
        rig.crm.wait(1)
        assert not [call for call in rig.meta.calls if call.status == 503]  # they still hang
        rig.meta.close()
        rig.engine.stop(PATIENCE_S)
        drain.join(PATIENCE_S)


def test_an_account_that_is_no_longer_pushed_to_owes_its_crm_nothing(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(503)
    rig.say("one", "mid-1")
    rig.say("two", "mid-2")
    rig.drain()
    rig.change_account(account, url=None)
    turn.end_leftovers(rig.db)
    assert rig.db.rows("SELECT DISTINCT state, last_code FROM deliveries") == [
        {"state": "done", "last_code": "not_pushed"}
    ]
    assert rig.drain() is None
    assert rig.alerts == []


def test_a_claim_that_lost_its_row_changes_nothing(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    (row,) = rig.due("crm", account)
    old = rig.claim(row, account)
    rig.engine.recover()
    verdict = decide(old, Outcome("done"), schedule, rig.now_s, lambda: 1.0)
    assert not rig.db.write(lambda tx: deliveries.record(tx, old, Outcome("done"), verdict))
    assert rig.db.value("SELECT state FROM deliveries") == "pending"


def test_an_inactive_account_loses_nothing(rig: Rig) -> None:
    account = rig.account()
    rig.change_account(account, status="inactive")
    rig.say("hello", "mid-1")
    assert rig.drain() is None
    assert rig.crm.received == []
    rig.change_account(account, status="active")
    rig.drain()
    assert rig.events() == ["message.received"]


def test_an_account_without_url_is_not_called(rig: Rig) -> None:
    rig.account(url=None)
    rig.say("hello", "mid-1")
    assert rig.drain() is None
    assert rig.db.row("SELECT state, last_code FROM deliveries") == {"state": "done", "last_code": "not_pushed"}


def test_a_lane_without_a_head_is_repaired(rig: Rig) -> None:
    rig.account()
    rig.say("hello", "mid-1")
    rig.db.write(lambda tx: tx.run("UPDATE deliveries SET place = 'behind'"))
    assert rig.drain() is None
    assert turn.repair(rig.db) == 1
    rig.drain()
    assert rig.events() == ["message.received"]


def test_a_row_that_cannot_be_rendered_stops_no_other(rig: Rig) -> None:
    rig.account()
    rig.say("lost", "mid-1")
    rig.say("fine", "mid-2", contact=OTHER_CUSTOMER)
    rig.db.write(lambda tx: tx.run("UPDATE events SET payload = NULL WHERE instagram_message_id = 'mid-1'"))
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()] == ["fine"]
    assert [kind for kind, _ in rig.alerts] == ["system_fault"]


def test_our_own_fault_alerts_and_does_not_go_on_for_ever(rig: Rig) -> None:
    rig.account()
    rig.break_seal("crm")
    rig.say("hello", "mid-1")
    rig.live_through(25 * 3600)
    assert rig.db.value("SELECT state FROM deliveries") == "dead"
    assert {kind for kind, _ in rig.alerts} == {"system_fault", "dead_letter"}


def test_a_wrong_vault_key_is_our_fault_and_burns_no_retry(rig: Rig) -> None:
    account = rig.account()
    rig.break_seal("crm")
    rig.say("hello", "mid-1")
    assert rig.drain() == pytest.approx(60)
    row = rig.db.row("SELECT retries, state, last_code FROM deliveries")
    assert row == {"retries": 0, "state": "pending", "last_code": "misconfigured"}
    rig.change_account(account, secret=WEBHOOK_SECRET)
    rig.pass_s(60)
    assert rig.events() == ["message.received"]
