"""Webhook signatures of both kinds: X-Hub-Signature-256 and Standard Webhooks.

Pure functions over bytes; knows no channel and no account. An empty secret signs nothing and matches nothing, as
everybody has it; one of zero bytes alone is the same key to HMAC.
"""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterable

from crmbridge.errors import Misconfigured

_STANDARD_PREFIX = "whsec_"
SHORTEST, WEAK = 8, 16  # characters of a secret: fewer are refused, fewer are weak
_FEW = 6  # different characters


def hub_signature(secret: str, body: bytes) -> str:
    """Return ``sha256=<hex>`` over the exact body bytes, keyed with the secret's UTF-8 bytes.

    Raises Misconfigured for an empty secret.
    """
    return "sha256=" + _digest(secret.encode(), body).hex()


def hub_signature_matches(secrets: Iterable[str], header: str | None, body: bytes) -> bool:
    """Tell whether the header was made with any of the secrets, in time that depends on none of them."""
    given = (header or "").strip().encode("utf-8", "surrogateescape")
    matched = False
    for secret in secrets:
        matched |= bool(secret.strip("\0")) and hmac.compare_digest(hub_signature(secret, body).encode(), given)
    return matched


def make_secret() -> str:
    """Return a new Standard Webhooks secret."""
    return _STANDARD_PREFIX + base64.b64encode(os.urandom(32)).decode()


def problem_of(secret: str) -> str | None:
    """Say why a text can be no webhook secret, in words that follow its name; None when it can."""
    if len(secret) < SHORTEST:
        return f"must have at least {SHORTEST} characters"
    if secret != secret.strip():
        return "must not begin or end with a blank"
    if secret.startswith(_STANDARD_PREFIX) and standard_key(secret) is None:
        return "begins with whsec_ and must go on with 24 to 64 bytes in standard, padded base64"
    return None


def is_weak(secret: str) -> bool:
    """Tell whether a webhook secret is easy to guess."""
    return standard_key(secret) is None and (len(secret) < WEAK or len(set(secret)) < _FEW)


def standard_key(secret: str) -> bytes | None:
    """Return the key of a Standard Webhooks secret (``whsec_`` + base64 of 24–64 bytes), else None."""
    if not secret.startswith(_STANDARD_PREFIX):
        return None
    try:
        key = base64.b64decode(secret[len(_STANDARD_PREFIX) :], validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if 24 <= len(key) <= 64 and key.strip(b"\0") else None


def standard_signature(keys: Iterable[bytes], webhook_id: str, timestamp_s: int, body: bytes) -> str:
    """Return the ``webhook-signature`` value: one ``v1,<base64>`` for each key, space-separated.

    Raises Misconfigured for an empty key.
    """
    signed = f"{webhook_id}.{timestamp_s}.".encode() + body
    return " ".join("v1," + base64.b64encode(_digest(key, signed)).decode() for key in keys)


def _digest(key: bytes, signed: bytes) -> bytes:
    if not key.strip(b"\0"):
        raise Misconfigured("an empty secret signs nothing: set a secret")
    return hmac.new(key, signed, hashlib.sha256).digest()
