"""What a far side's answer holds back, windows of their own length, old webhook secrets, refused tokens."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    "ALTER TABLE accounts ADD COLUMN old_webhook_secret_sealed TEXT /* signs beside its successor for a while */",
    "ALTER TABLE accounts ADD COLUMN old_webhook_secret_until TEXT /* so long */",
    "ALTER TABLE accounts ADD COLUMN token_refusals INTEGER NOT NULL DEFAULT 0 /* of a fresh token, in a row */",
    "ALTER TABLE contacts ADD COLUMN window_until TEXT /* where an ad opened more than the usual day */",
)
BACK = (
    "ALTER TABLE contacts DROP COLUMN window_until",
    "ALTER TABLE accounts DROP COLUMN token_refusals",
    "ALTER TABLE accounts DROP COLUMN old_webhook_secret_until",
    "ALTER TABLE accounts DROP COLUMN old_webhook_secret_sealed",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for step in STEPS:
        db.execute_sql(step)


def down(migrator: SchemaMigrator, db: Database) -> None:
    for step in BACK:
        db.execute_sql(step)
