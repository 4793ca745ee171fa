"""Dead deliveries may be asked for again, many at once."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STATEMENTS = (
    "ALTER TABLE deliveries ADD COLUMN retry_asked_at TEXT /* set while it is tried again among many; see dlq retry */",
    """
    CREATE INDEX deliveries_asked ON deliveries (state, target, account_id, contact, sequence)
        WHERE retry_asked_at IS NOT NULL""",
    """
    CREATE INDEX deliveries_asked_age ON deliveries (target, account_id, finished_at, contact)
        WHERE state = 'dead' AND retry_asked_at IS NOT NULL""",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for statement in STATEMENTS:
        db.execute_sql(statement.strip())
