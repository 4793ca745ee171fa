"""Pauses: what an operator, or a far side that is gone, holds back."""

from peewee import Database
from playhouse.migrate import SchemaMigrator


def up(migrator: SchemaMigrator, db: Database) -> None:
    db.execute_sql(
        """
    CREATE TABLE pauses (                            -- a row holds an account's deliveries or sends back
        account_id TEXT NOT NULL,
        target     TEXT NOT NULL,                    -- crm: its deliveries | instagram: its sends
        cause      TEXT NOT NULL,                    -- operator | crm_gone
        reason     TEXT,
        since      TEXT NOT NULL,
        until      TEXT,                             -- NULL: until somebody resumes it
        PRIMARY KEY (account_id, target)
    )""".strip()
    )
