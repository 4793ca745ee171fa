"""Dead letters: listed, counted, asked for by the hundred, and delivered in order behind live traffic."""

from collections import defaultdict
from typing import Any

from crmbridge.store import dead, turn
from crmbridge.store.dead import Asked, Filter
from tests.rig import Rig

DAY_S = 86_400
NOBODY = {"account_deleted": 0, "content_gone": 0, "not_pushed": 0, "in_doubt": 0}


def die(rig: Rig, lanes: dict[str, int]) -> dict[str, Any]:
    """Have a CRM be dead for 25 hours while customers write; return its account. The CRM is well again afterwards."""
    account = rig.account()
    rig.crm.answer_always(503)
    for number in range(max(lanes.values())):
        for contact, messages in lanes.items():
            if number < messages:
                rig.say(f"{contact} {number}", f"mid-{contact}-{number}", contact=contact)
    rig.live_through(25 * 3600)
    turn.expire(rig.db, rig.now_s, rig.patience)
    assert {row["state"] for row in rig.db.rows("SELECT state FROM deliveries")} == {"dead"}
    rig.crm.answer_always(None)
    rig.crm.reset()
    return account


def restart(rig: Rig) -> None:
    """Go on with an engine that has not seen the CRM dead."""
    rig.engine.stop(0)
    rig.engine = rig.make_engine()


def ask(rig: Rig, *, preview: bool = False, force: bool = False, target: Any = "crm", **wanted: Any) -> Asked:
    return dead.ask(rig.db, Filter(target, **wanted), rig.now_s, force=force, preview=preview)


def sequences(rig: Rig) -> dict[str, list[int]]:
    """Return the numbers that the CRM took, by customer, as they came."""
    found: dict[str, list[int]] = defaultdict(list)
    for entry in rig.taken():
        found[entry.event["sender_id"]].append(entry.event["sequence"])
    return found


def test_what_died_is_asked_for_and_comes_in_order_with_the_same_id_and_bytes(rig: Rig) -> None:
    die(rig, {"801": 45, "802": 3, "803": 1})
    bodies = {row["event_id"]: row["body"] for row in rig.dead()}
    assert ask(rig, preview=True) == Asked(49, 49, 0, NOBODY)
    assert rig.drain() is None  # a preview changes nothing
    assert ask(rig) == Asked(49, 49, 0, NOBODY)
    assert ask(rig) == Asked(49, 0, 49, NOBODY)
    rig.live_through(60)
    assert sequences(rig) == {"801": [*range(1, 46)], "802": [1, 2, 3], "803": [1]}
    taken = {entry.event["event_id"]: entry.body.decode() for entry in rig.taken()}
    assert set(taken) == set(bodies)
    assert all(taken[event_id] == body for event_id, body in bodies.items() if body)  # of those that had been tried
    assert rig.db.value("SELECT COUNT(*) FROM deliveries WHERE retry_asked_at IS NOT NULL") == 0
    assert {row["state"] for row in rig.db.rows("SELECT state FROM deliveries")} == {"done"}


def test_replays_keep_to_their_rate_and_live_messages_do_not_wait_for_it(rig: Rig) -> None:
    die(rig, {f"8{number:02}": 2 for number in range(40)})
    restart(rig)
    ask(rig)
    rig.drain()
    assert len(rig.taken()) == 20  # a burst
    for number in range(8):
        rig.now_s += 0.125
        rig.say("new", f"mid-new-{number}", contact="900")
        before = len(rig.taken())
        rig.drain()
        assert "new" in [entry.event["message"] for entry in rig.taken()[before : before + 3]]  # the first three calls
    assert len(rig.taken()) == 20 + 8 + 20
    rig.live_through(2.1)
    assert len(rig.taken()) == 80 + 8


def test_what_comes_new_in_a_lane_that_is_replayed_waits_its_turn(rig: Rig) -> None:
    die(rig, {"801": 30})
    restart(rig)
    ask(rig)
    rig.drain()
    assert len(rig.taken()) == 20
    rig.say("new", "mid-new", contact="801")
    rig.live_through(5)
    assert sequences(rig) == {"801": [*range(1, 32)]}


def test_replays_wait_for_an_endpoint_that_is_down_and_try_it_by_a_single_lane(rig: Rig) -> None:
    die(rig, {"801": 2, "802": 2, "803": 2})
    rig.crm.answer_always(503)
    ask(rig)
    rig.live_through(120)
    assert {entry.event["sender_id"] for entry in rig.crm.received} == {"801"}
    rig.crm.answer_always(None)
    rig.crm.reset()
    rig.live_through(120)
    assert sequences(rig) == {"801": [1, 2], "802": [1, 2], "803": [1, 2]}
