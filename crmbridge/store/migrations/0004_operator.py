"""What an operator asks afterwards: which texts fill pages of their own, and what was held back, when and why."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    """
    CREATE INDEX deliveries_long ON deliveries (state, finished_at)
        WHERE gone = 0 AND length(CAST(body AS BLOB)) > 4000""",
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
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for step in STEPS:
        db.execute_sql(step.strip())
