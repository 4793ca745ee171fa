"""The accounts that are configured here; secrets come and go sealed."""

from typing import Any

from crmbridge.errors import Conflict, NotFound
from crmbridge.events import new_id
from crmbridge.store import holds, pauses
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Patience

_LIVE = "deleted_at IS NULL"
REFUSED_OFTEN = 2  # so many refusals of a fresh token running are no accident


def find(db: Database, account_id: str) -> Row | None:
    """Return an account, or None when it is unknown or deleted."""
    return db.row(f"SELECT * FROM accounts WHERE id = ? AND {_LIVE}", (account_id,))


def find_external(db: Database, instagram_account_id: str) -> Row | None:
    """Return the account that has this id at Instagram, or None."""
    return db.row(f"SELECT * FROM accounts WHERE instagram_account_id = ? AND {_LIVE}", (instagram_account_id,))


def everyone(db: Database) -> list[Row]:
    """Return all accounts, oldest first."""
    return db.rows(f"SELECT * FROM accounts WHERE {_LIVE} ORDER BY id")


def ids(db: Database) -> list[str]:
    """Return the ids of all accounts, deleted ones too, oldest first."""
    return [row["id"] for row in db.rows("SELECT id FROM accounts ORDER BY id")]


def page(db: Database, *, after: str, limit: int, only: list[str] | None) -> list[Row]:
    """Return up to `limit` accounts with ids above `after`, of the ids in `only` where that is given."""
    chosen, parameters = "", [after]
    if only is not None:
        chosen = f" AND id IN ({', '.join('?' * len(only))})"
        parameters += only
    sql = f"SELECT * FROM accounts WHERE id > ?{chosen} AND {_LIVE} ORDER BY id LIMIT ?"
    return db.rows(sql, (*parameters, limit))


def create(db: Database, values: dict[str, Any], now: str) -> Row:
    """Store a new account. Raises Conflict when its Instagram account is already here."""

    def job() -> Row:
        taken = find_external(db, values["instagram_account_id"])
        if taken:
            raise Conflict(
                f"The Instagram account {values['instagram_account_id']} is already here, as {taken['id']}.",
                code="account_exists",
            )
        row = {
            **values,
            "id": new_id("acc"),
            "status": "active",
            "status_since": now,
            "created_at": now,
            "updated_at": now,
        }
        db.insert("accounts", row)
        return found(db, row["id"])

    return db.write(job)


def update(db: Database, account_id: str, values: dict[str, Any], now: str, patience: Patience) -> Row:
    """Change columns of an account and return it; what its status held back gets that time back.

    Without a URL for the CRM what it was still to get waits for `turn.end_leftovers`.
    """

    def job() -> Row:
        before, changed = found(db, account_id), {**values, "updated_at": now}
        if values.get("status", before["status"]) != before["status"]:
            changed["status_since"] = now
            pauses.note_end_of_status(db, before, now)
            if values["status"] == "active":
                holds.begin_trial(db, account_id, "instagram", now, by_answer=False)
        db.update("accounts", changed, "id = ?", [account_id])
        return found(db, account_id)

    if "status" in values:
        how: dict[str, Any] = {"ends": "status", "status": values["status"], "now": now, "patience": patience}
        return pauses.lift(db, account_id, pauses.TARGETS, job, **how)
    return db.write(job)


def to_refresh(db: Database, now: str) -> list[Row]:
    """Return the accounts whose token's time for a fresh one has come."""
    due = "access_token_sealed IS NOT NULL AND (token_refresh_at IS NULL OR token_refresh_at <= ?)"
    return db.rows(f"SELECT * FROM accounts WHERE {due} AND {_LIVE} ORDER BY id", (now,))


def renew_token(
    db: Database, account_id: str, old_sealed: str, new_sealed: str, expires_at: str, refresh_at: str, now: str
) -> bool:
    """Put a fresh token in the place of the old one; False when there is another one by now, which stays."""
    fresh = {"access_token_sealed": new_sealed, "token_checked_at": now, "token_expires_at": expires_at}
    values = {**fresh, "token_refresh_at": refresh_at, "token_refusals": 0, "updated_at": now}
    return bool(db.write_last(lambda: db.update("accounts", values, *_with_token(account_id, old_sealed))))


def refresh_later(db: Database, account_id: str, sealed: str, at: str) -> None:
    """Ask for a fresh token no sooner than then, unless there is another one by now."""
    db.write_last(lambda: db.update("accounts", {"token_refresh_at": at}, *_with_token(account_id, sealed)))


def refuse_token(db: Database, account_id: str, sealed: str, again_at: str) -> int:
    """Note that a fresh token was refused, to be asked for again then; return how often that was so running.

    Returns 0 when there is another token by now.
    """
    where, key = _with_token(account_id, sealed)

    def job() -> int:
        db.run(
            f"UPDATE accounts SET token_refusals = token_refusals + 1, token_refresh_at = ? WHERE {where}",
            (again_at, *key),
        )
        return int(db.value(f"SELECT token_refusals FROM accounts WHERE {where}", key) or 0)

    return db.write_last(job)


def ask_no_more(db: Database, account_id: str, until: str) -> None:
    """Note that an account's customers are not asked for until then, so that no message waits for their names."""
    db.write_last(lambda: db.update("accounts", {"ask_again_at": until}, "id = ?", [account_id]))


def stop(db: Database, account_id: str, sealed: str, code: str, reason: str, now: str) -> bool:
    """Put an active account in error, unless it has another token by now; runs inside a write. Tell whether it was."""
    changed = {"status": "error", "status_reason": reason, "status_since": now, "updated_at": now}
    where, key = _with_token(account_id, sealed)
    if not db.update("accounts", changed, f"{where} AND status = 'active'", key):
        return False
    holds.begin(db, account_id, "error", code=code, reason=reason, now=now)
    return True


def _with_token(account_id: str, sealed: str) -> tuple[str, list[str]]:
    return f"id = ? AND access_token_sealed = ? AND {_LIVE}", [account_id, sealed]


def found(db: Database, account_id: str) -> Row:
    """Return an account; raises NotFound when it was deleted meanwhile."""
    row = find(db, account_id)
    if row is None:
        raise NotFound("There is no such account.", code="account_not_found")
    return row


def erase(db: Database, account_id: str, now: str) -> None:
    """Mark an account as deleted and erase its secrets; runs inside a write."""
    db.run(
        """
        UPDATE accounts SET access_token_sealed = NULL, webhook_secret_sealed = NULL, crm_webhook_url = NULL,
            status = 'inactive', status_reason = 'deleted', updated_at = ?, deleted_at = ? WHERE id = ?""",
        (now, now, account_id),
    )
