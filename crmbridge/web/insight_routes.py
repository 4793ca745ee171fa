"""How the bridge is doing, and what became of a message: ``/api/v1/admin/stats`` and ``/api/v1/admin/explain``."""

import time
from typing import Any

from crmbridge import __version__
from crmbridge.errors import NotFound
from crmbridge.events import instant
from crmbridge.ops import explain
from crmbridge.store import alerts, overview, vitals
from crmbridge.store.database import Row
from crmbridge.store.deliveries import Patience
from crmbridge.web.app import Call, Reply, Route, Timings


def routes(timings: Timings, patience: Patience) -> list[Route]:
    """Return the routes; `timings` are those of this process's requests."""
    started_s = time.monotonic()

    def stats(call: Call) -> Reply:
        return Reply(
            {
                "timestamp": instant(call.now_s),
                "version": __version__,
                "uptime_s": int(time.monotonic() - started_s),
                "storage": call.db.sizes(),
                "worker": {"last_beat_at": vitals.last_beat(call.db, "worker")},
                "requests": timings.summary(),
                "unrouted_events": overview.unrouted(call.db),
                "alerts": [_alert(row) for row in alerts.everything(call.db) if row["cleared_at"] is None],
                "accounts": [_account(row) for row in overview.accounts(call.db)],
            }
        )

    def tell(call: Call) -> Reply:
        found = explain.explain(call.db, call.path["id"], call.now_s, patience)
        if not found["stories"] and not found["others"]:
            raise NotFound(explain.UNKNOWN, code="id_not_found")
        return Reply(found)

    return [
        Route("GET", "/api/v1/admin/stats", stats, "admin"),
        Route("GET", "/api/v1/admin/explain/<id:path>", tell, "admin"),
    ]


def _account(row: Row) -> dict[str, Any]:
    paused = {"deliveries": row["deliveries_paused_since"], "sends": row["sends_paused_since"]}
    shown = {name: value for name, value in row.items() if not name.endswith("_paused_since")}
    return {**shown, "paused_since": paused}


def _alert(row: Row) -> dict[str, Any]:
    return {
        "alert": row["kind"],
        "account_id": row["account_id"] or None,
        **{name: row[name] for name in ("since", "last_at", "count", "message")},
    }
