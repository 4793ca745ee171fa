"""Alerts that outlive a restart."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

TABLES = (
    """
    CREATE TABLE alerts (                            -- what an administrator must know, open and ended
        kind       TEXT NOT NULL,                    -- dead_letter, crm_down, …: README lists them
        account_id TEXT NOT NULL,                    -- '' when it is about the whole bridge
        since      TEXT NOT NULL,                    -- its first cause
        last_at    TEXT NOT NULL,                    -- its last cause
        count      INTEGER NOT NULL,                 -- causes
        message    TEXT NOT NULL,                    -- of the last cause
        told       INTEGER NOT NULL,                 -- how often the command and the URL took it
        told_at    TEXT,                             -- when they were last to be told
        told_count INTEGER NOT NULL,                 -- the causes they were told of
        reopened   INTEGER NOT NULL,                 -- 1: it came back soon after an all-clear
        cleared_at TEXT,                             -- NULL while it is open
        PRIMARY KEY (kind, account_id)
    )""",
    "CREATE INDEX inbound_activity ON inbound_events (account_id, received_at)",
    "CREATE INDEX deliveries_dead_account ON deliveries (target, account_id) WHERE state = 'dead'",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for statement in TABLES:
        db.execute_sql(statement.strip())
