"""The first schema. Times are UTC ISO-8601 text with milliseconds and Z; flags are 0 or 1."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

TABLES = (
    """
    CREATE TABLE accounts (
        id                    TEXT PRIMARY KEY,      -- acc_…
        instagram_account_id  TEXT NOT NULL,         -- what webhooks call entry.id and /me calls user_id
        app_scoped_id         TEXT,                  -- what /me calls id
        username              TEXT,
        status                TEXT NOT NULL,         -- active | inactive | error
        status_reason         TEXT,
        status_since          TEXT NOT NULL,
        access_token_sealed   TEXT,                  -- NULL once the account is deleted
        webhook_secret_sealed TEXT,
        crm_webhook_url       TEXT,                  -- NULL: nothing is pushed
        subscription_ok       INTEGER,
        subscription_error    TEXT,
        token_checked_at      TEXT,
        token_expires_at      TEXT,
        created_at            TEXT NOT NULL,
        updated_at            TEXT NOT NULL,
        deleted_at            TEXT
    )""",
    "CREATE UNIQUE INDEX accounts_routing ON accounts (instagram_account_id) WHERE deleted_at IS NULL",
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
        crm_sequence    INTEGER NOT NULL DEFAULT 0,  -- last number given out in this lane to the CRM
        send_sequence   INTEGER NOT NULL DEFAULT 0,  -- last number given out in this lane to the channel
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
        read_at              TEXT
    )""",
    "CREATE UNIQUE INDEX outbound_idempotency ON outbound_messages (account_id, idempotency_key)",
    """
    CREATE INDEX outbound_external ON outbound_messages (account_id, instagram_message_id)
        WHERE instagram_message_id IS NOT NULL""",
    """
    CREATE INDEX outbound_unread ON outbound_messages (account_id, recipient_id, sent_at)
        WHERE status IN ('sent', 'delivered')""",
    "CREATE INDEX outbound_age ON outbound_messages (created_at)",
    """
    CREATE TABLE status_transitions (                -- every change of an outbound message's status
        position   INTEGER PRIMARY KEY AUTOINCREMENT,
        message_id TEXT NOT NULL,
        status     TEXT NOT NULL,
        reason     TEXT,                             -- an error code, or how we know
        at         TEXT NOT NULL
    )""",
    "CREATE INDEX transitions_message ON status_transitions (message_id)",
    """
    CREATE TABLE inbound_events (                    -- what the channel told us
        id                   TEXT PRIMARY KEY,       -- evt_…
        account_id           TEXT,                   -- NULL while no account here has that id
        instagram_account_id TEXT NOT NULL,
        contact              TEXT NOT NULL,
        kind                 TEXT NOT NULL,          -- message.received, message.read, …
        dedupe_key           TEXT NOT NULL,          -- the same for every repetition of the same fact
        instagram_message_id TEXT,
        state                TEXT NOT NULL,          -- forwarded | noted | held | unrouted | dropped
        payload              TEXT,                   -- JSON; NULL once retention or an erasure took it
        occurred_at          TEXT NOT NULL,
        received_at          TEXT NOT NULL,
        correlation_id       TEXT NOT NULL
    )""",
    "CREATE UNIQUE INDEX inbound_dedupe ON inbound_events (instagram_account_id, dedupe_key)",
    """
    CREATE INDEX inbound_external ON inbound_events (account_id, instagram_message_id)
        WHERE instagram_message_id IS NOT NULL""",
    "CREATE INDEX inbound_held ON inbound_events (account_id, contact) WHERE state = 'held'",
    "CREATE INDEX inbound_unrouted ON inbound_events (instagram_account_id) WHERE state = 'unrouted'",
    "CREATE INDEX inbound_age ON inbound_events (received_at)",
    """
    CREATE TABLE deliveries (                        -- one HTTP call owed to one target
        position         INTEGER PRIMARY KEY AUTOINCREMENT,
        id               TEXT NOT NULL UNIQUE,       -- dlv_…
        target           TEXT NOT NULL,              -- crm | instagram
        account_id       TEXT NOT NULL,
        contact          TEXT NOT NULL,              -- target, account and contact make the lane
        sequence         INTEGER NOT NULL,           -- order within the lane
        event            TEXT NOT NULL,              -- message.received, …; message.send for the channel
        event_id         TEXT,                       -- evt_…: what the CRM sees
        message_id       TEXT,                       -- msg_…: the outbound message it is about
        body             TEXT,                       -- what the CRM gets; rendered at the first claim
        state            TEXT NOT NULL,              -- pending | done | dead
        ready            INTEGER NOT NULL,           -- 0 waits behind the lane's head, 1 head, 2 stepped aside
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
        correlation_id   TEXT NOT NULL,
        accepted_at      TEXT NOT NULL,
        expires_at       TEXT NOT NULL,              -- no further try after this
        finished_at      TEXT
    )""",
    """
    CREATE INDEX deliveries_due ON deliveries (target, account_id, due)
        WHERE state = 'pending' AND ready > 0""",
    """
    CREATE INDEX deliveries_lane ON deliveries (target, account_id, contact, ready, sequence)
        WHERE state = 'pending'""",
    """
    CREATE INDEX deliveries_untried ON deliveries (target, account_id, position)
        WHERE state = 'pending' AND ready = 0 AND attempts = 0""",
    "CREATE INDEX deliveries_expiry ON deliveries (expires_at) WHERE state = 'pending'",
    "CREATE INDEX deliveries_claimed ON deliveries (claim_id) WHERE claim_id IS NOT NULL",
    "CREATE INDEX deliveries_dead ON deliveries (target, finished_at) WHERE state = 'dead'",
    """
    CREATE INDEX deliveries_in_doubt ON deliveries (account_id, contact)
        WHERE state = 'dead' AND target = 'instagram' AND last_code = 'in_doubt'""",
    "CREATE INDEX deliveries_message ON deliveries (message_id) WHERE message_id IS NOT NULL",
    "CREATE INDEX deliveries_event ON deliveries (event_id) WHERE event_id IS NOT NULL",
    "CREATE INDEX deliveries_age ON deliveries (finished_at) WHERE state <> 'pending'",
    """
    CREATE TABLE delivery_attempts (                 -- written before the call, completed after it
        position    INTEGER PRIMARY KEY AUTOINCREMENT,
        delivery_id TEXT NOT NULL,
        claim_id    TEXT NOT NULL,
        kind        TEXT NOT NULL,                   -- call | look_up
        number      INTEGER NOT NULL,                -- of the call, or of the call that is looked for
        started_at  TEXT NOT NULL,
        finished_at TEXT,
        outcome     TEXT,                            -- done | retry | refused | in_doubt | fault | abandoned | absent
        code        TEXT,
        http_status INTEGER,
        error       TEXT,
        duration_ms INTEGER
    )""",
    "CREATE INDEX attempts_delivery ON delivery_attempts (delivery_id, number)",
    """
    CREATE TABLE heartbeats (                        -- who was alive when
        name TEXT PRIMARY KEY,
        at   TEXT NOT NULL
    )""",
    """
    CREATE VIEW webhook_deliveries AS                -- what is and was owed to CRMs
        SELECT id, account_id, contact, sequence, event, event_id, message_id, state, ready, due,
               attempts, last_code, last_http_status, last_error, accepted_at, finished_at, correlation_id
        FROM deliveries WHERE target = 'crm'""",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for statement in TABLES:
        db.execute_sql(statement.strip())
