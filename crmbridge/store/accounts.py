"""The accounts that are configured here, as people see them: where their things go, and whether they are in use."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from crmbridge.errors import Conflict, Invalid, Misconfigured, NotFound
from crmbridge.events import epoch_s, instant, new_id
from crmbridge.store import endpoints
from crmbridge.store.database import Database, Reads, Row, Tx
from crmbridge.vault import Vault

_LIVE = "deleted_at IS NULL"
_OVERLAP_S = 86_400.0  # the old webhook secret signs beside the new one
REFUSED_OFTEN = 2  # so many refusals of a fresh token running are no accident
_SELECT = """
    SELECT accounts.*, crm.id AS crm_id, crm.url AS crm_webhook_url, crm.secret_sealed AS webhook_secret_sealed,
        crm.old_secret_sealed AS old_webhook_secret_sealed, crm.old_secret_until AS old_webhook_secret_until,
        instagram.id AS instagram_id, instagram.secret_sealed AS access_token_sealed,
        instagram.paused_at AS sends_paused_at,
        CASE WHEN instagram.held_by IN ('inactive', 'error') THEN instagram.held_by ELSE 'active' END AS status,
        instagram.held_reason AS status_reason, COALESCE(instagram.held_at, instagram.aged_from) AS status_since
    FROM accounts LEFT JOIN endpoints AS crm ON crm.account_id = accounts.id AND crm.kind = 'crm'
        LEFT JOIN endpoints AS instagram ON instagram.account_id = accounts.id AND instagram.kind = 'instagram'"""


def find(db: Reads, account_id: str) -> Row | None:
    """Return an account, or None when it is unknown or deleted."""
    return db.row(f"{_SELECT} WHERE accounts.id = ? AND {_LIVE}", (account_id,))


def find_any(db: Reads, account_id: str | None) -> Row | None:
    """Return an account, a deleted one too, which has no secrets and goes nowhere, or None."""
    return db.row(f"{_SELECT} WHERE accounts.id = ?", (account_id,))


def find_external(db: Reads, instagram_account_id: str) -> Row | None:
    """Return the account that has this id at Instagram, or None."""
    return db.row(f"{_SELECT} WHERE instagram_account_id = ? AND {_LIVE}", (instagram_account_id,))


def everyone(db: Reads) -> list[Row]:
    """Return all accounts, oldest first."""
    return db.rows(f"{_SELECT} WHERE {_LIVE} ORDER BY accounts.id")


def some(db: Reads, account_ids: Sequence[str]) -> list[Row]:
    """Return those of the accounts that are here."""
    marks = ", ".join("?" * len(account_ids))
    return db.rows(f"{_SELECT} WHERE accounts.id IN ({marks}) AND {_LIVE}", account_ids)


def ids(db: Reads) -> list[str]:
    """Return the ids of all accounts, deleted ones too, oldest first."""
    return [row["id"] for row in db.rows("SELECT id FROM accounts ORDER BY id")]


def page(db: Reads, *, after: str, limit: int, only: list[str] | None) -> list[Row]:
    """Return up to `limit` accounts with ids above `after`, of the ids in `only` where that is given."""
    chosen, parameters = "", [after]
    if only is not None:
        chosen = f" AND accounts.id IN ({', '.join('?' * len(only))})"
        parameters += only
    sql = f"{_SELECT} WHERE accounts.id > ?{chosen} AND {_LIVE} ORDER BY accounts.id LIMIT ?"
    return db.rows(sql, (*parameters, limit))


def create(db: Database, vault: Vault, values: Row, *, token: str, url: str | None, secret: str | None) -> Row:
    """Store a new account. Raises Conflict when its Instagram account is already here."""

    def job(tx: Tx) -> Row:
        taken = find_external(tx, values["instagram_account_id"])
        if taken:
            raise Conflict(
                f"The Instagram account {values['instagram_account_id']} is already here, as {taken['id']}.",
                code="account_exists",
            )
        account_id, crm, instagram = new_id("acc"), endpoints.fresh_id(), endpoints.fresh_id()
        tx.insert("accounts", {**values, "id": account_id, "created_at": tx.now, "updated_at": tx.now})
        sealed = seal(vault, crm, secret) if secret else None
        endpoints.create(tx, account_id, "crm", crm, {"url": url, "secret_sealed": sealed})
        endpoints.create(tx, account_id, "instagram", instagram, {"secret_sealed": seal(vault, instagram, token)})
        return found(tx, account_id)

    return db.write(job)


def update(db: Database, account_id: str, values: Row) -> Row:
    """Change columns of an account; return it."""

    def job(tx: Tx) -> Row:
        tx.update("accounts", {**values, "updated_at": tx.now}, "id = ?", [account_id])
        return found(tx, account_id)

    return db.write_last(job)


def change(
    db: Database,
    vault: Vault,
    account_id: str,
    given: Mapping[str, Any],
    owner: Row | None = None,
    spare: str | None = None,
) -> tuple[Row, bool]:
    """Change an account as a person does, and return it; `owner` are the columns that a new token brings.

    `spare` becomes its webhook secret where a new URL needs one and there is none; it is told whether it did.

    Of `given` access_token, crm_webhook_url, webhook_secret (or None for these two) and status are read. To be
    ``active`` ends what an error of the account holds back, and so does a new token. Without a URL for the CRM what it
    was still to get waits for `turn.end_leftovers`. Raises Conflict where it is to be active and
    has no token.
    """

    def job(tx: Tx) -> tuple[Row, bool]:
        row = found(tx, account_id)
        token, status = given.get("access_token"), given.get("status")
        if status == "active" and not (token or row["access_token_sealed"]):
            raise Conflict("The account has no access token: send a new one.", code="token_missing")
        if token and row["status"] == "error" and status is None:
            status = "active"
        tx.update("accounts", {**(owner or {}), "updated_at": tx.now}, "id = ?", [account_id])
        crm = {"url": given["crm_webhook_url"]} if "crm_webhook_url" in given else {}
        needs_one = bool(crm.get("url")) and "webhook_secret" not in given and not row["webhook_secret_sealed"]
        if needs_one or "webhook_secret" in given:
            crm |= _rotated(vault, row, spare if needs_one else given["webhook_secret"], tx.now_s)
        secret = crm.get("secret_sealed", row["webhook_secret_sealed"])
        if crm and crm.get("url", row["crm_webhook_url"]) and not secret:  # another change came between
            problem = "is required with crm_webhook_url: it signs every webhook"
            raise Invalid(f"webhook_secret {problem}.", details=[{"field": "webhook_secret", "problem": problem}])
        endpoints.change(tx, account_id, "crm", crm)
        sealed = {"secret_sealed": seal(vault, row["instagram_id"], token)} if token else {}
        endpoints.change(tx, account_id, "instagram", sealed)
        for end in endpoints.of_accounts(tx, [account_id]):
            if status == "inactive":
                endpoints.hold(tx, account_id, end["kind"], "inactive", code=None, reason=None, revision=None)
            elif status == "active" and end["held_by"] in ("inactive", "error"):
                endpoints.release(tx, end, by_person=True)
        return found(tx, account_id), needs_one

    return db.write_last(job) if given.keys() & {"access_token", "status"} else db.write(job)


def _rotated(vault: Vault, account: Row, secret: str | None, now_s: float) -> Row:
    """Return the columns for a new secret; the old one signs beside it for a day, so that nothing is refused."""
    if not secret:
        return {"secret_sealed": None, "old_secret_sealed": None, "old_secret_until": None}
    try:
        before = webhook_secret(vault, account)
    except Misconfigured:  # it opens with no key: a new one is the remedy
        before = None
    if before == secret:
        return {}
    old = seal(vault, account["crm_id"], before, "old_secret_sealed") if before else None
    until = instant(now_s + _OVERLAP_S) if old else None
    return {
        "secret_sealed": seal(vault, account["crm_id"], secret), "old_secret_sealed": old, "old_secret_until": until,
    }  # fmt: skip


# --- secrets ---


def seal(vault: Vault, endpoint_id: str, secret: str, column: str = "secret_sealed") -> str:
    """Return a secret sealed for the column of an endpoint's row."""
    return vault.seal(secret, "endpoints", column, endpoint_id)


def token(vault: Vault, account: Row) -> str:
    """Return an account's access token. Raises Misconfigured."""
    return vault.open(account["access_token_sealed"], "endpoints", "secret_sealed", account["instagram_id"])


def webhook_secret(vault: Vault, account: Row) -> str | None:
    """Return what an account's events are signed with. Raises Misconfigured."""
    sealed = account["webhook_secret_sealed"]
    return vault.open(sealed, "endpoints", "secret_sealed", account["crm_id"]) if sealed else None


def webhook_secrets(vault: Vault, account: Row, now_s: float) -> list[str]:
    """Return what an account's events are signed with: its secret, and for a while the one before."""
    secrets, before = [webhook_secret(vault, account)], account["old_webhook_secret_sealed"]
    if before is not None and now_s < epoch_s(account["old_webhook_secret_until"]):
        with contextlib.suppress(Misconfigured):  # the present one is what counts
            secrets.append(vault.open(before, "endpoints", "old_secret_sealed", account["crm_id"]))
    return [secret for secret in secrets if secret]


# --- tokens ---


def to_refresh(db: Reads, now: str) -> list[Row]:
    """Return the accounts whose token's time for a fresh one has come."""
    due = "instagram.secret_sealed IS NOT NULL AND (token_refresh_at IS NULL OR token_refresh_at <= ?)"
    return db.rows(f"{_SELECT} WHERE {due} AND {_LIVE} ORDER BY accounts.id", (now,))


def renew_token(db: Database, account: Row, fresh_sealed: str, *, expires_at: str, refresh_at: str) -> bool:
    """Put a fresh token in the place of the one an account had; False when there is another by now, which stays.

    It is the same token for whoever waits for an answer: the endpoint's revision stays.
    """

    def job(tx: Tx) -> bool:
        old = account["access_token_sealed"]
        here = "account_id = ? AND kind = 'instagram' AND secret_sealed = ?"
        if not tx.update("endpoints", {"secret_sealed": fresh_sealed}, here, [account["id"], old]):
            return False
        fresh = {"token_checked_at": tx.now, "token_expires_at": expires_at, "token_refresh_at": refresh_at}
        tx.update("accounts", {**fresh, "token_refusals": 0, "updated_at": tx.now}, "id = ?", [account["id"]])
        return True

    return db.write_last(job)


def refresh_later(db: Database, account: Row, at: str) -> None:
    """Ask for a fresh token no sooner than then, unless there is another one by now."""
    where, key = _with_token(account)
    db.write_last(lambda tx: tx.update("accounts", {"token_refresh_at": at}, where, key))


def refuse_token(db: Database, account: Row, again_at: str) -> int:
    """Note that a fresh token was refused, to be asked for again then; return how often that was so running.

    Returns 0 when there is another token by now.
    """
    where, key = _with_token(account)

    def job(tx: Tx) -> int:
        tx.run(
            f"UPDATE accounts SET token_refusals = token_refusals + 1, token_refresh_at = ? WHERE {where}",
            (again_at, *key),
        )
        return int(tx.value(f"SELECT token_refusals FROM accounts WHERE {where}", key) or 0)

    return db.write_last(job)


def stop(tx: Tx, account: Row, code: str, reason: str) -> bool:
    """Hold an account's sends back, unless it has another token by now; tell whether that is news."""
    where, key = _with_token(account)
    if not tx.value(f"SELECT 1 FROM accounts WHERE {where}", key):
        return False
    return endpoints.hold(tx, account["id"], "instagram", "error", code=code, reason=reason, revision=None)


def lose(db: Database, account_id: str, reason: str) -> None:
    """Drop an account's token, which is good for nothing any more, and hold its sends back."""

    def job(tx: Tx) -> None:
        lost = {"token_expires_at": None, "subscription_ok": 0, "subscription_error": reason, "updated_at": tx.now}
        tx.update("accounts", lost, "id = ?", [account_id])
        endpoints.hold(tx, account_id, "instagram", "error", code="token_missing", reason=reason, revision=None)
        endpoints.change(tx, account_id, "instagram", {"secret_sealed": None})

    db.write_last(job)


def _with_token(account: Row) -> tuple[str, list[str]]:
    same = "SELECT 1 FROM endpoints WHERE account_id = accounts.id AND kind = 'instagram' AND secret_sealed = ?"
    return f"id = ? AND {_LIVE} AND EXISTS ({same})", [account["id"], account["access_token_sealed"]]


def ask_no_more(db: Database, account_id: str, until: str) -> None:
    """Note that an account's customers are not asked for until then, so that no message waits for their names."""
    db.write_last(lambda tx: tx.update("accounts", {"ask_again_at": until}, "id = ?", [account_id]))


def found(db: Reads, account_id: str) -> Row:
    """Return an account; raises NotFound when it was deleted meanwhile."""
    row = find(db, account_id)
    if row is None:
        raise NotFound("There is no such account.", code="account_not_found")
    return row


def erase(tx: Tx, account_id: str) -> None:
    """Mark an account as deleted and drop its endpoints with their secrets."""
    endpoints.forget(tx, account_id)
    tx.update("accounts", {"updated_at": tx.now, "deleted_at": tx.now}, "id = ?", [account_id])
