"""One turn of the engine in one transaction: record what came back, claim what is free."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from crmbridge.endpoints import NO_ROOM, Endpoint, Room
from crmbridge.errors import Conflict
from crmbridge.events import instant
from crmbridge.store import accounts, dead, deliveries, inbound, messages, pauses, questions
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Claimed, Outcome, Patience, Verdict

HASTEN_AT_ONCE = 500
_EXPIRE_AT_ONCE = 200
_END_AT_ONCE = 200
_EXPIRY_GRACE_S = 120.0  # the last try falls on the end itself
_LOOK_FURTHER = 16
_UNRENDERED_S = 300.0


@dataclass(frozen=True)
class Finished:
    """A call that came back, and what the engine makes of it."""

    claimed: Claimed
    outcome: Outcome
    verdict: Verdict


@dataclass
class Turn:
    """What a turn brought: calls to make, when each endpoint's next row is due, and what a person should know.

    `held` are the endpoints that get nothing now, by their account's status, a pause, or for want of a URL. `replays`
    says when rows that were dead are due, and how many of these must be free to go.
    """

    claimed: list[Claimed] = field(default_factory=list)
    dues: dict[Endpoint, str] = field(default_factory=dict)
    replays: list[tuple[Endpoint, str, int]] = field(default_factory=list)
    hastened: dict[Endpoint, int] = field(default_factory=dict)
    stopped: list[Finished] = field(default_factory=list)
    fenced: list[Claimed] = field(default_factory=list)
    unrendered: list[Row] = field(default_factory=list)
    late: list[tuple[Row, str]] = field(default_factory=list)  # sends that ended without a call, and their codes
    newest: int = 0
    held: frozenset[Endpoint] = frozenset()


@dataclass(frozen=True)
class Terms:
    """What a turn goes by: the time, how long a lease lasts, how soon a doubtful send is looked for."""

    now_s: float
    lease_s: float
    look_up_s: float
    patience: Patience


def take(
    db: Database,
    finished: Sequence[Finished],
    terms: Terms,
    *,
    room: Callable[[Endpoint], Room],
    senders: int,
    spare: int = 0,
    hasten: Mapping[Endpoint, str] = MappingProxyType({}),
    in_flight: Collection[str] = (),
) -> Turn:
    """Record the finished calls and claim up to `senders` new ones, as much as `room(endpoint)` allows for each.

    The last `spare` senders go only to endpoints that have no call. `hasten` names endpoints that recovered, and
    until when what failed there may be tried again at once; `in_flight` the claims that this process holds,
    however late they are.
    """
    now = instant(terms.now_s)

    def job() -> Turn:
        turn = Turn()
        for entry in finished:
            is_ours = deliveries.record(db, entry.claimed, entry.outcome, entry.verdict, now)
            if not is_ours:
                turn.fenced.append(entry.claimed)
            elif entry.outcome.stops and _stop(db, entry, now):
                turn.stopped.append(entry)
            # That a call went out stays true even when its claim was lost; what a look-up saw does not.
            is_true = is_ours or (entry.outcome.kind == "done" and entry.claimed.kind == "call")
            if entry.claimed.target == "instagram" and is_true:
                messages.settle(db, entry.claimed, entry.outcome, entry.verdict, terms.patience, terms.now_s)
                inbound.release_held(db, entry.claimed.account_id, entry.claimed.contact, now, terms.patience)
        served, turn.held = _served(db)
        is_any_asked = dead.is_any_asked(db)
        for target, account in _rotated(served, terms.now_s):
            endpoint = (target, account["id"])
            if endpoint in hasten:
                turn.hastened[endpoint] = deliveries.hasten(db, *endpoint, hasten[endpoint], now, HASTEN_AT_ONCE)
            left = senders - len(turn.claimed)
            free = room(endpoint) if left > 0 else NO_ROOM
            if is_any_asked:
                number = dead.let_in(db, *endpoint, free, terms.now_s, terms.patience)
                turn.replays += [(endpoint, now, number)] if number else []
            heads = deliveries.replays(db, *endpoint) if is_any_asked else []
            chosen = _choose(db, endpoint, free, left, spare, heads, now)
            turn.replays += [(endpoint, row["due"], int(not row["is_awaited"])) for row in heads if row not in chosen]
            for row in chosen:
                if row["claim_id"] not in in_flight:
                    _claim(db, turn, row, account, terms)
            due = deliveries.next_due(db, *endpoint)
            if due:
                turn.dues[endpoint] = due
        turn.newest = db.value("SELECT MAX(position) FROM deliveries") or 0
        return turn

    return db.write_last(job)


def _stop(db: Database, entry: Finished, now: str) -> bool:
    """Hold back an endpoint that takes nothing any more; tell whether that is news.

    What has been mended since the call began is left alone.
    """
    claimed, outcome = entry.claimed, entry.outcome
    account = accounts.find(db, claimed.account_id)
    called = "crm_webhook_url" if claimed.target == "crm" else "access_token_sealed"
    if account is None or account[called] != claimed.account[called]:
        return False
    if claimed.target == "crm":
        return pauses.pause(db, account["id"], "crm", cause="crm_gone", reason=outcome.message, until=None, now=now)
    if account["status"] != "active":
        return False
    changed = {"status": "error", "status_reason": outcome.message, "status_since": now, "updated_at": now}
    return bool(db.update("accounts", changed, "id = ?", [account["id"]]))


def _served(db: Database) -> tuple[list[tuple[Target, Row]], frozenset[Endpoint]]:
    """Return the endpoints that get calls now, with their accounts, and those that are held back."""
    paused, served, held = pauses.everyone(db), [], set()
    for account in accounts.everyone(db):
        for target in pauses.TARGETS:
            is_nowhere = target == "crm" and account["crm_webhook_url"] is None
            if is_nowhere or (target, account["id"]) in paused or pauses.blocks(account["status"], target):
                held.add((target, account["id"]))
            else:
                served.append((target, account))
    return served, frozenset(held)


def _rotated(served: list[tuple[Target, Row]], now_s: float) -> list[tuple[Target, Row]]:
    """Begin with another endpoint each time, so that none is always the last."""
    first = int(now_s * 1000) % len(served) if served else 0
    return served[first:] + served[:first]


def _choose(
    db: Database, endpoint: Endpoint, room: Room, most: int, spare: int, heads: Sequence[Row], now: str
) -> list[Row]:
    """Return the rows that an endpoint may get now; `heads` are those of its lanes in replay.

    These come last, and at their rate, but for a lane in which something new waits behind them.
    """
    # Some senders are left to endpoints that have none yet, so that hanging ones cannot take them all.
    calls = min(room.calls, max(most - spare, int(room.is_idle and most > 0)))
    if calls <= 0:
        return []
    if room.probe == "behind":
        behind = deliveries.first_behind(db, *endpoint, room.contact)
        return [behind] if behind else []
    rows = deliveries.due(db, *endpoint, now, calls if room.probe else calls + _LOOK_FURTHER)
    if room.probe and not rows:
        head = deliveries.head_of_the_newest(db, *endpoint)
        return [head] if head else [row for row in heads if row["due"] <= now][:calls]
    chosen: list[Row] = []
    retries = room.retries
    for row in rows:
        if row["attempts"]:
            if retries <= 0:
                continue
            retries -= 1
        chosen.append(row)
        if len(chosen) == calls:
            break
    paced = room.replays
    for row in heads:
        if row["due"] <= now and len(chosen) < calls and retries > 0 and (row["is_awaited"] or paced > 0):
            retries, paced = retries - 1, paced - 1
            chosen.append(row)
    return chosen


def _claim(db: Database, turn: Turn, row: Row, account: Row, terms: Terms) -> None:
    now = instant(terms.now_s)
    if row["claim_id"] is not None:
        _abandon(db, row, terms)
        if row["target"] == "instagram":
            return
    try:
        body = _body(db, row, account, now)
    except Conflict as late:
        deliveries.end(db, row, "dead", late.code, late.message, now)
        messages.fail(db, row["message_id"], late.code, late.message, now, terms.patience)
        inbound.release_held(db, row["account_id"], row["contact"], now, terms.patience)
        turn.late.append((row, late.code))
        return
    except inbound.UNRENDERABLE as error:
        # A row that cannot be rendered must not stop the others; it stays and is tried again.
        later = instant(terms.now_s + _UNRENDERED_S)
        problem: Row = {"due": later, "last_code": "unrendered", "last_error": type(error).__name__}
        if row["target"] == "crm" and row["ready"] < 2:  # ours alone is at fault: the lane goes on, told by sequence
            problem |= {"ready": 2, "retry_asked_at": None}
        db.update("deliveries", problem, "id = ?", [row["id"]])
        deliveries.promote(db, row["target"], row["account_id"], row["contact"], instant(terms.now_s))
        turn.unrendered.append(row)
        return
    lease_until = instant(terms.now_s + terms.lease_s)
    turn.claimed.append(deliveries.claim(db, row, account, body, now=now, lease_until=lease_until))


def _body(db: Database, row: Row, account: Row, now: str) -> str:
    if row["target"] == "instagram":
        return messages.body(db, row, account, now)
    return inbound.crm_body(db, account, row)


def _abandon(db: Database, row: Row, terms: Terms) -> None:
    now = instant(terms.now_s)
    if deliveries.is_repeatable(row["event"]):
        deliveries.release(db, row, due=now, in_doubt=False, now=now)
        return
    deliveries.release(db, row, due=instant(terms.now_s + terms.look_up_s), in_doubt=True, now=now)
    # Its echo may have come before its worker died.
    inbound.release_held(db, row["account_id"], row["contact"], now, terms.patience)


def recover(db: Database, terms: Terms) -> int:
    """Take back what a worker that no longer runs had claimed; return how many rows there were.

    A send whose call may have reached the channel is in doubt; a CRM's event may safely be repeated.
    """

    def job() -> int:
        rows = deliveries.abandoned(db)
        for row in rows:
            _abandon(db, row, terms)
        return len(rows)

    return db.write_last(job)


def expire(
    db: Database, now_s: float, patience: Patience, *, go_on: Callable[[], bool] = lambda: True
) -> dict[tuple[str, str, str], int]:
    """End what waited past its time without being tried; return how many rows by target, code and account.

    Nothing ends once `go_on` says that `now_s` is not the time to go by.
    """
    ended = Counter[tuple[str, str, str]]()
    now, before = instant(now_s), instant(now_s - _EXPIRY_GRACE_S)
    problem = "not delivered in time: the far side was unavailable"

    def job(found: Sequence[str]) -> None:
        for delivery_id in found if go_on() else ():
            row = deliveries.still_expired(db, delivery_id, before)
            if row is None:
                continue
            code = "in_doubt" if row["in_doubt"] else "expired"
            deliveries.end(db, row, "dead", code, problem, now)
            if row["target"] == "instagram":
                messages.fail(db, row["message_id"], code, problem, now, patience)
                inbound.release_held(db, row["account_id"], row["contact"], now, patience)
            ended[row["target"], code, row["account_id"]] += 1

    # What is held is passed over, too: outside the write lock.
    while go_on() and (found := deliveries.expired(db, before, _EXPIRE_AT_ONCE)):
        db.write_last(lambda found=found: job(found))  # type: ignore[misc]
    return ended


def repair(db: Database, now_s: float) -> int:
    """Give lanes without a head a new one; return how many there were."""
    # The search looks at every waiting row, so it happens outside the write lock; promoting checks again.
    lanes = deliveries.headless(db)
    if not lanes:
        return 0

    def job() -> int:
        for lane in lanes:
            deliveries.promote(db, lane["target"], lane["account_id"], lane["contact"], instant(now_s))
        return len(lanes)

    return db.write_last(job)


def follow_clock(db: Database, seconds: float, newest: int | None) -> None:
    """Move every time that lies ahead along with a clock that was set.

    Deliveries after `newest` may have been made by the new clock, and stay as they are.
    """

    def job() -> None:
        deliveries.follow_clock(db, seconds, newest)
        pauses.follow_clock(db, seconds)

    db.write_last(job)


def delete_account(db: Database, account_id: str, now_s: float) -> None:
    """Erase an account's secrets and serve it no more, in one commit; then begin to end what it is owed and owes."""
    now = instant(now_s)

    def job() -> None:
        inbound.drop_held(db, account_id)
        pauses.forget(db, account_id, now)
        questions.forget_account(db, account_id)
        accounts.erase(db, account_id, now)

    db.write(job)
    end_leftovers(db, now_s)


def end_leftovers(
    db: Database, now_s: float, *, budget_s: float = 2, pause: Callable[[float], None] = time.sleep
) -> int:
    """End what is owed where nothing goes any more: for a deleted account, and to a CRM without a URL.

    In small steps, with as much time between them for the others; what the budget leaves is for the next call.
    Returns how many rows there were.
    """
    total, until_s = 0, time.monotonic() + budget_s
    for endpoint in deliveries.unserved(db):
        found = _END_AT_ONCE
        while found == _END_AT_ONCE and time.monotonic() < until_s:
            began_s = time.monotonic()
            found = db.write_last(lambda endpoint=endpoint: _end_some(db, endpoint, instant(now_s)))  # type: ignore[misc]
            total += found
            if found == _END_AT_ONCE:
                pause(time.monotonic() - began_s)
    return total


def _end_some(db: Database, endpoint: Row, now: str) -> int:
    rows = deliveries.left_over(db, endpoint, _END_AT_ONCE)
    if rows and endpoint["deleted_at"] is None:
        deliveries.end_all(db, rows, "done", "not_pushed", None, now)
    elif rows:
        deliveries.end_all(db, rows, "dead", "account_deleted", "the account was deleted", now)
        messages.end_all(db, [row["message_id"] for row in rows if endpoint["target"] == "instagram"], now)
    return len(rows)


def counts(db: Database) -> Mapping[str, int]:
    """Return how many deliveries are pending, by target."""
    rows = db.rows("SELECT target, COUNT(*) AS number FROM deliveries WHERE state = 'pending' GROUP BY target")
    return {row["target"]: row["number"] for row in rows}
