"""What the Graph API accepts, and the error it answers otherwise.

Reads the request at hand; changes nothing.
"""

import json
from collections.abc import Mapping
from typing import Any

import bottle

from crmbridge.sandbox import wire


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


def json_body() -> dict[str, Any]:
    """Read the request's body as a JSON object."""
    try:
        given = json.loads(bottle.request.body.read())
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise GraphError(100, "(#100) The request's body is not a JSON object")
    return given


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
    return True


def message(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message of a send, once it is one."""
    given = payload.get("message")
    if not isinstance(given, dict):
        raise GraphError(100, "(#100) The parameter message is required")
    content = [key for key in ("text", "attachment", "attachments") if given.get(key)]
    if len(content) != 1:
        raise GraphError(100, "(#100) A message needs either text or attachments", subcode=2534015)
    if content == ["text"]:
        if not isinstance(given["text"], str) or len(given["text"].encode("utf-8", "surrogatepass")) > 1000:
            raise GraphError(100, "(#100) Length of param message[text] must be at most 1000 bytes of UTF-8")
    elif not all(isinstance(one, dict) and isinstance(one.get("type"), str) for one in wire.attachments_of(given)):
        raise GraphError(100, "(#100) An attachment needs a type", subcode=2534015)
    return given
