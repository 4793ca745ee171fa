"""What a far side's answer holds back, windows of their own length, old webhook secrets, refused tokens."""

from importlib import import_module

from peewee import Database
from playhouse.migrate import SchemaMigrator

BEFORE = import_module("crmbridge.store.migrations.0003_views").VIEWS[0].strip()
# The view `stuck`, with what a CRM's answer holds back.
STUCK = (
    BEFORE.replace("(pauses.since IS NOT NULL OR", "(pauses.since IS NOT NULL OR holds.since IS NOT NULL OR")
    .replace(
        "WHEN accounts.status = 'inactive' THEN",
        """WHEN holds.since IS NOT NULL THEN 'held: ' || COALESCE(holds.reason, holds.cause)
                WHEN accounts.status = 'inactive' THEN""",
    )
    .replace(
        "WHEN pauses.since IS NOT NULL THEN 'crmbridge",
        "WHEN COALESCE(pauses.since, holds.since) IS NOT NULL THEN 'crmbridge",
    )
    .replace("pauses.cause = 'crm_gone'", "holds.cause = 'gone'")
    .replace(
        "LEFT JOIN deliveries AS head",
        """LEFT JOIN holds ON holds.account_id = waiting.account_id AND holds.target = waiting.target
            AND holds.target = 'crm' AND holds.trial_since IS NULL
        LEFT JOIN deliveries AS head""",
    )
)

STEPS = (
    "ALTER TABLE accounts ADD COLUMN old_webhook_secret_sealed TEXT /* signs beside its successor for a while */",
    "ALTER TABLE accounts ADD COLUMN old_webhook_secret_until TEXT /* so long */",
    "ALTER TABLE accounts ADD COLUMN token_refusals INTEGER NOT NULL DEFAULT 0 /* of a fresh token, in a row */",
    "ALTER TABLE contacts ADD COLUMN window_until TEXT /* where an ad opened more than the usual day */",
    """
    CREATE TABLE holds (                             -- what a far side's answer holds back, or has let go on trial
        account_id  TEXT NOT NULL,
        target      TEXT NOT NULL,                   -- crm: its deliveries | instagram: its sends
        cause       TEXT NOT NULL,                   -- gone | unauthorized (crm), error (instagram)
        code        TEXT,                            -- of the answer
        reason      TEXT,
        since       TEXT NOT NULL,
        ask_at      TEXT,                            -- when the far side is asked next; NULL: a person must act
        asked       INTEGER NOT NULL DEFAULT 0,      -- times
        trial_since TEXT,                            -- set: let go, and the next call must show whether for good
        trials      INTEGER NOT NULL DEFAULT 0,      -- times it was let go by an answer
        PRIMARY KEY (account_id, target)
    )""",
    """
    INSERT INTO holds (account_id, target, cause, reason, since)
        SELECT account_id, target, 'gone', reason, since FROM pauses WHERE cause = 'crm_gone'""",
    "DELETE FROM pauses WHERE cause = 'crm_gone'",
    "DROP VIEW stuck",
    STUCK,
    "CREATE INDEX deliveries_doubtful ON deliveries (account_id, due) WHERE state = 'pending' AND in_doubt = 1",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for step in STEPS:
        db.execute_sql(step.strip())
