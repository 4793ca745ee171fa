"""The form of an API key: ``crmb_<id>_<secret><checksum>``. Makes, splits and checks keys; knows no rows."""

import binascii
import hmac
import re
import secrets
import string
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256

import bcrypt

from crmbridge.errors import TooMany

PERMISSIONS = ("messages:send", "messages:read", "accounts:read", "accounts:write", "events:read")
BCRYPT_COST = 10  # the secret is random: the cost guards nothing that guessing could reach
_SYMBOLS = string.digits + string.ascii_letters
_ID = string.digits + string.ascii_lowercase
_KEY = re.compile(r"crmb_([0-9a-z]{12})_([0-9A-Za-z]{32})([0-9A-Za-z]{6})\Z")
_REMEMBERED = 1000
_CHECKS_AT_MOST = 3


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

    One bcrypt check runs at a time and few wait for it, so that wrong secrets take neither the processor nor
    the threads; all that ask about the same secret wait for the one check.
    """

    def __init__(self) -> None:
        self._digest_key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._right: OrderedDict[bytes, bool] = OrderedDict()
        self._wrong: OrderedDict[bytes, bool] = OrderedDict()
        self._under_way: dict[bytes, threading.Event] = {}
        self._checking = threading.Lock()

    def matches(self, secret: str, secret_hash: str) -> bool:
        """Tell whether a secret has this bcrypt hash. Raises TooMany when too many others are being checked."""
        digest = hmac.new(self._digest_key, f"{secret}\0{secret_hash}".encode(), sha256).digest()
        while True:
            with self._lock:
                if digest in self._right or digest in self._wrong:
                    return digest in self._right
                checked = self._under_way.get(digest)
                if checked is None:
                    if len(self._under_way) >= _CHECKS_AT_MOST:
                        raise TooMany("Too many keys are being checked; try again in a second.", code="too_many_checks")
                    mine = self._under_way[digest] = threading.Event()
                    break
            checked.wait()
        try:
            with self._checking:
                matched = bcrypt.checkpw(secret.encode(), secret_hash.encode())
            with self._lock:
                known = self._right if matched else self._wrong
                known[digest] = True
                if len(known) > _REMEMBERED:
                    known.popitem(last=False)
            return matched
        finally:
            with self._lock:
                del self._under_way[digest]
            mine.set()
