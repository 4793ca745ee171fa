"""The tables. Times are UTC ISO-8601 text with milliseconds and Z; flags are 0 or 1."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

TABLES = (
    """
    CREATE TABLE accounts (
        id                   TEXT PRIMARY KEY,       -- acc_…
        instagram_account_id TEXT NOT NULL,          -- what webhooks call entry.id and /me calls user_id
        app_scoped_id        TEXT,                   -- what /me calls id
        username             TEXT,
        subscription_ok      INTEGER,
        subscription_error   TEXT,
        token_checked_at     TEXT,
        token_expires_at     TEXT,
        token_refresh_at     TEXT,                   -- when to ask for a fresh token; NULL: now
        token_refusals       INTEGER NOT NULL DEFAULT 0, -- of a fresh token, in a row
        ask_again_at         TEXT,                   -- until then Instagram is not asked for names: it failed
        created_at           TEXT NOT NULL,
        updated_at           TEXT NOT NULL,
        deleted_at           TEXT
    )""",
    "CREATE UNIQUE INDEX accounts_routing ON accounts (instagram_account_id) WHERE deleted_at IS NULL",
    """
    CREATE TABLE endpoints (                         -- where an account's things go; called while it has no lock
        id               TEXT PRIMARY KEY,           -- end_…
        account_id       TEXT NOT NULL,
        kind             TEXT NOT NULL,              -- crm | instagram
        name             TEXT NOT NULL DEFAULT '',   -- of one among several of a kind
        events           TEXT,                       -- JSON list of the events it gets; NULL: all
        url              TEXT,                       -- of a CRM; NULL: nothing is pushed
        secret_sealed    TEXT,                       -- signs what a CRM gets; Instagram's access token
        old_secret_sealed TEXT,                      -- signs beside its successor for a while
        old_secret_until TEXT,                       -- so long
        revision         INTEGER NOT NULL DEFAULT 0, -- grows with url, secret and release: an older call's answer
                                                     -- tells nothing of what is there now
        aged_from        TEXT NOT NULL,              -- what it is owed is at most as old as this
        acted_at         TEXT NOT NULL,              -- the last act of a person for it
        paused_at        TEXT,                       -- set: a person holds it back
        paused_until     TEXT,                       -- NULL: until somebody resumes it
        paused_reason    TEXT,
        held_by          TEXT,                       -- set: inactive | error | gone | unauthorized holds it back
        held_at          TEXT,
        held_code        TEXT,                       -- of the answer
        held_reason      TEXT,
        ask_at           TEXT,                       -- when the far side is asked next; NULL: a person must act
        asked            INTEGER NOT NULL DEFAULT 0, -- times
        trial_since      TEXT,                       -- set: let go, and the next call must show whether for good
        trials           INTEGER NOT NULL DEFAULT 0, -- times it was let go by an answer
        UNIQUE (account_id, kind, name)
    )""",
    """
    CREATE TABLE api_keys (
        id          TEXT PRIMARY KEY,                -- the part of the key that may be shown
        name        TEXT NOT NULL,
        secret_hash TEXT NOT NULL,                   -- bcrypt
        admin       INTEGER NOT NULL,
        accounts    TEXT NOT NULL,                   -- JSON list of account ids
        permissions TEXT NOT NULL,                   -- JSON list
        created_at  TEXT NOT NULL,
        expires_at  TEXT,
        revoked_at  TEXT
    )""",
    """
    CREATE TABLE contacts (                          -- a customer, as one account knows them
        account_id      TEXT NOT NULL,
        contact         TEXT NOT NULL,               -- the customer's id at the channel
        conversation_id TEXT NOT NULL,               -- cnv_…
        username        TEXT,
        crm_sequence    INTEGER NOT NULL DEFAULT 0,  -- the last event's number
        last_wrote_at   TEXT,                        -- opens the window in which we may answer
        window_until    TEXT,                        -- where an ad opened more than the usual day
        name            TEXT,                        -- what the customer calls themselves
        profile_checked_at TEXT,                     -- when the channel last told, or refused, their names
        profile_due     TEXT,                        -- no use to ask again before
        profile_failures INTEGER NOT NULL DEFAULT 0, -- in a row
        created_at      TEXT NOT NULL,
        PRIMARY KEY (account_id, contact)
    )""",
    """
    CREATE TABLE outbound_messages (                 -- what a CRM asked us to send
        id                   TEXT PRIMARY KEY,       -- msg_…
        account_id           TEXT NOT NULL,
        recipient_id         TEXT NOT NULL,
        idempotency_key      TEXT NOT NULL,
        request_hash         TEXT NOT NULL,          -- of the whole request, to tell a repetition from a misuse
        content              TEXT,                   -- JSON; NULL once retention or an erasure took it
        metadata             TEXT,                   -- JSON, the CRM's own, returned with every status
        status               TEXT NOT NULL,          -- pending | sent | delivered | read | failed
        instagram_message_id TEXT,
        retry_count          INTEGER NOT NULL DEFAULT 0,
        error_code           TEXT,
        error_message        TEXT,
        error_retryable      INTEGER,
        correlation_id       TEXT NOT NULL,
        created_at           TEXT NOT NULL,
        sent_at              TEXT,
        delivered_at         TEXT,
        read_at              TEXT,
        comment_id           TEXT,                   -- the comment that a private reply answers
        send_before          TEXT                    -- after this it is not sent any more
    )""",
    "CREATE UNIQUE INDEX outbound_idempotency ON outbound_messages (account_id, idempotency_key)",
    """
    CREATE INDEX outbound_external ON outbound_messages (account_id, instagram_message_id)
        WHERE instagram_message_id IS NOT NULL""",
    """
    CREATE INDEX outbound_unread ON outbound_messages (account_id, recipient_id, sent_at)
        WHERE status IN ('sent', 'delivered')""",
    "CREATE INDEX outbound_correlation ON outbound_messages (correlation_id)",
    "CREATE INDEX outbound_comment ON outbound_messages (account_id, comment_id) WHERE comment_id IS NOT NULL",
    """
    CREATE INDEX outbound_ends ON outbound_messages (send_before)
        WHERE status = 'pending' AND send_before IS NOT NULL""",
    """
    CREATE TABLE events (                            -- what the channel told us, and what became of sends
        position             INTEGER PRIMARY KEY AUTOINCREMENT, -- what a CRM reads, in the order of its cursor
        id                   TEXT NOT NULL UNIQUE,   -- evt_…
        account_id           TEXT,                   -- NULL while no account here has that id
        instagram_account_id TEXT,                   -- NULL: it tells what became of a send
        contact              TEXT NOT NULL,
        kind                 TEXT NOT NULL,          -- message.received, message.read, …
        sequence             INTEGER,                -- among what CRMs hear of the contact; NULL: not told
        dedupe_key           TEXT,                   -- the same for every repetition of the same fact
        rank                 INTEGER,                -- of a message by its id: 0 awaited, 1 announced, 2 recovered,
                                                     -- 3 told, 4 taken back, or erased
        instagram_message_id TEXT,
        message_id           TEXT,                   -- msg_…: the send whose status it tells
        state                TEXT NOT NULL,          -- forwarded | noted | held | unrouted | dropped
        payload              TEXT,                   -- JSON, for whom it is owed; NULL once retention took it
        body                 TEXT,                   -- what a CRM gets; rendered when one is to see it first
        gone                 INTEGER NOT NULL DEFAULT 0, -- 1: retention took its content
        party                TEXT,                   -- the business as the item names it, where the entry did not
        occurred_at          TEXT NOT NULL,
        received_at          TEXT NOT NULL,
        correlation_id       TEXT NOT NULL
    )""",
    "CREATE UNIQUE INDEX events_dedupe ON events (instagram_account_id, dedupe_key)",
    """
    CREATE INDEX events_external ON events (account_id, instagram_message_id)
        WHERE instagram_message_id IS NOT NULL""",
    "CREATE INDEX events_held ON events (account_id, contact) WHERE state = 'held'",
    "CREATE INDEX events_unrouted ON events (instagram_account_id) WHERE state = 'unrouted'",
    "CREATE INDEX events_unrouted_party ON events (party) WHERE state = 'unrouted' AND party IS NOT NULL",
    "CREATE INDEX events_age ON events (state, received_at)",
    "CREATE INDEX events_contact ON events (account_id, contact)",
    "CREATE INDEX events_heard ON events (account_id, received_at) WHERE message_id IS NULL",
    "CREATE INDEX events_correlation ON events (correlation_id)",
    "CREATE INDEX events_feed ON events (account_id, gone, position) WHERE sequence IS NOT NULL",
    "CREATE INDEX events_long ON events (received_at) WHERE length(CAST(body AS BLOB)) > 4000",
    """
    CREATE TABLE deliveries (                        -- one HTTP call owed to one target
        position         INTEGER PRIMARY KEY AUTOINCREMENT, -- order within the lane
        id               TEXT NOT NULL UNIQUE,       -- dlv_…
        target           TEXT NOT NULL,              -- crm | instagram
        account_id       TEXT NOT NULL,
        contact          TEXT NOT NULL,              -- target, account and contact make the lane
        event            TEXT NOT NULL,              -- message.received, …; message.send for the channel
        event_id         TEXT,                       -- evt_…: what the CRM sees
        message_id       TEXT,                       -- msg_…: the outbound message it is about
        place            TEXT NOT NULL,              -- behind | head | aside of its lane, done or dead
        state            TEXT GENERATED ALWAYS AS (CASE WHEN place IN ('done', 'dead') THEN place ELSE 'pending' END)
                         VIRTUAL,                    -- for who looks: pending | done | dead
        due              TEXT NOT NULL,              -- next try, or the end of the lease while claimed
        claim_id         TEXT,                       -- set while a call is in flight
        attempts         INTEGER NOT NULL DEFAULT 0, -- calls made
        retries          INTEGER NOT NULL DEFAULT 0, -- failures that use up the schedule
        waits            INTEGER NOT NULL DEFAULT 0, -- failures that do not: the far side was unavailable
        tried_at         TEXT,                       -- when the last call began
        in_doubt         INTEGER NOT NULL DEFAULT 0, -- 1: the last call may have taken effect
        look_ups         INTEGER NOT NULL DEFAULT 0, -- how often the channel was asked whether it did
        last_code        TEXT,
        last_http_status INTEGER,
        last_error       TEXT,
        last_ms          INTEGER,                    -- how long the last call took
        correlation_id   TEXT NOT NULL,
        accepted_at      TEXT NOT NULL,
        aged_from        TEXT NOT NULL,              -- when it was accepted, or last revived: its age counts from here
        revived          INTEGER NOT NULL DEFAULT 0, -- 1: it was dead, and goes behind live traffic
        finished_at      TEXT,
        latency_ms       INTEGER,                    -- accepted to done; NULL unless a call did it
        gone             INTEGER NOT NULL DEFAULT 0  -- 1: retention took its content
    )""",
    """
    CREATE INDEX deliveries_due ON deliveries (
            target, account_id, (CASE WHEN revived THEN 2 ELSE attempts > 0 END), due)
        WHERE place IN ('head', 'aside') AND in_doubt = 0""",
    "CREATE UNIQUE INDEX deliveries_head ON deliveries (target, account_id, contact) WHERE place = 'head'",
    """
    CREATE INDEX deliveries_lane ON deliveries (target, account_id, contact, place)
        WHERE finished_at IS NULL""",
    """
    CREATE INDEX deliveries_untried ON deliveries (target, account_id, position)
        WHERE place = 'behind' AND attempts = 0""",
    "CREATE INDEX deliveries_old ON deliveries (target, account_id, aged_from) WHERE finished_at IS NULL",
    "CREATE INDEX deliveries_claimed ON deliveries (claim_id) WHERE claim_id IS NOT NULL",
    "CREATE INDEX deliveries_dead ON deliveries (target, finished_at) WHERE place = 'dead'",
    "CREATE INDEX deliveries_message ON deliveries (message_id) WHERE message_id IS NOT NULL",
    "CREATE INDEX deliveries_event ON deliveries (event_id) WHERE event_id IS NOT NULL",
    """
    CREATE INDEX deliveries_doubtful ON deliveries (account_id, due)
        WHERE place IN ('head', 'aside') AND in_doubt = 1""",
    "CREATE INDEX deliveries_age ON deliveries (finished_at) WHERE finished_at IS NOT NULL",
    "CREATE INDEX deliveries_dead_account ON deliveries (target, account_id, contact) WHERE place = 'dead'",
    "CREATE INDEX deliveries_contact ON deliveries (account_id, contact)",
    "CREATE INDEX deliveries_slow ON deliveries (finished_at) WHERE latency_ms > 5000",
    """
    CREATE INDEX deliveries_texts ON deliveries (place, finished_at)
        WHERE gone = 0 AND finished_at IS NOT NULL""",
    """
    CREATE TABLE history (                           -- what became of things, beside what their own rows tell
        position    INTEGER PRIMARY KEY,
        subject     TEXT NOT NULL,                   -- a delivery, message, event or account, by its id
        at          TEXT NOT NULL,
        until       TEXT,                            -- of what took its time: a call, a hold
        kind        TEXT NOT NULL,                   -- call | look_up | status | repeat | stepped_aside | done | dead
                                                     -- | revived | discarded | restored | crm_held | instagram_held
        outcome     TEXT,                            -- of a call: done | retry | refused | in_doubt | fault | abandoned
                                                     -- | absent | unclear; a first one that was done has no row here
        code        TEXT,                            -- why; of a status: which
        http        INTEGER,                         -- the answer's status
        text        TEXT,                            -- an answer's words, or who it was; never what a message says
        ms          INTEGER,                         -- how long a call took
        correlation TEXT
    )""",
    "CREATE INDEX history_subject ON history (subject, at)",
    "CREATE INDEX history_held ON history (until) WHERE kind IN ('crm_held', 'instagram_held')",
    """
    CREATE TABLE heartbeats (                        -- who was alive when
        name TEXT PRIMARY KEY,
        at   TEXT NOT NULL
    )""",
    """
    CREATE TABLE alerts (                            -- what an administrator must know, open and ended
        kind       TEXT NOT NULL,                    -- dead_letter, crm_down, …: docs/operate.md lists them
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
    """
    CREATE TABLE backups (                           -- the last backups, and the tries that failed
        position INTEGER PRIMARY KEY AUTOINCREMENT,
        began_at TEXT NOT NULL,                      -- what was acknowledged before is in it
        ended_at TEXT NOT NULL,
        file     TEXT NOT NULL,
        bytes    INTEGER,
        error    TEXT                                -- NULL: it was made and verified
    )""",
    """
    CREATE VIEW webhook_deliveries AS                -- what is and was owed to CRMs
        SELECT deliveries.id, deliveries.account_id, deliveries.contact, sequence, event, event_id,
               deliveries.message_id, deliveries.state, place, due, attempts, last_code, last_http_status, last_error,
               accepted_at, finished_at, deliveries.correlation_id
        FROM deliveries LEFT JOIN events ON events.id = event_id WHERE target = 'crm'""",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for statement in TABLES:
        db.execute_sql(statement.strip())
