"""Outbound messages: accept them, follow what becomes of them, tell the CRM of every change."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from crmbridge import matching
from crmbridge.errors import Conflict, Invalid
from crmbridge.events import Thread, epoch_s, instant, new_id
from crmbridge.matching import Match
from crmbridge.store import accounts, contacts, deliveries, pauses, windows
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Claimed, Debt, Outcome, Patience, Verdict

# What ended without our knowing whether it had gone out; the channel may still show that it had.
_PROVABLE = ("in_doubt", "expired", "account_deleted")
_RANK = {"pending": 0, "failed": 0, "sent": 1, "delivered": 2, "read": 3}
TOLD = ("message.sent", "message.delivered", "message.read", "message.failed")  # the changes that a CRM is told of


# Whoever writes is shown for some seconds: later it is worth nothing.
_TYPING_S = 30.0


@dataclass(frozen=True)
class Request:
    """A send as the CRM asked for it. `hash` covers the whole request.

    `content` holds one of text, attachments, reaction, action and template, and what goes with it. It may name other
    messages by our ids; a private reply has a comment_id in it, and for its recipient the lane of that comment.
    """

    account_id: str
    recipient_id: str
    idempotency_key: str
    hash: str
    content: dict[str, Any]
    metadata: dict[str, Any] | None
    correlation_id: str
    send_before: str | None = None


def accept(db: Database, request: Request, patience: Patience, now_s: float) -> tuple[Row, bool]:
    """Store a send and its delivery, or return the one that has its key already; the flag tells if it is new.

    Raises Conflict when the key was used for another request, and what `check` raises.
    """

    def job() -> tuple[Row, bool]:
        known = db.row(
            "SELECT * FROM outbound_messages WHERE account_id = ? AND idempotency_key = ?",
            (request.account_id, request.idempotency_key),
        )
        if known:
            if known["request_hash"] != request.hash:
                raise Conflict(
                    f"This idempotency_key was used for another request, {known['id']}.", code="idempotency_conflict"
                )
            return known, False
        now, message_id = instant(now_s), new_id("msg")
        checked = check(db, request, now)
        content, is_action = checked.content, bool(checked.content.keys() & {"action", "reaction"})
        before = checked.send_before
        if content.get("action") in ("typing_on", "typing_off"):
            before = min(before or instant(now_s + _TYPING_S), instant(now_s + _TYPING_S))
        db.insert(
            "outbound_messages",
            {
                "id": message_id,
                "account_id": request.account_id,
                "recipient_id": checked.recipient_id,
                "comment_id": content.get("comment_id"),
                "idempotency_key": request.idempotency_key,
                "request_hash": request.hash,
                "content": _json(content),
                "metadata": _json(request.metadata),
                "status": "pending",
                "correlation_id": request.correlation_id,
                "created_at": now,
                "send_before": before,
            },
        )
        _transition(db, message_id, "pending", None, now)
        sequence = contacts.next_sequence(db, "instagram", request.account_id, request.recipient_id, now)
        debt = Debt(
            "instagram", request.account_id, request.recipient_id, deliveries.ACTION if is_action else deliveries.SEND,
            request.correlation_id, message_id=message_id,
        )  # fmt: skip
        expires = instant(now_s + patience.instagram_s)
        expires = min(expires, before or expires)
        deliveries.owe(db, debt, now=now, expires_at=expires, body=None, sequence=sequence, push=True)
        return found(db, message_id), True

    return db.write(job)


def check(db: Database, request: Request, now: str) -> Request:
    """Return a request with the channel's ids of the messages it names, and its customer as far as known.

    Raises Invalid or Conflict when it can't be sent: the account is inactive, it names a message that isn't there or
    was not sent yet, its time or its window is over, or its comment has its answer.
    """
    account = accounts.find(db, request.account_id)
    if account is None or account["status"] == "inactive":
        raise Conflict("The account is inactive: it takes no sends.", code="account_inactive")
    if request.send_before is not None and request.send_before <= now:
        detail = {"field": "send_before", "problem": f"is not after {now}"}
        raise Invalid("send_before has passed.", code="send_before_passed", details=[detail])
    content = dict(request.content)
    if "reply_to" in content:
        content["reply_to"] = _external_id(db, request, "reply_to", content["reply_to"])
    if "reaction" in content:
        about = _external_id(db, request, "reaction.message_id", content["reaction"]["message_id"])
        content["reaction"] = {**content["reaction"], "external_id": about}
    window = windows.of(db, account, request.recipient_id, content)
    if window.contact:
        content["comment_author"] = window.contact
    if "comment_id" in content and _is_answered(db, request.account_id, content["comment_id"]):
        raise Conflict("This comment has its private reply: Instagram takes one.", code="comment_already_answered")
    if window.is_closed(now):
        raise Conflict(f"Instagram's window for this send ended at {window.ends_at}.", code="window_closed")
    return replace(request, content=content, recipient_id=window.contact or request.recipient_id)


def outlook(db: Database, request: Request) -> tuple[str | None, list[str]]:
    """Return when a send's window ends, if it has an end that is known, and the warnings there are for it."""
    account = accounts.found(db, request.account_id)
    window = windows.of(db, account, request.recipient_id, request.content)
    warnings = [window.warning] if window.warning else []
    if ("instagram", account["id"]) in pauses.everyone(db):
        warnings.append("sends_paused")
    if account["status"] == "error":
        warnings.append("account_error")
    return window.ends_at, warnings


def _external_id(db: Database, request: Request, field: str, our_id: str) -> str:
    """Return the channel's id of a message to or from the same customer that the CRM names by an id of ours."""
    lane, named = (request.account_id, request.recipient_id), our_id
    if our_id.startswith("evt_"):
        named = db.value("SELECT message_id FROM deliveries WHERE event_id = ?", (our_id,))
    sent = db.row(
        """
        SELECT status, instagram_message_id FROM outbound_messages
        WHERE account_id = ? AND recipient_id = ? AND id = ?""",
        (*lane, named),
    )
    if sent and sent["instagram_message_id"]:
        return str(sent["instagram_message_id"])
    if sent and sent["status"] == "pending":
        raise Conflict(f"{field} names a message that is not sent yet.", code="message_not_sent_yet")
    external_id = db.value(
        "SELECT instagram_message_id FROM inbound_events WHERE account_id = ? AND contact = ? AND id = ?",
        (*lane, "evt_" + our_id[4:]),
    )
    if external_id:
        return str(external_id)
    detail = {"field": field, "problem": "names no message of this conversation that Instagram has"}
    raise Invalid(f"{field} names no message of this conversation.", code="message_unknown", details=[detail])


def _is_answered(db: Database, account_id: str, comment_id: str) -> bool:
    """Tell whether a comment has, or may have, its private reply."""
    return db.value(
        """
        SELECT 1 FROM outbound_messages WHERE account_id = ? AND comment_id = ?
            AND (status <> 'failed' OR error_code IN ('in_doubt', 'comment_already_answered')) LIMIT 1""",
        (account_id, comment_id),
    ) is not None  # fmt: skip


def cancel(db: Database, message_id: str, patience: Patience, now_s: float) -> bool:
    """End a message that still waits; tell whether it did. Raises Conflict when it has gone out, or may have."""
    now = instant(now_s)

    def job() -> bool:
        message = found(db, message_id)
        if message["status"] == "failed" and message["error_code"] != "in_doubt":
            return False
        send = _delivery(db, message_id)
        waits = send is not None and send["state"] == "pending" and send["claim_id"] is None and not send["in_doubt"]
        if message["status"] != "pending" or send is None or not waits:
            raise Conflict("The message has gone out, or may have.", code="message_gone_out")
        deliveries.end(db, send, "done", "cancelled", "cancelled by the CRM", now)
        fail(db, message_id, "cancelled", "cancelled before it was sent", now, patience)
        return True

    return db.write(job)


def _delivery(db: Database, message_id: str) -> Row | None:
    return db.row("SELECT * FROM deliveries WHERE message_id = ? AND target = 'instagram'", (message_id,))


def settle(
    db: Database, claimed: Claimed, outcome: Outcome, verdict: Verdict, patience: Patience, now_s: float
) -> None:
    """Carry a send's outcome over to its message; runs inside the write that records it."""
    message, now = found(db, str(claimed.message_id)), instant(now_s)
    if outcome.kind == "done":
        known = "id = ? AND instagram_message_id IS NULL"
        db.update("outbound_messages", {"instagram_message_id": outcome.external_id}, known, [message["id"]])
        _meet(db, message, outcome.contact)
        advance(db, message["id"], "sent", at=now, now=now, patience=patience)
        return
    again = verdict.state == "pending" and not verdict.in_doubt
    changed: Row = {"retry_count": message["retry_count"] + int(again)}
    if claimed.kind == "call" or (verdict.state == "dead" and outcome.kind != "absent"):
        retryable = int(outcome.kind in ("retry", "in_doubt") and claimed.kind == "call")
        changed |= {"error_code": outcome.code, "error_message": outcome.message, "error_retryable": retryable}
    db.update("outbound_messages", changed, "id = ?", [message["id"]])
    if verdict.state == "dead":
        reason = changed.get("error_code", message["error_code"])
        advance(db, message["id"], "failed", at=now, now=now, patience=patience, reason=reason)


def revive(db: Database, message_id: str, now: str) -> None:
    """A person has a failed message sent once more; runs inside a write."""
    anew = {"status": "pending", "error_code": None, "error_message": None, "error_retryable": None}
    db.update("outbound_messages", anew, "id = ?", [message_id])
    _transition(db, message_id, "pending", "revived", now)


def fail(db: Database, message_id: str, code: str, problem: str, now: str, patience: Patience) -> None:
    """End a message as failed without a call; runs inside a write."""
    failure = {"error_code": code, "error_message": problem, "error_retryable": 0}
    db.update("outbound_messages", failure, "id = ?", [message_id])
    advance(db, message_id, "failed", at=now, now=now, patience=patience, reason=code)


def _meet(db: Database, message: Row, contact: str | None) -> None:
    """Note whom a private reply reached: the channel tells it only now."""
    if message["comment_id"] is not None and contact:
        db.update("outbound_messages", {"recipient_id": contact}, "id = ?", [message["id"]])


def confirm(
    db: Database, message: Row, external_id: str, contact: str, *, at: str, now: str, patience: Patience
) -> None:
    """The channel showed the message in its thread: it is delivered, whatever we believed; runs inside a write."""
    _meet(db, message, contact)
    if message["instagram_message_id"] is None:
        db.update("outbound_messages", {"instagram_message_id": external_id}, "id = ?", [message["id"]])
    if message["status"] == "pending":
        advance(db, message["id"], "sent", at=at, now=now, patience=patience)
    advance(db, message["id"], "delivered", at=at, now=now, patience=patience)


def confirm_read(
    db: Database, account_id: str, contact: str, sent_until: str, *, at: str, now: str, patience: Patience
) -> int:
    """Mark what was sent to a contact up to a time as read; return how many messages changed."""
    unread = db.rows(
        """
        SELECT id FROM outbound_messages WHERE account_id = ? AND recipient_id = ? AND status IN ('sent', 'delivered')
            AND sent_at <= ? AND instagram_message_id IS NOT NULL ORDER BY sent_at""",
        (account_id, contact, sent_until),
    )
    for message in unread:
        advance(db, message["id"], "read", at=at, now=now, patience=patience)
    return len(unread)


def advance(
    db: Database, message_id: str, status: str, *, at: str, now: str, patience: Patience, reason: str | None = None
) -> None:
    """Move a message forward to a status, keep the transition and owe the CRM its event; backward is ignored.

    `at` is when it happened, `now` when we learned of it.
    """
    message = found(db, message_id)
    proven = message["status"] == "failed" and message["error_code"] in _PROVABLE
    forward = _RANK[status] > _RANK[message["status"]] if message["status"] != "failed" else proven
    if status == "failed":
        forward = message["status"] == "pending"
    if not forward:
        return
    latest = db.value("SELECT MAX(at) FROM status_transitions WHERE message_id = ?", (message_id,))
    at = max(at, latest or at)  # a receipt's own time may lie before the message's
    changed: Row = {"status": status}
    if status != "failed":
        changed |= {f"{status}_at": at, "error_code": None, "error_message": None, "error_retryable": None}
    db.update("outbound_messages", changed, "id = ?", [message_id])
    _transition(db, message_id, status, reason, at)
    _owe_status(db, found(db, message_id), at, now, patience)


def _owe_status(db: Database, message: Row, at: str, now: str, patience: Patience) -> None:
    account = accounts.find(db, message["account_id"])
    if account is None:
        return
    event, event_id = f"message.{message['status']}", new_id("evt")
    sequence = contacts.next_sequence(db, "crm", message["account_id"], message["recipient_id"], now)
    body = deliveries.rendered(
        {
            "event_id": event_id,
            "sequence": sequence,
            "account_id": message["account_id"],
            "timestamp": at,
            "event": event,
            "message_id": message["id"],
            "recipient_id": message["recipient_id"],
            "status": message["status"],
            "instagram_message_id": message["instagram_message_id"],
            "error": error_of(message) if message["status"] == "failed" else None,
            "metadata": json.loads(message["metadata"]) if message["metadata"] else None,
        },
    )
    debt = Debt(
        "crm", message["account_id"], message["recipient_id"], event, message["correlation_id"],
        event_id=event_id, message_id=message["id"],
    )  # fmt: skip
    expires = instant(epoch_s(now) + patience.crm_s)
    push = account["crm_webhook_url"] is not None
    deliveries.owe(db, debt, now=now, expires_at=expires, body=body, sequence=sequence, push=push)


def error_of(message: Row) -> dict[str, Any] | None:
    """Return a message's last error as the API shows it."""
    if message["error_code"] is None:
        return None
    return {
        "code": message["error_code"],
        "message": message["error_message"] or "",
        "retryable": bool(message["error_retryable"]),
    }


def status(db: Database, message_id: str) -> dict[str, Any] | None:
    """Return a message with its transitions and attempts, or None."""
    message = db.row("SELECT * FROM outbound_messages WHERE id = ?", (message_id,))
    if message is None:
        return None
    send = _delivery(db, message_id)
    attempts = db.rows(
        """
        SELECT kind, number, started_at, finished_at, outcome, code, http_status, error FROM delivery_attempts
        WHERE delivery_id = ? ORDER BY position""",
        (send["id"] if send else "",),
    )
    waits = send is not None and send["state"] == "pending" and send["claim_id"] is None
    account = accounts.find(db, message["account_id"]) if waits else None
    held = pauses.hold(db, account, "instagram") if account else None
    history = db.rows(
        "SELECT status, at AS timestamp FROM status_transitions WHERE message_id = ? ORDER BY position", (message_id,)
    )
    shown = "status account_id recipient_id instagram_message_id created_at sent_at delivered_at read_at retry_count"
    return {
        "message_id": message["id"],
        **{name: message[name] for name in shown.split()},
        "attempt_count": send["attempts"] if send else 0,
        "next_attempt_at": send["due"] if send and waits and send["ready"] and not held else None,
        "held": {name: held[name] for name in ("since", "until", "reason")} if held else None,
        "status_history": history,
        "attempts": attempts,
        "error": error_of(message),
        "metadata": json.loads(message["metadata"]) if message["metadata"] else None,
    }


def match(db: Database, claimed: Claimed, thread: Thread) -> Match:
    """Find what a doubtful call sent in its thread, among what is not known as something else."""
    ids = [entry.external_id for entry in thread.shown]
    marks, where = ", ".join("?" * len(ids)), (claimed.account_id, *ids)
    of = f"WHERE account_id = ? AND instagram_message_id IN ({marks})"
    sent = db.rows(f"SELECT instagram_message_id AS id, sent_at AS at FROM outbound_messages {of}", where)
    columns = "instagram_message_id AS id, received_at AS at, kind, state"
    heard = db.rows(f"SELECT {columns} FROM inbound_events {of}", where)
    echoes = {row["id"] for row in heard if row["kind"] == "message.echo" and row["state"] == "forwarded"}
    began = claimed.previous_at or claimed.claimed_at
    return matching.which(
        json.loads(claimed.body),
        thread,
        began_s=epoch_s(began),
        known={row["id"] for row in (*sent, *heard) if row["at"] is not None and row["at"] <= began},
        settled={row["id"] for row in sent} | echoes,
    )


def is_since(started: str | None, shown_s: float) -> bool:
    """Tell whether what is in the thread can be what a call that began at `started` sent."""
    return started is not None and shown_s >= epoch_s(started) - matching.SKEW_S


def body(db: Database, delivery: Row, account: Row, now: str) -> str:
    """Return what is to be sent now, as JSON.

    Raises Conflict when it is too late for it, and LookupError when retention took it.
    """
    message = found(db, delivery["message_id"])
    if message["content"] is None:
        raise LookupError(f"the content of {message['id']} is gone")
    if delivery["in_doubt"]:
        return str(message["content"])
    if message["send_before"] is not None and now >= message["send_before"]:
        raise Conflict("its send_before has passed", code="expired")
    sent = json.loads(message["content"])
    window = windows.of(db, account, message["recipient_id"], sent)
    if window.is_closed(now):
        raise Conflict(f"Instagram's window for it ended at {window.ends_at}", code="window_closed")
    return str(_json({**sent, "human_agent": True})) if window.needs_tag(now) else str(message["content"])


def content(db: Database, message_id: str) -> dict[str, Any]:
    """Return what is to be sent, or nothing once retention took it."""
    return json.loads(found(db, message_id)["content"] or "{}")  # type: ignore[no-any-return]


def find_external(db: Database, account_id: str, external_id: str) -> Row | None:
    """Return the account's message that has this id at the channel, or None."""
    return db.row(
        "SELECT * FROM outbound_messages WHERE account_id = ? AND instagram_message_id = ?", (account_id, external_id)
    )


def end_all(db: Database, message_ids: Sequence[str], now: str) -> None:
    """End messages of an account that is being deleted, where they still wait; no CRM is left to be told."""
    ended = {
        "status": "failed",
        "error_code": "account_deleted",
        "error_message": "the account was deleted",
        "error_retryable": 0,
    }
    marks = ", ".join("?" * len(message_ids))
    for message in db.rows(
        f"SELECT id FROM outbound_messages WHERE status = 'pending' AND id IN ({marks})", message_ids
    ):
        db.update("outbound_messages", ended, "id = ?", [message["id"]])
        _transition(db, message["id"], "failed", "account_deleted", now)


def _transition(db: Database, message_id: str, status: str, reason: str | None, at: str) -> None:
    db.insert("status_transitions", {"message_id": message_id, "status": status, "reason": reason, "at": at})


def found(db: Database, message_id: str) -> Row:
    """Return a message that is known to exist."""
    row = db.row("SELECT * FROM outbound_messages WHERE id = ?", (message_id,))
    if row is None:
        raise LookupError(message_id)
    return row


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
