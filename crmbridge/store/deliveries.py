"""What is owed to whom: owe, claim, record, release. Knows lanes and leases, not what a message is.

Every function runs inside a write of its caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import pydantic_core

from crmbridge.events import epoch_s, instant, new_id
from crmbridge.store import sqlite
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row

OutcomeKind = Literal["done", "retry", "refused", "in_doubt", "fault", "absent", "unclear"]
CallKind = Literal["call", "look_up"]


@dataclass(frozen=True)
class Patience:
    """How long what is owed to each target is tried, in seconds after it was accepted.

    `ask_s` is how long an event may wait for what the channel is asked about it.
    """

    crm_s: float
    instagram_s: float
    ask_s: float = 0.0

    def of(self, target: Target) -> float:
        """Return it for a target."""
        return self.crm_s if target == "crm" else self.instagram_s


@dataclass(frozen=True, slots=True)
class Claimed:
    """A delivery whose call may be made now by the holder of `claim_id`, with all that the call needs.

    A `look_up` asks the channel whether the last call, number `number`, took effect.
    """

    id: str
    claim_id: str
    target: Target
    account_id: str
    contact: str
    event: str
    event_id: str | None
    message_id: str | None
    body: str
    kind: CallKind
    number: int  # of this attempt, from 1
    ready: int
    retries: int
    waits: int
    look_ups: int
    previous_at: str | None  # when the call before this one began
    accepted_at: str
    expires_at: str
    correlation_id: str
    account: Row
    retry_asked_at: str | None = None  # set: it was dead, and goes behind live traffic
    last_code: str | None = None  # of the call before this one
    last_http_status: int | None = None
    claimed_at: str = ""
    was_due: str = ""
    seen: tuple[str, ...] = ()  # what the look-ups for this call told before: absent or unclear

    @property
    def is_repeatable(self) -> bool:
        """Tell whether its call may be made twice without harm."""
        return is_repeatable(self.event)


SEND, ACTION = "message.send", "action.send"  # what is owed to the channel: messages, and what leaves none
LOOK_UP_FAILED = "look_up_failed"  # the channel did not answer when it was asked for a send in doubt


def rendered(event: dict[str, Any]) -> str:
    """Return the body that a CRM receives; the text is stored, and its UTF-8 bytes are what is signed.

    Raises ValueError for half a surrogate pair and for what is nested too deeply. A number that JSON does not know,
    such as Infinity, becomes null.
    """
    return pydantic_core.to_json(event, inf_nan_mode="null").decode()


def is_repeatable(event: str) -> bool:
    """Tell whether a delivery's call may be made twice without harm: a message would stand there twice."""
    return event != SEND


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call came to. `external_id` is the channel's id of what was sent, `contact` of who got it.

    A look-up finds the send (``done``), or that it is ``absent``, or tells neither (``unclear``).

    `rest_s` is how long the far side asks to be left alone altogether. `stops` names the alert where nothing more
    for this account can succeed for now: all of its kind wait, and the delivery, unless it is refused, stays as it is.
    """

    kind: OutcomeKind
    code: str | None = None
    message: str | None = None
    http_status: int | None = None
    after_s: float | None = None
    counts: bool = True
    at_most: int | None = None  # this many of the retries
    alert: str | None = None
    stops: str | None = None
    external_id: str | None = None
    contact: str | None = None
    rest_s: float = 0
    ms: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the delivery after an outcome."""

    state: Literal["done", "dead", "pending"]
    due: str
    steps_aside: bool = False
    in_doubt: bool = False


_CARRIED = {entry.name for entry in fields(Claimed)} - {
    "claim_id", "body", "kind", "number", "previous_at", "account", "claimed_at", "was_due", "seen",
}  # fmt: skip
# `target = ? || ''`: beside indexes of one target alone a bare mark decides the plan, and SQLite compiles the statement
# anew each time that it is bound.
_BLOCKED = """
    SELECT 1 FROM deliveries
    WHERE state = 'pending' AND target = ? || '' AND account_id = ? AND contact = ? AND ready < 2 LIMIT 1"""


@dataclass(frozen=True, slots=True)
class Debt:
    """A delivery about to be owed. A `crm` debt without `body` is rendered from its event at the first claim."""

    target: Target
    account_id: str
    contact: str
    event: str
    correlation_id: str
    event_id: str | None = None
    message_id: str | None = None


def owe(
    db: Database,
    debt: Debt,
    *,
    now: str,
    expires_at: str,
    body: str | None,
    sequence: int,
    push: bool,
    wait_s: float = 0.0,
) -> str:
    """Store a delivery; it waits behind its lane's head, if there is one, or else for `wait_s`. Return its id.

    Without `push` nobody is called: the CRM reads the event when it asks.
    """
    delivery_id = new_id("dlv")
    lane = (debt.target, debt.account_id, debt.contact)
    db.insert(
        "deliveries",
        {
            "id": delivery_id,
            "target": debt.target,
            "account_id": debt.account_id,
            "contact": debt.contact,
            "sequence": sequence,
            "event": debt.event,
            "event_id": debt.event_id,
            "message_id": debt.message_id,
            "body": body,
            "state": "pending" if push else "done",
            "ready": 0 if push and db.value(_BLOCKED, lane) else 1,
            "due": instant(epoch_s(now) + wait_s) if wait_s else now,
            "last_code": None if push else "not_pushed",
            "correlation_id": debt.correlation_id,
            "accepted_at": now,
            "expires_at": expires_at,
            "finished_at": None if push else now,
        },
    )
    return delivery_id


_DUE = """
    SELECT * FROM deliveries WHERE state = 'pending' AND ready > 0 AND target = ? || '' AND account_id = ? AND due <= ?
        AND retry_asked_at IS NULL AND in_doubt = 0 ORDER BY due LIMIT ?"""
_LOOK_UPS = """
    SELECT * FROM deliveries WHERE state = 'pending' AND in_doubt = 1 AND ready > 0 AND account_id = ? AND due <= ?
        ORDER BY due LIMIT ?"""
_REPLAYS = """
    SELECT *, EXISTS (
        SELECT 1 FROM deliveries AS new WHERE new.state = 'pending' AND new.ready = 0 AND new.retry_asked_at IS NULL
            AND new.target = head.target AND new.account_id = head.account_id AND new.contact = head.contact
        ) AS is_awaited
    FROM deliveries AS head
    WHERE retry_asked_at IS NOT NULL AND state = 'pending' AND ready = 1 AND target = ? || '' AND account_id = ?
    ORDER BY due"""


def due(db: Database, target: str, account_id: str, now: str, limit: int) -> list[Row]:
    """Return the rows of an endpoint that are due, earliest first, but no replays and none in doubt."""
    return db.rows(_DUE, (target, account_id, now, limit))


def in_doubt(db: Database, account_id: str, now: str, limit: int) -> list[Row]:
    """Return the sends of an account that are due to be looked for, earliest first."""
    return db.rows(_LOOK_UPS, (account_id, now, limit))


def first_look_ups(db: Database) -> dict[str, str]:
    """Return the accounts that have sends in doubt, and when the next of these is due to be looked for."""
    rows = db.rows(
        """
        SELECT account_id, MIN(due) AS due FROM deliveries WHERE state = 'pending' AND in_doubt = 1 AND ready > 0
        GROUP BY account_id"""
    )
    return {row["account_id"]: row["due"] for row in rows}


def replays(db: Database, target: str, account_id: str) -> list[Row]:
    """Return the heads of an endpoint's lanes in replay, earliest first; `is_awaited` where something new waits."""
    return db.rows(_REPLAYS, (target, account_id))


def first_behind(db: Database, target: str, account_id: str, contact: str) -> Row | None:
    """Return the first row that waits behind a lane's head."""
    return db.row(
        """
        SELECT * FROM deliveries
        WHERE state = 'pending' AND target = ? || '' AND account_id = ? AND contact = ? AND ready = 0
        ORDER BY sequence LIMIT 1""",
        (target, account_id, contact),
    )


def head_of_the_newest(db: Database, target: str, account_id: str) -> Row | None:
    """Return the head behind which the newest untried row waits, if it came after the head's last call."""
    newest = db.row(
        """
        SELECT contact, accepted_at FROM deliveries
        WHERE state = 'pending' AND ready = 0 AND attempts = 0 AND target = ? || '' AND account_id = ?
        ORDER BY position DESC LIMIT 1""",
        (target, account_id),
    )
    if newest is None:
        return None
    return db.row(
        """
        SELECT * FROM deliveries
        WHERE state = 'pending' AND target = ? || '' AND account_id = ? AND contact = ? AND ready = 1
            AND claim_id IS NULL AND tried_at < ?""",
        (target, account_id, newest["contact"], newest["accepted_at"]),
    )


def hasten_look_ups(db: Database, account_id: str, now: str) -> None:
    """Look at once for the sends that could not be looked for before."""
    db.run(
        """
        UPDATE deliveries SET due = ? WHERE state = 'pending' AND in_doubt = 1 AND claim_id IS NULL
            AND account_id = ? AND due > ? AND last_code = ?""",
        (now, account_id, now, LOOK_UP_FAILED),
    )


def hasten(db: Database, target: str, account_id: str, before: str, now: str, limit: int) -> int:
    """Make up to `limit` rows due now that failed before then and wait for a later try; return how many there were."""
    return db.run(
        """
        UPDATE deliveries SET due = ? WHERE id IN (
            SELECT id FROM deliveries WHERE state = 'pending' AND ready > 0 AND target = ? || '' AND account_id = ?
                AND due > ? AND tried_at < ? AND claim_id IS NULL AND in_doubt = 0 LIMIT ?)""",
        (now, target, account_id, now, before, limit),
    )


def wait_no_more(db: Database, account_id: str, contact: str, now: str) -> None:
    """Let the head of a lane to a CRM go that waited for what the channel was asked."""
    db.run(
        """
        UPDATE deliveries SET due = ? WHERE state = 'pending' AND target = 'crm' AND account_id = ? AND contact = ?
            AND ready = 1 AND attempts = 0 AND due > ?""",
        (now, account_id, contact, now),
    )


def take_back(db: Database, event_id: str) -> bool:
    """Drop a delivery that no CRM was told of yet; tell whether there was one."""
    row = db.row(
        """
        SELECT * FROM deliveries WHERE event_id = ? AND target = 'crm' AND attempts = 0 AND body IS NULL
            AND (state = 'pending' OR last_code = 'not_pushed')""",
        (event_id,),
    )
    if row is None:
        return False
    db.run("DELETE FROM deliveries WHERE id = ?", (row["id"],))
    promote(db, "crm", row["account_id"], row["contact"], row["accepted_at"])
    return True


def next_due(db: Database, target: str, account_id: str) -> str | None:
    """Return when an endpoint's next row is due, replays and doubts aside, or when the lease of one in flight ends."""
    found = db.value(
        """
        SELECT MIN(due) FROM deliveries WHERE state = 'pending' AND ready > 0 AND target = ? || '' AND account_id = ?
            AND retry_asked_at IS NULL AND in_doubt = 0""",
        (target, account_id),
    )
    return str(found) if found else None


def claim(db: Database, row: Row, account: Row, body: str, *, now: str, lease_until: str) -> Claimed:
    """Lease a due row to a fresh claim id and write the attempt, before the call is made."""
    claim_id, kind = new_id("clm"), _kind(row)
    leased: Row = {"claim_id": claim_id, "due": lease_until}
    number = row["attempts"]
    if kind == "call":
        number += 1
        leased |= {"attempts": number, "tried_at": now, "look_ups": 0}
    if row["target"] == "crm":
        leased["body"] = body
    db.update("deliveries", leased, "id = ?", [row["id"]])
    attempt = {"delivery_id": row["id"], "claim_id": claim_id, "kind": kind, "number": number, "started_at": now}
    db.insert("delivery_attempts", attempt)
    carried = {name: row[name] for name in _CARRIED}
    return Claimed(
        claim_id=claim_id,
        body=body,
        kind=kind,
        number=number,
        previous_at=row["tried_at"],
        account=account,
        claimed_at=now,
        was_due=row["due"],
        seen=_seen(db, row) if kind == "look_up" else (),
        **carried,
    )


def _seen(db: Database, row: Row) -> tuple[str, ...]:
    """Return what the look-ups for a send's last call told, in their order; those without an answer told nothing."""
    rows = db.rows(
        """
        SELECT outcome FROM delivery_attempts WHERE delivery_id = ? AND number = ? AND kind = 'look_up'
            AND outcome IN ('absent', 'unclear') ORDER BY position""",
        (row["id"], row["attempts"]),
    )
    return tuple(found["outcome"] for found in rows)


def _kind(row: Row) -> CallKind:
    return "look_up" if row["in_doubt"] else "call"


def record(db: Database, claimed: Claimed, outcome: Outcome, verdict: Verdict, now: str) -> bool:
    """Store what a claimed call came to; False when the claim is no longer the row's, and nothing was changed."""
    finished = None if verdict.state == "pending" else now
    failed = outcome.kind not in ("done", "absent", "unclear") and outcome.stops is None
    leaves = finished or verdict.steps_aside
    touched = db.update(
        "deliveries",
        {
            "state": verdict.state,
            "due": verdict.due,
            "claim_id": None,
            "ready": 2 if verdict.steps_aside else claimed.ready,
            "in_doubt": int(verdict.in_doubt),
            "look_ups": claimed.look_ups + int(outcome.kind in ("absent", "unclear")),
            "retries": claimed.retries + int(failed and outcome.counts),
            "waits": claimed.waits + int(failed and not outcome.counts),
            "last_code": outcome.code,
            "last_http_status": outcome.http_status,
            "last_error": outcome.message,
            "finished_at": finished,
            "latency_ms": latency_ms(claimed.accepted_at, now) if verdict.state == "done" else None,
            "retry_asked_at": None if leaves else claimed.retry_asked_at,
        },
        "id = ? AND claim_id = ? AND state = 'pending'",
        [claimed.id, claimed.claim_id],
    )
    db.update(
        "delivery_attempts",
        {
            "finished_at": now,
            "outcome": outcome.kind,
            "code": outcome.code,
            "http_status": outcome.http_status,
            "error": outcome.message,
            "duration_ms": outcome.ms,
        },
        "delivery_id = ? AND claim_id = ?",
        [claimed.id, claimed.claim_id],
    )
    if touched and verdict.state == "dead":
        note(db, "id = ?", [claimed.id], f"dead {outcome.code}", now)
    elif touched and verdict.steps_aside and claimed.ready < 2:
        note(db, "id = ?", [claimed.id], "stepped_aside", now)
    if touched and claimed.ready == 0 and verdict.state == "done":
        # It went past its lane's head: so the far side works, and the head steps aside.
        where = "state = 'pending' AND target = ? || '' AND account_id = ? AND contact = ? AND ready = 1"
        lane = [claimed.target, claimed.account_id, claimed.contact]
        note(db, where, lane, "stepped_aside", now)
        db.update("deliveries", {"ready": 2, "retry_asked_at": None}, where, lane)
    if touched and leaves:
        promote(db, claimed.target, claimed.account_id, claimed.contact, now)
    return bool(touched)


def latency_ms(accepted_at: str, now: str) -> int:
    """Return how long ago a delivery was accepted, in milliseconds."""
    return max(round((epoch_s(now) - epoch_s(accepted_at)) * 1000), 0)


def note(db: Database, where: str, parameters: Sequence[Any], note: str, now: str) -> None:
    """Write down what became of deliveries without a call, for the one who asks what happened to them."""
    db.run(f"UPDATE deliveries SET notes = COALESCE(notes, '') || ? WHERE {where}", (f"{now} {note}\n", *parameters))


def end(db: Database, row: Row, state: Literal["done", "dead"], code: str, message: str | None, now: str) -> None:
    """End a delivery without a call, and let the next of its lane go."""
    ended: Row = {"state": state, "claim_id": None, "in_doubt": 0, "last_code": code, "last_error": message}
    if state == "done" and row["attempts"] and code != "cancelled":
        ended["latency_ms"] = latency_ms(row["accepted_at"], now)
    db.update("deliveries", {**ended, "finished_at": now, "retry_asked_at": None}, "id = ?", [row["id"]])
    note(db, "id = ?", [row["id"]], f"{state} {code}", now)
    if row["claim_id"] is not None:
        overtaken = {"finished_at": now, "outcome": "abandoned", "code": code}
        db.update("delivery_attempts", overtaken, "delivery_id = ? AND claim_id = ?", [row["id"], row["claim_id"]])
    promote(db, row["target"], row["account_id"], row["contact"], now)


def promote(db: Database, target: Target, account_id: str, contact: str, now: str) -> None:
    """Make the first waiting row the lane's head, unless the lane has one."""
    lane = (target, account_id, contact)
    if db.value(_BLOCKED.replace("ready < 2", "ready = 1"), lane):
        return
    db.run(
        """
        UPDATE deliveries SET ready = 1, due = ? WHERE id = (
            SELECT id FROM deliveries
            WHERE state = 'pending' AND target = ? || '' AND account_id = ? AND contact = ? AND ready = 0
            ORDER BY sequence LIMIT 1)""",
        (now, *lane),
    )


def first_try(db: Database, delivery_id: str) -> str | None:
    """Return when the first call of a delivery began, or None."""
    sql = "SELECT MIN(started_at) FROM delivery_attempts WHERE delivery_id = ? AND kind = 'call'"
    found = db.value(sql, (delivery_id,))
    return str(found) if found else None


def abandoned(db: Database) -> list[Row]:
    """Return the rows that a worker which no longer runs had claimed."""
    return db.rows("SELECT * FROM deliveries WHERE claim_id IS NOT NULL")


def release(db: Database, row: Row, *, due: str, in_doubt: bool, now: str) -> None:
    """Take a row back from a worker that never reported; its call may have taken effect."""
    released = {"claim_id": None, "due": due, "in_doubt": int(in_doubt), "last_code": "abandoned"}
    if in_doubt and not row["in_doubt"]:
        released["retries"] = row["retries"] + 1
    db.update("deliveries", released, "id = ?", [row["id"]])
    db.run(
        """
        UPDATE delivery_attempts SET finished_at = ?, outcome = 'abandoned', code = 'abandoned'
        WHERE delivery_id = ? AND claim_id = ?""",
        (now, row["id"], row["claim_id"]),
    )


def tried_send(db: Database, account_id: str, contact: str) -> Row | None:
    """Return the send to a contact that was tried and is not settled, if there is one."""
    return db.row(
        """
        SELECT * FROM deliveries WHERE state = 'pending' AND target = 'instagram' AND account_id = ? AND contact = ?
            AND ready = 1 AND attempts > 0 AND event = ? LIMIT 1""",
        (account_id, contact, SEND),
    )


def tried_behind(db: Database, account_id: str, contact: str) -> list[Row]:
    """Return the sends to a contact that were tried, died, were revived and wait behind another one."""
    return db.rows(
        """
        SELECT * FROM deliveries WHERE state = 'pending' AND target = 'instagram' AND account_id = ? AND contact = ?
            AND ready = 0 AND attempts > 0""",
        (account_id, contact),
    )


def given_up_in_doubt(db: Database, account_id: str, contact: str) -> list[Row]:
    """Return the sends to a contact that ended without our knowing whether they had gone out."""
    return db.rows(
        """
        SELECT * FROM deliveries WHERE state = 'dead' AND target = 'instagram' AND last_code = 'in_doubt'
            AND account_id = ? AND contact = ?""",
        (account_id, contact),
    )


# A private reply's lane is its comment's: the channel tells only later whom it reaches.
COMMENT_LANE = "comment:"
_PRIVATE_REPLIES = "target = 'instagram' AND account_id = ? AND contact >= 'comment:' AND contact < 'comment;'"


def doubtful_replies(db: Database, account_id: str) -> list[Row]:
    """Return the private replies that were tried and are not settled, or ended in doubt."""
    return db.rows(
        f"""
        SELECT * FROM deliveries WHERE state = 'pending' AND {_PRIVATE_REPLIES} AND ready = 1 AND attempts > 0
        UNION ALL
        SELECT * FROM deliveries WHERE state = 'dead' AND last_code = 'in_doubt' AND {_PRIVATE_REPLIES}""",
        (account_id, account_id),
    )


def headless(db: Database) -> list[Row]:
    """Return the lanes in which rows wait behind nobody."""
    return db.rows(
        """
        SELECT DISTINCT target, account_id, contact FROM deliveries AS waiting
        WHERE state = 'pending' AND ready = 0 AND NOT EXISTS (
            SELECT 1 FROM deliveries AS head
            WHERE head.state = 'pending' AND head.target = waiting.target AND head.account_id = waiting.account_id
                AND head.contact = waiting.contact AND head.ready = 1)"""
    )


_EXPIRED = """
    FROM deliveries JOIN accounts ON accounts.id = account_id
    WHERE state = 'pending' AND expires_at < ? AND claim_id IS NULL
        AND (accounts.status = 'active' OR (accounts.status = 'error' AND target = 'crm'))
        AND (target <> 'crm' OR crm_webhook_url IS NOT NULL)
        AND NOT EXISTS (
            SELECT 1 FROM pauses
            WHERE pauses.account_id = deliveries.account_id AND pauses.target = deliveries.target)
        AND NOT EXISTS (
            SELECT 1 FROM holds WHERE holds.account_id = deliveries.account_id AND holds.target = deliveries.target
                AND holds.target = 'crm' AND holds.trial_since IS NULL)"""


def expired(db: Database, before: str, limit: int) -> list[str]:
    """Return the ids of rows that nothing holds, whose time ended before then without a call in flight."""
    rows = db.rows(f"SELECT deliveries.id {_EXPIRED} ORDER BY expires_at LIMIT ?", (before, limit))
    return [row["id"] for row in rows]


def still_expired(db: Database, delivery_id: str, before: str) -> Row | None:
    """Return a row if nothing holds it and its time ended before then without a call in flight."""
    return db.row(f"SELECT deliveries.* {_EXPIRED} AND deliveries.id = ?", (before, delivery_id))


def ending_before(db: Database, before: tuple[str, int], limit: int) -> list[Row]:
    """Return the place and the end of pending rows that end before an end and position, the latest first."""
    return db.rows(
        """
        SELECT position, expires_at, target, account_id FROM deliveries
        WHERE state = 'pending' AND (expires_at, position) < (?, ?)
        ORDER BY expires_at DESC, position DESC LIMIT ?""",
        (*before, limit),
    )


def postpone(db: Database, seconds: float, at_most: str, positions: Sequence[int]) -> None:
    """Move the end of pending rows, for time that does not count, to no later than `at_most`."""
    later = sqlite.shifted_at_most("expires_at")
    db.run(
        f"UPDATE deliveries SET expires_at = {later} WHERE state = 'pending' AND position IN ({_marks(positions)})",
        (f"{seconds:+.3f}", at_most, *positions),
    )


def follow_clock(db: Database, seconds: float, newest: int | None) -> None:
    """Move all times that lie ahead along with a clock that was set, up to the delivery at `newest`."""
    due, expires = sqlite.shifted("due"), sqlite.shifted("expires_at")
    where, parameters = ("", []) if newest is None else (" AND position <= ?", [newest])
    db.run(
        f"UPDATE deliveries SET due = {due}, expires_at = {expires} WHERE state = 'pending'{where}",
        [f"{seconds:+.3f}", f"{seconds:+.3f}", *parameters],
    )


def revive(
    db: Database, rows: Sequence[Row], *, now: str, expires_at: str, asked_at: str | None, by: str | None = None
) -> None:
    """Owe dead deliveries of one lane again, in their old places in it, with their retries unused."""
    target, account_id, contact = lane = [rows[0][name] for name in ("target", "account_id", "contact")]
    fresh = {"state": "pending", "ready": 0, "due": now, "expires_at": expires_at, "finished_at": None}
    fresh |= {"retries": 0, "waits": 0, "in_doubt": 0, "retry_asked_at": asked_at}
    these, positions = f"position IN ({', '.join('?' * len(rows))})", [row["position"] for row in rows]
    db.update("deliveries", fresh, these, positions)
    note(db, these, positions, f"revived {by}" if by else "revived", now)
    # A send that was tried stays in front: its echo may still come.
    later = "ready = 1 AND claim_id IS NULL AND in_doubt = 0 AND (target = 'crm' OR attempts = 0) AND sequence > ?"
    where = f"state = 'pending' AND target = ? || '' AND account_id = ? AND contact = ? AND {later}"
    db.update("deliveries", {"ready": 0}, where, [*lane, min(row["sequence"] for row in rows)])
    promote(db, target, account_id, contact, now)


# Where nothing goes any more: an account that is deleted, a CRM without a URL.
_UNSERVED = "(accounts.deleted_at IS NOT NULL OR (target = 'crm' AND crm_webhook_url IS NULL))"
_ASKED = "retry_asked_at IS NOT NULL AND state = 'dead'"


def unserved(db: Database) -> list[Row]:
    """Return the endpoints where something is owed though nothing goes there any more; `deleted_at` tells why."""
    return db.rows(
        f"""
        SELECT target, accounts.id AS account_id, accounts.deleted_at
        FROM accounts CROSS JOIN (SELECT 'crm' AS target UNION ALL SELECT 'instagram') AS targets
        WHERE {_UNSERVED} AND (
            EXISTS (SELECT 1 FROM deliveries WHERE state = 'pending' AND {_OF_ENDPOINT})
            OR EXISTS (SELECT 1 FROM deliveries WHERE {_ASKED} AND {_OF_ENDPOINT}))"""
    )


_OF_ENDPOINT = "deliveries.target = targets.target AND deliveries.account_id = accounts.id"


def left_over(db: Database, endpoint: Row, limit: int) -> list[Row]:
    """Return rows of an unserved endpoint that are owed or asked for; none when it is served again."""
    these = "target = ? AND account_id = ?"
    key = [endpoint["target"], endpoint["account_id"]]
    if not db.value(f"SELECT 1 FROM accounts, (SELECT ? AS target) AS wanted WHERE id = ? AND {_UNSERVED}", key):
        return []
    found: list[Row] = []
    for owed in ("state = 'pending'", _ASKED):
        sql = f"SELECT position, state, message_id FROM deliveries WHERE {owed} AND {these} LIMIT ?"
        found += db.rows(sql, (*key, limit - len(found)))
    return found


def end_all(
    db: Database, rows: Sequence[Row], state: Literal["done", "dead"], code: str, message: str | None, now: str
) -> None:
    """End pending deliveries whose lanes go no further, without a call, and ask no more for dead ones."""
    owed, asked = ([row["position"] for row in rows if row["state"] == kind] for kind in ("pending", "dead"))
    db.run(
        f"""
        UPDATE deliveries SET state = ?, claim_id = NULL, in_doubt = 0, last_code = ?, last_error = ?, finished_at = ?,
            retry_asked_at = NULL, notes = COALESCE(notes, '') || ? WHERE position IN ({_marks(owed)})""",
        (state, code, message, now, f"{now} {state} {code}\n", *owed),
    )
    db.update("deliveries", {"retry_asked_at": None}, f"position IN ({_marks(asked)})", asked)


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
