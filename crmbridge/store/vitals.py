"""Heartbeats, and what grows old: signs of life and retention."""

from crmbridge.events import instant
from crmbridge.store.database import Database

_STEP = 500


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


# Each statement takes one bounded step and never touches what is still owed.
_TEXTS = (
    """
    UPDATE inbound_events SET payload = NULL WHERE id IN (
        SELECT id FROM inbound_events AS event WHERE received_at < ? AND payload IS NOT NULL AND state <> 'unrouted'
            AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event_id = event.id AND state = 'pending') LIMIT ?)""",
    """
    UPDATE outbound_messages SET content = NULL WHERE id IN (
        SELECT id FROM outbound_messages WHERE created_at < ? AND content IS NOT NULL AND status <> 'pending'
        LIMIT ?)""",
    """
    UPDATE deliveries SET body = NULL WHERE position IN (
        SELECT position FROM deliveries WHERE finished_at < ? AND state <> 'pending' AND body IS NOT NULL LIMIT ?)""",
)
_ROWS = (
    """
    DELETE FROM delivery_attempts WHERE position IN (
        SELECT attempt.position FROM delivery_attempts AS attempt JOIN deliveries ON deliveries.id = delivery_id
        WHERE deliveries.finished_at < ? AND state <> 'pending' LIMIT ?)""",
    """
    DELETE FROM deliveries WHERE position IN (
        SELECT position FROM deliveries AS old WHERE finished_at < ? AND state <> 'pending'
            AND NOT EXISTS (SELECT 1 FROM delivery_attempts WHERE delivery_id = old.id) LIMIT ?)""",
    """
    DELETE FROM inbound_events WHERE id IN (
        SELECT id FROM inbound_events AS event WHERE received_at < ? AND state <> 'unrouted'
            AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event_id = event.id) LIMIT ?)""",
    """
    DELETE FROM status_transitions WHERE position IN (
        SELECT step.position FROM status_transitions AS step JOIN outbound_messages AS old ON old.id = message_id
        WHERE old.created_at < ? AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.message_id = old.id)
        LIMIT ?)""",
    """
    DELETE FROM outbound_messages WHERE id IN (
        SELECT id FROM outbound_messages AS old WHERE created_at < ?
            AND NOT EXISTS (SELECT 1 FROM deliveries WHERE message_id = old.id)
            AND NOT EXISTS (SELECT 1 FROM status_transitions WHERE message_id = old.id) LIMIT ?)""",
)
_UNROUTED = (
    """
    DELETE FROM inbound_events WHERE id IN (
        SELECT id FROM inbound_events WHERE received_at < ? AND state = 'unrouted' LIMIT ?)""",
)


def prune(db: Database, *, texts_before: str, rows_before: str, unrouted_before: str) -> int:
    """Erase texts and rows that are older than given, in small steps; return how many rows were touched."""
    touched = 0
    for statements, before in ((_TEXTS, texts_before), (_ROWS, rows_before), (_UNROUTED, unrouted_before)):
        for statement in statements:
            step = _STEP
            while step == _STEP:
                step = db.write_last(lambda statement=statement, before=before: db.run(statement, (before, _STEP)))  # type: ignore[misc]
                touched += step
    return touched
