"""What administrators ask and do: ``/api/v1/admin/stats``, ``…/explain`` and ``…/dlq``."""

import re
import time
from typing import Any

from crmbridge import __version__, contract, log
from crmbridge.errors import Invalid, NotFound
from crmbridge.events import Wake, epoch_s, instant, read_instant
from crmbridge.ops import explain
from crmbridge.store import alerts, dead, overview, vitals
from crmbridge.store.contacts import Target
from crmbridge.store.database import Row
from crmbridge.store.dead import Filter
from crmbridge.store.deliveries import Patience
from crmbridge.web.app import Call, Reply, Route, Timings

_CURSOR = re.compile(r"([0-9]{1,15})-([0-9]{1,15})\Z")
_FILTER = ("account_id", "event", "code", "dead_after", "dead_before")


def routes(timings: Timings, patience: Patience, wake: Wake) -> list[Route]:
    """Return the routes. `timings` are those of our requests; `wake` is called after something is owed again."""
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
        *_of_dead("webhooks", "crm", wake),
        *_of_dead("messages", "instagram", wake),
    ]


def _of_dead(name: str, target: Target, wake: Wake) -> list[Route]:
    def page(call: Call) -> Reply:
        limit = call.limit()
        rows = dead.page(call.db, _filter(call, target), after=_after(call.query.get("cursor")), limit=limit + 1)
        shown, more = rows[:limit], len(rows) > limit
        cursor = f"{round(epoch_s(shown[-1]['finished_at']) * 1000)}-{shown[-1]['position']}" if more else None
        return Reply({"deliveries": [_shown(row) for row in shown], "next_cursor": cursor, "has_more": more})

    def retry(call: Call) -> Reply:
        request = call.read(contract.RetryOne) if call.body else contract.RetryOne()
        row = dead.find(call.db, call.path["id"])
        if row is None or row["target"] != target:
            raise NotFound("There is no such delivery here.", code="delivery_not_found")
        by = call.key_id()
        dead.revive(call.db, row["id"], force=request.force, by=by)
        log.info("dlq.retried", delivery=row["id"], account=row["account_id"], force=request.force or None, by=by)
        wake(None)
        shown = {key: row[key] for key in ("account_id", "event_id", "message_id")}
        return Reply({"delivery_id": row["id"], **shown, "state": "pending"}, 202)

    def retry_many(call: Call) -> Reply:
        request = call.read(contract.RetryMany) if call.body else contract.RetryMany()
        wanted = Filter(target, **{key: getattr(request, key) for key in _FILTER})
        dead.check(call.db, wanted)
        by = call.key_id()
        found = dead.revive_all(call.db, wanted, call.now_s, preview=request.preview, by=by)
        if not request.preview:
            log.info("dlq.retried", **vars(wanted), matching=found.matching, revived=found.revived, by=by)
            wake(None)
        return Reply({**vars(found), "preview": request.preview}, 200 if request.preview else 202)

    path, query = f"/api/v1/admin/dlq/{name}", frozenset((*_FILTER, "cursor", "limit"))
    return [
        Route("GET", path, page, "admin", query=query),
        Route("POST", f"{path}/retry", retry_many, "admin"),
        Route("POST", f"{path}/<id>/retry", retry, "admin"),
    ]


def _filter(call: Call, target: Target) -> Filter:
    given: dict[str, Any] = {name: call.query.get(name) for name in _FILTER}
    for name in ("dead_after", "dead_before"):
        try:
            given[name] = read_instant(given[name]) if given[name] is not None else None
        except ValueError as error:
            raise Invalid(f"{name} {error}.", details=[{"field": name, "problem": str(error)}]) from None
    wanted = Filter(target, **given)
    dead.check(call.db, wanted)
    return wanted


def _after(cursor: str | None) -> tuple[str, int] | None:
    if cursor is None:
        return None
    found = _CURSOR.match(cursor)
    if found is None:
        detail = {"field": "cursor", "problem": "is no next_cursor of this list"}
        raise Invalid("cursor is no next_cursor of this list.", code="invalid_cursor", details=[detail])
    return instant(int(found[1]) / 1000), int(found[2])


def _shown(row: Row) -> dict[str, Any]:
    """Return a dead delivery as the API shows it: a webhook's, or a send's."""
    because = row["because"]
    names = "account_id message_id attempts accepted_at correlation_id"
    found = {
        "delivery_id": row["id"],
        **{name: row[name] for name in names.split()},
        "code": row["last_code"],
        "http_status": row["last_http_status"],
        "error": row["last_error"],
        "dead_at": row["finished_at"],
        "retryable": because is None,
        "not_retryable_because": because,
    }
    if row["target"] == "crm":
        return {
            **found,
            "sequence": row["sequence"],
            "contact": row["contact"],
            "event": row["event"],
            "event_id": row["event_id"],
        }
    return {**found, "recipient_id": row["contact"], "in_doubt": row["last_code"] == "in_doubt"}


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
