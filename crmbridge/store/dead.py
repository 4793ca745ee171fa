"""Dead deliveries: list them, owe one again, ask for many and let these back in bit by bit, want some no more."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from crmbridge.endpoints import REPLAY_BURST, Room
from crmbridge.errors import Conflict, Invalid, NotFound
from crmbridge.events import instant
from crmbridge.store import accounts, deliveries, holds, inbound, messages
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Patience

_SAID: dict[str, str] = {
    "account_deleted": "Its account was deleted.",
    "content_gone": "Its content is gone: retention erased it.",
    "not_pushed": "The account has no crm_webhook_url.",
    "in_doubt": "It may have arrived, and would arrive twice: look into Instagram, then use force.",
}
_LANES = 3  # of one endpoint in replay at a time
_LANE_STEP, _LANE_LOW = 10, 3  # rows of a lane let back in at once, and when the next ones follow
_AT_ONCE = 200
_EVENTS = (*inbound.TOLD, *messages.TOLD, deliveries.SEND, deliveries.ACTION)
# Why a dead row cannot be tried again; a send in doubt can, by force.
_BECAUSE = """
    CASE WHEN account.id IS NULL OR account.deleted_at IS NOT NULL THEN 'account_deleted'
        WHEN dead.target = 'instagram' AND message.content IS NULL THEN 'content_gone'
        WHEN dead.target = 'crm' AND dead.body IS NULL AND heard.payload IS NULL THEN 'content_gone'
        WHEN dead.target = 'crm' AND account.crm_webhook_url IS NULL THEN 'not_pushed'
        WHEN dead.target = 'instagram' AND dead.last_code = 'in_doubt' THEN 'in_doubt' END"""
_DEAD = """
    FROM deliveries AS dead LEFT JOIN accounts AS account ON account.id = dead.account_id
        LEFT JOIN outbound_messages AS message ON message.id = dead.message_id
        LEFT JOIN inbound_events AS heard ON heard.id = dead.event_id
    WHERE dead.state = 'dead'"""


@dataclass(frozen=True)
class Filter:
    """Which dead deliveries are meant; None: any. Times are `instant` text, and the ends are included."""

    target: Target
    account_id: str | None = None
    event: str | None = None
    code: str | None = None
    dead_after: str | None = None
    dead_before: str | None = None


@dataclass(frozen=True)
class Asked:
    """How many rows match, how many of these are asked for now, were before, or are left out, and why."""

    matching: int
    asked: int
    already_asked: int
    left_out: dict[str, int]


def check(db: Database, wanted: Filter) -> None:
    """Raise NotFound for an account that never was, Invalid for what no dead delivery can match."""
    if wanted.account_id is not None and wanted.account_id not in accounts.ids(db):
        raise NotFound(f"There is no account {wanted.account_id}.", code="account_not_found")
    if wanted.event is not None and wanted.event not in _EVENTS:
        detail = {"field": "event", "problem": "must be one of " + ", ".join(_EVENTS)}
        raise Invalid(f"There is no event {wanted.event}; known: {', '.join(_EVENTS)}.", details=[detail])
    if (wanted.dead_after or "") > (wanted.dead_before or "~"):
        detail = {"field": "dead_after", "problem": "must not be later than dead_before"}
        raise Invalid("Nothing can have died after dead_after and before dead_before.", details=[detail])


def page(db: Database, wanted: Filter, *, after: tuple[str, int] | None, limit: int) -> list[Row]:
    """Return dead rows in the order of their death, after the one with that (finished_at, position).

    Each has `because`: why it cannot be tried again, or None.
    """
    where, parameters = _matching(wanted)
    if after is not None:
        where += " AND (dead.finished_at, dead.position) > (?, ?)"
        parameters += after
    return db.rows(
        f"SELECT dead.*, {_BECAUSE} AS because {_DEAD}{where} ORDER BY dead.finished_at, dead.position LIMIT ?",
        (*parameters, limit),
    )


def _matching(wanted: Filter) -> tuple[str, list[Any]]:
    where = " AND dead.target = ?"
    parameters: list[Any] = [wanted.target]
    for column, sign, value in (
        ("account_id", "=", wanted.account_id),
        ("event", "=", wanted.event),
        ("last_code", "=", wanted.code),
        ("finished_at", ">=", wanted.dead_after),
        ("finished_at", "<=", wanted.dead_before),
    ):
        if value is not None:
            where += f" AND dead.{column} {sign} ?"
            parameters.append(value)
    return where, parameters


# --- one, at once ---


def find(db: Database, name: str) -> Row | None:
    """Return the delivery with an id, or the send of the message with that id; None when there is none."""
    if name.startswith("msg_"):
        return db.row("SELECT * FROM deliveries WHERE message_id = ? AND target = 'instagram'", (name,))
    return db.row("SELECT * FROM deliveries WHERE id = ?", (name,))


def revive(
    db: Database, delivery_id: str, now_s: float, patience: Patience, *, force: bool = False, by: str | None = None
) -> None:
    """Owe a dead delivery again, at once, and note `by` whom. Raises Conflict as `retryable` does."""

    def job() -> None:
        _owe_again(db, [retryable(db, delivery_id, force=force)], now_s, patience, asked_at=None, by=by)

    db.write(job)


def retryable(db: Database, delivery_id: str, *, force: bool) -> Row:
    """Return a dead delivery that can be tried again. Raises Conflict, with the reason as its code, for another."""
    row = _dead(db, delivery_id)
    because: str | None = row["because"]
    if because is not None and not (force and because == "in_doubt"):
        raise Conflict(_SAID[because], code=because)
    return row


def _dead(db: Database, delivery_id: str) -> Row:
    row = db.row(f"SELECT dead.*, {_BECAUSE} AS because {_DEAD} AND dead.id = ?", (delivery_id,))
    if row is None:
        raise Conflict("It is not dead: it was delivered, or is being tried.", code="not_dead")
    return row


def _owe_again(
    db: Database,
    rows: Sequence[Row],
    now_s: float,
    patience: Patience,
    *,
    asked_at: str | None,
    by: str | None = None,
) -> None:
    """Put dead rows of one lane back into it, in front of what came after them and was not sent yet."""
    target, now = rows[0]["target"], instant(now_s)
    if target == "instagram":
        for row in rows:
            messages.revive(db, row["message_id"], now)
    expires_at = instant(now_s + patience.of(target))
    deliveries.revive(db, rows, now=now, expires_at=expires_at, asked_at=asked_at, by=by)


# --- what the CRM refused our signature for ---

MENDED = "mended"  # by whom a delivery was revived: a person mended what the 401 was about


def release(db: Database, account: Row, target: Target, now_s: float, patience: Patience) -> tuple[bool, int]:
    """End what a far side's answer holds back, as a person says that it is mended.

    First what the CRM's 401 ended is put back, in its old order: all of it, and each event once. Return whether there
    was a hold, and how many were put back.
    """
    again = _reinstate(db, account["id"], now_s, patience) if target == "crm" else 0
    return holds.let_go(db, account, target, now=instant(now_s), patience=patience), again


def _reinstate(db: Database, account_id: str, now_s: float, patience: Patience) -> int:
    sql = f"""
        SELECT dead.*, {_BECAUSE} AS because {_DEAD} AND dead.target = 'crm' AND dead.account_id = ?
            AND dead.last_code = 'crm_unauthorized' AND instr(COALESCE(dead.notes, ''), ' revived {MENDED}') = 0
            AND ({_BECAUSE}) IS NULL AND (dead.contact, dead.sequence) > (?, ?)
        ORDER BY dead.contact, dead.sequence LIMIT {_AT_ONCE}"""
    after: tuple[str, int] = ("", -1)
    again = 0
    while rows := db.rows(sql, (account_id, *after)):
        again += db.write(functools.partial(_reinstate_some, db, rows, now_s, patience))
        after = (rows[-1]["contact"], rows[-1]["sequence"])
    return again


def _reinstate_some(db: Database, rows: Sequence[Row], now_s: float, patience: Patience) -> int:
    again = 0
    for _, lane in itertools.groupby(rows, key=lambda row: str(row["contact"])):
        still = [row for row in lane if db.value("SELECT state FROM deliveries WHERE id = ?", (row["id"],)) == "dead"]
        if still:
            _owe_again(db, still, now_s, patience, asked_at=None, by=MENDED)
        again += len(still)
    return again


# --- many: ask for them, then let them in bit by bit ---


def ask(db: Database, wanted: Filter, now_s: float, *, force: bool, preview: bool, by: str | None = None) -> Asked:
    """Have all matching rows tried again that can be, behind live traffic; with `preview`, only count them.

    Only marks them, and notes `by` whom: the engine lets them back in, lane by lane. What dies from now on is not
    meant.
    """
    now = instant(now_s)
    wanted = _until(wanted, now)
    where, parameters = _matching(wanted)
    counts = db.rows(
        f"SELECT {_BECAUSE} AS because, dead.retry_asked_at IS NOT NULL AS was_asked, COUNT(*) AS number {_DEAD}{where}"
        " GROUP BY 1, 2",
        parameters,
    )
    asked, already_asked = 0, 0
    left_out: dict[str, int] = dict.fromkeys(_SAID, 0)
    for row in counts:
        if row["was_asked"]:
            already_asked += row["number"]
        elif row["because"] and not (force and row["because"] == "in_doubt"):
            left_out[row["because"]] += row["number"]
        else:
            asked += row["number"]
    matching = sum(row["number"] for row in counts)
    if not preview:
        asked = _mark(db, where, parameters, now, force=force, by=by)
    return Asked(matching, asked, already_asked, left_out)


def _until(wanted: Filter, now: str) -> Filter:
    return replace(wanted, dead_before=min(wanted.dead_before or now, now))


def _mark(db: Database, where: str, parameters: Sequence[Any], now: str, *, force: bool, by: str | None) -> int:
    """Mark the rows that match, oldest first, a step to a commit; return how many there were."""
    # What is to be marked is looked for outside the write lock; what becomes impossible meanwhile is left out later.
    able = f"COALESCE({_BECAUSE}, 'in_doubt') = 'in_doubt'" if force else f"({_BECAUSE}) IS NULL"
    sql = f"""
        SELECT dead.finished_at, dead.position {_DEAD}{where} AND dead.retry_asked_at IS NULL AND {able}
            AND (dead.finished_at, dead.position) > (?, ?)
        ORDER BY dead.finished_at, dead.position LIMIT {_AT_ONCE}"""
    total, after = 0, ("", 0)
    while rows := db.rows(sql, (*parameters, *after)):
        total += db.write(functools.partial(_mark_these, db, [row["position"] for row in rows], now, by))
        after = (rows[-1]["finished_at"], rows[-1]["position"])
    return total


def _mark_these(db: Database, positions: list[int], now: str, by: str | None) -> int:
    these = f"position IN ({', '.join('?' * len(positions))}) AND state = 'dead' AND retry_asked_at IS NULL"
    these += " AND account_id IN (SELECT id FROM accounts WHERE deleted_at IS NULL)"
    if by is not None:
        deliveries.note(db, these, positions, f"asked {by}", now)
    return db.update("deliveries", {"retry_asked_at": now}, these, positions)


# --- what nobody wants any more ---


def discard(db: Database, delivery_id: str, now_s: float, *, by: str, preview: bool = False) -> None:
    """End a dead delivery for good, though its content stays as long as it would. Raises Conflict when it is not dead.

    With `preview` only that is found out.
    """

    def job() -> None:
        position = _dead(db, delivery_id)["position"]
        if not preview:
            _discard(db, [position], instant(now_s), by)

    db.write(job)


def discard_all(db: Database, wanted: Filter, now_s: float, *, by: str, preview: bool = False) -> int:
    """End all dead deliveries that match, a step to a commit; return how many. With `preview`, only count them."""
    now, total, after = instant(now_s), 0, None
    wanted = _until(wanted, now)
    while rows := page(db, wanted, after=after, limit=_AT_ONCE):
        positions = [row["position"] for row in rows]
        total += len(rows) if preview else db.write(functools.partial(_discard, db, positions, now, by))
        after = (rows[-1]["finished_at"], rows[-1]["position"])
    return total


def _discard(db: Database, positions: Sequence[int], now: str, by: str) -> int:
    these = f"position IN ({', '.join('?' * len(positions))}) AND state = 'dead'"
    deliveries.note(db, these, positions, f"discarded {by}", now)
    ended = {"state": "done", "last_code": "discarded", "retry_asked_at": None}
    return db.update("deliveries", ended, these, positions)


def is_any_asked(db: Database) -> bool:
    """Tell whether there is a row that was asked for and is not done."""
    return db.value("SELECT 1 FROM deliveries WHERE retry_asked_at IS NOT NULL LIMIT 1") is not None


def let_in(db: Database, target: Target, account_id: str, room: Room, now_s: float, patience: Patience) -> int | None:
    """Let rows that were asked for back in: whole lanes, oldest first, a few lanes at a time.

    A lane is begun only when its rows, up to a burst, may go in one go, so that what comes new in it waits
    for a moment at most. Once begun it is kept filled until it is through: nothing later overtakes its rows.
    Returns how many replays must be free before the next lane can begin, or None when none waits for that.
    """
    endpoint = (target, account_id)
    waiting = {row["contact"]: row["number"] for row in db.rows(_WAITING, endpoint)}
    for contact, number in waiting.items():
        if number < _LANE_LOW:
            waiting[contact] += _fill(db, endpoint, contact, now_s, patience)
    most = 1 if room.probe else _LANES
    while len(waiting) < most:
        taken: int = sum(waiting.values())
        if room.replays <= taken:
            return taken + 1 if db.value(_OLDEST.format(""), endpoint) else None
        others = f" AND contact NOT IN ({', '.join('?' * len(waiting))})" if waiting else ""
        contact = db.value(_OLDEST.format(others), (*endpoint, *waiting))
        if contact is None:
            return None
        wanted = taken + int(db.value(_SIZE, (*endpoint, contact, REPLAY_BURST)))
        if room.calls <= 0 or room.replays < wanted:
            return wanted
        waiting[contact] = _fill(db, endpoint, contact, now_s, patience)
    return None


_WAITING = """
    SELECT contact, COUNT(*) AS number FROM deliveries
    WHERE retry_asked_at IS NOT NULL AND state = 'pending' AND target = ? AND account_id = ? GROUP BY contact"""
_OLDEST = """
    SELECT contact FROM deliveries
    WHERE state = 'dead' AND retry_asked_at IS NOT NULL AND target = ? AND account_id = ?{}
    ORDER BY finished_at LIMIT 1"""
_SIZE = """
    SELECT COUNT(*) FROM (
        SELECT 1 FROM deliveries WHERE state = 'dead' AND retry_asked_at IS NOT NULL AND target = ? AND account_id = ?
            AND contact = ? LIMIT ?) AS rows_of_lane"""


def _fill(db: Database, endpoint: tuple[Target, str], contact: str, now_s: float, patience: Patience) -> int:
    """Let the next rows of a lane in; return how many."""
    rows = db.rows(
        f"""
        SELECT dead.*, {_BECAUSE} AS because {_DEAD} AND dead.retry_asked_at IS NOT NULL AND dead.target = ?
            AND dead.account_id = ? AND dead.contact = ? ORDER BY dead.sequence LIMIT ?""",
        (*endpoint, contact, _LANE_STEP),
    )
    able = [row for row in rows if row["because"] in (None, "in_doubt")]
    for row in rows:
        if row not in able:  # its content went while it waited
            db.update("deliveries", {"retry_asked_at": None}, "id = ?", [row["id"]])
    if able:
        _owe_again(db, able, now_s, patience, asked_at=able[0]["retry_asked_at"])
    return len(able)
