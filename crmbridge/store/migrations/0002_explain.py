"""What a message's story needs beside its rows: how late it was, and what happened to it without a call."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    "ALTER TABLE deliveries ADD COLUMN latency_ms INTEGER /* accepted to done; NULL unless a call did it */",
    "ALTER TABLE deliveries ADD COLUMN notes TEXT /* what became of it between its calls: lines of time and word */",
    "ALTER TABLE inbound_events ADD COLUMN repeats INTEGER NOT NULL DEFAULT 0 /* times it was told again */",
    "ALTER TABLE inbound_events ADD COLUMN repeated_at TEXT /* the last time */",
    "CREATE INDEX deliveries_contact ON deliveries (account_id, contact)",
    "CREATE INDEX deliveries_slow ON deliveries (finished_at) WHERE latency_ms > 5000",
    "CREATE INDEX inbound_correlation ON inbound_events (correlation_id)",
    "CREATE INDEX outbound_correlation ON outbound_messages (correlation_id)",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for step in STEPS:
        db.execute_sql(step)
