"""What CRMs are told, in the order in which it was accepted, for those that ask instead of being called.

A position is given out inside a write, and there is one writer at a time over all processes: positions rise in the
order of commits, and none appears below one that was seen.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from crmbridge import log
from crmbridge.errors import Conflict, Invalid
from crmbridge.store import bodies, sqlite
from crmbridge.store.database import Database, Reads, Row, Tx

_CURSOR = re.compile(r"([0-9]{1,15})-([0-9a-z]{8})", re.ASCII)
_EVENT_ID = re.compile(r"evt_[0-9a-z]{26}", re.ASCII)
_LETTERS = 8
_PAGE_BYTES = 1_000_000
_NO_END = 2**62


@dataclass(frozen=True)
class Page:
    """Events as the JSON texts that are pushed, and where the next page begins.

    `expired` counts those before the page's end that retention has taken.
    """

    events: list[str]
    next_cursor: str | None
    has_more: bool
    expired: int


def page(db: Database, accounts: Sequence[Row], *, after: str | None, limit: int) -> Page:
    """Return up to `limit` events of the accounts that follow `after`, a cursor or an event's id.

    Raises Invalid for what is neither, Conflict for one that this database does not know.
    """
    by_id = {account["id"]: account for account in accounts}
    # Up to here everything is committed, so it does no harm that the accounts are read one after the other.
    newest = int(db.value("SELECT MAX(position) FROM events") or 0)
    begin = _oldest(db, by_id) if after is None else _position(db, by_id, after)
    found = sorted(itertools.chain.from_iterable(_next(db, one, begin, newest, limit + 1) for one in by_id))
    rows, taken = _read(db, by_id, found[:limit])
    has_more = taken < len(found)
    end = _last(db, by_id, newest) if not has_more else rows[-1] if rows else None
    if end is None or (after is not None and end["position"] <= begin):
        return Page([], after, has_more, 0)
    _store(db, by_id, [row for row in rows if row["body"] is None and row["rendered"]])
    events = [row["rendered"] for row in rows if row["rendered"]]
    broken = sum(not row["rendered"] and not row["gone"] for row in rows)
    expired = broken + sum(_count_gone(db, one, begin, end["position"]) for one in by_id)
    return Page(events, f"{end['position']}-{end['id'][-_LETTERS:]}", has_more, expired)


def _position(db: Reads, accounts: Collection[str], after: str) -> int:
    """Return the position that a cursor or an event's id stands for."""
    cursor = _CURSOR.fullmatch(after)
    if cursor is None and not _EVENT_ID.fullmatch(after):
        detail = {"field": "after", "problem": "is neither a next_cursor nor an event_id"}
        raise Invalid("after is neither a next_cursor nor an event_id.", code="invalid_cursor", details=[detail])
    if cursor is None:
        row = db.row("SELECT position, account_id FROM events WHERE id = ? AND sequence IS NOT NULL", (after,))
        if row and row["account_id"] in accounts:
            return int(row["position"])
    else:
        position = int(cursor[1])
        row = db.row("SELECT id FROM events WHERE position = ?", (position,))
        # The row may be gone, but a database that was put back from a backup has not come so far yet.
        fits = row["id"].endswith(cursor[2]) if row else position <= (db.value(sqlite.LAST_POSITION) or 0)
        if fits:
            return position
    raise Conflict(
        "This place is not known here (any more): read on after an event that you have, or from the start.",
        code="cursor_unknown",
    )


def _oldest(db: Reads, accounts: Iterable[str]) -> int:
    """Return the position before the first event that is still here."""
    first = [_next(db, one, 0, _NO_END, 1) for one in accounts]
    return min((positions[0] for positions in first if positions), default=_NO_END) - 1


def _next(db: Reads, account_id: str, begin: int, end: int, limit: int) -> list[int]:
    rows = db.rows(
        """
        SELECT position FROM events WHERE sequence IS NOT NULL AND account_id = ? AND gone = 0
            AND position > ? AND position <= ? ORDER BY position LIMIT ?""",
        (account_id, begin, end, limit),
    )
    return [row["position"] for row in rows]


def _last(db: Reads, accounts: Iterable[str], newest: int) -> Row | None:
    """Return the accounts' last event, be it here or gone."""
    found = [
        db.row(
            """
            SELECT position, id FROM events WHERE sequence IS NOT NULL AND account_id = ? AND gone = ?
                AND position <= ? ORDER BY position DESC LIMIT 1""",
            (one, gone, newest),
        )
        for one in accounts
        for gone in (0, 1)
    ]
    return max((row for row in found if row), key=lambda row: int(row["position"]), default=None)


def _count_gone(db: Reads, account_id: str, begin: int, end: int) -> int:
    return int(
        db.value(
            """
            SELECT COUNT(*) FROM events WHERE sequence IS NOT NULL AND account_id = ? AND gone = 1
                AND position > ? AND position <= ?""",
            (account_id, begin, end),
        )
    )


def _read(db: Reads, accounts: Mapping[str, Row], positions: Sequence[int]) -> tuple[list[Row], int]:
    """Return the rows with what is `rendered` of them, as many as fit into a page, and how many positions that took."""
    rows: list[Row] = []
    size = 0
    for taken, position in enumerate(positions):
        row = bodies.at_position(db, position)
        if row is None:
            continue
        row["rendered"] = None if row["gone"] else _rendered(db, accounts[row["account_id"]], row)
        size += len(row["rendered"] or "")
        if rows and size > _PAGE_BYTES:
            return rows, taken
        rows.append(row)
    return rows, len(positions)


def _rendered(db: Reads, account: Row, row: Row) -> str | None:
    try:
        return bodies.of(db, account, row)
    except bodies.UNRENDERABLE as error:
        log.warning("feed.unrendered", event=row["id"], error=type(error).__name__)
        return None


def _store(db: Database, accounts: Mapping[str, Row], rows: Sequence[Row]) -> None:
    """Keep what was rendered, so that a push has the same bytes; where a push was first, take over its own.

    It is rendered anew inside the write: what was taken back meanwhile must not come back.
    """
    if not rows:
        return

    def job(tx: Tx) -> None:
        for row in rows:
            present = bodies.at_position(tx, row["position"])
            if present is None or present["gone"] or present["sequence"] is None:
                row |= {"rendered": None, "gone": 1}
                continue
            row["rendered"] = _rendered(tx, accounts[row["account_id"]], present)
            if present["body"] is None and row["rendered"]:
                tx.update("events", {"body": row["rendered"]}, "position = ?", [row["position"]])

    db.write_last(job)
