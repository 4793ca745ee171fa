"""``crmbridge export``: all that is stored about one customer, as JSON on standard output. Changes nothing."""

import json
import time
from collections.abc import Iterator
from typing import Any

from crmbridge import __version__, terminal
from crmbridge.events import instant
from crmbridge.ops import erase
from crmbridge.store import accounts, bodies, history, privacy
from crmbridge.store.database import Database, Row

SCHEMA = 1  # of the JSON
_CONTACT = ("conversation_id", "username", "name", "last_wrote_at", "window_until", "profile_checked_at", "created_at")
_EVENT = (
    "instagram_account_id", "instagram_message_id", "message_id", "sequence", "state", "occurred_at", "received_at",
    "correlation_id",
)  # fmt: skip
_MESSAGE = (
    "idempotency_key", "comment_id", "instagram_message_id", "status", "retry_count", "error_code", "error_message",
    "created_at", "sent_at", "delivered_at", "read_at", "send_before", "correlation_id",
)  # fmt: skip
_DELIVERY = (
    "target", "event", "state", "attempts", "look_ups", "last_code", "last_http_status", "last_error", "accepted_at",
    "tried_at", "finished_at", "correlation_id",
)  # fmt: skip
_HISTORY = ("at", "until", "kind", "outcome", "code", "http", "text", "ms", "correlation")


def run(db: Database, contact: str, account_id: str | None) -> int:
    """Print what is stored about a customer; return 1, and print nothing but a complaint, when that is nothing.

    Raises Misconfigured as `erase.places` does.
    """
    found = {one: privacy.stored(db, one, contact) for one in erase.places(db, contact, account_id)}
    unrouted = privacy.stored_unrouted(db, contact) if account_id is None else []
    told = [_account(db, one, stored) for one, stored in found.items() if stored.is_something]
    if not told and not unrouted:
        terminal.complain("nothing is stored about this contact")
        return 1
    head = {"schema": SCHEMA, "version": __version__, "made_at": instant(time.time()), "contact": contact}
    whole = {**head, "accounts": told, "unrouted_events": [_event(db, row) for row in unrouted]}
    # ASCII alone, so that it is good on every terminal; DEL is what json leaves as it is.
    plain = json.loads(bodies.rendered(whole))  # a number that JSON does not know, such as Infinity, is null
    terminal.say(*json.dumps(plain, indent=2).replace("\x7f", "\\u007f").split("\n"))
    return 0


def _account(db: Database, account_id: str, stored: privacy.Stored) -> dict[str, Any]:
    account = accounts.find_any(db, account_id) or {}

    return {
        "account_id": account_id,
        "instagram_account_id": account.get("instagram_account_id"),
        "profile": _some(stored.profile, _CONTACT) if stored.profile else None,
        "events": [_event(db, row) for row in stored.events],
        "messages": [_message(db, row) for row in stored.messages],
        "other_deliveries": [_delivery(db, row) for row in stored.other_deliveries],
    }


def _event(db: Database, row: Row) -> dict[str, Any]:
    return {
        "event_id": row["id"],
        "event": row["kind"],
        **_some(row, _EVENT),
        # What names them among others, and is theirs alone only as far, is told without what it says.
        "content": _json(row["payload"]) if row["contact"] else None,
        "body": _json(row["body"]) if row["contact"] else None,
        "history": [*_history(db, row["id"])],
        "deliveries": [_delivery(db, one) for one in privacy.deliveries_of(db, event_id=row["id"])],
    }


def _message(db: Database, row: Row) -> dict[str, Any]:
    return {
        "message_id": row["id"],
        **_some(row, _MESSAGE),
        "content": _json(row["content"]),
        "metadata": _json(row["metadata"]),
        "history": [*_history(db, row["id"])],
        "deliveries": [_delivery(db, one) for one in privacy.deliveries_of(db, message_id=row["id"])],
    }


def _delivery(db: Database, row: Row) -> dict[str, Any]:
    return {"delivery_id": row["id"], **_some(row, _DELIVERY), "history": [*_history(db, row["id"])]}


def _history(db: Database, subject: str) -> Iterator[dict[str, Any]]:
    for row in history.of(db, subject):
        yield {name: row[name] for name in _HISTORY if row[name] is not None}


def _some(row: Row, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _json(text: str | None) -> Any:
    return None if text is None else json.loads(text)
