"""What a far side's answer holds back: until it answers well when it is asked again, or until a person acts.

A hold that has ended leaves its row on trial: the next call goes alone, and its success ends the matter. Of an
Instagram account the row says only when to ask again: it is held by its status.
"""

from typing import Literal

from crmbridge.events import epoch_s, instant
from crmbridge.store import pauses, sqlite
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Patience

Cause = Literal["gone", "unauthorized", "error"]
TARGETS: dict[Cause, Target] = {"gone": "crm", "unauthorized": "crm", "error": "instagram"}
CRM_ASK_S = (60.0, 300.0)  # the last one repeated
CRM_ASK_DAYS = 7
CRM_TRIALS = 2  # a CRM that takes tests without looking at them would burn an event after each
INSTAGRAM_ASK_S, INSTAGRAM_ASK_AT_MOST_S = 900.0, 6 * 3600.0
TOGETHER_S = 300.0  # accounts that are stopped within this time have one trouble, and it is not theirs
RESTRICTED_ASK_S = 24 * 3600.0
RESTRICTED = ("account_restricted", "account_blocked")  # asking soon is no help against a restriction by policy
_DAY_S = 86_400


def everyone(db: Database) -> dict[tuple[str, str], Row]:
    """Return all rows, those on trial too, by target and account id."""
    return {(row["target"], row["account_id"]): row for row in db.rows("SELECT * FROM holds")}


def find(db: Database, account_id: str, target: Target) -> Row | None:
    """Return an endpoint's row, or None; one on trial has `trial_since`."""
    return db.row("SELECT * FROM holds WHERE account_id = ? AND target = ?", (account_id, target))


def begin(db: Database, account_id: str, cause: Cause, *, code: str | None, reason: str | None, now: str) -> bool:
    """Hold an endpoint back; runs inside a write. Return whether that is news.

    A CRM that is gone counts for more than one that does not take our signature.
    """
    known = find(db, account_id, TARGETS[cause])
    if known is not None and known["trial_since"] is None and (known["cause"] == cause or cause != "gone"):
        return False
    fresh: Row = {"cause": cause, "code": code, "reason": reason, "since": now, "trial_since": None}
    asked, trials = (known["asked"], known["trials"]) if known is not None and known["cause"] == cause else (0, 0)
    if cause != "error":
        asked = 0
    values = {**fresh, "asked": asked, "trials": trials}
    values["ask_at"] = _ask_at(values, epoch_s(now))
    where = "account_id = ? AND target = ?"
    if known is not None:
        db.update("holds", values, where, [account_id, TARGETS[cause]])
    else:
        db.insert("holds", {"account_id": account_id, "target": TARGETS[cause], **values})
    return True


def _ask_at(row: Row, now_s: float) -> str | None:
    """Return when to ask the far side next; None when only a person can tell that it is well."""
    if row["cause"] == "gone":
        return None
    if row["cause"] == "error":
        wait_s = min(INSTAGRAM_ASK_S * 2.0 ** row["asked"], INSTAGRAM_ASK_AT_MOST_S)
        return instant(now_s + (RESTRICTED_ASK_S if row["code"] in RESTRICTED else wait_s))
    if row["trials"] >= CRM_TRIALS or now_s > epoch_s(row["since"]) + CRM_ASK_DAYS * _DAY_S:
        return None
    return instant(now_s + CRM_ASK_S[min(row["asked"], len(CRM_ASK_S) - 1)])


def ask_later(db: Database, hold: Row, now_s: float) -> None:
    """Note that the far side was asked, and is not well; a hold that changed meanwhile stays as it is."""
    row = {**hold, "asked": hold["asked"] + 1}
    changed = {"asked": row["asked"], "ask_at": _ask_at(row, now_s)}
    where = "account_id = ? AND target = ? AND since = ? AND trial_since IS NULL"
    db.write_last(lambda: db.update("holds", changed, where, [hold["account_id"], hold["target"], hold["since"]]))


def let_go(
    db: Database, account: Row, target: Target, *, now: str, patience: Patience, answered: Row | None = None
) -> bool:
    """End an endpoint's hold, by a person, or because the far side `answered` well while that row held it.

    Return whether there was one. By an answer nothing ends that is another hold by now, or whose account has another
    URL, secret or token than the one that was asked with.
    """
    account_id = account["id"]

    def job() -> bool:
        row = find(db, account_id, target)
        now_is = db.row("SELECT * FROM accounts WHERE id = ? AND deleted_at IS NULL", (account_id,))
        if now_is is None or (row is not None and row["trial_since"] is not None):
            return False
        if answered is not None and (
            row is None or row["since"] != answered["since"] or not is_same_endpoint(now_is, account, target)
        ):
            return False
        if target == "instagram":
            if now_is["status"] != "error" or now_is["access_token_sealed"] is None:
                return False
            pauses.note_end_of_status(db, now_is, now)
            active = {"status": "active", "status_reason": None, "status_since": now, "updated_at": now}
            db.update("accounts", active, "id = ?", [account_id])
        elif row is None:
            return False
        else:
            pauses.remember(db, account_id, target, row["cause"], row["reason"], row["since"], now)
        begin_trial(db, account_id, target, now, by_answer=answered is not None)
        return True

    if target == "instagram":
        return pauses.lift(db, account_id, (target,), job, ends="status", status="active", now=now, patience=patience)
    return pauses.lift(db, account_id, (target,), job, ends="hold", now=now, patience=patience)


def is_same_endpoint(account: Row, before: Row, target: str) -> bool:
    """Tell whether an account has the URL and secret, or the token, that it had before."""
    names = ("crm_webhook_url", "webhook_secret_sealed") if target == "crm" else ("access_token_sealed",)
    return all(account[name] == before[name] for name in names)


def begin_trial(db: Database, account_id: str, target: Target, now: str, *, by_answer: bool) -> None:
    """Have the next call of an endpoint show whether it is well; runs inside a write. A person's word counts anew."""
    trials = "trials + 1" if by_answer else "0"
    asked = "asked + 1" if by_answer else "0"
    db.run(
        f"""
        UPDATE holds SET trial_since = ?, ask_at = NULL, trials = {trials}, asked = {asked}
        WHERE account_id = ? AND target = ?""",
        (now, account_id, target),
    )


def prove(db: Database, account_id: str, target: str) -> None:
    """End a trial: a call has succeeded; runs inside a write."""
    where = "account_id = ? AND target = ? AND trial_since IS NOT NULL"
    db.run(f"DELETE FROM holds WHERE {where}", (account_id, target))


def forget(db: Database, account_id: str) -> None:
    """Drop the holds of an account that is being deleted; runs inside a write."""
    db.run("DELETE FROM holds WHERE account_id = ?", (account_id,))


def follow_clock(db: Database, seconds: float) -> None:
    """Move all times along with a clock that was set; runs inside a write."""
    columns = [f"{name} = {sqlite.shifted(name)}" for name in ("since", "ask_at", "trial_since")]
    db.run(f"UPDATE holds SET {', '.join(columns)}", [f"{seconds:+.3f}"] * len(columns))
