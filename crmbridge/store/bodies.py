"""What a CRM receives: rendered once, when one is to see it first, kept, and signed anew for each call."""

import json
from typing import Any

import pydantic_core

from crmbridge.store import windows
from crmbridge.store.database import Reads, Row, Tx

# What a CRM is told of, and what each event has beside what all have, in the order of its body.
TOLD: dict[str, tuple[str, ...]] = {
    "message.received": ("reply_to", "quick_reply", "referral", "is_self", "event"),
    "message.echo": ("reply_to", "quick_reply", "referral", "is_self", "event"),
    "message.reaction": ("event", "reaction"),
    "message.postback": ("event", "postback", "referral", "is_self"),
    "message.edited": ("event", "edit"),
    "message.deleted": ("event",),
    "message.referral": ("event", "referral"),
    "message.unsupported": ("event", "raw"),
    "comment.received": ("event", "comment", "referral"),
    "mention.received": ("event", "mention"),
}
# What rendering raises where the content is gone or is not what it was when it was written.
UNRENDERABLE = (LookupError, ValueError, TypeError, AttributeError, RecursionError)
# What brings a message; the other kinds are about one.
MESSAGES = ("message.received", "message.echo", "message.postback", "message.referral", "message.unsupported")
TAPPED = ("postback", "quick_reply")  # what was chosen says as much as words
_EVENT = """
    SELECT events.*, conversation_id, username, name, last_wrote_at, window_until FROM events
    LEFT JOIN contacts ON contacts.account_id = events.account_id AND contacts.contact = events.contact"""


def rendered(event: dict[str, Any]) -> str:
    """Return the body that a CRM receives; the text is stored, and its UTF-8 bytes are what is signed.

    Raises ValueError for half a surrogate pair and for what is nested too deeply. A number that JSON does not know,
    such as Infinity, becomes null.
    """
    return pydantic_core.to_json(event, inf_nan_mode="null").decode()


def found(db: Reads, event_id: str) -> Row:
    """Return an event that is known to exist, with what is known of its contact."""
    row = db.row(f"{_EVENT} WHERE events.id = ?", (event_id,))
    if row is None:
        raise LookupError(event_id)
    return row


def at_position(db: Reads, position: int) -> Row | None:
    """Return the event at a position as `found` does, or None."""
    return db.row(f"{_EVENT} WHERE events.position = ?", (position,))


def keep(tx: Tx, account: Row, event_id: str) -> str:
    """Return what the CRM gets, and keep it; raises one of UNRENDERABLE when it cannot be rendered."""
    row = found(tx, event_id)
    told = of(tx, account, row)
    if row["body"] is None:
        tx.update("events", {"body": told}, "id = ?", [event_id])
    return told


def of(db: Reads, account: Row, row: Row) -> str:
    """Return what the CRM gets of an event, rendered if it was not before; raises one of UNRENDERABLE."""
    if row["body"] is not None:
        return str(row["body"])
    if row["payload"] is None:
        raise LookupError(f"the content of {row['id']} is gone")
    content = json.loads(row["payload"])
    kind, extra, ours = (
        row["kind"],
        content.get("extra", {}),
        content.get("from_account", row["kind"] == "message.echo"),
    )
    shop, customer = account["instagram_account_id"], row["contact"] or extra.get("sender_id")
    in_conversation = row["contact"] and kind not in ("comment.received", "mention.received")
    others = content.get("others", {})
    fields: dict[str, Any] = {
        "event_id": row["id"],
        "sequence": row["sequence"],
        "account_id": account["id"],
        "timestamp": row["occurred_at"],
        "message_id": _message_id(db, account["id"], row),
        "sender_id": shop if ours else customer,
        "sender_username": account["username"] if ours else row["username"],
        "sender_name": None if ours else row["name"],
        "recipient_id": customer if ours else shop,
        "message": content.get("text"),
        "message_type": content["message_type"],
        "instagram_message_id": row["instagram_message_id"],
        "conversation_id": row["conversation_id"] if in_conversation else None,
        "attachments": [_attachment(entry) for entry in content.get("attachments", [])],
        "window_expires_at": windows.of_contact(row) if in_conversation else None,
        "recovered": bool(extra.get("recovered")),
        "other": others.get("event"),
    }
    for name in TOLD[kind]:
        if name == "event":
            fields[name] = kind
        elif name == "is_self":
            fields[name] = bool(extra.get("is_self"))
        elif name == "reply_to":
            fields[name] = _reply_to(db, account["id"], content.get("reply_to"), others)
        elif name == "raw":
            fields[name] = content.get("raw")
        else:
            fields[name] = {**extra[name], "other": others.get(name)} if extra.get(name) else None
    return rendered(fields)


def withdrawn(kind: str, body: str) -> str:
    """Return a body that was rendered, without what its message said; all else stays as it was told."""
    told = json.loads(body)
    nothing: dict[str, Any] = {"message": None, "attachments": [], "reply_to": None, "raw": None, "other": None}
    if kind in MESSAGES:
        nothing |= {"message_type": "deleted", **{name: dict.fromkeys(told.get(name) or ()) or None for name in TAPPED}}
    told |= {name: value for name, value in nothing.items() if name in told}
    for value in told.values():
        if isinstance(value, dict):
            value |= {name: None for name in ("other", "ad") if name in value}
    return rendered(told)


def _message_id(db: Reads, account_id: str, row: Row) -> str | None:
    """Return our id of the message that an event is or is about, or None when it is not here."""
    if row["kind"] in MESSAGES:
        return message_id(row["id"])
    return our_id(db, account_id, row["instagram_message_id"]) if row["instagram_message_id"] else None


def our_id(db: Reads, account_id: str, external_id: str) -> str | None:
    """Return our id of a message that was sent or told, by its id at the channel."""
    named = (account_id, external_id)
    sent = db.value("SELECT id FROM outbound_messages WHERE account_id = ? AND instagram_message_id = ?", named)
    if sent:
        return str(sent)
    # Sorted here: with ORDER BY and LIMIT SQLite reads all of the account's events by their age.
    heard = db.rows(
        f"""
        SELECT id, received_at FROM events WHERE account_id = ? AND instagram_message_id = ?
            AND kind IN ({", ".join("?" * len(MESSAGES))})""",
        (*named, *MESSAGES),
    )
    first = min(heard, key=lambda row: str(row["received_at"]), default=None)
    return message_id(first["id"]) if first else None


def message_id(event_id: str) -> str:
    """Return the id of the message that an event brought."""
    return "msg_" + event_id.removeprefix("evt_")


def _attachment(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": entry["type"],
        "url": entry["url"],
        "title": entry["title"],
        "instagram_id": entry["external_id"],
        "payload": entry.get("payload"),
    }


def _reply_to(
    db: Reads, account_id: str, reply: dict[str, Any] | None, others: dict[str, Any]
) -> dict[str, Any] | None:
    if reply is None:
        return None
    external_id = reply["external_id"]
    ours = our_id(db, account_id, external_id) if external_id else None
    story = {"id": reply["story_id"], "url": reply["story_url"], "other": others.get("story")}
    return {
        "message_id": ours,
        "instagram_message_id": external_id,
        "story": story if any(story.values()) else None,
        "other": others.get("reply_to"),
    }


def of_status(message: Row, event_id: str, sequence: int, at: str) -> str:
    """Return what the CRM gets of a change of a message's status."""
    return rendered(
        {
            "event_id": event_id,
            "sequence": sequence,
            "account_id": message["account_id"],
            "timestamp": at,
            "event": f"message.{message['status']}",
            "message_id": message["id"],
            "recipient_id": message["recipient_id"],
            "status": message["status"],
            "instagram_message_id": message["instagram_message_id"],
            "error": error_of(message) if message["status"] == "failed" else None,
            "metadata": json.loads(message["metadata"]) if message["metadata"] else None,
        }
    )


def error_of(message: Row) -> dict[str, Any] | None:
    """Return a message's last error as the API shows it."""
    if message["error_code"] is None:
        return None
    return {
        "code": message["error_code"],
        "message": message["error_message"] or "",
        "retryable": bool(message["error_retryable"]),
    }
