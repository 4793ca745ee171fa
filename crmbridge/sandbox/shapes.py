"""What Instagram can say besides a plain message: one shape for each kind of webhook, to rehearse it by name.

Sources: Meta's "Webhooks for Instagram" pages and captured payloads, as the bridge's channel tests know them.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from crmbridge.sandbox import wire

_URL = "https://lookaside.fbsbx.com/ig_messaging_cdn/?asset_id=18000000000000001&signature=example"
_AD = {
    "ref": "autumn",
    "ad_id": "6112345678901",
    "source": "ADS",
    "type": "OPEN_THREAD",
    "ads_context_data": {"ad_title": "Lamps", "photo_url": _URL},
}
_DAY_S = 86_400
_LINK = {"ref": "flyer", "source": "IGME-SOURCE-LINK", "type": "OPEN_THREAD"}
Body = Callable[[str, str], dict[str, Any]]  # from a message id and a text: what stands in the item


def _attached(kind: str, payload: Mapping[str, Any] | None = None) -> Body:
    attachment = {"type": kind} | ({"payload": payload} if payload is not None else {})
    return lambda mid, _: {"message": {"mid": mid, "attachments": [attachment]}}


# About a message of its own: `mid` is minted.
_NEW: dict[str, Body] = {
    "image": _attached("image", {"url": _URL}),
    "voice": _attached("audio", {"url": _URL}),
    "reel": _attached("ig_reel", {"reel_video_id": "18000000000000008", "title": "How to hang it", "url": _URL}),
    "post": lambda mid, _: {
        "message": {
            "mid": mid,
            "attachments": [
                {"type": kind, "payload": {"ig_post_media_id": "18000000000000007", "title": "A lamp", "url": _URL}}
                for kind in ("share", "ig_post")
            ],
        }
    },
    "story_mention": _attached("story_mention", {"url": _URL}),
    "sticker": lambda mid, _: {
        "message": {
            "mid": mid,
            "attachments": [
                {"type": kind, "payload": {"url": _URL, "sticker_id": 369239263222822}} for kind in ("image", "sticker")
            ],
        }
    },
    "heart": _attached("like_heart"),
    "view_once": _attached("ephemeral"),
    "attachment_of_tomorrow": _attached("hologram", {"url": _URL, "depth": 3}),
    "story_reply": lambda mid, text: {
        "message": {"mid": mid, "text": text, "reply_to": {"story": {"url": _URL, "id": "18000000000000009"}}}
    },
    "quick_reply": lambda mid, text: {"message": {"mid": mid, "text": text, "quick_reply": {"payload": "CONFIRM_YES"}}},
    "from_ad": lambda mid, text: {"message": {"mid": mid, "text": text, "referral": _AD}},
    "ad_opened": lambda mid, _: {"message": {"mid": mid, "referral": _AD}},
    "from_shop": lambda mid, text: {"message": {"mid": mid, "text": text, "referral": {"product": {"id": "4711"}}}},
    "unsupported": lambda mid, _: {"message": {"mid": mid, "is_unsupported": True}},
    "postback": lambda mid, text: {"postback": {"mid": mid, "title": text, "payload": "HOURS"}},
    "edit_zero": lambda mid, _: {"message_edit": {"mid": mid, "num_edit": 0}},
    "referral": lambda _, __: {"referral": _LINK},
    "optin": lambda _, __: {"optin": {"type": "notification_messages", "payload": "weekly"}},
    "handover": lambda _, __: {"pass_thread_control": {"previous_owner_app_id": None, "new_owner_app_id": "1"}},
}
# About a message that there is: its `mid` must be given.
_ABOUT: dict[str, Body] = {
    "reaction": lambda mid, _: {"reaction": {"mid": mid, "action": "react", "reaction": "love", "emoji": "❤"}},
    "reaction_taken_back": lambda mid, _: {"reaction": {"mid": mid, "action": "unreact"}},
    "edit": lambda mid, text: {"message_edit": {"mid": mid, "text": text, "num_edit": 1}},
    "unsend": lambda mid, _: {"message": {"mid": mid, "is_deleted": True}},
    "reply": lambda mid, text: {"message": {"mid": f"{mid}-reply", "text": text, "reply_to": {"mid": mid}}},
}
_WHOLE = ("comment", "mention", "test", "empty_entry")
NAMES = (*_NEW, *_ABOUT, *_WHOLE)


def payload(
    name: str,
    user_id: str,
    igsid: str,
    at_ms: int,
    *,
    mid: str | None = None,
    text: str = "Is it in stock?",
    url: str = _URL,
) -> dict[str, Any]:
    """Return a webhook's body of that shape, with `url` for its media.

    Raises ValueError when there is no such shape, or when it needs a `mid`.
    """
    body = _body(name, user_id, igsid, at_ms, mid, text)
    found: dict[str, Any] = json.loads(json.dumps(body).replace(json.dumps(_URL), json.dumps(url)))
    return found


def _body(name: str, user_id: str, igsid: str, at_ms: int, mid: str | None, text: str) -> dict[str, Any]:
    if name in _WHOLE:
        return _whole(name, user_id, igsid, at_ms, text)
    if name in _ABOUT and not mid:
        raise ValueError(f"{name} is about a message: give its mid")
    if name not in _NEW and name not in _ABOUT:
        raise ValueError(f"no shape {name!r}; there are: {', '.join(NAMES)}")
    body = (_NEW | _ABOUT)[name](mid or wire.mint_mid(user_id, igsid, at_ms), text)
    parties = {"sender": {"id": igsid}, "recipient": {"id": user_id}}
    # In some apps this one comes without its parties.
    item = {"timestamp": at_ms, **body} if name == "edit_zero" else {**parties, "timestamp": at_ms, **body}
    return wire.envelope(user_id, at_ms, item)


def is_writing(name: str) -> bool:
    """Tell whether a customer writes, or taps, with that shape; it lets their names be read."""
    body = _made(name)
    return "postback" in body or ("message" in body and not body["message"].get("is_deleted"))


def opens_for_s(name: str) -> float:
    """Return for how many seconds that shape opens the window; 0 for one that is no such act of the customer."""
    body = _made(name)
    is_act = is_writing(name) or name in ("edit_zero", "referral", "reaction")
    return 0 if not is_act else 7 * _DAY_S if body.get("message", {}).get("referral") == _AD else _DAY_S


def _made(name: str) -> dict[str, Any]:
    shape = (_NEW | _ABOUT).get(name)
    return shape("", "") if shape else {}


def _whole(name: str, user_id: str, igsid: str, at_ms: int, text: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": user_id, "time": at_ms // 1000}
    if name == "comment":
        value: dict[str, Any] = {
            "id": f"1790{at_ms}",
            "text": text,
            "from": {"id": igsid, "username": "passer_by"},
            "media": {"id": "18000000000000011", "media_product_type": "FEED"},
        }
        entry["changes"] = [{"field": "comments", "value": value}]
    elif name == "mention":
        entry["changes"] = [{"field": "mentions", "value": {"media_id": "18000000000000013"}}]
    elif name == "test":  # the console's button: always the same
        item = {"sender": {"id": "12334"}, "recipient": {"id": "23245"}, "timestamp": "1527459824"}
        value = {**item, "message": {"mid": "random_mid", "text": "random_text"}}
        entry = {"id": "0", "time": at_ms // 1000, "changes": [{"field": "messages", "value": value}]}
    return {"object": "instagram", "entry": [entry]}
