"""Where a delivery stands in its lane: one head to a lane, and no move that is not in the list."""

from typing import Any, get_args

import peewee
import pytest

from crmbridge.store import deliveries
from crmbridge.store.deliveries import Place
from tests.rig import Rig

PLACES = get_args(Place)
MOVES = {
    ("behind", "head"), ("behind", "aside"), ("behind", "done"), ("behind", "dead"), ("head", "behind"),
    ("head", "aside"), ("head", "done"), ("head", "dead"), ("aside", "done"), ("aside", "dead"), ("dead", "behind"),
    ("dead", "done"),
}  # fmt: skip


@pytest.mark.parametrize("begin", PLACES)
@pytest.mark.parametrize("end", PLACES)
def test_a_row_moves_where_the_list_lets_it_and_nowhere_else(rig: Rig, begin: Any, end: Any) -> None:
    rig.account()
    rig.say("hello", "mid-1")
    rig.by_hand("UPDATE deliveries SET place = ?", (begin,))
    moved = rig.db.write(lambda tx: deliveries.move(tx, end, "target = 'crm'", (), told={"kind": "dead"}))
    assert moved == ((begin, end) in MOVES)
    row = rig.db.row("SELECT place, state FROM deliveries") or {}
    assert row["place"] == (end if moved else begin)
    assert row["state"] == (row["place"] if row["place"] in ("done", "dead") else "pending")
    assert rig.db.value("SELECT COUNT(*) FROM history") == moved


def test_a_lane_has_one_head_whatever_is_asked(rig: Rig) -> None:
    rig.account()
    rig.say("one", "mid-1")
    rig.say("two", "mid-2")
    assert [row["place"] for row in rig.db.rows("SELECT place FROM deliveries ORDER BY position")] == ["head", "behind"]
    with pytest.raises(peewee.IntegrityError, match="UNIQUE"):
        rig.by_hand("UPDATE deliveries SET place = 'head'")
    rig.drain()
    assert rig.events() == ["message.received"] * 2
