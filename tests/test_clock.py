"""A clock that is set: what regular jobs make of it before, while and after the engine moves all times along."""

from typing import Any

import pytest

from crmbridge.clock import Clock
from crmbridge.store import deliveries, feed, turn, vitals
from crmbridge.upkeep import Upkeep
from tests.rig import Rig
from tests.shop import OTHER_ID

HOUR_S, DAY_S = 3600.0, 86_400.0


def upkeep(rig: Rig) -> Upkeep:
    return Upkeep(rig.db, rig.settings.retention, rig.patience, rig.alarm, clock=rig.clock, pause=lambda seconds: None)


@pytest.mark.parametrize("days", [-9, 9])
def test_jobs_that_run_before_the_engine_has_seen_it_end_resume_and_take_nothing(rig: Rig, days: int) -> None:
    rig.account()
    rig.lose("dies", "mid-1")
    rig.crm.answer_always(503)
    rig.say("waits", "mid-2", contact="900000000000002")
    rig.drain()
    paused = rig.account(OTHER_ID)
    rig.pause(paused, "deliveries", until_s=rig.now_s + 2 * HOUR_S)
    jobs = upkeep(rig)
    rig.clock_is_wrong_by_s = days * DAY_S
    for _ in range(2):
        jobs.expire()
        assert not jobs.resume()
        jobs.prune()
        rig.drain()
    assert rig.db.rows("SELECT state, gone FROM deliveries ORDER BY position") == [
        {"state": "dead", "gone": 0},
        {"state": "pending", "gone": 0},
    ]
    rig.crm.answer_always(None)
    rig.now_s += HOUR_S
    rig.drain()
    assert rig.events() == ["message.received"]
    rig.now_s += HOUR_S
    assert jobs.resume()


def test_a_clock_that_is_set_while_rows_expire_stops_that(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.account()
    rig.crm.answer_always(503)
    rig.say("hello", "mid-1")
    rig.drain()
    rig.now_s += HOUR_S
    look, jobs = deliveries.older, upkeep(rig)

    def look_then_set(*given: Any) -> list[list[dict[str, Any]]]:
        list(look(*given))
        rig.clock_is_wrong_by_s = -9 * DAY_S
        turn.follow_clock(rig.db, -9 * DAY_S, None)
        rig.clock.follow(-9 * DAY_S)
        return [rig.db.rows("SELECT id FROM deliveries")]

    monkeypatch.setattr(deliveries, "older", look_then_set)
    jobs.expire()
    assert rig.db.value("SELECT state FROM deliveries") == "pending"


def test_retention_believes_a_clock_that_was_set_after_an_hour(rig: Rig) -> None:
    account = rig.account(url=None)
    rig.say("unread", "mid-1")
    rig.drain()
    jobs = upkeep(rig)
    rig.clock_is_wrong_by_s = 9 * DAY_S
    for minutes, left in ((0, 1), (59, 1), (2, 0)):
        rig.now_s += minutes * 60
        rig.drain()
        jobs.prune()
        assert len(feed.page(rig.db, [account], after=None, limit=10).events) == left


def test_retention_believes_no_clock_at_once_that_is_days_off_at_the_start(rig: Rig) -> None:
    rig.account(url=None)
    rig.say("unread", "mid-1")
    vitals.beat(rig.db, "worker", rig.now_s)
    rig.now_s += 9 * DAY_S
    for minutes, gone in ((0, 0), (59, 0), (2, 1)):
        if not minutes:
            rig.engine = rig.make_engine()
            rig.engine.recover()
        rig.now_s += minutes * 60
        upkeep(rig).prune()
        assert rig.db.value("SELECT gone FROM deliveries") == gone


def test_drift_is_no_jump_and_a_jump_is_one_until_it_is_followed() -> None:
    now, ahead = 1000.0, 0.0
    clock = Clock(lambda: now + ahead, lambda: now)
    is_steady = clock.steady()
    ahead = 29.0
    assert clock.jump_s() == 0
    assert is_steady()
    assert clock.is_trusted()
    ahead = 31.0
    assert clock.jump_s() == 31
    assert not is_steady()
    clock.follow(31)
    assert clock.jump_s() == 0
    assert not is_steady()
    assert clock.steady()()
    assert not clock.is_trusted()
    now += 3601
    assert clock.is_trusted()
