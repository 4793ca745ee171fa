"""What holds an account's deliveries or sends back, a pause, a hold or its status, and that what is held does not age.

A pause is a person's; a hold is what the CRM's answer brought about.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from crmbridge.errors import Invalid
from crmbridge.events import epoch_s, instant
from crmbridge.store import deliveries, sqlite
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Patience

TARGETS: tuple[Target, ...] = ("crm", "instagram")
WHAT: dict[str, Target] = {"deliveries": "crm", "sends": "instagram"}  # in words for people
_AT_ONCE = 500
_LONGEST_DAYS = 366
T = TypeVar("T")


def blocks(status: str, target: str) -> bool:
    """Tell whether an account's status holds back what goes to a target."""
    return status == "inactive" or (status == "error" and target == "instagram")


def everyone(db: Database) -> dict[tuple[str, str], Row]:
    """Return all pauses by target and account id."""
    return {(row["target"], row["account_id"]): row for row in db.rows("SELECT * FROM pauses")}


def hold(db: Database, account: Row, target: Target) -> Row | None:
    """Return `since`, `until`, `reason` and `cause` of what holds an endpoint back, or None.

    The `cause` is a pause's ``operator`` before a hold's ``gone`` or ``unauthorized`` before the account's status.
    """
    found = _find(db, account["id"], target) or _find_hold(db, account["id"], target)
    if found is None and blocks(account["status"], target):
        reason = account["status_reason"] or f"the account is {account['status']}"
        found = {"since": account["status_since"], "until": None, "reason": reason, "cause": account["status"]}
    return found


def _find_hold(db: Database, account_id: str, target: Target) -> Row | None:
    return db.row(
        """
        SELECT since, NULL AS until, reason, cause, ask_at FROM holds
        WHERE account_id = ? AND target = ? AND target = 'crm' AND trial_since IS NULL""",
        (account_id, target),
    )


def over(db: Database, now: str) -> list[Row]:
    """Return the pauses whose time has come."""
    return db.rows("SELECT * FROM pauses WHERE until <= ?", (now,))


def pause(db: Database, account_id: str, target: Target, *, reason: str | None, until: str | None, now: str) -> bool:
    """Hold an endpoint back for a person; runs inside a write. Return whether that is news.

    One that is there keeps its beginning, and its reason unless another one is given.
    """
    why: Row = {"cause": "operator", "reason": reason, "until": until}
    is_new = db.insert("pauses", {"account_id": account_id, "target": target, "since": now, **why}, once=True)
    if not is_new:
        changed = {name: value for name, value in why.items() if (name, value) != ("reason", None)}
        db.update("pauses", changed, "account_id = ? AND target = ?", [account_id, target])
    return is_new


def stop(
    db: Database, account_id: str, what: Sequence[str], *, reason: str | None, until: str | None, now: str
) -> None:
    """Have an operator hold an account's ``deliveries`` or ``sends`` back. Raises Invalid for an end out of reach."""
    latest = instant(epoch_s(now) + _LONGEST_DAYS * 86_400)
    if until is not None and not now < until <= latest:
        problem = "must lie ahead" if until <= now else f"must not be later than {latest}: a pause lasts a year at most"
        detail = {"field": "until", "problem": problem}
        raise Invalid(f"The end of the pause, {until}, {problem}.", details=[detail])

    def job() -> None:
        for name in what:
            pause(db, account_id, WHAT[name], reason=reason, until=until, now=now)

    db.write(job)


def resume(
    db: Database,
    account_id: str,
    target: Target,
    *,
    now: str,
    patience: Patience,
    when: Callable[[Row], bool] = lambda _: True,
) -> bool:
    """End the pause of an endpoint, if there is one and `when` holds for it; tell whether it was ended."""

    def job() -> bool:
        found = _find(db, account_id, target)
        if found is None or not when(found):
            return False
        remember(db, account_id, target, found["cause"], found["reason"], found["since"], now)
        return bool(db.run("DELETE FROM pauses WHERE account_id = ? AND target = ?", (account_id, target)))

    found = _find(db, account_id, target)
    if found is None or not when(found):
        return False
    return lift(db, account_id, (target,), job, ends="pause", now=now, patience=patience)


def lift(
    db: Database,
    account_id: str,
    targets: Sequence[Target],
    job: Callable[[], T],
    *,
    ends: Literal["pause", "hold", "status"],
    status: str | None = None,
    now: str,
    patience: Patience,
) -> T:
    """Run `job` in a write: it ends the targets' pauses or holds, or changes the account's status to `status`.

    First what they held gets the time back, in small writes: a crash between gives it more, never less. Time for
    which several held is given back by the one that ends last.
    """
    while True:
        seen = {target: _blockers(db, account_id, target) for target in targets}
        for target, blockers in seen.items():
            if blockers is None or blockers["status"] == status:
                continue
            since = {"pause": blockers["since"], "hold": blockers["held_since"], "status": None}
            if blocks(blockers["status"], target):
                since["status"] = blockers["status_since"]
            if (begin := since.pop(ends)) is not None:
                end = min([now, *filter(None, since.values())])
                _give_back(db, target, account_id, begin, end, patience.of(target))

        def checked(seen: dict[Target, Row | None] = seen) -> tuple[bool, T | None]:
            if {target: _blockers(db, account_id, target) for target in targets} != seen:
                return False, None
            return True, job()

        is_done, result = db.write_last(checked)
        if is_done:
            return result  # type: ignore[return-value]


def _give_back(db: Database, target: Target, account_id: str, since: str, end: str, lasts_s: float) -> None:
    """Move the end of what an endpoint is owed by the time from `since` to `end`, to no more than its full time."""
    held_s, full = epoch_s(end) - epoch_s(since), instant(epoch_s(end) + lasts_s)
    if held_s <= 0:
        return
    # From the latest end down, so that what was moved is not met again; read outside the write lock.
    before = (full, 0)
    while page := deliveries.ending_before(db, before, _AT_ONCE):
        ours = [row["position"] for row in page if (row["target"], row["account_id"]) == (target, account_id)]
        if ours:
            db.write_last(lambda ours=ours: deliveries.postpone(db, held_s, full, ours))  # type: ignore[misc]
        before = page[-1]["expires_at"], page[-1]["position"]


def _find(db: Database, account_id: str, target: Target) -> Row | None:
    return db.row("SELECT * FROM pauses WHERE account_id = ? AND target = ?", (account_id, target))


def _blockers(db: Database, account_id: str, target: Target) -> Row | None:
    return db.row(
        """
        SELECT status, status_since, pauses.since, until, holds.since AS held_since FROM accounts
        LEFT JOIN pauses ON pauses.account_id = accounts.id AND pauses.target = ?
        LEFT JOIN holds ON holds.account_id = accounts.id AND holds.target = ? AND holds.target = 'crm'
            AND trial_since IS NULL
        WHERE accounts.id = ? AND deleted_at IS NULL""",
        (target, target, account_id),
    )


def follow_clock(db: Database, seconds: float) -> None:
    """Move the beginnings and ends of all holds along with a clock that was set; runs inside a write."""
    by = f"{seconds:+.3f}"
    since, until, status_since = (sqlite.shifted(column) for column in ("since", "until", "status_since"))
    db.run(f"UPDATE pauses SET since = {since}, until = {until}", (by, by))
    db.run(f"UPDATE accounts SET status_since = {status_since} WHERE status <> 'active'", (by,))


def forget(db: Database, account_id: str, now: str) -> None:
    """End the pauses of an account that is being deleted; runs inside a write."""
    for row in db.rows("SELECT * FROM pauses WHERE account_id = ?", (account_id,)):
        remember(db, account_id, row["target"], row["cause"], row["reason"], row["since"], now)
    db.run("DELETE FROM pauses WHERE account_id = ?", (account_id,))


# --- what was held, for those who ask afterwards ---


def note_end_of_status(db: Database, account: Row, now: str) -> None:
    """Note what an account's status held back until now; runs inside a write."""
    for target in TARGETS:
        if blocks(account["status"], target):
            reason = account["status_reason"] or f"the account was {account['status']}"
            remember(db, account["id"], target, account["status"], reason, account["status_since"], now)


def past(db: Database, account_id: str, target: str, *, begin: str, end: str) -> list[Row]:
    """Return `cause`, `reason`, `since` and `ended_at` of the holds of an endpoint that met a time and are over."""
    return db.rows(
        """
        SELECT * FROM past_holds WHERE account_id = ? AND target = ? AND ended_at > ? AND since < ?
        ORDER BY ended_at""",
        (account_id, target, begin, end),
    )


def remember(
    db: Database, account_id: str, target: str, cause: str, reason: str | None, since: str, ended_at: str
) -> None:
    """Note what held an endpoint back and has ended; runs inside a write."""
    where: Row = {"account_id": account_id, "target": target}
    db.insert("past_holds", {**where, "cause": cause, "reason": reason, "since": since, "ended_at": ended_at})


def has_ended_since(db: Database, account_id: str, target: str, since: str) -> bool:
    """Tell whether what held an endpoint back, other than a pause, has ended after that time."""
    sql = "SELECT 1 FROM past_holds WHERE account_id = ? AND target = ? AND ended_at > ? AND cause <> 'operator'"
    return db.value(sql, (account_id, target, since)) is not None


def to_type(account_id: str, target: Target, cause: str) -> str:
    """Return what ends a pause or a hold."""
    name = next(name for name, place in WHAT.items() if place == target)
    command, put = f"crmbridge account resume {account_id} --{name}", f"PUT /api/v1/accounts/{account_id}"
    if cause == "gone":
        return f"mend crm_webhook_url ({put}), or {command}"
    if cause == "unauthorized":
        return f"set the same webhook_secret in the CRM and by {put}, or {command}"
    return command
