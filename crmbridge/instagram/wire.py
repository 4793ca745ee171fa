"""Meta's shapes, read into channel-neutral events. Pure: values in, values out; nothing raises on bad items.

Sources: Meta's "Webhooks for Instagram" (with its examples and ig_post pages) and "Messenger Platform Webhooks"
pages, captured payloads, and what implementers report. Where they differ, every variant is taken.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from crmbridge.events import (
    ANNOUNCED,
    NOTED,
    TEST,
    TOLD,
    Attachment,
    ChannelEvent,
    Opens,
    ReplyTo,
    epoch_s,
    instant,
    message_key,
    new_id,
)
from crmbridge.instagram import objects
from crmbridge.instagram.objects import Parts, Told, first

_SECONDS_BELOW = 1e11  # entry.time is milliseconds for messaging, seconds for changes and dashboard tests
_MILLIS_BELOW = 1e15
_ENVELOPE = {"sender", "recipient", "timestamp", "is_self"}
_TEST_ACCOUNT, _TEST_MID = "0", "random_mid"  # what the console's "Test" button sends, always the same
_COMMENT_FIELDS = {"comments": "comment", "live_comments": "live_comment"}
_RECEIPTS = ("messaging_seen", "message_reads", "read", "delivery", "message_deliveries")
_TWINS = {"ig_post": "share", "sticker": "image"}  # one thing may come in both forms: the new one, and the old one
_AD_KEYS = ("ad_title", "photo_url", "video_url", "post_id", "product_id", "flow_id")
# What names the customer as its sender, though they did nothing that opens the window.
_NO_ACTS = {
    "read", "delivery", "pass_thread_control", "take_thread_control", "request_thread_control", "app_roles",
    "policy_enforcement",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Item:
    """A messaging item with its envelope read. `time` is the item's own time as it came, if it has one.

    `told` is what stands around the object that the item is about.
    """

    account: str
    sender: str
    recipient: str
    username: str | None
    at: str
    time: str
    body: Mapping[str, Any]
    told: Told
    parts: Parts

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

    @property
    def is_self(self) -> bool:
        """Whether the business writes to itself, as a test."""
        places = (self.body, self.body.get("message"), self.body.get("postback"))
        return any(isinstance(place, dict) and _is(place.get("is_self")) for place in places)

    @property
    def opens(self) -> Opens | None:
        """What the item does to the window in which the shop may answer.

        Sources: Meta's policy page, and its list of acts as its partners show it. What these do not settle, Instagram
        is to judge: a reaction taken back, an opt-in, what nobody knows yet.
        """
        if self.from_account or self.is_self:
            return None
        about = {name: value for name, value in self.body.items() if isinstance(value, dict)}
        if _is(about.get("message", {}).get("is_deleted")):
            return None
        if acts := about.keys() & {"message", "postback", "referral"}:
            places = (self.body, *(about[name] for name in acts))
            return "ad" if any(_is_ad(place.get("referral")) for place in places) else "window"
        if "message_edit" in self.body:  # number 0 announces a new message
            return "window" if _number(about.get("message_edit", {}).get("num_edit")) == 0 else None
        if "reaction" in about:
            return "window" if _action(about["reaction"]) == "react" else "perhaps"
        names = self.body.keys() - _ENVELOPE
        return "perhaps" if names and not names & _NO_ACTS else None

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
            opens=self.opens,
            # What was taken back must not come back by another door.
            others=self.parts.others() if kind != "message.deleted" else {},
            **facts,
        )

    def unsupported(self, *, external_id: str | None = None, rank: int = TOLD) -> ChannelEvent:
        account = self.account or self.party
        event = _unsupported(account, self.contact, self.body, self.at, external_id=external_id, rank=rank)
        return replace(event, party=self.party if self.party != account else "", opens=self.opens)


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
    said = {name: value for name, value in message.items() if name not in ("from", "to", "timestamp")}
    return {**parties, "timestamp": message.get("timestamp"), "message": said}


# --- messaging items ---


def _item(account: str, value: Any, sent_at: str) -> ChannelEvent:
    if not isinstance(value, dict):
        return _unsupported(account, "", value, sent_at)
    if any(isinstance(about, dict) and about.get("mid") == _TEST_MID for about in value.values()):
        return _test(value, sent_at)
    for key, handler in _HANDLERS.items():
        about = value.get(key)
        if isinstance(about, dict) and (event := handler(_envelope(account, value, sent_at, key), about)) is not None:
            return event
    item = _envelope(account, value, sent_at)
    if not value.keys() - _ENVELOPE - {"read", "delivery"}:  # receipts that tell nothing we can use
        return _noted(account or item.party, item.contact, value, item.at)
    return item.unsupported()


def _envelope(account: str, value: Mapping[str, Any], sent_at: str, key: str = "") -> _Item:
    """Read what stands around the object of that key."""
    parts = Parts()
    told = parts.begin("item", {name: inner for name, inner in value.items() if name != key})
    told.take("is_self", _flag)
    username = None
    for role in ("sender", "recipient"):
        told.take(role, _known_id)
        party = told.part(role)
        party.take("id", _known_id)
        username = party.take("username", _text) if role == "sender" else username
    return _Item(
        account=account,
        sender=_party(value, "sender"),
        recipient=_party(value, "recipient"),
        username=username,
        at=_time(value.get("timestamp"), sent_at),
        time=told.take("timestamp", _moment) or "",
        body=value,
        told=told,
        parts=parts,
    )


def _message(item: _Item, told: Mapping[str, Any]) -> ChannelEvent | None:
    message = item.parts.begin("message", told)
    mid = first(_known_id, (message, "mid"), (message, "id")) or ""
    if not item.contact:
        return None
    if message.take("is_deleted", _flag):
        return item.event("message.deleted", f"deleted:{mid}", external_id=mid, message_type="deleted") if mid else None
    for flag in ("is_echo", "is_self"):
        message.take(flag, _flag)
    is_unsupported = _is(message.get("is_unsupported"))
    if not is_unsupported:
        message.take("is_unsupported", _flag)
    text, attachments, reply_to = _words(message), _attachments(message), _reply_to(item.parts, message)
    extra = _extra(item, message)
    # Of what has no id only the keys that are known tell it from others: the rest may differ when it is told again.
    things = [(one.type, one.url, one.external_id) for one in attachments]
    referral = extra.get("referral")
    known = [item.sender, item.recipient, item.time, text, things, extra.get("quick_reply"), _identity(referral)]
    key = message_key(mid) if mid else ("echo:" if item.from_account else "message:") + _hash(known)
    identity: dict[str, Any] = {"external_id": mid, "rank": TOLD} if mid else {}
    if text is None and not attachments and "quick_reply" not in extra:
        if referral and not is_unsupported:
            return item.event("message.referral", key, **identity, message_type="referral", extra=extra)
        return None
    return item.event(
        "message.echo" if item.from_account else "message.received",
        key,
        **identity,
        text=text,
        message_type=attachments[0].type if attachments else "text",
        attachments=attachments,
        reply_to=reply_to,
        extra=extra,
    )


def _extra(item: _Item, message: Told) -> dict[str, Any]:
    extra: dict[str, Any] = {"is_self": True} if item.is_self else {}
    reply, referral = message.take("quick_reply", _object), _referral_of(item, message)
    if reply:
        extra["quick_reply"] = {"payload": item.parts.begin("quick_reply", reply).take("payload", _scalar)}
    if referral:
        extra["referral"] = referral
    return extra


def _edit(item: _Item, told: Mapping[str, Any]) -> ChannelEvent | None:
    """Read an edit. Number 0 comes for new messages in some apps, often without text and parties."""
    is_new = _number(told.get("num_edit")) == 0
    edit = item.parts.begin("message" if is_new else "edit", told)
    mid, text, number = edit.take("mid", _known_id), edit.take("text", _text), edit.take("num_edit", _number)
    if not mid:
        return None
    if is_new:
        if text and item.contact:
            kind = "message.echo" if item.from_account else "message.received"
            # The whole message may follow, with what this form cannot carry.
            facts = {"external_id": mid, "rank": ANNOUNCED, "text": text, "message_type": "text"}
            return item.event(kind, message_key(mid), **facts)
        return item.unsupported(external_id=mid, rank=ANNOUNCED)
    # Apps that tell no number tell the edits apart by their time.
    which = str(number) if number is not None else item.time or _hash(text)
    return item.event(
        "message.edited",
        f"edited:{mid}:{which}",
        external_id=mid,
        text=text,
        message_type="edited",
        extra={"edit": {"number": number}},
    )


def _reaction(item: _Item, told: Mapping[str, Any]) -> ChannelEvent | None:
    reaction, action = item.parts.begin("reaction", told), _action(told)
    mid = reaction.take("mid", _known_id)
    if not mid or not item.contact:
        return None
    reaction.take("action", _text)
    name, emoji = reaction.take("reaction", _text), reaction.take("emoji", _text)
    return item.event(
        "message.reaction",
        f"reaction:{mid}:{item.side}:{action}:{emoji or name or ''}:{item.time}",
        external_id=mid,
        message_type="reaction",
        extra={"reaction": {"action": action, "name": name, "emoji": emoji}},
    )


def _action(reaction: Mapping[str, Any]) -> str:
    is_there = _text(reaction.get("reaction")) or _text(reaction.get("emoji"))
    return _text(reaction.get("action")) or ("react" if is_there else "unreact")


def _postback(item: _Item, told: Mapping[str, Any]) -> ChannelEvent | None:
    postback = item.parts.begin("postback", told)
    mid, payload = postback.take("mid", _known_id), postback.take("payload", _scalar)
    title, referral = postback.take("title", _text), _referral_of(item, postback)
    postback.take("is_self", _flag)
    if not item.contact:
        return None
    extra: dict[str, Any] = {"postback": {"title": title, "payload": payload}}
    if item.is_self:
        extra["is_self"] = True
    if referral:
        extra["referral"] = referral
    key = mid or _hash([item.sender, item.time, payload, title])
    return item.event(
        "message.postback",
        f"postback:{key}",
        external_id=mid,
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


def _referral(item: _Item, told: Mapping[str, Any]) -> ChannelEvent | None:
    if not item.contact or not told:
        return None
    referral = _origin(item.parts, told)
    return item.event(
        "message.referral",
        f"referral:{_hash([item.sender, item.time, _identity(referral)])}",
        external_id=_known_id(told.get("mid")),
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


def _attachments(message: Told) -> tuple[Attachment, ...]:
    value = message.get("attachments")
    items = _many(value)
    if items or value is None:
        message.leave("attachments", [item for item in items if item is not None and not isinstance(item, dict)])
    merged: list[Attachment] = []
    for attachment in (_attachment(item) for item in items if isinstance(item, dict)):
        twin = next((entry for entry in merged if _are_twins(entry, attachment)), None)
        if twin is None:
            merged.append(attachment)
        else:
            newer, older = (attachment, twin) if attachment.type in _TWINS else (twin, attachment)
            merged[merged.index(twin)] = Attachment(
                type=newer.type,
                url=newer.url or older.url,
                title=newer.title or older.title,
                external_id=newer.external_id or older.external_id,
                payload={**(older.payload or {}), **(newer.payload or {})} or None,
            )
    return tuple(merged)


def _are_twins(one: Attachment, other: Attachment) -> bool:
    """Tell whether two attachments are the old and the new form of one thing: by what they are called, else by url."""
    if _TWINS.get(one.type) != other.type and _TWINS.get(other.type) != one.type:
        return False
    ids, others = _ids(one), _ids(other)
    return bool(ids & others) if ids and others else one.url is not None and one.url == other.url


def _ids(attachment: Attachment) -> set[str]:
    return {attachment.external_id or "", _id((attachment.payload or {}).get("sticker_id"))} - {""}


def _attachment(item: Mapping[str, Any]) -> Attachment:
    outer = Told({name: value for name, value in item.items() if name != "payload"})
    payload = item.get("payload")
    inner = Told(payload if isinstance(payload, dict) else {} if payload in (None, "") else {"value": payload})
    ids = ("ig_post_media_id", "reel_video_id", "story_media_id", "id")
    return Attachment(
        type=outer.take("type", _text) or "unknown",
        url=first(_text, (inner, "url"), (inner, "story_media_url"), (outer, "url")),
        title=first(_text, (inner, "title"), (outer, "title")),
        external_id=first(_known_id, *((place, name) for place in (inner, outer) for name in ids)),
        payload=objects.shallow(objects.together(inner.left(), outer.left())) or None,
    )


def _referral_of(item: _Item, inner: Told) -> dict[str, Any] | None:
    """Return the referral of an item: in the object that it is about, or beside that."""
    told = first(_object, (inner, "referral"), (item.told, "referral"))
    return _origin(item.parts, told) if told else None


def _origin(parts: Parts, told: Mapping[str, Any]) -> dict[str, Any]:
    """Read a referral: from an ad (ad_id, ads_context_data), a shop (product), or an ig.me link (ref)."""
    referral = parts.begin("referral", told)
    return {
        "ref": referral.take("ref", _scalar),
        "source": referral.take("source", _text),
        "type": referral.take("type", _text),
        "ad_id": referral.take("ad_id", _known_id),
        "product_id": referral.part("product").take("id", _known_id),
        "ad": objects.shallow(ad) if (ad := referral.take("ads_context_data", _object)) else None,
    }


def _identity(referral: Mapping[str, Any] | None) -> Any:
    """Return what is the same whenever a referral is told: an ad's unknown keys may not be."""
    ad = referral["ad"] if referral else None
    return {**referral, "ad": {name: ad[name] for name in _AD_KEYS if name in ad}} if referral and ad else referral


def _is_ad(referral: Any) -> bool:
    if not isinstance(referral, dict):
        return False
    return (_text(referral.get("source")) or "").upper() == "ADS" or any(
        referral.get(name) for name in ("ad_id", "ads_context_data")
    )


def _reply_to(parts: Parts, message: Told) -> ReplyTo | None:
    told = message.take("reply_to", _object)
    if told is None:
        return None
    reply = parts.begin("reply_to", told)
    story = parts.begin("story", reply.take("story", _object) or {})
    mid, story_id, url = reply.take("mid", _known_id), story.take("id", _known_id), story.take("url", _text)
    return ReplyTo(mid, story_id, url) if mid or story_id or url or reply.left() or story.left() else None


# --- comments and mentions ---


def _comment(account: str, kind: str, value: Mapping[str, Any], sent_at: str) -> ChannelEvent | None:
    parts = Parts()
    comment = parts.begin("comment", value)
    author, media = comment.part("from"), comment.part("media")
    comment_id = first(_known_id, (comment, "id"), (comment, "comment_id"))
    if not comment_id:
        return None
    at = first(_moment, (comment, "created_time"), (comment, "timestamp"))
    referral = comment.take("referral", _object)
    author_id = author.take("id", _known_id) or ""
    own = account in (author_id, _id(author.get("self_ig_scoped_id")))
    return ChannelEvent(
        # What the shop itself answers comes back as a comment: told to a CRM, it could answer itself for ever.
        NOTED if own else "comment.received",
        account,
        author_id,
        at or sent_at,
        f"comment:{comment_id}",
        external_id=comment_id,
        text=comment.take("text", _text),
        message_type=kind,
        from_account=own,
        extra={
            "comment": {
                "id": comment_id,
                "parent_id": comment.take("parent_id", _known_id),
                "username": author.take("username", _text),
                "media_id": first(_known_id, (media, "id"), (comment, "media_id")),
                "media_type": media.take("media_product_type", _text),
                "ad_id": media.take("ad_id", _known_id),
            },
            **({"referral": _origin(parts, referral)} if referral else {}),
        },
        others=parts.others(),
    )


def _mention(account: str, value: Mapping[str, Any], sent_at: str) -> ChannelEvent | None:
    parts = Parts()
    mention = parts.begin("mention", value)
    media_id, comment_id = mention.take("media_id", _known_id), mention.take("comment_id", _known_id)
    if not media_id and not comment_id:
        return None
    return ChannelEvent(
        "mention.received",
        account,
        "",
        sent_at,
        f"mention:{media_id or ''}:{comment_id or ''}",
        external_id=comment_id or media_id,
        message_type="mention",
        extra={"mention": {"media_id": media_id, "comment_id": comment_id}},
        others=parts.others(),
    )


# --- what is no event of a customer ---


def _test(item: Any, at: str) -> ChannelEvent:
    """A press of the console's "Test" button: all tests look alike, and none is a repetition."""
    raw = objects.shown(item)
    return ChannelEvent(TEST, _TEST_ACCOUNT, "", at, "test:" + new_id("tst"), message_type="test", raw=raw)


def _noted(account: str, contact: str, item: Any, at: str) -> ChannelEvent:
    return ChannelEvent(NOTED, account, contact, at, "raw:" + _hash(item), raw=objects.shown(item))


def _unsupported(
    account: str, contact: str, item: Any, at: str, *, external_id: str | None = None, rank: int = TOLD
) -> ChannelEvent:
    message = item.get("message") if isinstance(item, dict) else None
    mid = external_id or (_id(message.get("mid")) if isinstance(message, dict) else "")
    return ChannelEvent(
        kind="message.unsupported",
        external_account_id=account,
        contact=contact,
        occurred_at=at,
        dedupe_key=message_key(mid) if mid else "raw:" + _hash(item),
        external_id=mid or None,
        rank=rank if mid else None,
        message_type="unsupported",
        from_account=isinstance(item, dict) and bool(account) and _party(item, "sender") == account,
        extra={"sender_id": _party(item, "sender") or None} if isinstance(item, dict) else {},
        raw=objects.shown(item),
    )


# --- values ---


def _hash(value: Any) -> str:
    try:
        content = json.dumps(value, sort_keys=True)
    except RecursionError:
        content = "an item nested too deeply to be told apart"
    return hashlib.sha256(content.encode()).hexdigest()


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


def _known_id(value: Any) -> str | None:
    return _id(value) or None


def _is(value: Any) -> bool:
    """Read a flag: absent is false, and older pages show the text "true"."""
    return bool(_flag(value))


def _flag(value: Any) -> bool | None:
    word = value.lower() if isinstance(value, str) else value
    return True if word in (True, "true", "1") else False if word in (False, "false", "0") else None


def _number(value: Any) -> int | None:
    text = _id(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _object(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _words(message: Told) -> str | None:
    """Read a text, or WhatsApp's object around one."""
    return message.take("text", _text) or message.part("text").take("body", _text)


def _scalar(value: Any) -> str | None:
    """Read a text that some senders write as a number or as JSON."""
    if isinstance(value, dict | list):
        return json.dumps(objects.shown(value), ensure_ascii=False)
    return _text(value) or _id(value) or None


def _moment(value: Any) -> str | None:
    return _time(value, "") or None


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
