"""What the bridge asks the channel by itself: names, single messages, conversations of a time it missed."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    "ALTER TABLE contacts ADD COLUMN name TEXT /* what the customer calls themselves */",
    "ALTER TABLE contacts ADD COLUMN profile_checked_at TEXT /* when the channel last told, or refused, their names */",
    "ALTER TABLE contacts ADD COLUMN profile_due TEXT /* no use to ask again before */",
    "ALTER TABLE contacts ADD COLUMN profile_failures INTEGER NOT NULL DEFAULT 0 /* in a row */",
    "ALTER TABLE accounts ADD COLUMN token_refresh_at TEXT /* when to ask for a fresh token; NULL: now */",
    "ALTER TABLE accounts ADD COLUMN ask_again_at TEXT /* until then Instagram is not asked for names: it failed */",
    """
    CREATE TABLE questions (                         -- what the channel is to be asked, off every message's way
        account_id TEXT NOT NULL,
        kind       TEXT NOT NULL,                    -- profile: a contact's names | message: one only announced
        subject    TEXT NOT NULL,                    -- the contact, or the message's id at the channel
        asked_at   TEXT NOT NULL,
        due        TEXT NOT NULL,
        tries      INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (account_id, kind, subject)
    )""",
    "CREATE INDEX questions_due ON questions (due)",
    """
    CREATE TABLE backfills (                         -- accounts whose conversations are to be read again
        account_id TEXT PRIMARY KEY,
        since      TEXT NOT NULL,                    -- messages after this may have been missed
        asked_at   TEXT NOT NULL,
        due        TEXT NOT NULL,
        tries      INTEGER NOT NULL DEFAULT 0
    )""",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for step in STEPS:
        db.execute_sql(step.strip())
