"""Where an account's things go, a row for its CRM and one for Instagram, each with two locks.

A pause is a person's; a hold is what an answer or the account's being inactive brought about. An endpoint is called
while it has neither. What is owed to it does not age while it has one: its release, which sets `aged_from`, gives all
of it the full time again.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from crmbridge.errors import Invalid
from crmbridge.events import epoch_s, instant, new_id
from crmbridge.store import history, sqlite
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Reads, Row, Tx

KINDS: tuple[Target, ...] = ("crm", "instagram")
WHAT: dict[str, Target] = {"deliveries": "crm", "sends": "instagram"}  # in words for people
Cause = Literal["inactive", "error", "gone", "unauthorized"]
_RANK = {
    None: 0,
    "unauthorized": 1,
    "gone": 2,
    "error": 3,
    "inactive": 4,
}  # a stronger cause takes a weaker one's place
CRM_ASK_S = (60.0, 300.0)  # the last one repeated
CRM_ASK_DAYS = 7
CRM_TRIALS = 2  # a CRM that takes tests without looking at them would burn an event after each
INSTAGRAM_ASK_S, INSTAGRAM_ASK_AT_MOST_S = 900.0, 6 * 3600.0
TOGETHER_S = 300.0  # accounts that are stopped within this time have one trouble, and it is not theirs
RESTRICTED_ASK_S = 24 * 3600.0
RESTRICTED = ("account_restricted", "account_blocked")  # asking soon is no help against a restriction by policy
_DAY_S = 86_400
_LONGEST_PAUSE_DAYS = 366
_FREE: Row = {"held_by": None, "held_at": None, "held_code": None, "held_reason": None, "ask_at": None}
_TIMES = ("aged_from", "acted_at", "paused_at", "paused_until", "held_at", "ask_at", "trial_since")


def create(tx: Tx, account_id: str, kind: Target, endpoint_id: str, values: Row) -> None:
    """Store an endpoint of a new account."""
    made = {"id": endpoint_id, "account_id": account_id, "kind": kind, "aged_from": tx.now, "acted_at": tx.now}
    tx.insert("endpoints", {**made, **values})


def fresh_id() -> str:
    """Return an id for an endpoint: its secret is sealed for the row that it will stand in."""
    return new_id("end")


def find(db: Reads, account_id: str, kind: str) -> Row | None:
    """Return an endpoint; None for an account that is unknown or deleted."""
    return db.row("SELECT * FROM endpoints WHERE account_id = ? AND kind = ?", (account_id, kind))


def everyone(db: Reads) -> list[Row]:
    """Return all endpoints, account by account."""
    return db.rows("SELECT * FROM endpoints ORDER BY account_id, kind")


def of_accounts(db: Reads, account_ids: Iterable[str]) -> list[Row]:
    """Return the endpoints of some accounts."""
    ids = list(account_ids)
    return db.rows(f"SELECT * FROM endpoints WHERE account_id IN ({', '.join('?' * len(ids))})", ids)


def is_open(row: Row) -> bool:
    """Tell whether an endpoint has no lock."""
    return row["paused_at"] is None and row["held_by"] is None


def locks(row: Row | None) -> list[Row]:
    """Return `cause`, `since`, `until`, `reason` and `ask_at` of each lock of an endpoint, a person's first.

    The `cause` of a pause is ``operator``.
    """
    found: list[Row] = []
    if row is not None and row["paused_at"] is not None:
        shown = {"since": row["paused_at"], "until": row["paused_until"], "reason": row["paused_reason"]}
        found.append({"cause": "operator", **shown, "ask_at": None})
    if row is not None and row["held_by"] is not None:
        asked = row["ask_at"] if row["paused_at"] is None else None  # who is paused is not asked
        shown = {"since": row["held_at"], "until": None, "reason": why_held(row["held_by"], row["held_reason"])}
        found.append({"cause": row["held_by"], **shown, "ask_at": asked})
    return found


def why_held(cause: str, reason: str | None) -> str | None:
    """Return the reason of a lock, or what its cause says without one."""
    return reason or (f"the account was {cause}" if cause in ("inactive", "error") else None)


def lock(row: Row | None) -> Row | None:
    """Return the first of an endpoint's locks, or None."""
    return next(iter(locks(row)), None)


def locked(db: Reads, account_id: str, kind: str) -> Row | None:
    """Return what `lock` tells of an endpoint."""
    return lock(find(db, account_id, kind))


# --- a person's lock ---


def pause(
    db: Database, account_id: str, what: Sequence[str], *, reason: str | None = None, until: str | None = None
) -> None:
    """Have a person hold an account's ``deliveries`` or ``sends`` back. Raises Invalid for an end out of reach.

    What is paused already keeps its beginning, and its reason unless another one is given.
    """

    def job(tx: Tx) -> None:
        latest = instant(tx.now_s + _LONGEST_PAUSE_DAYS * _DAY_S)
        if until is not None and not tx.now < until <= latest:
            late = f"must not be later than {latest}: a pause lasts a year at most"
            problem = "must lie ahead" if until <= tx.now else late
            detail = {"field": "until", "problem": problem}
            raise Invalid(f"The end of the pause, {until}, {problem}.", details=[detail])
        for name in what:
            tx.run(
                """
                UPDATE endpoints SET paused_at = COALESCE(paused_at, ?), paused_until = ?,
                    paused_reason = COALESCE(?, paused_reason) WHERE account_id = ? AND kind = ?""",
                (tx.now, until, reason, account_id, WHAT[name]),
            )

    db.write(job)


def paused_too_long(db: Reads, now: str) -> list[Row]:
    """Return the endpoints whose pause's end has come."""
    return db.rows("SELECT * FROM endpoints WHERE paused_until <= ?", (now,))


def resume(db: Database, account_id: str, kind: Target, *, only_over: bool = False) -> bool:
    """End a person's pause, with `only_over` one whose end has come; tell whether there was one."""

    def job(tx: Tx) -> bool:
        row = find(tx, account_id, kind)
        if row is None or row["paused_at"] is None:
            return False
        if only_over and (row["paused_until"] or "9") > tx.now:
            return False
        _remember(tx, row, "operator", row["paused_reason"], row["paused_at"])
        ended = {"paused_at": None, "paused_until": None, "paused_reason": None}
        acted = {"aged_from": tx.now, "acted_at": tx.now}
        return bool(tx.update("endpoints", {**ended, **acted}, "id = ?", [row["id"]]))

    return db.write_last(job)


# --- the machine's ---


def hold(
    tx: Tx, account_id: str, kind: Target, cause: Cause, *, code: str | None, reason: str | None, revision: int | None
) -> bool:
    """Hold an endpoint back; tell whether that is news.

    Not for a cause that is weaker than the one which holds it, nor where the `revision` of what answered is another.
    """
    row = find(tx, account_id, kind)
    if row is None or (revision is not None and revision != row["revision"]) or _RANK[cause] <= _RANK[row["held_by"]]:
        return False
    if row["held_by"] is not None:
        _remember(tx, row, row["held_by"], row["held_reason"], row["held_at"])
    # What was asked before a trial that failed counts on: each is asked after a longer time.
    asked = row["asked"] if cause == "error" and row["trial_since"] is not None else 0
    held: Row = {"held_by": cause, "held_at": tx.now, "held_code": code, "held_reason": reason, "asked": asked}
    held["trials"] = row["trials"] if cause == "unauthorized" else 0
    held["ask_at"] = _ask_at({**row, **held}, tx.now_s)
    tx.update("endpoints", {**held, "trial_since": None}, "id = ?", [row["id"]])
    _touch(tx, account_id)
    return True


def _touch(tx: Tx, account_id: str) -> None:
    tx.update("accounts", {"updated_at": tx.now}, "id = ?", [account_id])


def _ask_at(row: Row, now_s: float) -> str | None:
    """Return when to ask the far side next; None when only a person can tell that it is well."""
    if row["held_by"] in ("gone", "inactive"):
        return None
    if row["held_by"] == "error":
        wait_s = min(INSTAGRAM_ASK_S * 2.0 ** row["asked"], INSTAGRAM_ASK_AT_MOST_S)
        return instant(now_s + (RESTRICTED_ASK_S if row["held_code"] in RESTRICTED else wait_s))
    if row["trials"] >= CRM_TRIALS or now_s > epoch_s(row["held_at"]) + CRM_ASK_DAYS * _DAY_S:
        return None
    return instant(now_s + CRM_ASK_S[min(row["asked"], len(CRM_ASK_S) - 1)])


def ask_later(db: Database, asked: Row) -> None:
    """Note that the far side was asked, and is not well; a hold that changed meanwhile stays as it is."""

    def job(tx: Tx) -> None:
        row = {**asked, "asked": asked["asked"] + 1}
        values = {"asked": row["asked"], "ask_at": _ask_at(row, tx.now_s)}
        tx.update("endpoints", values, "id = ? AND held_at = ?", [row["id"], row["held_at"]])

    db.write_last(job)


def release(tx: Tx, row: Row, *, by_person: bool) -> None:
    """End a hold. The next call goes alone, and its success ends the matter; a person's word counts anew."""
    if row["held_by"] is not None:
        _remember(tx, row, row["held_by"], row["held_reason"], row["held_at"])
    freed: Row = {**_FREE, "aged_from": tx.now, "trial_since": tx.now, "revision": row["revision"] + 1}
    counted = {"asked": 0, "trials": 0} if by_person else {"asked": row["asked"] + 1, "trials": row["trials"] + 1}
    acted = {"acted_at": tx.now} if by_person else {}
    tx.update("endpoints", {**freed, **counted, **acted}, "id = ?", [row["id"]])
    _touch(tx, row["account_id"])


def let_go(db: Database, account_id: str, kind: Target, *, answered: Row | None = None) -> bool:
    """End what an answer holds back, by a person, or because the far side `answered` well while that row held it.

    Tell whether there was such a hold. By an answer nothing ends that is another hold by now, or that has another URL,
    secret or token than the one that was asked with. What is inactive stays so.
    """

    def job(tx: Tx) -> bool:
        row = find(tx, account_id, kind)
        if row is None or row["held_by"] in (None, "inactive"):
            return False
        if kind == "instagram" and row["secret_sealed"] is None:
            return False
        if answered is not None and any(row[name] != answered[name] for name in ("held_at", "held_by", "revision")):
            return False
        release(tx, row, by_person=answered is None)
        return True

    return db.write_last(job)


def prove(tx: Tx, account_id: str, kind: str, revision: int) -> None:
    """End a trial: a call that began in it has succeeded."""
    proven = {"trial_since": None, "asked": 0, "trials": 0}
    tx.update("endpoints", proven, "account_id = ? AND kind = ? AND revision = ?", [account_id, kind, revision])


def change(tx: Tx, account_id: str, kind: Target, values: Row) -> None:
    """Give an endpoint another URL, secret or token: no answer to the one before tells anything of it."""
    if not values:
        return
    names = ", ".join(f"{name} = ?" for name in values)
    anew = "revision = revision + 1, acted_at = ?, asked = 0, trials = 0"
    tx.run(
        f"UPDATE endpoints SET {names}, {anew} WHERE account_id = ? AND kind = ?",
        (*values.values(), tx.now, account_id, kind),
    )


def follow_clock(tx: Tx, seconds: float) -> None:
    """Move all times along with a clock that was set."""
    columns = [f"{name} = {sqlite.shifted(name)}" for name in _TIMES]
    tx.run(f"UPDATE endpoints SET {', '.join(columns)}", [f"{seconds:+.3f}"] * len(columns))


# --- what was held, for those who ask afterwards ---


_HELD: dict[str, history.Kind] = {"crm": "crm_held", "instagram": "instagram_held"}
IS_HELD = "kind IN ('crm_held', 'instagram_held')"  # of history


def _remember(tx: Tx, row: Row, cause: str, reason: str | None, since: str) -> None:
    history.note(tx, row["account_id"], _HELD[row["kind"]], at=since, until=tx.now, code=cause, text=reason)


def forget(tx: Tx, account_id: str) -> None:
    """Drop the endpoints of an account that is being deleted, with their secrets."""
    for row in of_accounts(tx, [account_id]):
        held = lock(row)
        if held is not None:
            _remember(tx, row, held["cause"], held["reason"], held["since"])
    tx.run("DELETE FROM endpoints WHERE account_id = ?", (account_id,))


def past(db: Reads, account_id: str, kind: str, *, begin: str, end: str) -> list[Row]:
    """Return `cause`, `reason`, `since` and `ended_at` of the locks of an endpoint that met a time and are over."""
    return [
        {"cause": row["code"], "reason": row["text"], "since": row["at"], "ended_at": row["until"]}
        for row in history.of(db, account_id, _HELD[kind])
        if row["until"] > begin and row["at"] < end
    ]


def to_type(account_id: str, kind: Target, cause: str) -> str:
    """Return what ends a pause or a hold."""
    name = next(name for name, place in WHAT.items() if place == kind)
    resume, change = f"crmbridge account resume {account_id} --{name}", f"crmbridge account set {account_id}"
    if cause == "inactive":
        return f"{change} --active"
    if cause == "error":
        return f"{change} --token - (a new access token), or, if that is not at fault, {resume}"
    if cause == "gone":
        return f"{change} --url URL (where the CRM is now), or {resume}"
    if cause == "unauthorized":
        return f"{change} --secret - (the secret that the CRM has), or, if only the CRM was wrong, {resume}"
    return resume
