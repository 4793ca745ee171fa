"""The channel's whole language: windows, names, tokens, backfills, every form of send, and erasures."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

STEPS = (
    "ALTER TABLE contacts ADD COLUMN last_wrote_at TEXT /* opens the window in which we may answer */",
    "ALTER TABLE inbound_events ADD COLUMN party TEXT /* the business as the item names it, where the entry did not */",
    "CREATE INDEX inbound_unrouted_party ON inbound_events (party) WHERE state = 'unrouted' AND party IS NOT NULL",
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
    "ALTER TABLE outbound_messages ADD COLUMN comment_id TEXT /* the comment that a private reply answers */",
    "ALTER TABLE outbound_messages ADD COLUMN send_before TEXT /* after this it is not sent any more */",
    """
    CREATE INDEX outbound_comment ON outbound_messages (account_id, comment_id)
        WHERE comment_id IS NOT NULL""",
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
    for step in STEPS:
        db.execute_sql(step.strip())
