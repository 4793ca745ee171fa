"""How the whole bridge is doing, read from the views that an operator sees."""

from typing import Any

from crmbridge.store.contacts import Target
from crmbridge.store.database import Reads, Row

NAMES: dict[Target, str] = {"crm": "webhooks", "instagram": "sends"}


def accounts(db: Reads, account_id: str | None = None) -> list[Row]:
    """Return each account, or one, with what it waits for, what died, and the latencies of its last hour."""
    where, parameters = (" WHERE account_id = ?", [account_id]) if account_id else ("", [])
    found = db.rows(f"SELECT * FROM account_overview{where} ORDER BY account_id", parameters)
    late: dict[str, dict[str, Any]] = {}
    for row in db.rows(f"SELECT * FROM latency_last_hour{where}", parameters):
        shown = {name: row[name] for name in ("count", "p50_ms", "p95_ms", "p99_ms", "max_ms")}
        late.setdefault(row["account_id"], {})[NAMES[row["target"]]] = shown
    for row in found:
        del row["to_type"]
        row["latency"] = {name: late.get(row["account_id"], {}).get(name) for name in NAMES.values()}
    return found


def said(latency: Row | None) -> str:
    """Say the latencies of an hour in words."""
    if latency is None:
        return "nothing to measure"
    percentiles = ", ".join(f"{name} {latency[f'{name}_ms']} ms" for name in ("p50", "p95", "p99"))
    return f"{latency['count']} done, {percentiles}, at most {latency['max_ms']} ms"


def unrouted(db: Reads) -> int:
    """Return how many events wait for an account that is not here."""
    return int(db.value("SELECT COUNT(*) FROM events WHERE state = 'unrouted'"))


# --- for whoever looks for a fault ---


def schema(db: Reads) -> dict[str, str]:
    """Return what made each table, index and view."""
    return {row["name"]: row["sql"] for row in db.rows("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")}


def tables(db: Reads) -> dict[str, int]:
    """Return how many rows each table has."""
    names = db.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return {row["name"]: int(db.value(f"SELECT COUNT(*) FROM {row['name']}")) for row in names}


def calls(db: Reads, number: int) -> list[Row]:
    """Return the last calls that did not succeed at once, without what was answered in words."""
    return db.rows(
        """
        SELECT told.subject AS delivery_id, account_id, target, event, told.kind, told.at, told.until, told.outcome,
            told.code, told.http, told.ms, state, place, due, attempts, retries, waits, in_doubt, look_ups, accepted_at
        FROM history AS told JOIN deliveries ON deliveries.id = subject
        WHERE told.kind IN ('call', 'look_up') ORDER BY told.position DESC LIMIT ?""",
        (number,),
    )
