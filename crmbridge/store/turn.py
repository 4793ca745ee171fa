"""One turn of the engine in one transaction: record what came back, claim what is free."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from crmbridge.endpoints import ASK, NO_ROOM, Endpoint, Room
from crmbridge.errors import Conflict
from crmbridge.events import instant
from crmbridge.store import accounts, dead, deliveries, holds, inbound, messages, pauses, questions
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Claimed, Outcome, Patience, Verdict

HASTEN_AT_ONCE = 500
_EXPIRE_AT_ONCE = 200
_END_AT_ONCE = 200
_EXPIRY_GRACE_S = 120.0  # the last try falls on the end itself
_LOOK_FURTHER = 16
_OUTDATED_S = 1.0
# What holds an endpoint back, by the alert that tells of it.
_CAUSES: dict[str, holds.Cause] = {
    "crm_gone": "gone", "crm_unauthorized": "unauthorized", "token_dead": "error", "account_error": "error",
}  # fmt: skip
_UNRENDERED_S = 300.0


@dataclass(frozen=True)
class Finished:
    """A call that came back, and what the engine makes of it."""

    claimed: Claimed
    outcome: Outcome
    verdict: Verdict


@dataclass(frozen=True)
class Question:
    """What a far side is to be asked, as its account is now: about its `hold`, or None to tell whether it is up."""

    endpoint: Endpoint
    account: Row
    hold: Row | None


@dataclass
class Turn:
    """What a turn brought: calls to make, when each endpoint's next row is due, and what a person should know.

    `held` are the endpoints that get nothing now, by their account's status, a pause, a hold, or for want of a URL;
    those of `trials` were held until now. `replays` says when rows that were dead are due, and how many of these must
    be free to go. `wanted` are the accounts with sends to look for that had to wait. `ask_at` is when the next
    question about a hold is due.
    """

    claimed: list[Claimed] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    ask_at: str | None = None
    trials: frozenset[Endpoint] = frozenset()
    wanted: frozenset[str] = frozenset()
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
    room: Callable[..., Room],
    senders: int,
    spare: int = 0,
    hasten: Mapping[Endpoint, str] = MappingProxyType({}),
    in_flight: Collection[str] = (),
    trials: Collection[Endpoint] = (),
) -> Turn:
    """Record the finished calls and claim up to `senders` new ones, as much as `room(endpoint, is_on_trial)` allows.

    The last `spare` senders go only to endpoints that have no call. `hasten` names endpoints that recovered, and
    until when what failed there may be tried again at once; `in_flight` the claims that this process holds,
    however late they are; `trials` the endpoints that were on trial when the calls began.
    """
    now = instant(terms.now_s)

    def job() -> Turn:
        turn = Turn()
        for entry in finished:
            _record(db, turn, entry, terms, now, trials)
        served = _served(db, turn, now)
        is_any_asked = dead.is_any_asked(db)
        for target, account in _rotated(served, terms.now_s):
            endpoint = (target, account["id"])
            if endpoint in hasten:
                turn.hastened[endpoint] = deliveries.hasten(db, *endpoint, hasten[endpoint], now, HASTEN_AT_ONCE)
            left = senders - len(turn.claimed)
            free = room(endpoint, endpoint in turn.trials) if left > 0 else NO_ROOM
            if free.probe == "ask":
                turn.questions.append(Question(endpoint, account, None))
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
        _look_for(db, turn, served, terms, room=room, hasten=hasten, senders=senders, in_flight=in_flight)
        turn.newest = db.value("SELECT MAX(position) FROM deliveries") or 0
        return turn

    return db.write_last(job)


def _record(db: Database, turn: Turn, entry: Finished, terms: Terms, now: str, trials: Collection[Endpoint]) -> None:
    """Store what a call came to, and what it says of its endpoint."""
    claimed, outcome = entry.claimed, entry.outcome
    if outcome.stops and _is_outdated(db, claimed):
        outcome = replace(outcome, kind="retry", stops=None)
        soon = instant(terms.now_s + _OUTDATED_S)
        entry = Finished(claimed, outcome, Verdict("pending", soon, in_doubt=claimed.kind == "look_up"))
    is_ours = deliveries.record(db, claimed, outcome, entry.verdict, now)
    if not is_ours:
        turn.fenced.append(claimed)
    elif outcome.stops and _stop(db, entry, now):
        turn.stopped.append(entry)
    endpoint = (claimed.target, claimed.account_id)
    if outcome.kind == "done" and claimed.kind == "call" and endpoint in trials:
        holds.prove(db, claimed.account_id, claimed.target)
    # That a call went out stays true even when its claim was lost; what a look-up saw does not.
    is_true = is_ours or (outcome.kind == "done" and claimed.kind == "call")
    if claimed.target == "instagram" and is_true:
        messages.settle(db, claimed, outcome, entry.verdict, terms.patience, terms.now_s)
        inbound.release_held(db, claimed.account_id, claimed.contact, now, terms.patience)


def _look_for(
    db: Database,
    turn: Turn,
    served: Sequence[tuple[Target, Row]],
    terms: Terms,
    *,
    room: Callable[..., Room],
    hasten: Mapping[Endpoint, str],
    senders: int,
    in_flight: Collection[str],
) -> None:
    """Claim the look-ups that are due: they have a room and a pace of their own, beside that of sends."""
    first, now = deliveries.first_look_ups(db), instant(terms.now_s)
    if not first:
        return
    for account in (account for target, account in served if target == "instagram" and account["id"] in first):
        endpoint, due = (ASK, account["id"]), first[account["id"]]
        if endpoint in hasten:
            deliveries.hasten_look_ups(db, account["id"], now)
            turn.hastened[endpoint], due = 0, now
        free = room(endpoint, False) if len(turn.claimed) < senders and due <= now else NO_ROOM
        rows = deliveries.in_doubt(db, account["id"], now, free.calls + len(in_flight)) if free.calls else []
        rows = [row for row in rows if row["claim_id"] not in in_flight][: free.calls]
        for row in rows:
            _claim(db, turn, row, account, terms)
        if due <= now and not rows:
            turn.wanted |= {account["id"]}
        turn.dues[endpoint] = deliveries.first_look_ups(db).get(account["id"], due) if rows else due


def _is_outdated(db: Database, claimed: Claimed) -> bool:
    """Tell whether what an answer says of its endpoint was mended since its call began, or the account is gone."""
    account = accounts.find(db, claimed.account_id)
    if account is None or not holds.is_same_endpoint(account, claimed.account, claimed.target):
        return True
    return pauses.has_ended_since(db, claimed.account_id, claimed.target, claimed.claimed_at)


def _stop(db: Database, entry: Finished, now: str) -> bool:
    """Hold back an endpoint that takes nothing any more; tell whether that is news."""
    claimed, outcome = entry.claimed, entry.outcome
    cause = _CAUSES[str(outcome.stops)]
    code, reason = str(outcome.code), str(outcome.message)
    if cause == "error":
        return accounts.stop(db, claimed.account_id, claimed.account["access_token_sealed"], code, reason, now)
    return holds.begin(db, claimed.account_id, cause, code=code, reason=reason, now=now)


def _served(db: Database, turn: Turn, now: str) -> list[tuple[Target, Row]]:
    """Return the endpoints that get calls now, with their accounts; note those that are held back, or to be asked."""
    paused, held, served, closed, trials = pauses.everyone(db), holds.everyone(db), [], set(), set()
    for account in accounts.everyone(db):
        for target in pauses.TARGETS:
            endpoint = (target, account["id"])
            is_nowhere = target == "crm" and account["crm_webhook_url"] is None
            hold = held.get(endpoint)
            if hold is not None and hold["trial_since"] is not None:
                trials.add(endpoint)
                hold = None
            is_held = endpoint in paused or pauses.blocks(account["status"], target)
            is_held = is_held or (hold is not None and target == "crm")
            if is_nowhere or is_held:
                closed.add(endpoint)
            else:
                served.append((target, account))
            if hold is not None and hold["ask_at"] and endpoint not in paused and _may_ask(account, target):
                if hold["ask_at"] <= now:
                    turn.questions.append(Question(endpoint, account, hold))
                else:
                    turn.ask_at = min(turn.ask_at or hold["ask_at"], hold["ask_at"])
    turn.held, turn.trials = frozenset(closed), frozenset(trials)
    return served


def _may_ask(account: Row, target: Target) -> bool:
    """Tell whether a far side may be asked if it is well: a CRM of an account in use, Instagram for one in error."""
    if target == "crm":
        return account["crm_webhook_url"] is not None and account["status"] != "inactive"
    return account["access_token_sealed"] is not None and account["status"] == "error"


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
    rows = deliveries.due(db, *endpoint, now, calls + _LOOK_FURTHER)
    if room.probe and not rows:
        head = deliveries.head_of_the_newest(db, *endpoint)
        return [head] if head else [row for row in heads if row["due"] <= now][:calls]
    if room.probe:  # one that was not tried yet cannot be at fault itself
        rows.sort(key=lambda row: row["attempts"] > 0)
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
        holds.follow_clock(db, seconds)

    db.write_last(job)


def delete_account(db: Database, account_id: str, now_s: float) -> None:
    """Erase an account's secrets and serve it no more, in one commit; then begin to end what it is owed and owes."""
    now = instant(now_s)

    def job() -> None:
        inbound.drop_held(db, account_id)
        pauses.forget(db, account_id, now)
        holds.forget(db, account_id)
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
