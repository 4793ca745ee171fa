"""How Meta writes: message ids, webhook bodies and their signatures, error objects.

Pure functions; knows no server and no state.
"""

import base64
import hashlib
import hmac
import itertools
import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_ESCAPES = (("Z", "ZA"), ("+", "ZB"), ("/", "ZC"), ("=", "ZD"))
_MID_HEAD = "ig_dm_item:1:IGMessageID"
_THREAD_HEAD = "340282366841710301244"
_tick = itertools.count()


def mint_mid(user_id: str, igsid: str, at_ms: int) -> str:
    """Mint a message id as Meta's look: account, thread and creation time are readable in it."""
    thread = _THREAD_HEAD + digits_of(f"{user_id} {igsid}", 18)
    item = (at_ms * 1000 + next(_tick) % 1000) << 64 | secrets.randbits(64)
    text = base64.b64encode(f"{_MID_HEAD}:{user_id}:{thread}:{item}".encode()).decode()
    for plain, escaped in _ESCAPES:
        text = text.replace(plain, escaped)
    return text


def read_mid(mid: str) -> tuple[str, str, int]:
    """Return the account, the thread and the creation time in milliseconds that a message id carries."""
    for plain, escaped in reversed(_ESCAPES):
        mid = mid.replace(escaped, plain)
    user_id, thread, item = base64.b64decode(mid).decode().removeprefix(_MID_HEAD + ":").split(":")
    return user_id, thread, (int(item) >> 64) // 1000


def digits_of(text: str, length: int) -> str:
    """Derive an id of that many digits from a text, always the same one."""
    return str(int.from_bytes(hashlib.sha256(text.encode()).digest()))[:length]


def webhook_body(payload: object) -> bytes:
    """Render as Meta does: compact, non-ASCII as lower-case ``\\uXXXX``, ``/`` as ``\\/``."""
    return json.dumps(payload, separators=(",", ":")).replace("/", "\\/").encode()


def signature_headers(secret: str, body: bytes, how: str = "good") -> dict[str, str]:
    """Sign a body; `how` is good, bad (another secret), missing or sha1_only."""
    if how == "bad":
        secret += "-but-another"
    both = {
        "X-Hub-Signature": "sha1=" + hmac.new(secret.encode(), body, hashlib.sha1).hexdigest(),
        "X-Hub-Signature-256": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest(),
    }
    match how:
        case "good" | "bad":
            return both
        case "sha1_only":
            return {"X-Hub-Signature": both["X-Hub-Signature"]}
        case "missing":
            return {}
    raise ValueError(f"signature must be good, bad, missing or sha1_only, not {how!r}")


def signed_request(secret: str, user_id: str, at_s: int) -> str:
    """Build what Meta's privacy callbacks carry, about the account that has this app-scoped id."""
    payload = {"algorithm": "HMAC-SHA256", "expires": at_s + 3600, "issued_at": at_s, "user_id": user_id}
    second = _base64url(json.dumps(payload).encode())
    return _base64url(hmac.new(secret.encode(), second.encode(), hashlib.sha256).digest()) + "." + second


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def error_body(
    code: int,
    message: str = "(#{code}) An error of the sandbox",
    *,
    subcode: int | None = None,
    type: str = "IGApiException",
    **more: object,
) -> dict[str, Any]:
    """Build Meta's error object; `more` may carry is_transient, error_user_msg and the like."""
    error: dict[str, Any] = {"message": message.replace("{code}", str(code)), "type": type, "code": code, **more}
    if subcode is not None:
        error["error_subcode"] = subcode
    return {"error": error | {"fbtrace_id": "A" + secrets.token_urlsafe(16)}}


def envelope(user_id: str, now_ms: int, *items: Mapping[str, Any]) -> dict[str, Any]:
    """Wrap messaging items of one account as one webhook."""
    return {"object": "instagram", "entry": [{"time": now_ms, "id": user_id, "messaging": list(items)}]}


def echo_message(mid: str, sent: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the message of a send into the message of its echo."""
    message: dict[str, Any] = {"mid": mid}
    if "text" in sent:
        message["text"] = sent["text"]
    if attachments := attachments_of(sent):
        message["attachments"] = [_echo_attachment(one) for one in attachments]
    return message | {"is_echo": True}


def attachments_of(message: Mapping[str, Any]) -> list[Any]:
    """Return a message's attachments, whether it has one or several."""
    several = message.get("attachments")
    return several if isinstance(several, list) else [message["attachment"]] if "attachment" in message else []


def conversation_edges(attachments: list[Any]) -> dict[str, Any]:
    """Render what came with a message as the Conversations API does: by keys, and templates as shares."""
    files, shares = [], []
    for number, one in enumerate(attachments):
        kind, url = str(one.get("type", "")).lower(), (one.get("payload") or {}).get("url")
        if kind == "template":
            shares.append({"template": one["payload"]})
        elif kind in ("share", "ig_post"):
            shares.append({"link": url})
        elif kind == "audio":
            files.append({"id": str(number), "name": "voice.m4a", "file_url": url})
        elif url and kind != "story_mention":
            rest = {name: value for name, value in one["payload"].items() if name == "sticker_id"}
            image, sticker = {"image_data": {"url": url}}, {"type": "sticker", "image_data": {"url": url}}
            shown: dict[str, dict[str, Any]] = {
                "image": image,
                "sticker": sticker,
                "video": {"video_data": {"url": url}},
            }
            files.append({"id": str(number), **rest, **shown.get(kind, {"file_url": url})})
    edges = {"attachments": files, "shares": shares}
    return {name: {"data": found} for name, found in edges.items() if found}


def _echo_attachment(sent: Mapping[str, Any]) -> dict[str, Any]:
    kind, payload = str(sent.get("type", "")).lower(), sent.get("payload")
    if kind == "template" and isinstance(payload, dict):
        payload = {"generic": {"elements": payload.get("elements", [])}}
    return {"type": kind} | ({"payload": payload} if payload is not None else {})


def iso_time(epoch_s: float) -> str:
    """Render a time as the Graph API does: whole seconds, and an offset without a colon."""
    return datetime.fromtimestamp(int(epoch_s), UTC).strftime("%Y-%m-%dT%H:%M:%S+0000")
