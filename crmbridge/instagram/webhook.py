"""The webhook's door: the subscription handshake, the signature over the raw bytes, then parsing."""

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from crmbridge import signing
from crmbridge.errors import Forbidden, Invalid, Unauthorized
from crmbridge.events import ChannelEvent
from crmbridge.instagram import wire

_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{1,512}\Z")


def challenge(query: Mapping[str, str], verify_token: str) -> str:
    """Answer the subscription GET with its challenge. Raises Invalid or Forbidden.

    Some stacks on the way turn the dots of ``hub.mode`` into underscores.
    """

    def parameter(name: str) -> str:
        return query.get(f"hub.{name}") or query.get(f"hub_{name}") or ""

    token, text = parameter("verify_token"), parameter("challenge")
    if parameter("mode") != "subscribe" or not token or not text:
        raise Invalid("hub.mode=subscribe, hub.verify_token and hub.challenge are required.")
    if not verify_token or not hmac.compare_digest(token.encode("utf-8", "replace"), verify_token.encode()):
        raise Forbidden("hub.verify_token is not the one in [instagram] verify_token.", code="wrong_verify_token")
    if not _CHALLENGE.match(text):
        raise Invalid("hub.challenge holds characters that are not reflected.")
    return text


def verify(body: bytes, signature: str | None, app_secrets: Sequence[str]) -> None:
    """Raise Unauthorized unless one of the app secrets signed exactly these bytes."""
    if not signature:
        raise Unauthorized("X-Hub-Signature-256 is missing.", code="signature_missing")
    if not signing.hub_signature_matches(app_secrets, signature, body):
        raise Unauthorized("X-Hub-Signature-256 matches none of the app secrets.", code="signature_mismatch")


def read(body: bytes, received_at: str) -> list[ChannelEvent]:
    """Return the events in a verified body; a body that is no JSON becomes one event that keeps its text."""
    try:
        return list(wire.read(_json(body), received_at))
    except (ValueError, RecursionError):
        return [
            ChannelEvent(
                kind="message.unsupported",
                external_account_id="",
                contact="",
                occurred_at=received_at,
                dedupe_key="body:" + hashlib.sha256(body).hexdigest(),
                message_type="unsupported",
                raw=body.decode("utf-8", "replace"),
            )
        ]


def _json(body: bytes) -> Any:
    value = json.loads(body)
    if b"\\ud" in body.lower():
        # An escaped half of a surrogate pair is no text: neither SQLite nor a CRM could take it.
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value
