"""What an operator looks at in the sqlite3 shell. Read-only; each row tells the command to type next."""

from peewee import Database
from playhouse.migrate import SchemaMigrator

VIEWS = (
    """
    CREATE VIEW connected AS  -- the accounts in use, with what is held back of each
        SELECT accounts.id, username, instagram_account_id, crm.url AS crm_webhook_url,
            CASE WHEN instagram.held_by IN ('inactive', 'error') THEN instagram.held_by ELSE 'active' END AS status,
            instagram.held_reason AS status_reason, crm.held_by AS deliveries_held_by,
            crm.paused_at AS deliveries_paused_since, instagram.paused_at AS sends_paused_since, created_at, updated_at
        FROM accounts
        JOIN endpoints AS crm ON crm.account_id = accounts.id AND crm.kind = 'crm'
        JOIN endpoints AS instagram ON instagram.account_id = accounts.id AND instagram.kind = 'instagram'
        WHERE deleted_at IS NULL""",
    """
    CREATE VIEW stuck AS  -- what is owed and not on its normal way: failing, held, or waiting for over a minute
        SELECT waiting.id, waiting.account_id, waiting.contact, waiting.target, waiting.event,
            CASE
                WHEN paused_at IS NOT NULL THEN 'paused' || COALESCE(': ' || paused_reason, '')
                WHEN held_by = 'inactive' THEN 'the account is inactive'
                WHEN held_by = 'error' THEN 'the account is in error: ' || COALESCE(held_reason, 'no reason given')
                WHEN held_by IS NOT NULL THEN 'held: ' || COALESCE(held_reason, held_by)
                WHEN waiting.in_doubt THEN 'Instagram may have taken it; it is looked for'
                WHEN waiting.place = 'behind'
                    THEN 'waits behind ' || COALESCE(head.id, 'nobody: the next sweep mends it')
                WHEN waiting.attempts > 0 THEN 'failed '
                    || CASE waiting.attempts WHEN 1 THEN 'once' ELSE waiting.attempts || ' times' END
                    || ': ' || COALESCE(waiting.last_error, waiting.last_code, 'no answer yet')
                ELSE 'not tried yet: its endpoint rests or is busy, or no worker runs'
            END AS why,
            waiting.accepted_at AS since,
            CASE WHEN paused_at IS NULL AND held_by IS NULL AND waiting.place <> 'behind' THEN waiting.due END
                AS next_try,
            waiting.attempts, waiting.last_code, waiting.last_http_status, waiting.last_error,
            CASE
                WHEN paused_at IS NOT NULL OR held_by = 'unauthorized' THEN 'crmbridge account resume '
                    || waiting.account_id || CASE waiting.target WHEN 'crm' THEN ' --deliveries' ELSE ' --sends' END
                WHEN held_by = 'gone'
                    THEN 'crmbridge account set ' || waiting.account_id
                        || ' --url URL (where the CRM is now), or crmbridge account resume ' || waiting.account_id
                        || ' --deliveries'
                ELSE 'crmbridge explain ' || COALESCE(head.id, waiting.id) END AS to_type
        FROM endpoints CROSS JOIN deliveries AS waiting
            ON waiting.account_id = endpoints.account_id AND waiting.target = endpoints.kind
        LEFT JOIN deliveries AS head ON waiting.place = 'behind' AND head.place = 'head'
            AND head.target = waiting.target AND head.account_id = waiting.account_id AND head.contact = waiting.contact
        WHERE waiting.finished_at IS NULL AND (
            paused_at IS NOT NULL OR held_by IS NOT NULL OR waiting.in_doubt = 1
            OR (waiting.attempts > 0 AND waiting.claim_id IS NULL) OR (head.attempts > 0 AND head.claim_id IS NULL)
            OR waiting.accepted_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 minute'))
        UNION ALL
        SELECT MIN(id), NULL, MIN(contact), 'crm', COUNT(*) || ' unrouted',
            'no account here has the Instagram account id ' || instagram_account_id,
            MIN(received_at), NULL, 0, NULL, NULL, NULL, 'crmbridge explain ' || MIN(id)
        FROM events WHERE state = 'unrouted' GROUP BY instagram_account_id""",
    """
    CREATE VIEW dead AS  -- what was given up, until a person has it tried again
        SELECT id, account_id, contact, target, event, COALESCE(message_id, event_id) AS about, finished_at AS died_at,
            attempts, last_code, last_http_status, last_error, accepted_at, gone AS content_gone,
            CASE WHEN gone OR (target = 'instagram' AND last_code = 'in_doubt') THEN 'crmbridge explain ' || id
                ELSE 'crmbridge dlq retry ' || id END AS to_type
        FROM deliveries WHERE place = 'dead'""",
    """
    CREATE VIEW recent AS  -- every event for a CRM and every send, the newest first
        SELECT accepted_at AS at, account_id, contact,
            CASE target WHEN 'crm' THEN 'to the CRM' ELSE 'to Instagram' END AS way,
            event, COALESCE(message_id, event_id) AS about, state, attempts, last_code, last_http_status,
            finished_at, latency_ms, 'crmbridge explain ' || id AS to_type
        FROM deliveries ORDER BY position DESC""",
    """
    CREATE VIEW slow AS  -- what took longer than five seconds to get there, the newest first
        SELECT finished_at, latency_ms, account_id, contact, target, event, attempts, accepted_at, id,
            (SELECT group_concat(at || ' to ' || until || ': ' || COALESCE(text, code), '; ') FROM history
                WHERE subject = account_id AND kind = target || '_held' AND at < finished_at
                    AND until > accepted_at) AS held,  -- when, and why, it had to wait
            'crmbridge explain ' || id AS to_type
        FROM deliveries WHERE latency_ms > 5000 ORDER BY finished_at DESC""",
    """
    CREATE VIEW latency_last_hour AS  -- accepted to done, in milliseconds, of what a call did in the last hour;
        -- without what was held meanwhile, by a pause or the account's status, and what a person had tried again
        WITH counted AS (
            SELECT account_id, target, latency_ms, COUNT(*) AS number FROM deliveries
            WHERE finished_at IS NOT NULL AND latency_ms IS NOT NULL
                AND finished_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 hour')
                AND NOT EXISTS (SELECT 1 FROM history WHERE subject = deliveries.id AND kind = 'revived')
                AND NOT EXISTS (
                    SELECT 1 FROM history
                    WHERE subject = account_id AND kind = target || '_held' AND at < finished_at
                        AND until > accepted_at)
            GROUP BY account_id, target, latency_ms),
        placed AS (
            SELECT account_id, target, latency_ms,
                SUM(number) OVER (PARTITION BY account_id, target ORDER BY latency_ms) AS place,
                SUM(number) OVER (PARTITION BY account_id, target) AS count
            FROM counted)
        SELECT account_id, target, count,
            MIN(CASE WHEN place * 100 >= count * 50 THEN latency_ms END) AS p50_ms,
            MIN(CASE WHEN place * 100 >= count * 95 THEN latency_ms END) AS p95_ms,
            MIN(CASE WHEN place * 100 >= count * 99 THEN latency_ms END) AS p99_ms,
            MAX(latency_ms) AS max_ms, 'crmbridge explain ' || account_id AS to_type
        FROM placed GROUP BY account_id, target, count""",
    """
    CREATE VIEW account_overview AS  -- one row for each account: what it waits for, what died, when it was last heard
        SELECT id AS account_id, username, status, status_reason, deliveries_paused_since, sends_paused_since,
            (SELECT COUNT(*) FROM deliveries
                WHERE finished_at IS NULL AND target = 'crm' AND account_id = connected.id) AS pending_webhooks,
            (SELECT accepted_at FROM deliveries WHERE position = (SELECT MIN(position) FROM deliveries
                WHERE finished_at IS NULL AND target = 'crm' AND account_id = connected.id))
                AS oldest_pending_webhook_at,
            (SELECT COUNT(*) FROM deliveries
                WHERE place = 'dead' AND target = 'crm' AND account_id = connected.id) AS dead_webhooks,
            (SELECT COUNT(*) FROM deliveries
                WHERE finished_at IS NULL AND target = 'instagram' AND account_id = connected.id) AS pending_sends,
            (SELECT accepted_at FROM deliveries WHERE position = (SELECT MIN(position) FROM deliveries
                WHERE finished_at IS NULL AND target = 'instagram' AND account_id = connected.id))
                AS oldest_pending_send_at,
            (SELECT COUNT(*) FROM deliveries
                WHERE place = 'dead' AND target = 'instagram' AND account_id = connected.id) AS dead_sends,
            (SELECT MAX(received_at) FROM events WHERE account_id = connected.id AND message_id IS NULL)
                AS last_event_at,
            'crmbridge explain ' || id AS to_type
        FROM connected""",
)


def up(migrator: SchemaMigrator, db: Database) -> None:
    for view in VIEWS:
        db.execute_sql(view.strip())
