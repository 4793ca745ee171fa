"""Heartbeats: who was alive when."""

from crmbridge.events import epoch_s, instant
from crmbridge.store.database import Database, Reads

STALE_S = 45.0
_BEAT = "INSERT INTO heartbeats (name, at) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET at = excluded.at"


def beat(db: Database, name: str, now_s: float) -> None:
    """Write that `name` was alive now, even on a full disk."""
    db.write_last(lambda tx: tx.run(_BEAT, (name, instant(now_s))))


def probe(db: Database) -> None:
    """Write as a request does. Raises Unavailable when requests cannot be taken."""
    db.write(lambda tx: tx.run(_BEAT, ("probe", tx.now)))


def last_beat(db: Reads, name: str) -> str | None:
    """Return when `name` was last alive, or None."""
    found = db.value("SELECT at FROM heartbeats WHERE name = ?", (name,))
    return str(found) if found else None


def end(db: Database, name: str) -> None:
    """Write that `name` was stopped on purpose now."""
    db.write_last(lambda tx: tx.run(_BEAT, (f"{name}_stopped", tx.now)))


def worker_problem(db: Reads, now_s: float) -> str | None:
    """Say since when no worker is alive; None when one is."""
    last, stopped = last_beat(db, "worker"), last_beat(db, "worker_stopped")
    if last is None:
        return "no worker has run yet"
    if stopped is not None and stopped >= last:
        return f"no worker is running: it was stopped at {stopped}"
    return f"no worker since {last}" if now_s - epoch_s(last) > STALE_S else None
