"""Webhook signatures of both kinds: X-Hub-Signature-256 and Standard Webhooks.

Pure functions over bytes; knows no channel and no account.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable

_STANDARD_PREFIX = "whsec_"


def hub_signature(secret: str, body: bytes) -> str:
    """Return ``sha256=<hex>`` over the exact body bytes, keyed with the secret's UTF-8 bytes."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def hub_signature_matches(secrets: Iterable[str], header: str | None, body: bytes) -> bool:
    """Tell whether the header was made with any of the secrets, in time that depends on none of them."""
    given = (header or "").strip().encode("utf-8", "surrogateescape")
    matched = False
    for secret in secrets:
        matched |= hmac.compare_digest(hub_signature(secret, body).encode(), given)
    return matched


def standard_key(secret: str) -> bytes | None:
    """Return the key of a Standard Webhooks secret (``whsec_`` + base64 of 24–64 bytes), else None."""
    if not secret.startswith(_STANDARD_PREFIX):
        return None
    try:
        key = base64.b64decode(secret[len(_STANDARD_PREFIX) :], validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if 24 <= len(key) <= 64 else None


def standard_signature(keys: Iterable[bytes], webhook_id: str, timestamp_s: int, body: bytes) -> str:
    """Return the ``webhook-signature`` value: one ``v1,<base64>`` for each key, space-separated."""
    signed = f"{webhook_id}.{timestamp_s}.".encode() + body
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join("v1," + base64.b64encode(digest).decode() for digest in digests)
