"""The webhook's door: the subscription handshake, the signature over the raw bytes, then parsing."""

import hashlib
import hmac
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from crmbridge import signing
from crmbridge.errors import Forbidden, Invalid, Unauthorized
from crmbridge.events import NOTED, ChannelEvent
from crmbridge.instagram import wire

_ITEMS_AT_MOST = 2000  # Meta batches 1000 updates
_DIGITS = 40
_DEPTH = 100
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
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


def read(body: bytes, received_at: str, *, quiet: Collection[str] = ()) -> list[ChannelEvent]:
    """Return the events in a verified body; what is no JSON, or far more than Meta sends, is kept as one event.

    Events of the `quiet` kinds are only kept.
    """
    text = body.decode("utf-8-sig", "replace")
    try:
        found = itertools.islice(wire.read(_json(text), received_at), _ITEMS_AT_MOST + 1)
        events = [replace(event, kind=NOTED) if event.kind in quiet else event for event in found]
    except (ValueError, RecursionError):
        return [_kept_whole(text, received_at)]
    if len(events) > _ITEMS_AT_MOST:
        return [*events[:-1], _kept_whole(text, received_at)]
    return events


def _kept_whole(text: str, received_at: str) -> ChannelEvent:
    return ChannelEvent(
        kind="message.unsupported",
        external_account_id="",
        contact="",
        occurred_at=received_at,
        dedupe_key="body:" + hashlib.sha256(text.encode()).hexdigest(),
        message_type="unsupported",
        raw=text,
    )


def _json(text: str) -> Any:
    try:
        value = json.loads(text, parse_int=_number)
    except RecursionError:
        value = json.loads(_cut(text), parse_int=_number)
    if "\\ud" in text.lower():
        # An escaped half of a surrogate pair is no text: neither SQLite nor a CRM could take it.
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), parse_int=_number)
    return value


def _number(digits: str) -> int | str:
    """Keep a number that is too long to be one as text, so that it sinks nothing else."""
    return int(digits) if len(digits) < _DIGITS else digits


def _cut(text: str) -> str:
    """Replace what is nested too deeply to be read by a short text, so that it sinks nothing else."""
    parts, depth, kept_to = [], 0, 0
    for found in _TOKEN.finditer(text):
        mark = found[0]
        if mark in "[{":
            depth += 1
            if depth == _DEPTH:
                parts.append(text[kept_to : found.start()])
        elif mark in "]}":
            depth -= 1
            if depth == _DEPTH - 1:
                parts.append('"nested too deeply"')
                kept_to = found.end()
    return "".join(parts) + text[kept_to:] if depth < _DEPTH else text
