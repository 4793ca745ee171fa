"""Meta's shapes, read into channel-neutral events. Pure: values in, values out; nothing raises on bad items.

Sources: Meta's "Webhooks for Instagram" (with its examples and ig_post pages) and "Messenger Platform Webhooks"
pages, captured payloads, and what implementers report. Where they differ, every variant is taken.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from crmbridge.events import NOTED, TEST, Attachment, ChannelEvent, ReplyTo, epoch_s, instant, new_id

_SECONDS_BELOW = 1e11  # entry.time is milliseconds for messaging, seconds for changes and dashboard tests
_MILLIS_BELOW = 1e15
_RAW_DEPTH = 64  # what is passed on as JSON; a deeper item is passed on as text
_ENVELOPE = {"sender", "recipient", "timestamp", "is_self"}
_TEST_ACCOUNT, _TEST_MID = "0", "random_mid"  # what the console's "Test" button sends, always the same
_COMMENT_FIELDS = {"comments": "comment", "live_comments": "live_comment"}
_RECEIPTS = ("messaging_seen", "message_reads", "read", "delivery", "message_deliveries")
_POST_TYPES = ("share", "ig_post")  # a shared post may come as both


@dataclass(frozen=True, slots=True)
class _Item:
    """A messaging item with its envelope read. `time` is the item's own time as it came, if it has one."""

    account: str
    sender: str
    recipient: str
    at: str
    time: str
    body: Mapping[str, Any]

    @property
    def from_account(self) -> bool:
        if self.account and self.account in (self.sender, self.recipient):
            return self.sender == self.account
        message = self.body.get("message")
        return isinstance(message, dict) and (_is(message.get("is_echo")) or _is(message.get("is_self")))

    @property
    def contact(self) -> str:
        """The customer: whichever side is not the account."""
        return self.recipient if self.from_account else self.sender

    @property
    def side(self) -> str:
        """Who acts, for keys: these outlive an erasure of the customer, so they name nobody."""
        return "us" if self.from_account else "them"

    @property
    def party(self) -> str:
        """The business, as the item itself names it."""
        return self.sender if self.from_account else self.recipient

    def event(self, kind: str, dedupe_key: str, **facts: Any) -> ChannelEvent:
        account = self.account or self.party
        return ChannelEvent(
            kind,
            account,
            self.contact,
            self.at,
            dedupe_key,
            from_account=self.from_account,
            party=self.party if self.party != account else "",
            contact_name=None if self.from_account else self.username,
            **facts,
        )

    def unsupported(self, *, external_id: str | None = None, key: str | None = None) -> ChannelEvent:
        account = self.account or self.party
        event = _unsupported(account, self.contact, self.body, self.at, external_id=external_id, key=key)
        return replace(event, party=self.party if self.party != account else "")

    @property
    def username(self) -> str | None:
        sender = self.body.get("sender")
        return _text(sender.get("username")) if isinstance(sender, dict) else None


def read(payload: Any, received_at: str) -> Iterator[ChannelEvent]:
    """Yield one event for each item of a webhook body; what is not understood becomes message.unsupported.

    `received_at` stands in for a time that is missing or cannot be read.
    """
    # Meta posts one object; some of its samples wrap it in an array.
    for body in payload if isinstance(payload, list) and payload else [payload]:
        entries = _many(body.get("entry")) if isinstance(body, dict) else []
        if not entries:
            yield _unsupported("", "", body, received_at)
        for entry in entries:
            yield from _entry(entry, received_at)


def _entry(entry: Any, received_at: str) -> Iterator[ChannelEvent]:
    if not isinstance(entry, dict):
        yield _unsupported("", "", entry, received_at)
        return
    account = _id(entry.get("id"))
    sent_at = _time(entry.get("time"), received_at)
    items = [item for key in ("messaging", "standby") for item in _many(entry.get(key))]
    account, is_test = ("", True) if account == _TEST_ACCOUNT else (account, False)
    changes = _many(entry.get("changes"))
    if "field" in entry:  # in Meta's samples a change may stand in the entry itself
        changes.append({"field": entry["field"], "value": entry.get("value")})
    for item in items:
        yield _item(account, item, sent_at)
    for change in changes:
        yield from (
            [_test(change, sent_at)] if is_test and not _holds_item(change) else _change(account, change, sent_at)
        )
    if not items and not changes:
        # The time of sending differs from one delivery of the same fact to the next.
        lasting = {key: value for key, value in entry.items() if key != "time"}
        told = {key: value for key, value in lasting.items() if key != "id" and value not in ([], {}, None)}
        yield _unsupported(account, "", lasting, sent_at) if told else _noted(account, "", lasting, sent_at)


def _holds_item(change: Any) -> bool:
    value = change.get("value") if isinstance(change, dict) else None
    return isinstance(value, dict) and bool(_HANDLERS.keys() & value.keys())


def _change(account: str, change: Any, sent_at: str) -> Iterator[ChannelEvent]:
    """Read ``{field, value}``: comments and mentions, or messaging items in another wrapping."""
    field = _text(change.get("field")) if isinstance(change, dict) else None
    values = _many(change.get("value")) if isinstance(change, dict) else []
    for value in values:
        event = None
        if isinstance(value, dict):
            inner = [*_many(value.get("messaging")), *map(_item_of_cloud_message, _many(value.get("messages")))]
            if inner:
                yield from (_item(account, item, sent_at) for item in inner)
                continue
            if field in _COMMENT_FIELDS:
                event = _comment(account, _COMMENT_FIELDS[field], value, sent_at)
            elif field == "mentions":
                event = _mention(account, value, sent_at)
            elif field in _RECEIPTS or _HANDLERS.keys() & value.keys():
                event = _item(account, value, sent_at)
        yield event if event is not None else _unsupported(account, "", change, sent_at)
    if not values:
        yield _unsupported(account, "", change, sent_at)


def _item_of_cloud_message(message: Any) -> Any:
    """Rewrite a message as WhatsApp's API words it (``from``, ``id``, ``text.body``), which some gateways pass on."""
    if not isinstance(message, dict):
        return message
    parties = {"sender": {"id": message.get("from")}, "recipient": {"id": message.get("to")}}
    return {**parties, "timestamp": message.get("timestamp"), "message": message}


# --- messaging items ---


def _item(account: str, value: Any, sent_at: str) -> ChannelEvent:
    if not isinstance(value, dict):
        return _unsupported(account, "", value, sent_at)
    time = value.get("timestamp")
    item = _Item(
        account=account,
        sender=_party(value, "sender"),
        recipient=_party(value, "recipient"),
        at=_time(time, sent_at),
        time=_time(time, ""),
        body=value,
    )
    if any(isinstance(about, dict) and about.get("mid") == _TEST_MID for about in value.values()):
        return _test(value, sent_at)
    for key, handler in _HANDLERS.items():
        about = value.get(key)
        if isinstance(about, dict) and (event := handler(item, about)) is not None:
            return event
    if not value.keys() - _ENVELOPE - {"read", "delivery"}:  # receipts that tell nothing we can use
        return _noted(account or item.party, item.contact, value, item.at)
    return item.unsupported()


def _message(item: _Item, message: Mapping[str, Any]) -> ChannelEvent | None:
    mid = _id(message.get("mid")) or _id(message.get("id"))
    if not item.contact:
        return None
    if _is(message.get("is_deleted")):
        return item.event("message.deleted", f"deleted:{mid}", external_id=mid, message_type="deleted") if mid else None
    text, attachments = _words(message.get("text")), _attachments(message.get("attachments"))
    extra: dict[str, Any] = {}
    if _is(message.get("is_self")) or _is(item.body.get("is_self")):
        extra["is_self"] = True
    reply, referral = message.get("quick_reply"), _referral_of(message, item.body)
    if isinstance(reply, dict):
        extra["quick_reply"] = {"payload": _scalar(reply.get("payload"))}
    if referral:
        extra["referral"] = referral
    key = mid or _hash(item.body)
    if text is None and not attachments and "quick_reply" not in extra:
        if referral and not _is(message.get("is_unsupported")):
            return item.event("message.referral", f"message:{key}", external_id=mid or None,
                              message_type="referral", extra=extra)  # fmt: skip
        return None
    return item.event(
        "message.echo" if item.from_account else "message.received",
        f"echo:{key}" if item.from_account else f"message:{key}",
        external_id=mid or None,
        text=text,
        message_type=attachments[0].type if attachments else "text",
        attachments=attachments,
        reply_to=_reply_to(message.get("reply_to")),
        extra=extra,
    )


def _edit(item: _Item, edit: Mapping[str, Any]) -> ChannelEvent | None:
    """Read an edit. Number 0 comes for new messages in some apps, often without text and parties."""
    mid, text, number = _id(edit.get("mid")), _text(edit.get("text")), _number(edit.get("num_edit"))
    if not mid:
        return None
    if number == 0:
        if text and item.contact:
            kind, key = ("message.echo", "echo") if item.from_account else ("message.received", "message")
            extra = {"announced": True}  # the whole message may follow, with what this form cannot carry
            return item.event(kind, f"{key}:{mid}", external_id=mid, text=text, message_type="text", extra=extra)
        return item.unsupported(external_id=mid, key=f"new:{mid}")
    # Apps that tell no number tell the edits apart by their time.
    which = str(number) if number is not None else item.time or _hash(edit)
    return item.event(
        "message.edited",
        f"edited:{mid}:{which}",
        external_id=mid,
        text=text,
        message_type="edited",
        extra={"edit": {"number": number}},
    )


def _reaction(item: _Item, reaction: Mapping[str, Any]) -> ChannelEvent | None:
    mid = _id(reaction.get("mid"))
    if not mid or not item.contact:
        return None
    name, emoji = _text(reaction.get("reaction")), _text(reaction.get("emoji"))
    action = _text(reaction.get("action")) or ("react" if name or emoji else "unreact")
    return item.event(
        "message.reaction",
        f"reaction:{mid}:{item.side}:{action}:{emoji or name or ''}:{item.time}",
        external_id=mid,
        message_type="reaction",
        extra={"reaction": {"action": action, "name": name, "emoji": emoji}},
    )


def _postback(item: _Item, postback: Mapping[str, Any]) -> ChannelEvent | None:
    mid, payload, title = _id(postback.get("mid")), _scalar(postback.get("payload")), _text(postback.get("title"))
    if not item.contact:
        return None
    extra: dict[str, Any] = {"postback": {"title": title, "payload": payload}}
    if _is(item.body.get("is_self")) or _is(postback.get("is_self")):
        extra["is_self"] = True
    if referral := _referral_of(postback, item.body):
        extra["referral"] = referral
    key = mid or _hash([item.sender, item.time, payload, title])
    return item.event(
        "message.postback",
        f"postback:{key}",
        external_id=mid or None,
        text=title,
        message_type="postback",
        extra=extra,
    )


def _read(item: _Item, receipt: Mapping[str, Any]) -> ChannelEvent | None:
    """Read a receipt: Instagram names the last message seen; Messenger's form tells until when."""
    mid, until = _id(receipt.get("mid")), receipt.get("watermark")
    if not item.sender or item.from_account:
        return None
    if mid:
        return item.event("message.read", f"read:{mid}", external_id=mid)
    seen_at = _time(until, "")
    if not seen_at:
        return None
    return item.event("message.read", f"read:{_hash([seen_at, item.sender])}", extra={"read_until": seen_at})


def _referral(item: _Item, _: Mapping[str, Any]) -> ChannelEvent | None:
    referral = _referral_of(item.body)
    if not item.contact or not referral:
        return None
    return item.event(
        "message.referral",
        f"referral:{_hash([item.sender, item.time, referral])}",
        message_type="referral",
        extra={"referral": referral},
    )


# In this order: a message that brings a referral is a message.
_HANDLERS: dict[str, Callable[[_Item, Mapping[str, Any]], ChannelEvent | None]] = {
    "message": _message,
    "message_edit": _edit,
    "reaction": _reaction,
    "postback": _postback,
    "read": _read,
    "referral": _referral,
}


# --- parts of items ---


def _attachments(value: Any) -> tuple[Attachment, ...]:
    found = [_attachment(item) for item in _many(value) if isinstance(item, dict)]
    merged: list[Attachment] = []
    for attachment in found:
        twin = next((entry for entry in merged if _same_post(entry, attachment)), None)
        if twin is None:
            merged.append(attachment)
        else:
            newer, older = (attachment, twin) if attachment.type == "ig_post" else (twin, attachment)
            merged[merged.index(twin)] = Attachment(
                type=newer.type,
                url=newer.url or older.url,
                title=newer.title or older.title,
                external_id=newer.external_id or older.external_id,
                payload={**(older.payload or {}), **(newer.payload or {})} or None,
            )
    return tuple(merged)


def _same_post(one: Attachment, other: Attachment) -> bool:
    """Tell whether two attachments are the old and the new form of one shared post."""
    if one.type == other.type or one.type not in _POST_TYPES or other.type not in _POST_TYPES:
        return False
    if one.external_id and other.external_id:
        return one.external_id == other.external_id
    return one.url is not None and one.url == other.url


def _attachment(item: Mapping[str, Any]) -> Attachment:
    payload = item.get("payload")
    told = dict(payload) if isinstance(payload, dict) else {} if payload in (None, "") else {"value": payload}
    told |= {key: value for key, value in item.items() if key not in ("type", "payload", "url", "title")}
    ids = ("ig_post_media_id", "reel_video_id", "story_media_id", "id")
    external_id = next((_id(told.pop(key)) for key in ids if _id(told.get(key))), None)
    urls = [_text(told.pop("url", None)), _text(told.pop("story_media_url", None)), _text(item.get("url"))]
    titles = [_text(told.pop("title", None)), _text(item.get("title"))]
    return Attachment(
        type=_text(item.get("type")) or "unknown",
        url=next(filter(None, urls), None),
        title=next(filter(None, titles), None),
        external_id=external_id,
        payload=_shallow(told) or None,
    )


def _referral_of(*places: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the first referral: from an ad (ad_id, ads_context_data), a shop (product), or an ig.me link (ref)."""
    for place in places:
        told = place.get("referral")
        if isinstance(told, dict) and told:
            product, context = told.get("product"), told.get("ads_context_data")
            return {
                "ref": _scalar(told.get("ref")),
                "source": _text(told.get("source")),
                "type": _text(told.get("type")),
                "ad_id": _id(told.get("ad_id")) or None,
                "product_id": (_id(product.get("id")) or None) if isinstance(product, dict) else None,
                "ad": _shallow(context) if isinstance(context, dict) else None,
            }
    return None


def _reply_to(value: Any) -> ReplyTo | None:
    if not isinstance(value, dict):
        return None
    story = value.get("story")
    if isinstance(story, dict):
        return ReplyTo(story_id=_id(story.get("id")) or None, story_url=_text(story.get("url")))
    mid = _id(value.get("mid"))
    return ReplyTo(external_id=mid) if mid else None


# --- comments and mentions ---


def _comment(account: str, kind: str, value: Mapping[str, Any], sent_at: str) -> ChannelEvent | None:
    author, media = value.get("from"), value.get("media")
    author, media = author if isinstance(author, dict) else {}, media if isinstance(media, dict) else {}
    comment_id = _id(value.get("id")) or _id(value.get("comment_id"))
    if not comment_id:
        return None
    time = value.get("created_time") or value.get("timestamp")
    referral = _referral_of(value)
    own = account in (_id(author.get("id")), _id(author.get("self_ig_scoped_id")))
    return ChannelEvent(
        # What the shop itself answers comes back as a comment: told to a CRM, it could answer itself for ever.
        NOTED if own else "comment.received",
        account,
        _id(author.get("id")),
        _time(time, sent_at),
        f"comment:{comment_id}",
        external_id=comment_id,
        text=_text(value.get("text")),
        message_type=kind,
        from_account=own,
        extra={
            "comment": {
                "id": comment_id,
                "parent_id": _id(value.get("parent_id")) or None,
                "username": _text(author.get("username")),
                "media_id": _id(media.get("id")) or _id(value.get("media_id")) or None,
                "media_type": _text(media.get("media_product_type")),
                "ad_id": _id(media.get("ad_id")) or None,
            },
            **({"referral": referral} if referral else {}),
        },
    )


def _mention(account: str, value: Mapping[str, Any], sent_at: str) -> ChannelEvent | None:
    media_id, comment_id = _id(value.get("media_id")), _id(value.get("comment_id"))
    if not media_id and not comment_id:
        return None
    return ChannelEvent(
        "mention.received",
        account,
        "",
        sent_at,
        f"mention:{media_id}:{comment_id}",
        external_id=comment_id or media_id,
        message_type="mention",
        extra={"mention": {"media_id": media_id or None, "comment_id": comment_id or None}},
    )


# --- what is no event of a customer ---


def _test(item: Any, at: str) -> ChannelEvent:
    """A press of the console's "Test" button: all tests look alike, and none is a repetition."""
    return ChannelEvent(TEST, _TEST_ACCOUNT, "", at, "test:" + new_id("tst"), message_type="test", raw=_shown(item))


def _noted(account: str, contact: str, item: Any, at: str) -> ChannelEvent:
    return ChannelEvent(NOTED, account, contact, at, "raw:" + _hash(item), raw=_shown(item))


def _unsupported(
    account: str, contact: str, item: Any, at: str, *, external_id: str | None = None, key: str | None = None
) -> ChannelEvent:
    message = item.get("message") if isinstance(item, dict) else None
    mid = external_id or (_id(message.get("mid")) if isinstance(message, dict) else "")
    return ChannelEvent(
        kind="message.unsupported",
        external_account_id=account,
        contact=contact,
        occurred_at=at,
        dedupe_key=key or (f"unsupported:{mid}" if mid else "raw:" + _hash(item)),
        external_id=mid or None,
        message_type="unsupported",
        from_account=isinstance(item, dict) and bool(account) and _party(item, "sender") == account,
        extra={"sender_id": _party(item, "sender") or None} if isinstance(item, dict) else {},
        raw=_shown(item),
    )


# --- values ---


def _shown(item: Any) -> Any:
    """Return what may be passed on as JSON: an item as it is, as text when it is nested too deeply."""
    try:
        content = json.dumps(item, sort_keys=True)
    except RecursionError:
        return "an item nested too deeply to be shown"
    return content if _deeper_than(_RAW_DEPTH, item) else item


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    return value if not _deeper_than(_RAW_DEPTH, value) else {"value": _shown(value)}


def _hash(value: Any) -> str:
    try:
        content = json.dumps(value, sort_keys=True)
    except RecursionError:
        content = "an item nested too deeply to be told apart"
    return hashlib.sha256(content.encode()).hexdigest()


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


def _many(value: Any) -> list[Any]:
    """Take a list, or one thing where a list is expected."""
    if isinstance(value, list):
        return list(value)
    return [value] if isinstance(value, dict) else []


def _party(item: Mapping[str, Any], role: str) -> str:
    value = item.get(role)
    return _id(value.get("id")) if isinstance(value, dict) else _id(value)


def _id(value: Any) -> str:
    """Ids are strings at Instagram, numbers in some fixtures: text either way, empty when it is neither."""
    if isinstance(value, str):
        return value[:1024]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return ""


def _is(value: Any) -> bool:
    """Read a flag: absent is false, and older pages show the text "true"."""
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("true", "1"))


def _number(value: Any) -> int | None:
    text = _id(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _words(value: Any) -> str | None:
    """Read a text, or WhatsApp's object around one."""
    return _text(value.get("body")) if isinstance(value, dict) else _text(value)


def _scalar(value: Any) -> str | None:
    """Read a text that some senders write as a number or as JSON."""
    if isinstance(value, dict | list):
        return json.dumps(_shown(value), ensure_ascii=False)
    return _text(value) or _id(value) or None


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
