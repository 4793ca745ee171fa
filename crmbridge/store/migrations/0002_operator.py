"""What an operator needs: pauses, alerts, dead letters that are asked for again, stories, the feed, retention."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    """
    CREATE TABLE pauses (                            -- a row holds an account's deliveries or sends back
        account_id TEXT NOT NULL,
        target     TEXT NOT NULL,                    -- crm: its deliveries | instagram: its sends
        cause      TEXT NOT NULL,                    -- operator | crm_gone
        reason     TEXT,
        since      TEXT NOT NULL,
        until      TEXT,                             -- NULL: until somebody resumes it
        PRIMARY KEY (account_id, target)
    )""",
    """
    CREATE TABLE past_holds (                        -- what held an account's deliveries or sends back, and ended
        position   INTEGER PRIMARY KEY AUTOINCREMENT,
        account_id TEXT NOT NULL,
        target     TEXT NOT NULL,                    -- crm: its deliveries | instagram: its sends
        cause      TEXT NOT NULL,                    -- operator | crm_gone | inactive | error: the account's status
        reason     TEXT,
        since      TEXT NOT NULL,
        ended_at   TEXT NOT NULL
    )""",
    "CREATE INDEX past_holds_endpoint ON past_holds (account_id, target, ended_at)",
    "CREATE INDEX past_holds_age ON past_holds (ended_at)",
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
    "ALTER TABLE deliveries ADD COLUMN retry_asked_at TEXT /* set while it is tried again among many; see dlq retry */",
    """
    CREATE INDEX deliveries_asked ON deliveries (state, target, account_id, contact, sequence)
        WHERE retry_asked_at IS NOT NULL""",
    """
    CREATE INDEX deliveries_asked_age ON deliveries (target, account_id, finished_at, contact)
        WHERE state = 'dead' AND retry_asked_at IS NOT NULL""",
    "ALTER TABLE deliveries ADD COLUMN latency_ms INTEGER /* accepted to done; NULL unless a call did it */",
    "ALTER TABLE deliveries ADD COLUMN notes TEXT /* what became of it between its calls: lines of time and word */",
    "ALTER TABLE inbound_events ADD COLUMN repeats INTEGER NOT NULL DEFAULT 0 /* times it was told again */",
    "ALTER TABLE inbound_events ADD COLUMN repeated_at TEXT /* the last time */",
    "CREATE INDEX deliveries_contact ON deliveries (account_id, contact)",
    "CREATE INDEX deliveries_slow ON deliveries (finished_at) WHERE latency_ms > 5000",
    "CREATE INDEX inbound_correlation ON inbound_events (correlation_id)",
    "CREATE INDEX outbound_correlation ON outbound_messages (correlation_id)",
    "ALTER TABLE deliveries ADD COLUMN gone INTEGER NOT NULL DEFAULT 0 /* 1: retention took its content */",
    """
    CREATE INDEX deliveries_texts ON deliveries (state, finished_at)
        WHERE gone = 0 AND finished_at IS NOT NULL""",
    """
    CREATE INDEX deliveries_long ON deliveries (state, finished_at)
        WHERE gone = 0 AND length(CAST(body AS BLOB)) > 4000""",
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
