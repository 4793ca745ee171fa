"""The form of an API key: ``crmb_<id>_<secret><checksum>``. Makes and splits keys; knows no rows."""

import binascii
import hmac
import re
import secrets
import string
from dataclasses import dataclass

import bcrypt

PERMISSIONS = ("messages:send", "messages:read", "accounts:read", "accounts:write", "events:read")
BCRYPT_COST = 10  # the secret is random: the cost guards nothing that guessing could reach
_SYMBOLS = string.digits + string.ascii_letters
_ID = string.digits + string.ascii_lowercase
_KEY = re.compile(r"crmb_([0-9a-z]{12})_([0-9A-Za-z]{32})([0-9A-Za-z]{6})\Z")


@dataclass(frozen=True)
class Parts:
    """A key whose form and checksum are right."""

    id: str
    secret: str


def make() -> tuple[str, str, str]:
    """Return a new key, its id and its secret's bcrypt hash."""
    key_id = "".join(secrets.choice(_ID) for _ in range(12))
    secret = "".join(secrets.choice(_SYMBOLS) for _ in range(32))
    head = f"crmb_{key_id}_{secret}"
    return head + _checksum(head), "key_" + key_id, bcrypt.hashpw(secret.encode(), bcrypt.gensalt(BCRYPT_COST)).decode()


def split(key: str) -> Parts | None:
    """Return a key's parts, or None when it cannot be one of ours."""
    found = _KEY.match(key)
    if not found or not hmac.compare_digest(_checksum(key[:-6]), found[3]):
        return None
    return Parts("key_" + found[1], found[2])


def _checksum(text: str) -> str:
    value, digits = binascii.crc32(text.encode()), ""
    for _ in range(6):
        value, index = divmod(value, len(_SYMBOLS))
        digits = _SYMBOLS[index] + digits
    return digits
