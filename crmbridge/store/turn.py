"""One turn of the engine in one transaction: record what came back, claim what is free."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from crmbridge.errors import Conflict
from crmbridge.events import epoch_s, instant
from crmbridge.health import ASK, Endpoint, Room
from crmbridge.store import accounts, bodies, deliveries, endpoints, inbound, messages, questions
from crmbridge.store.database import Database, Reads, Row, Tx
from crmbridge.store.deliveries import Claimed, Outcome, Patience, Verdict

HASTEN_AT_ONCE = 500
_EXPIRE_AT_ONCE = 200
_END_AT_ONCE = 200
_EXPIRY_GRACE_S = 120.0  # the last try falls on the end itself
HELD_AT_MOST_S = 7 * 86_400.0
_OUTDATED_S = 1.0
# What holds an endpoint back, by the alert that tells of it.
_CAUSES: dict[str, endpoints.Cause] = {
    "crm_gone": "gone", "crm_unauthorized": "unauthorized", "token_dead": "error", "account_error": "error",
}  # fmt: skip
_UNRENDERED_S = 300.0
_DUES = ("due_0", "due_1", "due_2")  # by rank
_HELD_TOO_LONG = "its far side took nothing for a week, and nobody did anything about it"


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
    """What a turn brought: calls to make, when each endpoint that was looked at is to be looked at again, and what a
    person should know.

    `served` are the endpoints that may be called, with what changes when somebody lets them go or sends them elsewhere.
    """

    claimed: list[Claimed] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    served: dict[Endpoint, str] = field(default_factory=dict)
    dues: dict[Endpoint, str | None] = field(default_factory=dict)
    hastened: dict[Endpoint, int] = field(default_factory=dict)
    recorded: list[Finished] = field(default_factory=list)  # what came back, as it was taken
    stopped: list[Finished] = field(default_factory=list)
    fenced: list[Claimed] = field(default_factory=list)
    unrendered: list[Row] = field(default_factory=list)
    late: list[tuple[Row, str]] = field(default_factory=list)  # sends that ended without a call, and their codes
    newest: int = 0


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
    look: Collection[str] | None,
    room: Callable[..., Room],
    senders: int,
    spare: int = 0,
    hasten: Mapping[Endpoint, str] = MappingProxyType({}),
    in_flight: Collection[str] = (),
) -> Turn:
    """Record the finished calls and claim up to `senders` new ones, as much as `room(endpoint, is_on_trial)` allows.

    It looks only at the accounts in `look`, at all with None. The last `spare` senders go only to endpoints that have
    no call. `hasten` names endpoints that recovered, and until when what failed there may be tried again at once;
    `in_flight` the claims that this process holds, however late they are.
    """

    def job(tx: Tx) -> Turn:
        turn = Turn()
        for entry in finished:
            _record(tx, turn, entry, terms)
        for row in _rotated(_look(tx, look), terms.now_s):
            turn.newest = row["newest"]
            _serve(tx, turn, row, terms, room=room, senders=senders, spare=spare, hasten=hasten, in_flight=in_flight)
        return turn

    return db.write_last(job)


def _record(tx: Tx, turn: Turn, entry: Finished, terms: Terms) -> None:
    """Store what a call came to, and what it says of its endpoint."""
    claimed, outcome = entry.claimed, entry.outcome
    if outcome.stops and _is_outdated(tx, claimed):
        outcome = replace(outcome, kind="retry", stops=None)
        soon = instant(terms.now_s + _OUTDATED_S)
        entry = Finished(claimed, outcome, Verdict("pending", soon, in_doubt=claimed.kind == "look_up"))
    turn.recorded.append(entry)
    is_ours = deliveries.record(tx, claimed, outcome, entry.verdict)
    if not is_ours:
        turn.fenced.append(claimed)
    elif outcome.stops and _stop(tx, entry):
        turn.stopped.append(entry)
    if outcome.kind == "done" and claimed.kind == "call" and claimed.is_on_trial:
        endpoints.prove(tx, claimed.account_id, claimed.target, claimed.revision)
    # That a call went out stays true even when its claim was lost; what a look-up saw does not.
    is_true = is_ours or (outcome.kind == "done" and claimed.kind == "call")
    if claimed.target == "instagram" and is_true and messages.settle(tx, claimed, outcome, entry.verdict):
        inbound.release_held(tx, claimed.account_id, claimed.contact)


def _is_outdated(db: Reads, claimed: Claimed) -> bool:
    """Tell whether what an answer says of its endpoint was mended since its call began, or the account is gone."""
    now = endpoints.find(db, claimed.account_id, claimed.target)
    return now is None or now["revision"] != claimed.revision


def _stop(tx: Tx, entry: Finished) -> bool:
    """Hold back an endpoint that takes nothing any more; tell whether that is news."""
    claimed, outcome = entry.claimed, entry.outcome
    cause, revision = _CAUSES[str(outcome.stops)], claimed.revision
    why = {"code": str(outcome.code), "reason": str(outcome.message)}
    return endpoints.hold(tx, claimed.account_id, claimed.target, cause, **why, revision=revision)


def _look(db: Reads, account_ids: Collection[str] | None) -> list[Row]:
    """Return the endpoints of some accounts, or all, with what each has due; locked ones have nothing."""
    which = "" if account_ids is None else f"WHERE account_id IN ({', '.join('?' * len(account_ids))})"
    newest = "SELECT COALESCE(MAX(position), 0) FROM deliveries"
    sql = f"SELECT *, ({newest}) AS newest, {deliveries.DUES} FROM endpoints {which} ORDER BY account_id, kind"
    return db.rows(sql, list(account_ids or ()))


def _again(db: Reads, row: Row) -> Row:
    return next(one for one in _look(db, [row["account_id"]]) if one["id"] == row["id"])


def _rotated(rows: list[Row], now_s: float) -> list[Row]:
    """Begin with another endpoint each time, so that none is always the last."""
    first = int(now_s * 1000) % len(rows) if rows else 0
    return rows[first:] + rows[:first]


def _serve(
    tx: Tx,
    turn: Turn,
    row: Row,
    terms: Terms,
    *,
    room: Callable[..., Room],
    senders: int,
    spare: int,
    hasten: Mapping[Endpoint, str],
    in_flight: Collection[str],
) -> None:
    """Claim what an endpoint may get, or note that it is to be asked how it is."""
    endpoint, ask = (row["kind"], row["account_id"]), (ASK, row["account_id"])
    turn.dues[endpoint] = _question_due(tx, turn, row)
    if not endpoints.is_open(row) or (row["kind"] == "crm" and row["url"] is None):
        return
    turn.served[endpoint] = f"{row['revision']} {row['aged_from']}"
    row = _hastened(tx, turn, row, hasten)
    if not any(row[due] for due in (*_DUES, "due_look_up")):
        return  # nothing is owed, so it does not matter how its far side is
    place, dues = room(endpoint, row["trial_since"] is not None), [row[due] for due in _DUES]
    rows = _choose(tx, turn, row, place, senders, spare, dues)
    in_order = place.probe is None and row["due_look_up"] is None
    rows += _doubtful(tx, turn, row, room, senders, in_flight)
    if rows:
        all_claimed = _claim_all(tx, turn, row, rows, terms, in_flight)
        dues.append(instant(terms.now_s + terms.lease_s))
        if not (all_claimed and in_order):
            row = _again(tx, row)
            dues = [row[due] for due in _DUES]
    turn.dues[endpoint] = min(filter(None, dues), default=None)
    if row["kind"] == "instagram":
        turn.dues[ask] = row["due_look_up"]


def _doubtful(
    tx: Tx, turn: Turn, row: Row, room: Callable[..., Room], senders: int, in_flight: Collection[str]
) -> list[Row]:
    """Return the sends that may be looked for now. That has a room and a pace of its own, beside that of sends."""
    if row["due_look_up"] is None or row["due_look_up"] > tx.now or len(turn.claimed) >= senders:
        return []
    calls = room((ASK, row["account_id"]), False).calls
    doubtful = deliveries.in_doubt(tx, row["account_id"], tx.now, calls + len(in_flight)) if calls else []
    return [one for one in doubtful if one["claim_id"] not in in_flight][:calls]


def _claim_all(
    tx: Tx, turn: Turn, endpoint: Row, rows: Sequence[Row], terms: Terms, in_flight: Collection[str]
) -> bool:
    """Claim rows of an endpoint; False when some ended instead, or are in flight still."""
    account, claimed = accounts.found(tx, endpoint["account_id"]), len(turn.claimed)
    for row in rows:
        if row["claim_id"] not in in_flight:
            _claim(tx, turn, row, account, endpoint, terms)
    return len(turn.claimed) - claimed == len(rows)


def _question_due(tx: Tx, turn: Turn, row: Row) -> str | None:
    """Return when a far side is to be asked about what holds it back; note the question if that is now."""
    goes_where = row["url" if row["kind"] == "crm" else "secret_sealed"]
    if row["ask_at"] is None or row["paused_at"] is not None or not goes_where:
        return None
    if row["ask_at"] <= tx.now:
        turn.questions.append(Question((row["kind"], row["account_id"]), accounts.found(tx, row["account_id"]), row))
    return str(row["ask_at"])


def _hastened(tx: Tx, turn: Turn, row: Row, hasten: Mapping[Endpoint, str]) -> Row:
    """Make due what failed while an endpoint was down, if it has recovered; return the endpoint as it is then."""
    endpoint, ask = (row["kind"], row["account_id"]), (ASK, row["account_id"])
    if endpoint in hasten:
        turn.hastened[endpoint] = deliveries.hasten(tx, *endpoint, hasten[endpoint], HASTEN_AT_ONCE)
    if row["kind"] == "instagram" and ask in hasten:
        turn.hastened[ask] = 0
        deliveries.hasten_look_ups(tx, row["account_id"])
    return _again(tx, row) if endpoint in turn.hastened or ask in turn.hastened else row


def _choose(tx: Tx, turn: Turn, row: Row, room: Room, senders: int, spare: int, dues: list[str | None]) -> list[Row]:
    """Return the rows that an endpoint may get now: what was never tried goes first, what was dead goes last.

    One that was never tried cannot be at fault itself, so that is what a probe takes, too. `dues`, when the first of
    each rank is due, is changed to what is true of those that are left.
    """
    endpoint, most = (row["kind"], row["account_id"]), senders - len(turn.claimed)
    if room.probe == "ask" and most > 0:
        turn.questions.append(Question(endpoint, accounts.found(tx, row["account_id"]), None))
    # Some senders are left to endpoints that have none yet, so that hanging ones cannot take them all.
    calls = min(room.calls, max(most - spare, int(room.is_idle and most > 0)))
    if calls <= 0:
        return []
    if room.probe == "behind":
        after = deliveries.next_after(tx, room.failed)
        return [after] if after else []

    def due(rank: int, at_most: int) -> list[Row]:
        at = dues[rank]
        if at_most <= 0 or at is None or at > tx.now:
            return []
        first = deliveries.due(tx, *endpoint, rank, at_most + 1)
        ready = [one for one in first[:at_most] if one["due"] <= tx.now]
        dues[rank] = first[len(ready)]["due"] if len(ready) < len(first) else None
        return ready

    chosen = due(deliveries.FRESH, calls)
    tried = due(deliveries.TRIED, min(calls - len(chosen), room.retries))
    chosen += tried
    chosen += due(deliveries.REVIVED, min(calls - len(chosen), room.retries - len(tried), room.revived))
    if not chosen and room.probe:
        head = deliveries.head_of_the_newest(tx, *endpoint)
        chosen = [head] if head else []
    return chosen


def _claim(tx: Tx, turn: Turn, row: Row, account: Row, endpoint: Row, terms: Terms) -> None:
    if row["claim_id"] is not None:
        _abandon(tx, row, terms)
        if row["target"] == "instagram":
            return
    try:
        body, send_before = _body(tx, row, account)
    except Conflict as late:
        _end_send(tx, row, late.code, late.message)
        turn.late.append((row, late.code))
        return
    except bodies.UNRENDERABLE as error:
        # A row that cannot be rendered must not stop the others; it stays and is tried again.
        later = instant(terms.now_s + _UNRENDERED_S)
        problem: Row = {"due": later, "last_code": "unrendered", "last_error": type(error).__name__}
        if row["target"] == "crm" and row["place"] != "aside":  # ours alone is at fault: the lane goes on
            deliveries.move(tx, "aside", "id = ?", [row["id"]], problem)
        else:
            tx.update("deliveries", problem, "id = ?", [row["id"]])
        deliveries.promote(tx, row["target"], row["account_id"], row["contact"])
        turn.unrendered.append(row)
        return
    begin_s = epoch_s(max(row["aged_from"], endpoint["aged_from"]))
    ends_at = instant(begin_s + terms.patience.of(row["target"]))
    if send_before is not None and not row["in_doubt"]:  # when it was to go out tells nothing of whether it has
        ends_at = min(ends_at, send_before)
    lease_until = instant(terms.now_s + terms.lease_s)
    how: dict[str, Any] = {"lease_until": lease_until, "expires_at": ends_at, "endpoint": endpoint}
    turn.claimed.append(deliveries.claim(tx, row, account, body, **how))


def _body(tx: Tx, row: Row, account: Row) -> tuple[str, str | None]:
    """Return what is to be sent, and the time after which it is not to be."""
    if row["target"] == "instagram":
        return messages.body(tx, row, account, tx.now)
    return bodies.keep(tx, account, row["event_id"]), None


def _end_send(tx: Tx, row: Row, code: str, problem: str) -> None:
    """End a send without a call, and look again at what waited for it."""
    deliveries.end(tx, row, "dead", code, problem)
    messages.fail(tx, row["message_id"], code, problem)
    inbound.release_held(tx, row["account_id"], row["contact"])


def _abandon(tx: Tx, row: Row, terms: Terms) -> None:
    now = tx.now
    if deliveries.is_repeatable(row["event"]):
        deliveries.release(tx, row, due=now, in_doubt=False)
        return
    deliveries.release(tx, row, due=instant(terms.now_s + terms.look_up_s), in_doubt=True)
    # Its echo may have come before its worker died.
    inbound.release_held(tx, row["account_id"], row["contact"])


def recover(db: Database, terms: Terms) -> int:
    """Take back what a worker that no longer runs had claimed; return how many rows there were.

    A send whose call may have reached the channel is in doubt; a CRM's event may safely be repeated.
    """

    def job(tx: Tx) -> int:
        rows = deliveries.abandoned(tx)
        for row in rows:
            _abandon(tx, row, terms)
        return len(rows)

    return db.write_last(job)


def expire(
    db: Database, now_s: float, patience: Patience, *, go_on: Callable[[], bool] = lambda: True
) -> dict[tuple[str, str, str], int]:
    """End what waited past its time without being tried; return how many rows by target, code and account.

    What a lock holds back does not age, but a hold that comes and goes keeps nothing longer than a week after the last
    act of a person, and a send ends with its `send_before` and its window, held or not. Nothing ends once `go_on` says
    that `now_s` is not the time to go by.
    """
    ended = Counter[tuple[str, str, str]]()

    def end(pages: Iterable[list[Row]], why: Callable[[Tx, Row], tuple[str, str] | None]) -> None:
        def step(tx: Tx, found: Sequence[Row]) -> int:
            now_ended = Counter[tuple[str, str, str]]()
            for row in (deliveries.waiting(tx, one["id"]) for one in found):
                reason = why(tx, row) if row is not None and go_on() else None
                if row is None or reason is None:
                    continue
                code = "in_doubt" if row["in_doubt"] else reason[0]
                if row["target"] == "instagram":
                    _end_send(tx, row, code, reason[1])
                else:
                    deliveries.end(tx, row, "dead", code, reason[1])
                now_ended[row["target"], code, row["account_id"]] += 1
            tx.after(lambda: ended.update(now_ended))
            return len(found)

        db.in_steps(pages, step)

    passed, now = instant(now_s - _EXPIRY_GRACE_S), instant(now_s)
    end(deliveries.past_their_time(db, passed, _EXPIRE_AT_ONCE), lambda *_: ("expired", "its send_before has passed"))
    for endpoint in endpoints.everyone(db):
        key = (endpoint["kind"], endpoint["account_id"])
        limit = max(_limits(endpoint, now_s, patience), default=None)
        if limit is not None:
            old = deliveries.older(db, *key, limit[0], _EXPIRE_AT_ONCE)
            end(old, lambda tx, row: _too_old(tx, row, now_s, patience))
        if endpoint["kind"] == "instagram" and not endpoints.is_open(endpoint):
            closed = deliveries.behind_closed_windows(db, endpoint["account_id"], now, _EXPIRE_AT_ONCE)
            end(closed, lambda tx, row: _too_late(tx, row, now))
    return ended


def _limits(endpoint: Row, now_s: float, patience: Patience) -> list[tuple[str, str, str]]:
    """Return before when what an endpoint is owed must have been accepted to have had its time; by which code, why."""
    if endpoint["kind"] == "crm" and endpoint["url"] is None:
        return []  # the CRM reads it when it asks
    found, a_week_ago = [], instant(now_s - HELD_AT_MOST_S)
    before = instant(now_s - patience.of(endpoint["kind"]) - _EXPIRY_GRACE_S)
    if endpoints.is_open(endpoint) and endpoint["aged_from"] < before:
        found.append((before, "expired", "not delivered in time: the far side was unavailable"))
    is_by_choice = endpoint["paused_at"] is not None or endpoint["held_by"] == "inactive"
    if not is_by_choice and endpoint["acted_at"] < a_week_ago:
        found.append((a_week_ago, "held_too_long", _HELD_TOO_LONG))
    return found


def _too_old(db: Reads, row: Row, now_s: float, patience: Patience) -> tuple[str, str] | None:
    """Return the code and the reason with which a row has had its time, as its endpoint is now."""
    endpoint = endpoints.find(db, row["account_id"], row["target"])
    limits = _limits(endpoint, now_s, patience) if endpoint else []
    return next(((code, why) for before, code, why in limits if row["aged_from"] < before), None)


def _too_late(db: Reads, row: Row, now: str) -> tuple[str, str] | None:
    """Return the code and the reason with which it is too late to send something."""
    try:
        messages.body(db, row, accounts.found(db, row["account_id"]), now)
    except Conflict as late:
        return late.code, late.message
    except LookupError:
        return None
    return None


def repair(db: Database) -> int:
    """Give lanes without a head a new one; return how many there were."""
    # The search looks at every waiting row, so it happens outside the write lock; promoting checks again.
    lanes = deliveries.headless(db)
    if not lanes:
        return 0

    def job(tx: Tx) -> int:
        for lane in lanes:
            deliveries.promote(tx, lane["target"], lane["account_id"], lane["contact"])
        return len(lanes)

    return db.write_last(job)


def follow_clock(db: Database, seconds: float, newest: int | None) -> None:
    """Move every time that lies ahead along with a clock that was set.

    Deliveries after `newest` may have been made by the new clock, and stay as they are.
    """

    def job(tx: Tx) -> None:
        deliveries.follow_clock(tx, seconds, newest)
        endpoints.follow_clock(tx, seconds)

    db.write_last(job)


def delete_account(db: Database, account_id: str) -> None:
    """Erase an account's secrets and serve it no more, in one commit; then begin to end what it is owed and owes."""

    def job(tx: Tx) -> None:
        inbound.drop_held(tx, account_id)
        questions.forget_account(tx, account_id)
        accounts.erase(tx, account_id)

    db.write(job)
    end_leftovers(db)


def end_leftovers(db: Database, *, budget_s: float = 2, pause: Callable[[float], None] = time.sleep) -> int:
    """End what is owed where nothing goes any more: for a deleted account, and to a CRM without a URL.

    In small steps, with as much time between them for the others; what the budget leaves is for the next call.
    Returns how many rows there were.
    """
    total, until_s = 0, time.monotonic() + budget_s
    for endpoint in deliveries.unserved(db):
        pages = iter(lambda endpoint=endpoint: deliveries.left_over(db, endpoint, _END_AT_ONCE), [])  # type: ignore[misc]
        step = functools.partial(_end_some, endpoint)
        total += db.in_steps(pages, step, until_s=until_s, rest=1, pause=pause)
    return total


def _end_some(endpoint: Row, tx: Tx, _: Sequence[Row]) -> int:
    rows = deliveries.left_over(tx, endpoint, _END_AT_ONCE)  # it may be served again by now
    if rows and endpoint["deleted_at"] is None:
        deliveries.end_all(tx, rows, "done", "not_pushed", None)
    elif rows:
        deliveries.end_all(tx, rows, "dead", "account_deleted", "the account was deleted")
        messages.end_all(tx, [row["message_id"] for row in rows if endpoint["target"] == "instagram"])
    return len(rows)


def counts(db: Reads) -> Mapping[str, int]:
    """Return how many deliveries are pending, by target."""
    rows = db.rows("SELECT target, COUNT(*) AS number FROM deliveries WHERE finished_at IS NULL GROUP BY target")
    return {row["target"]: row["number"] for row in rows}
