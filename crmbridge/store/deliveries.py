"""What is owed to whom: owe, claim, record, release. Knows lanes and leases, not what a message is.

What takes a `Tx` runs inside a write of its caller.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from crmbridge.events import epoch_s, instant, new_id
from crmbridge.store import history, sqlite
from crmbridge.store.contacts import Target
from crmbridge.store.database import Reads, Row, Tx

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
    place: str
    retries: int
    waits: int
    look_ups: int
    previous_at: str | None  # when the call before this one began
    accepted_at: str
    correlation_id: str
    account: Row
    revision: int  # of its endpoint, when it was claimed
    expires_at: str  # no further try after this
    is_revived: bool  # it was dead, and goes behind live traffic
    is_on_trial: bool = False  # it is to show whether its endpoint is well again
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
    "claim_id", "body", "kind", "number", "previous_at", "account", "claimed_at", "was_due", "seen", "revision",
    "expires_at", "is_revived", "is_on_trial",
}  # fmt: skip
# `target = ? || ''`: beside indexes of one target alone a bare mark decides the plan, and SQLite compiles the statement
# anew each time that it is bound.
_IN_FRONT = """
    (SELECT {} FROM deliveries AS other
    WHERE other.finished_at IS NULL AND other.target = ? || '' AND other.account_id = ? AND other.contact = ?
        AND other.place IN ('behind', 'head') AND other.id <> ?
    ORDER BY other.place DESC LIMIT 1)"""  # 'head' before 'behind'
_HEAD_OR_BEHIND = f"CASE WHEN EXISTS {_IN_FRONT.format(1)} THEN 'behind' ELSE 'head' END"


_GO_AHEAD = """
    UPDATE deliveries SET revived = 0
    WHERE finished_at IS NULL AND revived = 1 AND target = ? || '' AND account_id = ? AND contact = ?"""


@dataclass(frozen=True, slots=True)
class Debt:
    """A delivery about to be owed."""

    target: Target
    account_id: str
    contact: str
    event: str
    correlation_id: str
    event_id: str | None = None
    message_id: str | None = None


def owe(tx: Tx, debt: Debt, *, push: bool = True, wait_s: float = 0.0) -> str:
    """Store a delivery; it waits behind its lane's head, if there is one, or else for `wait_s`. Return its id.

    Without `push` nobody is called: the CRM reads the event when it asks.
    """
    delivery_id = new_id("dlv")
    values: Row = {
        "id": delivery_id,
        "target": debt.target,
        "account_id": debt.account_id,
        "contact": debt.contact,
        "event": debt.event,
        "event_id": debt.event_id,
        "message_id": debt.message_id,
        "due": instant(tx.now_s + wait_s) if wait_s else tx.now,
        "correlation_id": debt.correlation_id,
        "accepted_at": tx.now,
        "aged_from": tx.now,
    }
    if not push:
        tx.insert("deliveries", {**values, "place": "done", "last_code": "not_pushed", "finished_at": tx.now})
        return delivery_id
    lane = (debt.target, debt.account_id, debt.contact)
    in_front = (*lane, delivery_id)
    sql = f"""
        INSERT INTO deliveries ({", ".join(values)}, place) VALUES ({_marks(values)}, {_HEAD_OR_BEHIND})
        RETURNING {_IN_FRONT.format("revived")}"""
    if tx.value(sql, (*values.values(), *in_front, *in_front)):
        tx.run(_GO_AHEAD, lane)  # something new must not wait for all that was dead: its conversation goes first
    return delivery_id


FRESH, TRIED, REVIVED = 0, 1, 2  # what goes first, and what last
_RANKED = """place IN ('head', 'aside') AND in_doubt = 0
        AND (CASE WHEN revived THEN 2 ELSE attempts > 0 END)"""
_DUE = {
    rank: f"""
    SELECT * FROM deliveries WHERE {_RANKED} = {rank} AND target = ? || '' AND account_id = ? ORDER BY due LIMIT ?"""
    for rank in (FRESH, TRIED, REVIVED)
}
# For each endpoint of the outer query: when its next row of each rank is due, and its next look-up.
DUES = ", ".join(
    f"(SELECT MIN(due) FROM deliveries WHERE {which} AND account_id = endpoints.account_id) AS {name}"
    for name, which in (
        *((f"due_{rank}", f"{_RANKED} = {rank} AND target = endpoints.kind") for rank in (FRESH, TRIED, REVIVED)),
        ("due_look_up", "place IN ('head', 'aside') AND in_doubt = 1 AND endpoints.kind = 'instagram'"),
    )
)
_LOOK_UPS = """
    SELECT * FROM deliveries WHERE place IN ('head', 'aside') AND in_doubt = 1 AND account_id = ? AND due <= ?
        ORDER BY due LIMIT ?"""


def due(db: Reads, target: str, account_id: str, rank: int, limit: int) -> list[Row]:
    """Return what an endpoint is to get, what is due first at the front, of one rank: never tried, tried, once dead."""
    return db.rows(_DUE[rank], (target, account_id, limit))


def in_doubt(db: Reads, account_id: str, now: str, limit: int) -> list[Row]:
    """Return the sends of an account that are due to be looked for, earliest first."""
    return db.rows(_LOOK_UPS, (account_id, now, limit))


def next_after(db: Reads, delivery_id: str) -> Row | None:
    """Return the row that goes after a delivery in its lane: the first one behind it, or the head where it is over."""
    return db.row(
        """
        SELECT after.* FROM deliveries AS before JOIN deliveries AS after
            ON after.target = before.target AND after.account_id = before.account_id AND after.contact = before.contact
        WHERE before.id = ? AND after.finished_at IS NULL AND after.place IN ('head', 'behind')
            AND after.id <> before.id
        ORDER BY after.place = 'behind', after.position LIMIT 1""",
        (delivery_id,),
    )


def head_of_the_newest(db: Reads, target: str, account_id: str) -> Row | None:
    """Return the head behind which the newest untried row waits, if it came after the head's last call."""
    newest = db.row(
        """
        SELECT contact, accepted_at FROM deliveries
        WHERE place = 'behind' AND attempts = 0 AND target = ? || '' AND account_id = ?
        ORDER BY position DESC LIMIT 1""",
        (target, account_id),
    )
    if newest is None:
        return None
    return db.row(
        """
        SELECT * FROM deliveries
        WHERE finished_at IS NULL AND target = ? || '' AND account_id = ? AND contact = ? AND place = 'head'
            AND claim_id IS NULL AND tried_at < ?""",
        (target, account_id, newest["contact"], newest["accepted_at"]),
    )


def hasten_look_ups(tx: Tx, account_id: str) -> None:
    """Look at once for the sends that could not be looked for before."""
    tx.run(
        """
        UPDATE deliveries SET due = ? WHERE place IN ('head', 'aside') AND in_doubt = 1 AND claim_id IS NULL
            AND account_id = ? AND due > ? AND last_code = ?""",
        (tx.now, account_id, tx.now, LOOK_UP_FAILED),
    )


def hasten(tx: Tx, target: str, account_id: str, before: str, limit: int) -> int:
    """Make up to `limit` rows due now that failed before then and wait for a later try; return how many there were."""
    return tx.run(
        f"""
        UPDATE deliveries SET due = ? WHERE id IN (
            SELECT id FROM deliveries WHERE {_RANKED} IN (1, 2) AND target = ? || '' AND account_id = ?
                AND due > ? AND tried_at < ? AND claim_id IS NULL LIMIT ?)""",
        (tx.now, target, account_id, tx.now, before, limit),
    )


def wait_no_more(tx: Tx, account_id: str, contact: str) -> None:
    """Let the head of a lane to a CRM go that waited for what the channel was asked."""
    tx.run(
        """
        UPDATE deliveries SET due = ? WHERE finished_at IS NULL AND target = 'crm' AND account_id = ? AND contact = ?
            AND place = 'head' AND attempts = 0 AND due > ?""",
        (tx.now, account_id, contact, tx.now),
    )


def unseen(db: Reads, event_id: str) -> Row | None:
    """Return the delivery of an event that no CRM was told of yet, and may be; None when there is none."""
    return db.row(
        """
        SELECT deliveries.* FROM events JOIN deliveries ON event_id = events.id
        WHERE events.id = ? AND body IS NULL AND attempts = 0 AND (finished_at IS NULL OR last_code = 'not_pushed')""",
        (event_id,),
    )


def take_back(tx: Tx, event_id: str) -> bool:
    """Drop a delivery that no CRM was told of yet; tell whether there was one."""
    row = unseen(tx, event_id)
    if row is None:
        return False
    history.forget(tx, [row["id"]])
    tx.run("DELETE FROM deliveries WHERE id = ?", (row["id"],))
    promote(tx, "crm", row["account_id"], row["contact"])
    return True


def claim(tx: Tx, row: Row, account: Row, body: str, *, lease_until: str, expires_at: str, endpoint: Row) -> Claimed:
    """Lease a due row to a fresh claim id and count the attempt, before the call is made."""
    claim_id, kind = new_id("clm"), _kind(row)
    leased: Row = {"claim_id": claim_id, "due": lease_until}
    number = row["attempts"]
    if kind == "call":
        number += 1
        leased |= {"attempts": number, "tried_at": tx.now, "look_ups": 0}
    tx.update("deliveries", leased, "id = ?", [row["id"]])
    carried = {name: row[name] for name in _CARRIED}
    return Claimed(
        claim_id=claim_id,
        body=body,
        kind=kind,
        number=number,
        previous_at=row["tried_at"],
        account=account,
        claimed_at=tx.now,
        was_due=row["due"],
        seen=_seen(tx, row) if kind == "look_up" else (),
        revision=endpoint["revision"],
        is_on_trial=endpoint["trial_since"] is not None,
        expires_at=expires_at,
        is_revived=bool(row["revived"]),
        **carried,
    )


def _seen(db: Reads, row: Row) -> tuple[str, ...]:
    """Return what the look-ups for a send's last call told, in their order; those without an answer told nothing."""
    told = [one["outcome"] for one in history.of(db, row["id"], "look_up") if one["outcome"] in ("absent", "unclear")]
    return tuple(told[len(told) - row["look_ups"] :])


def _kind(row: Row) -> CallKind:
    return "look_up" if row["in_doubt"] else "call"


def record(tx: Tx, claimed: Claimed, outcome: Outcome, verdict: Verdict) -> bool:
    """Store what a claimed call came to; False when the claim is no longer the row's, and nothing was changed."""
    failed = outcome.kind not in ("done", "absent", "unclear") and outcome.stops is None
    values: Row = {
        "due": verdict.due,
        "claim_id": None,
        "in_doubt": int(verdict.in_doubt),
        "look_ups": claimed.look_ups + int(outcome.kind in ("absent", "unclear")) if claimed.kind == "look_up" else 0,
        "retries": claimed.retries + int(failed and outcome.counts),
        "waits": claimed.waits + int(failed and not outcome.counts),
        "last_code": outcome.code,
        "last_http_status": outcome.http_status,
        "last_error": outcome.message,
        "last_ms": outcome.ms,
        "latency_ms": latency_ms(claimed.accepted_at, tx.now) if verdict.state == "done" else None,
    }
    ours, key = "id = ? AND claim_id = ?", [claimed.id, claimed.claim_id]
    to: Place | None = None if verdict.state == "pending" else verdict.state
    if verdict.steps_aside and to is None and claimed.place != "aside":
        to = "aside"
    if (claimed.kind, claimed.number, outcome.kind) != ("call", 1, "done"):  # which the row itself tells
        came_to: Row = {"outcome": outcome.kind, "code": outcome.code, "text": outcome.message, "ms": outcome.ms}
        came_to |= {"http": outcome.http_status, "until": tx.now, "correlation": claimed.correlation_id}
        history.note_where(tx, claimed.kind, ours, key, at=claimed.claimed_at, **came_to)
    told: Told | None = None
    if to == "dead":
        told = {"kind": "dead", "code": outcome.code}
    elif to == "aside":
        told = {"kind": "stepped_aside"}
    if to is None:
        return bool(tx.update("deliveries", values, ours, key))
    touched = _move_one(tx, to, ours, key, values, told)
    if touched and claimed.place == "behind" and to == "done":
        # It went past its lane's head: so the far side works, and the head steps aside.
        lane = (claimed.target, claimed.account_id, claimed.contact)
        where = "target = ? || '' AND account_id = ? AND contact = ? AND place = 'head'"
        move(tx, "aside", where, lane, told={"kind": "stepped_aside"})
        promote(tx, *lane)
    return touched


def latency_ms(accepted_at: str, now: str) -> int:
    """Return how long ago a delivery was accepted, in milliseconds."""
    return max(round((epoch_s(now) - epoch_s(accepted_at)) * 1000), 0)


Place = Literal["behind", "head", "aside", "done", "dead"]
Told = dict[str, Any]  # what history gets of a move: kind, and code or text
# From where a row may come to each place.
_FROM: dict[Place, tuple[Place, ...]] = {
    "behind": ("head", "dead"),  # it makes room for one that was dead, or was dead itself
    "head": ("behind",),
    "aside": ("behind", "head"),
    "done": ("behind", "head", "aside", "dead"),
    "dead": ("behind", "head", "aside"),
}


def move(
    tx: Tx, to: Place, where: str, parameters: Sequence[Any], values: Row | None = None, *, told: Told | None = None
) -> int:
    """Put rows in another place, with other `values`, where they may come from theirs; return how many there were.

    Nothing else changes `place`. `told` is for their history. Who takes a lane's head away promotes the next.
    """
    sql, given = _move(tx, to, where, parameters, values, told)
    return tx.run(sql, given)


def _move_one(tx: Tx, to: Place, where: str, parameters: Sequence[Any], values: Row, told: Told | None) -> bool:
    """Do as `move` with the one row that matches, if any, and promote the next of its lane."""
    sql, given = _move(tx, to, where, parameters, values, told)
    row = tx.row(f"{sql} RETURNING target, account_id, contact, EXISTS ({_BEHIND}) AS promotes", given)
    if row is not None and row["promotes"]:
        promote(tx, row["target"], row["account_id"], row["contact"])
    return row is not None


_BEHIND = """
    SELECT 1 FROM deliveries AS behind WHERE behind.finished_at IS NULL AND behind.place = 'behind'
        AND behind.target = deliveries.target AND behind.account_id = deliveries.account_id
        AND behind.contact = deliveries.contact"""


def _move(
    tx: Tx, to: Place, where: str, parameters: Sequence[Any], values: Row | None, told: Told | None
) -> tuple[str, tuple[Any, ...]]:
    changed = {"place": to, **(values or {})}
    if to in ("done", "dead"):
        changed |= {"claim_id": None, "in_doubt": 0}
    names, given = ", ".join(f"{name} = ?" for name in changed), [*changed.values()]
    if to in ("done", "dead"):
        names, given = f"{names}, finished_at = COALESCE(finished_at, ?)", [*given, tx.now]
    places = ", ".join(f"'{place}'" for place in _FROM[to])
    where = f"{where} AND place IN ({places})"
    if told is not None:
        history.note_where(tx, where=where, parameters=parameters, **told)
    return f"UPDATE deliveries SET {names} WHERE {where}", (*given, *parameters)


def end(tx: Tx, row: Row, to: Literal["done", "dead"], code: str, message: str | None) -> None:
    """End a delivery without a call, and let the next of its lane go."""
    ended: Row = {"last_code": code, "last_error": message}
    if to == "done" and row["attempts"] and code != "cancelled":
        ended["latency_ms"] = latency_ms(row["accepted_at"], tx.now)
    if row["claim_id"] is not None:
        break_off(tx, "id = ?", [row["id"]], code)
    _move_one(tx, to, "id = ?", [row["id"]], ended, {"kind": to, "code": code})


_NEXT_OF_LANE = """
    id = (
        SELECT id FROM deliveries WHERE place = 'behind' AND finished_at IS NULL AND target = ? || '' AND account_id = ?
            AND contact = ? ORDER BY position LIMIT 1)
        AND NOT EXISTS (
            SELECT 1 FROM deliveries AS head WHERE head.place = 'head' AND head.target = deliveries.target
                AND head.account_id = deliveries.account_id AND head.contact = deliveries.contact)"""


def promote(tx: Tx, target: Target, account_id: str, contact: str) -> None:
    """Make the first waiting row the lane's head, unless the lane has one."""
    move(tx, "head", _NEXT_OF_LANE, (target, account_id, contact), {"due": tx.now})


def break_off(tx: Tx, where: str, parameters: Sequence[Any], code: str) -> None:
    """Write down of deliveries whose calls are under way that nobody waits for the answers any more."""
    tx.run(
        f"""
        INSERT INTO history (subject, kind, at, until, outcome, code)
        SELECT id, CASE WHEN in_doubt THEN 'look_up' ELSE 'call' END,
            CASE WHEN in_doubt THEN ? ELSE tried_at END, ?, 'abandoned', ?
        FROM deliveries WHERE claim_id IS NOT NULL AND {where}""",
        (tx.now, tx.now, code, *parameters),
    )


def abandoned(db: Reads) -> list[Row]:
    """Return the rows that a worker which no longer runs had claimed."""
    return db.rows("SELECT * FROM deliveries WHERE claim_id IS NOT NULL")


def release(tx: Tx, row: Row, *, due: str, in_doubt: bool) -> None:
    """Take a row back from a worker that never reported; its call may have taken effect."""
    released = {"claim_id": None, "due": due, "in_doubt": int(in_doubt), "last_code": "abandoned"}
    if in_doubt and not row["in_doubt"]:
        released["retries"] = row["retries"] + 1
    break_off(tx, "id = ?", [row["id"]], "abandoned")
    tx.update("deliveries", released, "id = ?", [row["id"]])


# A private reply's lane is its comment's: the channel tells only later whom it reaches.
COMMENT_LANE = "comment:"
_UNSETTLED = " UNION ALL ".join(
    f"""
    SELECT deliveries.*, sent.recipient_id, sent.content FROM deliveries
    JOIN outbound_messages AS sent ON sent.id = message_id
    WHERE {which} AND target = 'instagram' AND deliveries.account_id = ? AND event = '{SEND}' AND {whose}"""
    for which in ("finished_at IS NULL AND attempts > 0 AND place IN ('head', 'behind')",
                  "place = 'dead' AND last_code = 'in_doubt'")
    for whose in ("contact = ?", "contact >= 'comment:' AND contact < 'comment;' AND recipient_id IN (contact, ?)")
)  # fmt: skip


def unsettled(db: Reads, account_id: str, contact: str) -> list[Row]:
    """Return the sends to a contact, and the private replies that may be to them, whose end is open or was in doubt.

    They were tried and not settled, or given up in doubt; each with its `content`.
    """
    return db.rows(_UNSETTLED, (account_id, contact) * 4)


def headless(db: Reads) -> list[Row]:
    """Return the lanes in which rows wait behind nobody."""
    return db.rows(
        """
        SELECT DISTINCT target, account_id, contact FROM deliveries AS waiting
        WHERE place = 'behind' AND NOT EXISTS (
            SELECT 1 FROM deliveries AS head
            WHERE head.finished_at IS NULL AND head.target = waiting.target AND head.account_id = waiting.account_id
                AND head.contact = waiting.contact AND head.place = 'head')"""
    )


_WAITS = "finished_at IS NULL AND claim_id IS NULL"
_DAY_S = 86_400.0  # after this the usual window has ended; `windows` knows more


def older(db: Reads, target: str, account_id: str, before: str, limit: int) -> Iterator[list[Row]]:
    """Yield pages of an endpoint's rows without a call in flight whose age counts from before then."""
    of = "target = ? AND account_id = ? AND aged_from < ?"
    sql = f"SELECT id, aged_from, position FROM deliveries WHERE {_WAITS} AND {of}"
    return db.pages(sql, (target, account_id, before), key=("aged_from", "position"), limit=limit)


def past_their_time(db: Reads, before: str, limit: int) -> Iterator[list[Row]]:
    """Yield pages of sends without a call in flight that were not to be sent after a time before then."""
    sql = f"""
        SELECT deliveries.id, send_before FROM outbound_messages CROSS JOIN deliveries
            ON message_id = outbound_messages.id
        WHERE status = 'pending' AND send_before < ? AND target = 'instagram' AND {_WAITS}"""
    return db.pages(sql, (before,), key=("send_before", "deliveries.id"), limit=limit)


def behind_closed_windows(db: Reads, account_id: str, now: str, limit: int) -> Iterator[list[Row]]:
    """Yield pages of an account's sends, none in doubt, to customers whose usual window has ended."""
    sql = f"""
        SELECT deliveries.id, position FROM deliveries JOIN contacts USING (account_id, contact)
        WHERE {_WAITS} AND target = 'instagram' AND account_id = ? AND in_doubt = 0
            AND last_wrote_at < ? AND COALESCE(window_until, '') < ?"""
    a_day_ago = instant(epoch_s(now) - _DAY_S)
    return db.pages(sql, (account_id, a_day_ago, now), key=("position",), limit=limit)


def waiting(db: Reads, delivery_id: str) -> Row | None:
    """Return a row that waits without a call in flight."""
    return db.row(f"SELECT * FROM deliveries WHERE {_WAITS} AND id = ?", (delivery_id,))


def follow_clock(tx: Tx, seconds: float, newest: int | None) -> None:
    """Move all times that lie ahead along with a clock that was set, up to the delivery at `newest`."""
    due, aged_from = sqlite.shifted("due"), sqlite.shifted("aged_from")
    where, parameters = ("", []) if newest is None else (" AND position <= ?", [newest])
    tx.run(
        f"UPDATE deliveries SET due = {due}, aged_from = {aged_from} WHERE finished_at IS NULL{where}",
        [f"{seconds:+.3f}", f"{seconds:+.3f}", *parameters],
    )


def revive(tx: Tx, rows: Sequence[Row], *, by: str | None = None) -> None:
    """Owe dead deliveries of one lane again, in their old places in it, with their time and their retries unused."""
    target, account_id, contact = lane = [rows[0][name] for name in ("target", "account_id", "contact")]
    fresh: Row = {"due": tx.now, "aged_from": tx.now, "finished_at": None}
    fresh |= {"retries": 0, "waits": 0, "in_doubt": 0, "revived": 1}
    these, positions = f"position IN ({_marks(rows)})", [row["position"] for row in rows]
    move(tx, "behind", these, positions, fresh, told={"kind": "revived", "text": by})
    # A send that was tried stays in front: its echo may still come.
    later = "place = 'head' AND claim_id IS NULL AND in_doubt = 0 AND (target = 'crm' OR attempts = 0) AND position > ?"
    where = f"target = ? || '' AND account_id = ? AND contact = ? AND {later}"
    move(tx, "behind", where, [*lane, min(positions)])
    promote(tx, target, account_id, contact)


# Where nothing goes any more: an account that is deleted, a CRM without a URL.
_UNSERVED = """
    SELECT 1 FROM accounts LEFT JOIN endpoints ON account_id = accounts.id AND kind = ?
    WHERE accounts.id = ? AND (deleted_at IS NOT NULL OR (kind = 'crm' AND url IS NULL))"""


def unserved(db: Reads) -> list[Row]:
    """Return the endpoints where something is owed though nothing goes there any more; `deleted_at` tells why."""
    return db.rows(
        """
        SELECT target, accounts.id AS account_id, accounts.deleted_at
        FROM accounts CROSS JOIN (SELECT 'crm' AS target UNION ALL SELECT 'instagram') AS targets
            LEFT JOIN endpoints ON account_id = accounts.id AND kind = targets.target
        WHERE (deleted_at IS NOT NULL OR (kind = 'crm' AND url IS NULL)) AND EXISTS (
            SELECT 1 FROM deliveries WHERE finished_at IS NULL AND deliveries.target = targets.target
                AND deliveries.account_id = accounts.id)"""
    )


def left_over(db: Reads, endpoint: Row, limit: int) -> list[Row]:
    """Return rows that an unserved endpoint is owed; none when it is served again."""
    key = (endpoint["target"], endpoint["account_id"])
    if not db.value(_UNSERVED, key):
        return []
    owed = "SELECT position, message_id FROM deliveries WHERE finished_at IS NULL AND target = ? AND account_id = ?"
    return db.rows(f"{owed} LIMIT ?", (*key, limit))


def end_all(tx: Tx, rows: Sequence[Row], to: Literal["done", "dead"], code: str, message: str | None) -> None:
    """End pending deliveries whose lanes go no further, without a call. A send in doubt ends so."""
    for in_doubt, told in ((1, "in_doubt"), (0, code)):  # before the mark of the doubt goes
        these = f"position IN ({_marks(rows)}) AND in_doubt = {in_doubt}", [row["position"] for row in rows]
        break_off(tx, *these, told)
        move(tx, to, *these, {"last_code": told, "last_error": message}, told={"kind": to, "code": told})


def _marks(values: Collection[Any]) -> str:
    return ", ".join("?" * len(values))
