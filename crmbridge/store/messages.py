"""Outbound messages: accept them, follow what becomes of them, tell the CRM of every change."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from crmbridge import matching
from crmbridge.errors import Conflict, Invalid
from crmbridge.events import Thread, epoch_s, instant, new_id
from crmbridge.matching import Match
from crmbridge.store import accounts, bodies, contacts, deliveries, endpoints, history, windows
from crmbridge.store.database import Database, Reads, Row, Tx
from crmbridge.store.deliveries import Claimed, Debt, Outcome, Verdict

# What ended without our knowing whether it had gone out; the channel may still show that it had.
_PROVABLE = ("in_doubt", "expired", "held_too_long", "account_deleted")
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


@dataclass(frozen=True, slots=True)
class Outlook:
    """When a send's window ends, if it has an end that is known, and the warnings there are for it."""

    window_expires_at: str | None
    warnings: list[str]


def accept(db: Database, request: Request) -> tuple[Row, Outlook, bool]:
    """Store a send and its delivery, or return the one that has its key already; the flag tells if it is new.

    Raises Conflict when the key was used for another request, and what `check` raises.
    """

    def job(tx: Tx) -> tuple[Row, Outlook, bool]:
        try:
            checked, outlook = check(tx, request, tx.now)
        except (
            Conflict,
            Invalid,
        ):  # what was accepted then may not be any more, and is no reason to refuse its repetition
            if (known := _repeated(tx, request)) is None:
                raise
            return *known, False
        message_id, content = new_id("msg"), checked.content
        is_action = bool(content.keys() & {"action", "reaction"})
        before = checked.send_before
        if content.get("action") in ("typing_on", "typing_off"):
            before = min(before or "9", instant(tx.now_s + _TYPING_S))
        row: Row = {
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
            "created_at": tx.now,
            "send_before": before,
        }
        if not tx.insert("outbound_messages", row, once=True) and (known := _repeated(tx, request)):
            return *known, False
        debt = Debt(
            "instagram", request.account_id, request.recipient_id, deliveries.ACTION if is_action else deliveries.SEND,
            request.correlation_id, message_id=message_id,
        )  # fmt: skip
        deliveries.owe(tx, debt)
        return row, outlook, True

    return db.write(job)


def _repeated(db: Reads, request: Request) -> tuple[Row, Outlook] | None:
    """Return the message that a request repeats by its key, if it does. Raises Conflict for another request."""
    known = db.row(
        "SELECT * FROM outbound_messages WHERE account_id = ? AND idempotency_key = ?",
        (request.account_id, request.idempotency_key),
    )
    if known is None:
        return None
    if known["request_hash"] != request.hash:
        raise Conflict(
            f"This idempotency_key was used for another request, {known['id']}.", code="idempotency_conflict"
        )
    account = accounts.found(db, request.account_id)
    return known, _outlook(account, windows.of(db, account, request.recipient_id, request.content))


def check(db: Reads, request: Request, now: str) -> tuple[Request, Outlook]:
    """Return a request with the channel's ids of the messages it names, and its customer as far as known.

    Raises NotFound, Invalid or Conflict when it can't be sent: its account isn't here or is inactive, it names a
    message that isn't there or was not sent yet, its time or its window is over, or its comment has its answer.
    """
    account = accounts.found(db, request.account_id)
    if account["status"] == "inactive":
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
    checked = replace(request, content=content, recipient_id=window.contact or request.recipient_id)
    return checked, _outlook(account, window)


def _outlook(account: Row, window: windows.Window) -> Outlook:
    warnings = [window.warning] if window.warning else []
    if account["sends_paused_at"] is not None:
        warnings.append("sends_paused")
    if account["status"] == "error":
        warnings.append("account_error")
    return Outlook(window.ends_at, warnings)


def _external_id(db: Reads, request: Request, field: str, our_id: str) -> str:
    """Return the channel's id of a message to or from the same customer that the CRM names by an id of ours."""
    lane, named = (request.account_id, request.recipient_id), our_id
    if our_id.startswith("evt_"):
        named = db.value("SELECT message_id FROM events WHERE id = ?", (our_id,))
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
        "SELECT instagram_message_id FROM events WHERE account_id = ? AND contact = ? AND id = ?",
        (*lane, "evt_" + our_id[4:]),
    )
    if external_id:
        return str(external_id)
    detail = {"field": field, "problem": "names no message of this conversation that Instagram has"}
    raise Invalid(f"{field} names no message of this conversation.", code="message_unknown", details=[detail])


def _is_answered(db: Reads, account_id: str, comment_id: str) -> bool:
    """Tell whether a comment has, or may have, its private reply."""
    return db.value(
        """
        SELECT 1 FROM outbound_messages WHERE account_id = ? AND comment_id = ?
            AND (status <> 'failed' OR error_code IN ('in_doubt', 'comment_already_answered')) LIMIT 1""",
        (account_id, comment_id),
    ) is not None  # fmt: skip


def cancel(db: Database, message_id: str) -> bool:
    """End a message that still waits; tell whether it did. Raises Conflict when it has gone out, or may have."""

    def job(tx: Tx) -> bool:
        message = found(tx, message_id)
        if message["status"] == "failed" and message["error_code"] != "in_doubt":
            return False
        send = _delivery(tx, message_id)
        waits = send is not None and send["state"] == "pending" and send["claim_id"] is None and not send["in_doubt"]
        if message["status"] != "pending" or send is None or not waits:
            raise Conflict("The message has gone out, or may have.", code="message_gone_out")
        deliveries.end(tx, send, "done", "cancelled", "cancelled by the CRM")
        fail(tx, message_id, "cancelled", "cancelled before it was sent")
        return True

    return db.write(job)


def _delivery(db: Reads, message_id: str) -> Row | None:
    return db.row("SELECT * FROM deliveries WHERE message_id = ? AND target = 'instagram'", (message_id,))


_HELD = "SELECT 1 FROM events WHERE state = 'held' AND account_id = outbound_messages.account_id"
_TAKEN_BACK = """
    SELECT 1 FROM events
    WHERE account_id = outbound_messages.account_id AND instagram_message_id = ? AND kind = 'message.deleted'"""
_SETTLED = f"""
    SELECT *, EXISTS ({_HELD}) AS awaited, EXISTS ({_TAKEN_BACK}) AS taken_back FROM outbound_messages WHERE id = ?"""


def settle(tx: Tx, claimed: Claimed, outcome: Outcome, verdict: Verdict) -> bool:
    """Carry a send's outcome over to its message; runs inside the write that records it.

    Tells whether echoes or receipts of its account wait for such news.
    """
    message = tx.row(_SETTLED, (outcome.external_id, claimed.message_id))
    if message is None:  # its account was erased while the call was under way
        return False
    _settle(tx, message, claimed, outcome, verdict)
    return bool(message["awaited"])


def _settle(tx: Tx, message: Row, claimed: Claimed, outcome: Outcome, verdict: Verdict) -> None:
    if outcome.kind == "done":
        known: Row = {"instagram_message_id": message["instagram_message_id"] or outcome.external_id}
        if message["taken_back"]:  # before its answer was recorded
            known["content"] = None
        advance(tx, message, "sent", {**known, **_met(message, outcome.contact)}, at=tx.now)
        return
    again = verdict.state == "pending" and not verdict.in_doubt
    changed: Row = {"retry_count": message["retry_count"] + int(again)}
    if claimed.kind == "call" or (verdict.state == "dead" and outcome.kind != "absent"):
        retryable = int(outcome.kind in ("retry", "in_doubt") and claimed.kind == "call")
        changed |= {"error_code": outcome.code, "error_message": outcome.message, "error_retryable": retryable}
    if verdict.state == "dead":
        reason = changed.get("error_code", message["error_code"])
        advance(tx, message, "failed", changed, at=tx.now, reason=reason)
    else:
        tx.update("outbound_messages", changed, "id = ?", [message["id"]])


def revive(tx: Tx, message_id: str) -> None:
    """A person has a failed message sent once more; runs inside a write."""
    anew = {"status": "pending", "error_code": None, "error_message": None, "error_retryable": None}
    tx.update("outbound_messages", anew, "id = ?", [message_id])
    history.note(tx, message_id, "status", code="pending", text="revived")


def fail(tx: Tx, message_id: str, code: str, problem: str) -> None:
    """End a message as failed without a call; runs inside a write."""
    failure = {"error_code": code, "error_message": problem, "error_retryable": 0}
    advance(tx, found(tx, message_id), "failed", failure, at=tx.now, reason=code)


def _met(message: Row, contact: str | None) -> Row:
    """Return whom a private reply reached: the channel tells it only when it has."""
    return {"recipient_id": contact} if message["comment_id"] is not None and contact else {}


def confirm(tx: Tx, message: Row, external_id: str, contact: str, *, at: str) -> None:
    """The channel showed the message in its thread: it is delivered, whatever we believed; runs inside a write."""
    proof: Row = {"instagram_message_id": message["instagram_message_id"] or external_id, **_met(message, contact)}
    if tx.value(f"SELECT EXISTS ({_TAKEN_BACK}) FROM outbound_messages WHERE id = ?", (external_id, message["id"])):
        proof["content"] = None
    if message["status"] == "pending":
        message = advance(tx, message, "sent", proof, at=at)
    advance(tx, message, "delivered", proof, at=at)


def confirm_read(tx: Tx, account_id: str, contact: str, sent_until: str, *, at: str) -> int:
    """Mark what was sent to a contact up to a time as read; return how many messages changed."""
    unread = tx.rows(
        """
        SELECT * FROM outbound_messages WHERE account_id = ? AND recipient_id = ? AND status IN ('sent', 'delivered')
            AND sent_at <= ? AND instagram_message_id IS NOT NULL ORDER BY sent_at""",
        (account_id, contact, sent_until),
    )
    for message in unread:
        advance(tx, message, "read", {}, at=at)
    return len(unread)


def advance(tx: Tx, message: Row, status: str, values: Row, *, at: str, reason: str | None = None) -> Row:
    """Change a message, and move it forward to a status: keep that in its history, and owe the CRM its event.

    `at` is when it happened; a move backward is ignored. Returns the message as it is then.
    """
    proven = message["status"] == "failed" and message["error_code"] in _PROVABLE
    forward = _RANK[status] > _RANK[message["status"]] if message["status"] != "failed" else proven
    if status == "failed":
        forward = message["status"] == "pending"
    changed = dict(values)
    if forward:
        at = max(at, _latest(tx, message, at))  # a receipt's own time may lie before the message's
        changed["status"] = status
        if status != "failed":
            changed |= {f"{status}_at": at, "error_code": None, "error_message": None, "error_retryable": None}
    if changed:
        tx.update("outbound_messages", changed, "id = ?", [message["id"]])
    message = {**message, **changed}
    if forward:
        history.note(tx, message["id"], "status", at=at, code=status, text=reason)
        _owe_status(tx, message, at)
    return message


def _latest(db: Tx, message: Row, at: str) -> str:
    """Return when a message last changed its status, as far as that can lie after `at`."""
    if at < db.now:
        told = db.value("SELECT MAX(at) FROM history WHERE subject = ? AND kind = 'status'", (message["id"],))
        return str(told or message["created_at"])
    return str(max(filter(None, (message["created_at"], message["sent_at"], message["delivered_at"]))))


def _owe_status(tx: Tx, message: Row, at: str) -> None:
    heard = contacts.hear(tx, message["account_id"], message["recipient_id"])
    if not heard:
        return
    event, event_id, sequence = f"message.{message['status']}", new_id("evt"), heard["crm_sequence"]
    body = bodies.of_status(message, event_id, sequence, at)
    told = {"contact": message["recipient_id"], "kind": event, "message_id": message["id"], "occurred_at": at}
    told |= {"account_id": message["account_id"], "correlation_id": message["correlation_id"], "received_at": tx.now}
    tx.insert("events", {"id": event_id, "state": "forwarded", "sequence": sequence, "body": body, **told})
    debt = Debt(
        "crm", message["account_id"], message["recipient_id"], event, message["correlation_id"],
        event_id=event_id, message_id=message["id"],
    )  # fmt: skip
    deliveries.owe(tx, debt, push=heard["crm_url"] is not None)


def status(db: Reads, message_id: str) -> dict[str, Any] | None:
    """Return a message with its transitions and attempts, or None."""
    message = db.row("SELECT * FROM outbound_messages WHERE id = ?", (message_id,))
    if message is None:
        return None
    send = _delivery(db, message_id)
    calls = history.calls(db, send) if send else []
    waits = send is not None and send["state"] == "pending" and send["claim_id"] is None
    account = accounts.find(db, message["account_id"]) if waits else None
    held = endpoints.locked(db, account["id"], "instagram") if account else None
    changes = [{"status": row["code"], "timestamp": row["at"]} for row in history.of(db, message_id, "status")]
    shown = "status account_id recipient_id instagram_message_id created_at sent_at delivered_at read_at retry_count"
    return {
        "message_id": message["id"],
        **{name: message[name] for name in shown.split()},
        "attempt_count": send["attempts"] if send else 0,
        "next_attempt_at": send["due"] if send and waits and send["place"] != "behind" and not held else None,
        "held": {name: held[name] for name in ("since", "until", "reason")} if held else None,
        "status_history": [{"status": "pending", "timestamp": message["created_at"]}, *changes],
        "attempts": [{name: call[name] for name in call if name != "duration_ms"} for call in calls],
        "error": bodies.error_of(message),
        "metadata": json.loads(message["metadata"]) if message["metadata"] else None,
    }


def match(db: Reads, claimed: Claimed, thread: Thread) -> Match:
    """Find what a doubtful call sent in its thread, among what is not known as something else."""
    ids = [entry.external_id for entry in thread.shown]
    marks, where = ", ".join("?" * len(ids)), (claimed.account_id, *ids)
    of = f"WHERE account_id = ? AND instagram_message_id IN ({marks})"
    sent = db.rows(f"SELECT instagram_message_id AS id, sent_at AS at FROM outbound_messages {of}", where)
    columns = "instagram_message_id AS id, received_at AS at, kind, state"
    heard = db.rows(f"SELECT {columns} FROM events {of}", where)
    echoes = {row["id"] for row in heard if row["kind"] == "message.echo" and row["state"] == "forwarded"}
    began = claimed.previous_at or claimed.claimed_at
    return matching.which(
        json.loads(claimed.body),
        thread,
        began_s=epoch_s(began),
        known={row["id"] for row in (*sent, *heard) if row["at"] is not None and row["at"] <= began},
        settled={row["id"] for row in sent} | echoes,
    )


def body(db: Reads, delivery: Row, account: Row, now: str) -> tuple[str, str | None]:
    """Return what is to be sent now, as JSON, and after when it is not to be.

    Raises Conflict when it is too late for it, and LookupError when retention took it.
    """
    message = _with_contact(db, delivery["message_id"])
    if message["content"] is None:
        raise LookupError(f"the content of {message['id']} is gone")
    if delivery["in_doubt"]:
        return message["content"], message["send_before"]
    if message["send_before"] is not None and now >= message["send_before"]:
        raise Conflict("its send_before has passed", code="expired")
    sent = json.loads(message["content"])
    window = windows.of(db, account, message["recipient_id"], sent, message)
    if window.is_closed(now):
        raise Conflict(f"Instagram's window for it ended at {window.ends_at}", code="window_closed")
    tagged = str(_json({**sent, "human_agent": True})) if window.needs_tag(now) else message["content"]
    return tagged, message["send_before"]


def tagged_until(db: Reads, message_id: str) -> str | None:
    """Return until when a send would be taken from a person who says so; None where that changes nothing."""
    message = _with_contact(db, message_id)
    sent, account = json.loads(message["content"]), accounts.found(db, message["account_id"])
    window = windows.of(db, account, message["recipient_id"], {**sent, "human": True}, message)
    return None if sent.get("human") or window.tagged_from is None else window.ends_at


def find_external(db: Reads, account_id: str, external_id: str) -> Row | None:
    """Return the account's message that has this id at the channel, or None."""
    return db.row(
        "SELECT * FROM outbound_messages WHERE account_id = ? AND instagram_message_id = ?", (account_id, external_id)
    )


def end_all(tx: Tx, message_ids: Sequence[str]) -> None:
    """End messages of an account that is being deleted, where they still wait; no CRM is left to be told."""
    ended = {
        "status": "failed",
        "error_code": "account_deleted",
        "error_message": "the account was deleted",
        "error_retryable": 0,
    }
    marks = ", ".join("?" * len(message_ids))
    for message in tx.rows(
        f"SELECT id FROM outbound_messages WHERE status = 'pending' AND id IN ({marks})", message_ids
    ):
        tx.update("outbound_messages", ended, "id = ?", [message["id"]])
        history.note(tx, message["id"], "status", code="failed", text="account_deleted")


def found(db: Reads, message_id: str) -> Row:
    """Return a message that is known to exist."""
    row = db.row("SELECT * FROM outbound_messages WHERE id = ?", (message_id,))
    if row is None:
        raise LookupError(message_id)
    return row


def _with_contact(db: Reads, message_id: str) -> Row:
    """Return a message that is known to exist, with what opens its recipient's window."""
    row = db.row(
        """
        SELECT outbound_messages.*, last_wrote_at, window_until FROM outbound_messages
        LEFT JOIN contacts ON contacts.account_id = outbound_messages.account_id AND contact = recipient_id
        WHERE id = ?""",
        (message_id,),
    )
    if row is None:
        raise LookupError(message_id)
    return row


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
