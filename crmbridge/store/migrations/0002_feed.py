"""What the feed reads by, and what retention finds its work by."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    "ALTER TABLE deliveries ADD COLUMN gone INTEGER NOT NULL DEFAULT 0 /* 1: retention took its content */",
    """
    CREATE INDEX deliveries_texts ON deliveries (state, finished_at)
        WHERE gone = 0 AND finished_at IS NOT NULL""",
    # Old events are found by what became of them, old messages by their deliveries.
    "DROP INDEX inbound_age",
    "CREATE INDEX inbound_age ON inbound_events (state, received_at)",
    "DROP INDEX outbound_age",
    # A payload is kept only for whom it is owed; a new state, dropped, is an unrouted event's that lost its own.
    "UPDATE inbound_events SET payload = NULL WHERE state = 'noted'",
    "CREATE INDEX deliveries_feed ON deliveries (account_id, gone, position) WHERE target = 'crm'",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for step in STEPS:
        db.execute_sql(step.strip())
