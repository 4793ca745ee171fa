"""What the feed reads by, and what retention finds its work by."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    "ALTER TABLE deliveries ADD COLUMN gone INTEGER NOT NULL DEFAULT 0 /* 1: retention took its content */",
    "CREATE INDEX deliveries_feed ON deliveries (account_id, gone, position) WHERE target = 'crm'",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for step in STEPS:
        db.execute_sql(step)
