"""What the Graph API tells when it is asked: names, tokens, subscriptions, conversations.

A message that is read there is put into the webhook's shape, so that `wire` reads it like one that was told.

Sources: "Get a user's profile", "Conversations API", "Business Login" (refresh), "Webhooks" (subscribed_apps).
Every function raises the client's Refusal, or Unavailable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import quote

from crmbridge.errors import Unavailable
from crmbridge.events import RECOVERED, ChannelEvent, epoch_s, instant
from crmbridge.instagram import wire
from crmbridge.instagram.client import Client

SHOWN_AT_MOST = 20  # details of older messages of a conversation are not told
_PAGE = 50
_SIXTY_DAYS_S = 5_184_000.0
_FIELDS = "id,created_time,from,to,message,attachments,shares,story,reply_to,is_unsupported"
_READ = (*_FIELDS.split(","), "reactions")  # none of these is passed on besides as it is
_DATA = ("sticker_data", "image_data", "video_data")
_SOUNDS = (".aac", ".m4a", ".wav", ".mp3", ".ogg", ".mp4")


@dataclass(frozen=True)
class Profile:
    """What a customer calls themselves."""

    username: str | None
    name: str | None


@dataclass(frozen=True)
class Fresh:
    """A token in place of an older one, good for `lasts_s`."""

    token: str
    lasts_s: float


class TokenEnd(NamedTuple):
    """When a token ends; where that is not `known`, the latest that it can be."""

    at: str
    known: bool

    def said(self) -> str:
        """Say it in a sentence, after ``ends``."""
        return f"at {self.at[:16]}Z" if self.known else f"by {self.at[:16]}Z at the latest"


@dataclass(frozen=True)
class Listed:
    """A conversation, and when something was last said in it."""

    id: str
    updated_s: float


def profile(client: Client, token: str, contact: str) -> Profile:
    """Return a customer's names; Instagram tells them only of one who wrote or tapped."""
    query = [("fields", "name,username")]
    _, found = client.ask("GET", f"/{quote(contact, safe='')}", token, query, names_object=True)
    return Profile(_text(found.get("username")), _text(found.get("name")))


def refresh(client: Client, token: str) -> Fresh:
    """Return a token for 60 more days; Instagram refuses when the old one is younger than 24 hours."""
    query = [("grant_type", "ig_refresh_token"), ("access_token", token)]
    _, found = client.ask("GET", "/refresh_access_token", token, query, versioned=False)
    fresh, lasts = _text(found.get("access_token")), found.get("expires_in")
    if fresh is None:
        raise Unavailable("Instagram's answer holds no token.", code="instagram_unavailable", after_s=60)
    is_sane = isinstance(lasts, int | float) and 0 < lasts < 1e9
    return Fresh(fresh, float(lasts) if is_sane else _SIXTY_DAYS_S)  # type: ignore[arg-type]


def token_end(account: Mapping[str, Any]) -> TokenEnd | None:
    """Return when an account's token ends, or None when it has none.

    Instagram tells the end when it renews a token. Until then it is taken from the day on which the token was set and
    checked: one made in the console, too, is good for 60 days (Business Login, "long-lived access token").
    """
    if not account["access_token_sealed"]:
        return None
    if account["token_expires_at"]:
        return TokenEnd(account["token_expires_at"], known=True)
    checked_at = account["token_checked_at"]
    return TokenEnd(instant(epoch_s(checked_at) + _SIXTY_DAYS_S), known=False) if checked_at else None


def lacking(client: Client, token: str, user_id: str) -> list[str]:
    """Return the webhook fields that the account is not subscribed to."""
    _, found = client.ask("GET", f"/{user_id}/subscribed_apps", token, ())
    apps = _objects(found.get("data"))
    told = [field for app in apps for field in _many(app.get("subscribed_fields"))]
    names = {field.get("name") if isinstance(field, dict) else field for field in told}
    if apps and not names:
        return []  # it is subscribed, and the answer does not say to what
    return [field for field in client.fields if field not in names]


def conversations(client: Client, token: str, user_id: str, after: str | None) -> tuple[list[Listed], str | None]:
    """Return a page of the account's conversations, and the cursor of the next one."""
    query = [("platform", "instagram"), ("fields", "id,updated_time"), ("limit", str(_PAGE))]
    _, found = client.ask("GET", f"/{user_id}/conversations", token, query + ([("after", after)] if after else []))
    listed = []
    for entry in _objects(found.get("data")):
        name = _text(entry.get("id"))
        if name:
            listed.append(Listed(name, _time_s(entry.get("updated_time"))))
    paging = found.get("paging")
    cursors = paging.get("cursors") if isinstance(paging, dict) and paging.get("next") else None
    cursor = _text(cursors.get("after")) if isinstance(cursors, dict) else None
    return listed, cursor if cursor != after else None


def messages(client: Client, token: str, conversation: Listed) -> Sequence[Mapping[str, Any]]:
    """Return the newest messages of a conversation as they are told, no more than `SHOWN_AT_MOST` of them."""
    query = [("fields", f"messages{{{_FIELDS}}}")]
    _, found = client.ask("GET", f"/{quote(conversation.id, safe='')}", token, query, names_object=True)
    told = found.get("messages")
    return _objects(told.get("data") if isinstance(told, dict) else None)


def message(client: Client, token: str, external_id: str) -> Mapping[str, Any]:
    """Return one message as it is told."""
    query = [("fields", _FIELDS)]
    _, found = client.ask("GET", f"/{quote(external_id, safe='')}", token, query, names_object=True)
    return found


def told_s(entry: Mapping[str, Any]) -> float:
    """Return when a message was written, in seconds since the epoch; 0 when it is not told."""
    return _time_s(entry.get("created_time"))


def events(entries: Sequence[Mapping[str, Any]], account: Mapping[str, Any], received_at: str) -> list[ChannelEvent]:
    """Return messages, the newest first, as the events that their webhooks would have been, marked as recovered."""
    own = {account["instagram_account_id"], account["app_scoped_id"]} - {None}
    items = [item for entry in reversed(entries) if (item := _item(entry, account["instagram_account_id"], own))]
    body = {"object": "instagram", "entry": [{"id": account["instagram_account_id"], "messaging": items}]}
    found = wire.read(body, received_at) if items else ()
    return [
        replace(event, rank=RECOVERED if event.rank else None, extra={**event.extra, "recovered": True})
        for event in found
    ]


def _item(entry: Mapping[str, Any], user_id: str, own: set[str]) -> dict[str, Any] | None:
    """Put a message into the webhook's shape; None when it tells neither who nor when, such as one that was deleted."""
    mid, at_s, author = _text(entry.get("id")), told_s(entry), _party(entry.get("from"))
    to = entry.get("to")
    readers = [_party(one) for one in _objects(to.get("data") if isinstance(to, dict) else None)]
    is_echo = author in own
    contact = next((one for one in readers if one and one not in own), "") if is_echo else author
    if not mid or not at_s or not contact:
        return None
    message: dict[str, Any] = {**_but(entry, *_READ), "mid": mid}
    if text := _text(entry.get("message")):
        message["text"] = text
    attachments = _attachments(entry)
    if attachments:
        message["attachments"] = attachments
    if reply := _reply(entry):
        message["reply_to"] = reply
    if is_echo:
        message["is_echo"] = True
    if not text and not attachments:
        message["is_unsupported"] = True
    return {
        "sender": {"id": user_id if is_echo else contact},
        "recipient": {"id": contact if is_echo else user_id},
        "timestamp": int(at_s * 1000),
        "message": message,
    }


def _attachments(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [_attachment(one) for one in _data(entry.get("attachments"))]
    for share in _data(entry.get("shares")):
        if isinstance(share.get("template"), dict):
            found.append({**_but(share, "template"), "type": "template", "payload": {"generic": share["template"]}})
        else:
            found.append({"type": "share", "payload": {**_but(share, "link"), "url": _text(share.get("link"))}})
    story = entry.get("story")
    mention = story.get("mention") if isinstance(story, dict) else None
    if isinstance(mention, dict):
        payload = {"url": _text(mention.get("link")), "id": _text(mention.get("id"))}
        told = {name: value for name, value in payload.items() if value}
        found.append({"type": "story_mention", "payload": {**_but(mention, "link", "id"), **told}})
    return found


def _attachment(told: Mapping[str, Any]) -> dict[str, Any]:
    """Put an attachment into the webhook's shape. Its own id is not the one that webhooks tell."""
    if "generic_template" in told:
        rest = _but(told, "id", "generic_template")
        return {**rest, "type": "template", "payload": {"generic": told["generic_template"]}}
    key = next((name for name in _DATA if isinstance(told.get(name), dict)), None)
    data = told[key] if key else {"url": told.get("file_url")}
    rest = _but(told, "id", "type", key or "file_url")
    return {"type": _kind(told, key), "payload": {**rest, **_but(data, "id"), "url": _text(data.get("url"))}}


def _kind(told: Mapping[str, Any], key: str | None) -> str:
    if named := _text(told.get("type")):
        return named
    if key is not None or "sticker_id" in told:
        return (key or "sticker").removesuffix("_data")
    is_sound = str(told.get("mime_type") or "").startswith("audio/")
    return "audio" if is_sound or (_text(told.get("name")) or "").lower().endswith(_SOUNDS) else "file"


def _reply(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    story, reply = entry.get("story"), entry.get("reply_to")
    about = story.get("reply_to") if isinstance(story, dict) else None
    if isinstance(about, dict):
        known = {"url": _text(about.get("link")), "id": _text(about.get("id"))}
        return {"story": {**_but(about, "link", "id"), **known}}
    if not isinstance(reply, dict):
        return None
    mid = _text(reply.get("mid")) or _text(reply.get("id"))
    return {**_but(reply, "id"), "mid": mid} if mid else None


def _but(told: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name not in names}


def _party(value: Any) -> str:
    return str(value.get("id") or "") if isinstance(value, dict) else ""


def _data(value: Any) -> Sequence[Mapping[str, Any]]:
    return _objects(value.get("data") if isinstance(value, dict) else value)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in _many(value) if isinstance(entry, dict)]


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _time_s(value: Any) -> float:
    try:
        return epoch_s(value)
    except (TypeError, ValueError):
        return 0.0
