"""The alerts that are open or ended lately, and what shows whether a cause is gone."""

from collections.abc import Sequence

from crmbridge.events import epoch_s, instant
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database, Reads, Row, Tx

_HOUR_S = 3600
_SAVE = """
    INSERT INTO alerts (kind, account_id, since, last_at, count, message, told, told_at, told_count, reopened,
        cleared_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (kind, account_id) DO UPDATE SET since = excluded.since, last_at = excluded.last_at,
        count = excluded.count, message = excluded.message, told = excluded.told, told_at = excluded.told_at,
        told_count = excluded.told_count, reopened = excluded.reopened, cleared_at = excluded.cleared_at"""


def everything(db: Reads) -> list[Row]:
    """Return the alerts, the longest open first, then those that ended."""
    return db.rows("SELECT * FROM alerts ORDER BY cleared_at IS NOT NULL, since, kind, account_id")


def save(db: Database, rows: Sequence[Row]) -> None:
    """Store alerts as they are now, in one commit, even on a full disk."""

    def job(tx: Tx) -> None:
        for row in rows:
            tx.run(_SAVE, tuple(row.values()))

    db.write_last(job)


def has_dead(db: Reads, target: Target, account_id: str) -> bool:
    """Tell whether an account has dead deliveries; of its sends only those that ended in doubt count."""
    doubt = " AND last_code = 'in_doubt'" if target == "instagram" else ""
    sql = f"SELECT 1 FROM deliveries WHERE place = 'dead' AND target = ? AND account_id = ?{doubt} LIMIT 1"
    return db.value(sql, (target, account_id)) is not None


def dead_letters(db: Reads, account_id: str) -> tuple[int, Row | None]:
    """Return how many deliveries to an account's CRM are dead, and the one that died first."""
    where = "FROM deliveries WHERE place = 'dead' AND target = 'crm' AND account_id = ?"
    oldest = db.row(f"SELECT id, finished_at, last_error {where} ORDER BY finished_at, position LIMIT 1", (account_id,))
    return (int(db.value(f"SELECT COUNT(*) {where}", (account_id,))), oldest) if oldest else (0, None)


def has_pending(db: Reads, target: Target, account_id: str, before: str = "~") -> bool:
    """Tell whether anything is owed at an endpoint, accepted before then."""
    of = "target = ? AND account_id = ? AND accepted_at < ?"
    sql = f"SELECT 1 FROM deliveries WHERE finished_at IS NULL AND {of} LIMIT 1"
    return db.value(sql, (target, account_id, before)) is not None


def last_heard(db: Reads, account_id: str) -> str | None:
    """Return when the channel last told something about an account."""
    found = db.value("SELECT MAX(received_at) FROM events WHERE account_id = ? AND message_id IS NULL", (account_id,))
    return str(found) if found else None


def active_hours(db: Reads, account_id: str, since: str) -> list[int]:
    """Return the hours since then in which the channel told something, as whole hours since the epoch, in order.

    Goes from hour to hour by the index, so that a busy account costs no more than a quiet one.
    """
    hours: list[int] = []
    sql = "SELECT MIN(received_at) FROM events WHERE account_id = ? AND message_id IS NULL AND received_at >= ?"
    while found := db.value(sql, (account_id, since)):
        hours.append(int(epoch_s(found)) // _HOUR_S)
        since = instant((hours[-1] + 1) * _HOUR_S)
    return hours
