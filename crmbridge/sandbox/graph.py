"""What the Graph API accepts, and the error it answers otherwise.

Reads the request at hand; changes nothing.
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import bottle

from crmbridge.sandbox import wire

MEDIA_FAULTS = {"unreachable": 2018008, "timeout": 2018294, "rejected": 2018047, "too_large": 2018109}
_LIMITS = (("title", 80), ("subtitle", 80))


class GraphError(Exception):
    """An answer with Meta's error object."""

    def __init__(self, code: int, message: str, status: int = 400, **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, wire.error_body(code, message, **more)


def chosen(known: Mapping[str, str], also: str) -> dict[str, str]:
    """Pick what `?fields=` asks for; `also` names fields that exist and are empty here."""
    fields = [name for name in bottle.request.query.fields.split(",") if name]
    for name in fields:
        if name not in known and name not in also.split():
            raise GraphError(100, f"(#100) Tried accessing nonexisting field ({name})")
    return {name: known[name] for name in (*fields, "id") if name in known}


def shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """Render a message as the Conversations API does: attachments, shares and stories in places of their own."""
    customer, shop = {"id": message["igsid"]}, {"id": message["user_id"]}
    author, reader = (customer, shop) if message["from"] == "customer" else (shop, customer)
    told: dict[str, Any] = {
        "id": message["mid"],
        "created_time": wire.iso_time(message["at"]),
        "from": author,
        "to": {"data": [reader]},
        "message": message["text"] or "",
    }
    told |= wire.conversation_edges(message["attachments"])
    for one in message["attachments"]:
        if one.get("type") == "story_mention":
            url = one["payload"]["url"]
            told["story"] = {"mention": {"link": url, "id": wire.digits_of(url, 17)}}
    reply = message.get("reply_to") or {}
    if "story" in reply:
        told["story"] = {"reply_to": {"link": reply["story"].get("url"), "id": reply["story"].get("id")}}
    elif "mid" in reply:
        told["reply_to"] = {"mid": reply["mid"], "is_self_reply": False}
    return told


def json_body() -> dict[str, Any]:
    """Read the request's body as a JSON object, or as a form whose fields may hold JSON."""
    raw: Any = bottle.request.body.read()
    try:
        if bottle.request.content_type.startswith("application/x-www-form-urlencoded"):
            return {name: _nested(value) for name, value in parse_qsl(raw.decode(), keep_blank_values=True)}
        given = json.loads(raw)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise GraphError(100, "(#100) The request's body is not a JSON object")
    return given


def _nested(value: str) -> Any:
    return json.loads(value) if value.startswith(("{", "[")) else value


def recipient(payload: Mapping[str, Any]) -> str:
    """Return whom a send is for; a comment stands for its author, whose id is made up."""
    given = payload.get("recipient")
    if isinstance(given, dict) and len(given) == 1:
        match next(iter(given.items())):
            case "id", str(igsid) if igsid:
                return igsid
            case "comment_id", str(comment) if comment:
                return wire.digits_of(comment, 16)
    raise GraphError(100, "(#100) The parameter recipient is required")


def is_action(payload: Mapping[str, Any]) -> bool:
    """Tell whether this is a sender action, and refuse one that is wrong."""
    action = payload.get("sender_action")
    if action is None:
        return False
    allowed = {"recipient", "sender_action"} | ({"payload"} if action in ("react", "unreact") else set())
    if action not in ("typing_on", "typing_off", "mark_seen", "react", "unreact") or not payload.keys() <= allowed:
        raise GraphError(100, "(#100) Param sender_action is invalid or was not sent alone")
    about = payload.get("payload")
    needs = {"react": ("message_id", "reaction"), "unreact": ("message_id",)}.get(action, ())
    if not all(isinstance(about, dict) and about.get(name) for name in needs):
        raise GraphError(100, "(#100) A reaction needs payload[message_id], and a new one payload[reaction]")
    return True


def tag(payload: Mapping[str, Any], human_agent: bool) -> str | None:
    """Return the tag of a send. Only one is left, and it needs an approval."""
    given = payload.get("tag")
    if given not in (None, "HUMAN_AGENT"):
        raise GraphError(100, "(#100) Invalid parameter: this message tag is not supported any more")
    if given and not human_agent:
        raise GraphError(10, "(#10) To use 'Human Agent', your use of this endpoint must be reviewed and approved", 403)
    return given


def comment(payload: Mapping[str, Any]) -> str | None:
    """Return the comment that a private reply answers."""
    found: str | None = payload["recipient"].get("comment_id")
    return found


def message(payload: Mapping[str, Any], media: str = "ok") -> dict[str, Any]:
    """Return the message of a send, once it is one; `media` is what comes of fetching what it names."""
    given = payload.get("message")
    if not isinstance(given, dict):
        raise GraphError(100, "(#100) The parameter message is required")
    content = [key for key in ("text", "attachment", "attachments") if given.get(key)]
    if len(content) != 1:
        raise GraphError(100, "(#100) A message needs either text or attachments", subcode=2534015)
    if content == ["text"]:
        if not isinstance(given["text"], str) or len(given["text"].encode("utf-8", "surrogatepass")) > 1000:
            raise GraphError(100, "(#100) Length of param message[text] must be at most 1000 bytes of UTF-8")
        _quick_replies(given.get("quick_replies", []))
        return given
    attachments = wire.attachments_of(given)
    if len(attachments) > 10:
        raise GraphError(100, "(#100) Too many attachments", subcode=2534015)
    for one in attachments:
        if not isinstance(one, dict) or not isinstance(one.get("type"), str):
            raise GraphError(100, "(#100) An attachment needs a type", subcode=2534015)
        _attachment(one["type"], one.get("payload"), media)
    return given


def _attachment(kind: str, payload: Any, media: str) -> None:
    if kind in ("image", "audio", "video", "file"):
        if not isinstance(payload, dict) or not (payload.get("url") or payload.get("attachment_id")):
            raise GraphError(100, "(#100) An attachment needs a url or an attachment_id", subcode=2534015)
        if media != "ok":
            raise GraphError(100, "(#100) Failed to fetch the file from the url", subcode=MEDIA_FAULTS[media])
    elif kind == "template":
        _template(payload if isinstance(payload, dict) else {})
    elif kind not in ("like_heart", "MEDIA_SHARE"):
        raise GraphError(100, f"(#100) Param message[attachment][type] must not be {kind}", subcode=2534015)


def _quick_replies(replies: Any) -> None:
    fits = isinstance(replies, list) and len(replies) <= 13
    if not fits or not all(
        isinstance(one, dict) and one.get("content_type") == "text" and one.get("title") and one.get("payload")
        for one in replies
    ):
        raise GraphError(
            100, "(#100) Param message[quick_replies] must be up to 13 of type text with title and payload"
        )


def _template(payload: Mapping[str, Any]) -> None:
    elements, buttons = payload.get("elements", []), payload.get("buttons", [])
    match payload.get("template_type"):
        case "generic":
            fits = 1 <= len(elements) <= 10 and all(
                one.get("title") and all(len(one.get(name, "")) <= most for name, most in _LIMITS) for one in elements
            )
            buttons = [button for one in elements for button in one.get("buttons", [])]
            fits = fits and all(len(one.get("buttons", [])) <= 3 for one in elements)
        case "button":
            fits = 0 < len(payload.get("text", "")) <= 640 and 1 <= len(buttons) <= 3
        case _:
            fits = False
    needs = {"web_url": "url", "postback": "payload"}
    if not fits or not all(one.get("title") and one.get(needs.get(one.get("type"), "")) for one in buttons):
        raise GraphError(100, "(#100) The template's payload is invalid", subcode=2534015)
