"""``crmbridge key``: make an API key, list them, end one."""

import time
from collections.abc import Sequence

from crmbridge import apikey, terminal
from crmbridge.errors import Misconfigured
from crmbridge.events import instant
from crmbridge.store import accounts, keys
from crmbridge.store.database import Database

_DAY_S = 86_400


def create(
    db: Database,
    *,
    name: str,
    admin: bool,
    account_ids: Sequence[str],
    permissions: Sequence[str],
    expires_days: float | None,
) -> None:
    """Make a key and print it, and nothing else, on standard output. Raises Misconfigured for what makes no sense."""
    if not admin and not account_ids:
        raise Misconfigured("a key needs --account ID (one or more), or --admin")
    if admin and account_ids:
        raise Misconfigured("an admin key is good for every account: leave out --account")
    if not name.strip() or not name.isprintable():
        raise Misconfigured("--name must be printable text")
    if expires_days is not None and not 0 < expires_days <= 36_500:
        raise Misconfigured("--expires-days must be more than 0 and at most 36500")
    missing = [account_id for account_id in account_ids if accounts.find(db, account_id) is None]
    if missing:
        raise Misconfigured(f"there is no account {', '.join(missing)}; 'crmbridge account list' shows them")
    key, key_id, secret_hash = apikey.make()
    now_s = time.time()
    row = {
        "id": key_id,
        "name": name,
        "secret_hash": secret_hash,
        "admin": int(admin),
        "accounts": list(dict.fromkeys(account_ids)),
        "permissions": list(dict.fromkeys(permissions)) or list(apikey.PERMISSIONS),
        "created_at": instant(now_s),
        "expires_at": None if expires_days is None else instant(now_s + expires_days * _DAY_S),
    }
    keys.create(db, row)
    terminal.say(key)
    terminal.complain(f"{key_id}: shown once; 'crmbridge key revoke {key_id}' ends it")


def show(db: Database) -> None:
    """Print a line for each key, oldest first."""
    for row in keys.everyone(db):
        state = "revoked" if row["revoked_at"] is not None else "active"
        if state == "active" and row["expires_at"] and row["expires_at"] <= instant(time.time()):
            state = "expired"
        reach = "admin" if row["admin"] else f"{','.join(row['accounts'])} {','.join(row['permissions'])}"
        until = f" until {row['expires_at']}" if row["expires_at"] else ""
        terminal.say(f"{row['id']}  {state:8} {row['created_at']}{until}  {row['name']}  {reach}")


def revoke(db: Database, named: str) -> None:
    """End a key, named by its id or by itself. Raises Misconfigured when there is no such key."""
    whole = apikey.split(named)
    key_id = whole.id if whole else named
    if not keys.revoke(db, key_id):
        raise Misconfigured(f"there is no key {key_id[:20]}; 'crmbridge key list' shows them")
    terminal.say(f"revoked {key_id}")
