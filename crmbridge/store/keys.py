"""API keys as rows: the secret's bcrypt hash, what the key may do, and until when."""

import json
from typing import Any

from crmbridge.store.database import Database, Reads, Row


def create(db: Database, values: dict[str, Any]) -> None:
    """Store a key; `accounts` and `permissions` are lists."""
    row = {**values, "accounts": json.dumps(values["accounts"]), "permissions": json.dumps(values["permissions"])}
    db.write(lambda tx: tx.insert("api_keys", row))


def find(db: Reads, key_id: str) -> Row | None:
    """Return a key by its id, with its lists read, or None."""
    row = db.row("SELECT * FROM api_keys WHERE id = ?", (key_id,))
    return _read(row) if row else None


def everyone(db: Reads) -> list[Row]:
    """Return all keys, oldest first."""
    return [_read(row) for row in db.rows("SELECT * FROM api_keys ORDER BY created_at, id")]


def revoke(db: Database, key_id: str) -> bool:
    """Revoke a key from now on; False when there is no such key."""
    return bool(
        db.write(
            lambda tx: tx.run("UPDATE api_keys SET revoked_at = COALESCE(revoked_at, ?) WHERE id = ?", (tx.now, key_id))
        )
    )


def _read(row: Row) -> Row:
    return {**row, "accounts": json.loads(row["accounts"]), "permissions": json.loads(row["permissions"])}
