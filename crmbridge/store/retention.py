"""What grows old: texts first, then rows, never what is owed; in steps so small that nobody waits for them.

What may go is read outside the write lock, from indexes that lead straight to it; each step looks again before it
takes anything.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crmbridge.store import endpoints, history
from crmbridge.store.database import Database, Reads, Row, Tx

_STEP_S = 0.001  # what a step aims at, inside its transaction
_REST = 19  # times as long as a step took, its commit included, the others have the disk to themselves
_FEWEST, _MOST = 5, 50
SPARE_BYTES = 16 * 2**20  # of the file stays free, to be used again
_PAGES = 16
_EVER = "9999"
# More than this does not fit in a page beside its row: taking it frees pages. What less leaves behind is a gap that
# stays until the row goes.
_LONG_BYTES = 4000


@dataclass(frozen=True)
class Terms:
    """Up to when what is kept: times as text; `bytes_most` of pages in use, 0 for no bound.

    For that bound's sake goes what is older than `keys_before`, and long texts before `young_from`; nothing younger.
    """

    texts_before: str
    rows_before: str
    unrouted_before: str
    keys_before: str  # nothing that tells a repetition goes before this
    young_from: str
    unrouted_most: int
    bytes_most: int


@dataclass
class Swept:
    """What a run took: deliveries' texts, unrouted events' payloads, rows, and pages given back to the disk.

    `is_large`: nothing more may go, and it is over its bound all the same. None when there was no time to find out.
    """

    texts: int = 0
    unrouted: int = 0
    rows: int = 0
    pages: int = 0
    is_large: bool | None = None


def sweep(db: Database, terms: Terms, *, budget_s: float = 10, pause: Callable[[float], None] = time.sleep) -> Swept:
    """Take what is old, or too much, as far as the time goes."""
    swept, run = Swept(), _Run(db, time.monotonic() + budget_s, pause)

    def is_large() -> bool:
        return 0 < terms.bytes_most < db.used_bytes()

    for place in ("done", "dead"):
        swept.texts += run.work_off(_texts(place, terms.texts_before))
    swept.unrouted += run.work_off(_unrouted(terms.unrouted_before))
    swept.unrouted += run.work_off(_unrouted(_EVER), most=_count_unrouted(db) - terms.unrouted_most)
    swept.rows += run.work_off(_deliveries(terms.rows_before))
    swept.rows += run.work_off(_events("noted", terms.rows_before))
    swept.rows += run.work_off(_holds(terms.rows_before))
    swept.rows += run.work_off(_events("dropped", min(terms.unrouted_before, terms.keys_before)))
    swept.texts += run.work_off(_long_texts(terms.keys_before), go_on=is_large)
    swept.rows += run.work_off(_deliveries(terms.keys_before), go_on=is_large)
    swept.rows += run.work_off(_events("noted", terms.keys_before), go_on=is_large)
    swept.texts += run.work_off(_long_texts(terms.young_from), go_on=is_large)
    swept.is_large = None if run.is_over() else is_large()
    while db.can_shrink() and db.free_bytes() > SPARE_BYTES and not run.is_over():
        swept.pages += run.step(lambda: db.shrink(_PAGES))
    return swept


@dataclass(frozen=True)
class _Kind:
    """Rows that may go: the query for the keys of the first ones, and what takes them inside a write."""

    sql: str
    parameters: tuple[Any, ...]
    take: Callable[[Tx, Sequence[Any]], int]


class _Run:
    """Steps with pauses between them until the time is up."""

    def __init__(self, db: Database, until_s: float, pause: Callable[[float], None]) -> None:
        self._db = db
        self._until_s = until_s
        self._pause = pause

    def work_off(self, kind: _Kind, *, most: int | None = None, go_on: Callable[[], bool] = lambda: True) -> int:
        """Take rows of a kind, at most that many, for as long as `go_on` says; return how many there were."""
        size, total = _FEWEST, 0

        def pages() -> Iterator[list[Any]]:
            while (most is None or total < most) and not self.is_over() and go_on():
                at_once = size if most is None else min(size, most - total)
                keys = self._db.rows(f"{kind.sql} LIMIT ?", (*kind.parameters, at_once))
                if not keys:
                    return
                yield [next(iter(row.values())) for row in keys]

        def step(tx: Tx, keys: Sequence[Any]) -> int:
            nonlocal size, total
            began_s = time.monotonic()
            touched = kind.take(tx, keys)
            faster = min(max(_STEP_S / max(time.monotonic() - began_s, 1e-6), 0.5), 2.0)
            size = round(min(max(size * faster, _FEWEST), _MOST))
            total += touched
            return touched

        return self._db.in_steps(pages(), step, rest=_REST, pause=self._pause)

    def is_over(self) -> bool:
        """Tell whether the rest is for the next run."""
        return time.monotonic() >= self._until_s

    def step(self, work: Callable[[], int]) -> int:
        """Do one step, then pause for the others."""
        began = time.monotonic()
        done = work()
        self._pause(_REST * (time.monotonic() - began))
        return done


def _marks(keys: Sequence[Any]) -> str:
    return ", ".join("?" * len(keys))


_FINISHED = "finished_at < ?"
_DELIVERY = "SELECT position, id, place, target, event_id, message_id, finished_at FROM deliveries"


def _still(db: Reads, sql: str, keys: Sequence[Any], fits: Callable[[Row], bool]) -> list[Row]:
    """Return those of the rows that fit still; asked in SQL, SQLite may go by the age of all rows, not by the keys."""
    return [row for row in db.rows(f"{sql} IN ({_marks(keys)})", keys) if fits(row)]


def _texts(place: str, before: str, *, long: bool = False) -> _Kind:
    """What finished deliveries said, and what they were made of."""

    def fits(row: Row) -> bool:
        return row["place"] == place and _is_old(row, before)

    def take(tx: Tx, positions: Sequence[Any]) -> int:
        rows = _still(tx, f"{_DELIVERY} WHERE position", positions, fits)
        events = [row["event_id"] for row in rows if row["target"] == "crm"]
        sends = [row["message_id"] for row in rows if row["target"] == "instagram"]
        tx.run(f"UPDATE events SET payload = NULL, body = NULL, gone = 1 WHERE id IN ({_marks(events)})", events)
        tx.run(f"UPDATE outbound_messages SET content = NULL WHERE id IN ({_marks(sends)})", sends)
        taken = [row["position"] for row in rows]
        return tx.update("deliveries", {"gone": 1}, f"position IN ({_marks(taken)})", taken)

    where = f"deliveries.gone = 0 AND place = ? AND {_FINISHED}"
    if not long:
        return _Kind(f"SELECT position FROM deliveries WHERE {where} ORDER BY finished_at", (place, before), take)
    among = "events CROSS JOIN deliveries ON event_id = events.id"
    where += f" AND length(CAST(body AS BLOB)) > {_LONG_BYTES} AND received_at < ?"
    sql = f"SELECT deliveries.position FROM {among} WHERE {where} ORDER BY received_at"
    return _Kind(sql, (place, before, before), take)


def _long_texts(before: str) -> _Kind:
    """Of what was delivered, the texts that have pages of their own."""
    return _texts("done", before, long=True)


def _is_old(row: Row, before: str) -> bool:
    return row["finished_at"] is not None and row["finished_at"] < before


def _deliveries(before: str) -> _Kind:
    """Finished deliveries with their history and what they were made of."""

    def take(tx: Tx, positions: Sequence[Any]) -> int:
        rows = _still(tx, f"{_DELIVERY} WHERE position", positions, lambda row: _is_old(row, before))
        ids, taken = [row["id"] for row in rows], [row["position"] for row in rows]
        events = [row["event_id"] for row in rows if row["event_id"]]
        messages = list({row["message_id"] for row in rows if row["message_id"]})
        history.forget(tx, [*ids, *events])
        touched = tx.run(f"DELETE FROM deliveries WHERE position IN ({_marks(taken)})", taken)
        tx.run(f"DELETE FROM events WHERE id IN ({_marks(events)})", events)
        # A message stays as long as anything is known of what became of it.
        owed = {
            row["id"]
            for row in tx.rows(
                f"SELECT message_id AS id FROM deliveries WHERE message_id IN ({_marks(messages)})", messages
            )
        }
        over = [one for one in messages if one not in owed]
        history.forget(tx, over)
        tx.run(f"DELETE FROM outbound_messages WHERE id IN ({_marks(over)})", over)
        return touched

    sql = f"SELECT position FROM deliveries WHERE finished_at IS NOT NULL AND {_FINISHED} ORDER BY finished_at"
    return _Kind(sql, (before,), take)


_OLD_EVENTS = "SELECT id FROM events WHERE state = ? AND received_at < ? ORDER BY received_at"


def _events(state: str, before: str) -> _Kind:
    """Events that led to no delivery."""

    def take(tx: Tx, ids: Sequence[Any]) -> int:
        rows = _still(tx, "SELECT id, state FROM events WHERE id", ids, lambda row: row["state"] == state)
        taken = [row["id"] for row in rows]
        history.forget(tx, taken)
        return tx.run(f"DELETE FROM events WHERE id IN ({_marks(taken)})", taken)

    return _Kind(_OLD_EVENTS, (state, before), take)


def _holds(before: str) -> _Kind:
    """What was held back so long ago that no row tells of it any more."""

    def take(tx: Tx, positions: Sequence[Any]) -> int:
        return tx.run(f"DELETE FROM history WHERE position IN ({_marks(positions)})", positions)

    sql = f"SELECT position FROM history WHERE {endpoints.IS_HELD} AND until < ? ORDER BY until"
    return _Kind(sql, (before,), take)


def _unrouted(before: str) -> _Kind:
    """What unrouted events said; they stay as keys, by which their repetitions are known."""

    def take(tx: Tx, ids: Sequence[Any]) -> int:
        rows = _still(tx, "SELECT id, state FROM events WHERE id", ids, lambda row: row["state"] == "unrouted")
        taken = [row["id"] for row in rows]
        dropped = {"state": "dropped", "payload": None}
        return tx.update("events", dropped, f"id IN ({_marks(taken)})", taken)

    return _Kind(_OLD_EVENTS, ("unrouted", before), take)


def _count_unrouted(db: Reads) -> int:
    return int(db.value("SELECT COUNT(*) FROM events WHERE state = 'unrouted'"))
