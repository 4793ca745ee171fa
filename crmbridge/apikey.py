"""The form of an API key: ``crmb_<id>_<secret><checksum>``. Makes, splits and checks keys; knows no rows."""

import binascii
import hmac
import re
import secrets
import string
import threading
from dataclasses import dataclass
from hashlib import sha256

import bcrypt

PERMISSIONS = ("messages:send", "messages:read", "accounts:read", "accounts:write", "events:read")
BCRYPT_COST = 10  # the secret is random: the cost guards nothing that guessing could reach
_SYMBOLS = string.digits + string.ascii_letters
_ID = string.digits + string.ascii_lowercase
_KEY = re.compile(r"crmb_([0-9a-z]{12})_([0-9A-Za-z]{32})([0-9A-Za-z]{6})\Z")
_REMEMBERED = 1000


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


class Verifier:
    """Checks secrets against their hashes; each answer is remembered by a digest that only this process can make.

    One bcrypt check runs at a time, so that wrong secrets cannot take the processor.
    """

    def __init__(self) -> None:
        self._digest_key = secrets.token_bytes(32)
        self._known: dict[bytes, bool] = {}
        self._checking = threading.Lock()

    def matches(self, secret: str, secret_hash: str) -> bool:
        """Tell whether a secret has this bcrypt hash."""
        digest = hmac.new(self._digest_key, f"{secret}\0{secret_hash}".encode(), sha256).digest()
        known = self._known.get(digest)
        if known is not None:
            return known
        with self._checking:
            known = self._known.get(digest)
            if known is None:
                known = bcrypt.checkpw(secret.encode(), secret_hash.encode())
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[digest] = known
        return known
