"""Heartbeats: who was alive when."""

from crmbridge.events import instant
from crmbridge.store.database import Database

_BEAT = "INSERT INTO heartbeats (name, at) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET at = excluded.at"


def beat(db: Database, name: str, now_s: float) -> None:
    """Write that `name` was alive now, even on a full disk."""
    db.write_last(lambda: db.run(_BEAT, (name, instant(now_s))))


def probe(db: Database, now_s: float) -> None:
    """Write as a request does. Raises Unavailable when requests cannot be taken."""
    db.write(lambda: db.run(_BEAT, ("probe", instant(now_s))))


def last_beat(db: Database, name: str) -> str | None:
    """Return when `name` was last alive, or None."""
    found = db.value("SELECT at FROM heartbeats WHERE name = ?", (name,))
    return str(found) if found else None
