"""Meta's shapes, read into channel-neutral events. Pure: values in, values out; nothing raises on bad items.

Sources: Meta's "Webhooks for Instagram" and "Messenger Platform Webhooks" pages, and captured payloads.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from crmbridge.events import Attachment, ChannelEvent, ReplyTo, epoch_s, instant

_SECONDS_BELOW = 1e11  # entry.time is milliseconds for messaging, seconds for changes and dashboard tests
_MILLIS_BELOW = 1e15
_RAW_DEPTH = 64  # what is passed on as JSON; a deeper item is passed on as text


def read(payload: Any, received_at: str) -> Iterator[ChannelEvent]:
    """Yield one event for each item of a webhook body; what is not understood becomes message.unsupported.

    `received_at` stands in for a time that is missing or cannot be read.
    """
    # Meta posts one object; some of its samples wrap it in an array.
    for body in payload if isinstance(payload, list) and payload else [payload]:
        entries = body.get("entry") if isinstance(body, dict) else None
        if not isinstance(entries, list) or not entries:
            yield _unsupported("", None, body, received_at)
            continue
        for entry in entries:
            yield from _entry(entry, received_at)


def _entry(entry: Any, received_at: str) -> Iterator[ChannelEvent]:
    if not isinstance(entry, dict):
        yield _unsupported("", None, entry, received_at)
        return
    account = _id(entry.get("id"))
    sent_at = _time(entry.get("time"), received_at)
    found = False
    for key in ("messaging", "standby"):
        items = entry.get(key)
        for item in items if isinstance(items, list) else []:
            found = True
            yield _item(account, item, sent_at)
    changes = entry.get("changes")
    for change in changes if isinstance(changes, list) else []:
        found = True
        yield _unsupported(account, None, change, sent_at)
    if not found:
        # The time of sending differs from one delivery of the same fact to the next.
        lasting = {key: value for key, value in entry.items() if key != "time"}
        yield _unsupported(account, None, lasting, sent_at)


def _item(account: str, item: Any, sent_at: str) -> ChannelEvent:
    if not isinstance(item, dict):
        return _unsupported(account, None, item, sent_at)
    sender, recipient = _party(item, "sender"), _party(item, "recipient")
    at = _time(item.get("timestamp"), sent_at)
    read_receipt = item.get("read")
    if isinstance(read_receipt, dict) and _id(read_receipt.get("mid")) and sender:
        mid = _id(read_receipt["mid"])
        return ChannelEvent("message.read", account, sender, at, f"read:{mid}:{sender}", external_id=mid)
    message = item.get("message")
    if isinstance(message, dict) and sender and recipient:
        event = _message(account, sender, recipient, message, at)
        if event is not None:
            return event
    # The customer is whichever side is not the account.
    customer = recipient if sender == account else sender
    return _unsupported(account, customer, item, at)


def _message(account: str, sender: str, recipient: str, message: dict[str, Any], at: str) -> ChannelEvent | None:
    mid = _id(message.get("mid"))
    if not mid or message.get("is_deleted") or message.get("is_unsupported"):
        return None
    text = message.get("text")
    text = text if isinstance(text, str) and text else None
    attachments = _attachments(message.get("attachments"))
    if text is None and not attachments:
        return None
    echo = bool(message.get("is_echo"))
    return ChannelEvent(
        kind="message.echo" if echo else "message.received",
        external_account_id=account,
        contact=recipient if echo else sender,
        occurred_at=at,
        dedupe_key=f"echo:{mid}" if echo else f"message:{mid}",
        external_id=mid,
        text=text,
        message_type=attachments[0].type if attachments else "text",
        attachments=attachments,
        reply_to=_reply_to(message.get("reply_to")),
    )


def _attachments(value: Any) -> tuple[Attachment, ...]:
    found = []
    for item in value if isinstance(value, list) else []:
        if not isinstance(item, dict):
            continue
        payload = item.get("payload")
        payload = payload if isinstance(payload, dict) else {}
        external = payload.get("ig_post_media_id") or payload.get("reel_video_id") or payload.get("story_media_id")
        found.append(
            Attachment(
                type=_text(item.get("type")) or "unknown",
                url=_text(payload.get("url")) or _text(payload.get("story_media_url")) or _text(item.get("url")),
                title=_text(payload.get("title")) or _text(item.get("title")),
                external_id=_id(external) or None,
            )
        )
    return tuple(found)


def _reply_to(value: Any) -> ReplyTo | None:
    if not isinstance(value, dict):
        return None
    story = value.get("story")
    if isinstance(story, dict):
        return ReplyTo(story_id=_id(story.get("id")) or None, story_url=_text(story.get("url")))
    mid = _id(value.get("mid"))
    return ReplyTo(external_id=mid) if mid else None


def _unsupported(account: str, contact: str | None, item: Any, at: str) -> ChannelEvent:
    message = item.get("message") if isinstance(item, dict) else None
    mid = _id(message.get("mid")) if isinstance(message, dict) else ""
    try:
        content = json.dumps(item, sort_keys=True)
    except RecursionError:
        item = content = "an item nested too deeply to be shown"
    if _deeper_than(_RAW_DEPTH, item):
        item = content
    return ChannelEvent(
        kind="message.unsupported",
        external_account_id=account,
        contact=contact or "",
        occurred_at=at,
        dedupe_key="raw:" + hashlib.sha256(content.encode()).hexdigest(),
        external_id=mid or None,
        message_type="unsupported",
        extra={"sender_id": _party(item, "sender") or None} if isinstance(item, dict) else {},
        raw=item,
    )


def _deeper_than(limit: int, value: Any) -> bool:
    pending = [(value, 0)]
    while pending:
        inner, depth = pending.pop()
        if depth > limit:
            return True
        if isinstance(inner, dict):
            pending += [(entry, depth + 1) for entry in inner.values()]
        elif isinstance(inner, list):
            pending += [(entry, depth + 1) for entry in inner]
    return False


def _party(item: dict[str, Any], role: str) -> str:
    value = item.get(role)
    return _id(value.get("id")) if isinstance(value, dict) else ""


def _id(value: Any) -> str:
    """Ids are strings at Instagram, numbers in some fixtures: text either way, empty when it is neither."""
    if isinstance(value, str):
        return value[:1024]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return ""


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _time(value: Any, otherwise: str) -> str:
    """Read milliseconds, seconds, either as text, or ISO 8601."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                return instant(epoch_s(value))
            except (ValueError, OverflowError):
                return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MILLIS_BELOW:
        return otherwise
    return instant(value if value < _SECONDS_BELOW else value / 1000)
