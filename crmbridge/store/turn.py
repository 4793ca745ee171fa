"""One turn of the engine in one transaction: record what came back, claim what is free."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from crmbridge.events import epoch_s, instant
from crmbridge.store import accounts, deliveries, inbound, messages
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Claimed, Outcome, Verdict
from crmbridge.store.messages import Patience

TARGETS: tuple[Target, ...] = ("crm", "instagram")
Endpoint = tuple[Target, str]
_UNRENDERED_S = 300.0


@dataclass(frozen=True)
class Finished:
    """A call that came back, and what the engine makes of it."""

    claimed: Claimed
    outcome: Outcome
    verdict: Verdict


@dataclass
class Turn:
    """What a turn brought: calls to make, when to look again, and what a person should know."""

    claimed: list[Claimed] = field(default_factory=list)
    next_due: str | None = None
    fenced: list[Claimed] = field(default_factory=list)
    in_doubt: list[Row] = field(default_factory=list)
    unrendered: list[Row] = field(default_factory=list)


def take(
    db: Database,
    finished: Sequence[Finished],
    *,
    free: Callable[[Endpoint], int],
    senders: int,
    now_s: float,
    lease_s: float,
    in_doubt_s: float,
    patience: Patience,
) -> Turn:
    """Record the finished calls and claim up to `senders` new ones, `free(endpoint)` for each endpoint at most."""
    now = instant(now_s)

    def job() -> Turn:
        turn = Turn()
        for entry in finished:
            is_ours = deliveries.record(db, entry.claimed, entry.outcome, entry.verdict, now)
            if not is_ours:
                turn.fenced.append(entry.claimed)
            # That a send went out stays true even when the claim was lost.
            if entry.claimed.target == "instagram" and (is_ours or entry.outcome.kind == "done"):
                _settle(db, entry, now_s, patience)
        claimable = [
            (target, account)
            for account in accounts.everyone(db)
            for target in TARGETS
            if account["status"] == "active" or (target == "crm" and account["status"] == "error")
        ]
        for target, account in claimable:
            room = min(free((target, account["id"])), senders - len(turn.claimed))
            for row in deliveries.due(db, target, account["id"], now, room) if room > 0 else ():
                _claim(db, turn, row, account, now_s, lease_s, in_doubt_s, patience)
        dues = [deliveries.next_due(db, target, account["id"]) for target, account in claimable]
        turn.next_due = min((due for due in dues if due), default=None)
        return turn

    return db.write_last(job)


def _settle(db: Database, entry: Finished, now_s: float, patience: Patience) -> None:
    claimed = entry.claimed
    messages.settle(db, claimed, entry.outcome, entry.verdict, patience, now_s)
    inbound.release_held(db, claimed.account_id, claimed.contact, instant(now_s), patience)


def _claim(
    db: Database,
    turn: Turn,
    row: Row,
    account: Row,
    now_s: float,
    lease_s: float,
    in_doubt_s: float,
    patience: Patience,
) -> None:
    now = instant(now_s)
    if row["claim_id"] is not None:
        _abandon(db, row, now_s, in_doubt_s)
        if row["target"] == "instagram":
            return
    if row["in_doubt"]:
        give_up_in_doubt(db, row, now, patience)
        turn.in_doubt.append(row)
        return
    try:
        body = _body(db, row, account)
    except (LookupError, ValueError, TypeError) as error:
        # A row that cannot be rendered must not stop the others; it stays and is tried again.
        later = instant(now_s + _UNRENDERED_S)
        problem = {"due": later, "last_code": "unrendered", "last_error": type(error).__name__}
        db.update("deliveries", problem, "id = ?", [row["id"]])
        turn.unrendered.append(row)
        return
    turn.claimed.append(deliveries.claim(db, row, account, body, now=now, lease_until=instant(now_s + lease_s)))


def _body(db: Database, row: Row, account: Row) -> str:
    if row["target"] == "instagram":
        body = messages.content(db, row["message_id"])
        if body is None:
            raise LookupError(f"the content of {row['message_id']} is gone")
        return body
    return row["body"] if row["body"] is not None else inbound.crm_body(db, account, row)


def give_up_in_doubt(db: Database, row: Row, now: str, patience: Patience) -> None:
    """End a send whose outcome stayed unknown: for a person or the CRM to decide, never to repeat blindly."""
    problem = "Instagram did not say whether it took the message, and no echo came"
    deliveries.end(db, row, "dead", "in_doubt", problem, now)
    messages.fail(db, row["message_id"], "in_doubt", problem, now, patience)
    inbound.release_held(db, row["account_id"], row["contact"], now, patience)


def _abandon(db: Database, row: Row, now_s: float, in_doubt_s: float) -> None:
    doubtful = row["target"] == "instagram"
    due = instant(now_s + in_doubt_s) if doubtful else instant(now_s)
    deliveries.release(db, row, due=due, in_doubt=doubtful, now=instant(now_s))


def recover(db: Database, now_s: float, in_doubt_s: float) -> int:
    """Take back what a worker that no longer runs had claimed; return how many rows there were.

    A send whose call may have reached the channel is in doubt; a CRM's event may safely be repeated.
    """

    def job() -> int:
        rows = deliveries.abandoned(db)
        for row in rows:
            _abandon(db, row, now_s, in_doubt_s)
        return len(rows)

    return db.write(job)


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

    return db.write(job)


def latency_s(claimed: Claimed, now_s: float) -> float:
    """Return how long ago a delivery was accepted, in seconds."""
    return max(now_s - epoch_s(claimed.accepted_at), 0.0)


def delete_account(db: Database, account_id: str, now_s: float) -> None:
    """End what an account is owed and owes, and erase its secrets, in one commit."""
    now = instant(now_s)

    def job() -> None:
        deliveries.end_account(db, account_id, now)
        messages.end_account(db, account_id, now)
        accounts.erase(db, account_id, now)

    db.write(job)


def counts(db: Database) -> Mapping[str, int]:
    """Return how many deliveries are pending, by target."""
    rows = db.rows("SELECT target, COUNT(*) AS number FROM deliveries WHERE state = 'pending' GROUP BY target")
    return {row["target"]: row["number"] for row in rows}
