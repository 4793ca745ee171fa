"""What was erased on request: a log that names nobody."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

TABLES = (
    """
    CREATE TABLE erasures (                          -- what was erased on request, or is about to be
        id         TEXT PRIMARY KEY,                 -- era_…, or with the confirmation code that Meta got
        kind       TEXT NOT NULL,                    -- contact | account | deauthorized
        account_id TEXT,                             -- NULL when nothing was stored
        asked_at   TEXT NOT NULL,
        done_at    TEXT,                             -- NULL while it goes on
        events     INTEGER NOT NULL DEFAULT 0,       -- rows of each table
        messages   INTEGER NOT NULL DEFAULT 0,
        deliveries INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX erasures_open ON erasures (asked_at) WHERE done_at IS NULL",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for statement in TABLES:
        db.execute_sql(statement.strip())
