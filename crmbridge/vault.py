"""Seals secrets at rest with the key file's keys: the first one seals, all of them open.

The key file lies outside the database, one Fernet key a line, mode 0600.
"""

import base64
import functools
import json
import os
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from crmbridge.errors import Misconfigured


class Vault:
    """Seals and opens short texts."""

    def __init__(self, keys: list[str]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys])
        # The engine opens the same few secrets at every call; opening costs more than signing with them.
        self._opened = functools.lru_cache(maxsize=256)(self._decrypt)

    def seal(self, text: str, *place: str) -> str:
        """Return the text sealed for a place: a table, a column and a row's id. It opens in no other."""
        return self._fernet.encrypt(json.dumps([*place, text]).encode()).decode()

    def open(self, sealed: str | None, *place: str) -> str:
        """Return what was sealed for a place. Raises Misconfigured when no key fits, it is of elsewhere, or missing."""
        if sealed is None:
            raise Misconfigured("the account has no access token: set a new one")
        *sealed_for, text = self._opened(sealed)
        if sealed_for != [*place]:
            raise Misconfigured(f"a sealed secret was made for another row than {' '.join(place)}: somebody moved it")
        return str(text)

    def fits(self, sealed: str) -> bool:
        """Tell whether a key opens a secret, wherever it belongs."""
        try:
            return bool(self._opened(sealed))
        except Misconfigured:
            return False

    def _decrypt(self, sealed: str) -> list[str]:
        try:
            found: list[str] = json.loads(self._fernet.decrypt(sealed.encode()))
            return found
        except (InvalidToken, ValueError):
            raise Misconfigured(
                "a sealed secret does not open with the key file's keys: is it the key file of this database?"
            ) from None


def load(path: Path) -> Vault:
    """Read the key file. Raises Misconfigured when it is missing, readable by others or not made of keys."""
    lines = read(path).split()
    try:
        return Vault(lines)
    except ValueError:
        raise Misconfigured(f"{path} is not a key file: it must hold one Fernet key a line") from None


def read(path: Path) -> str:
    """Return what the key file holds. Raises Misconfigured when it is missing or readable by others."""
    try:
        mode = path.stat().st_mode
        content = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise Misconfigured(
            f"no key file at {path}: put the saved one back; 'crmbridge init' makes one for a new database"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(f"the key file {path} cannot be read: {error}") from None
    if mode & 0o077:
        raise Misconfigured(f"the key file {path} is open to other users: chmod 600 {path}")
    return content


def opens(keys: list[str], sealed: list[str]) -> bool:
    """Tell whether these keys open all of these secrets."""
    try:
        opener = Vault(keys)
    except ValueError:
        return False
    return all(opener.fits(secret) for secret in sealed)


_SCRYPT = (2**15, 8, 1)  # 32 MB for a moment


def seal_key(content: str, passphrase: str) -> str:
    """Return a key file's content sealed with a passphrase."""
    salt = os.urandom(16)
    return f"scrypt${salt.hex()}${Fernet(_stretched(passphrase, salt)).encrypt(content.encode()).decode()}"


def open_key(sealed: str, passphrase: str) -> str:
    """Return a key file's content. Raises Misconfigured when it is another passphrase."""
    try:
        _, salt, token = sealed.split("$")
        return Fernet(_stretched(passphrase, bytes.fromhex(salt))).decrypt(token.encode()).decode()
    except (InvalidToken, ValueError):
        raise Misconfigured("the passphrase is not the one that the key was sealed with") from None


def _stretched(passphrase: str, salt: bytes) -> bytes:
    import hashlib
    import unicodedata

    n, r, p = _SCRYPT
    # The same words, however a keyboard composes its letters, and whatever bytes a terminal gave.
    spelt = unicodedata.normalize("NFC", passphrase).encode(errors="surrogateescape")
    key = hashlib.scrypt(spelt, salt=salt, n=n, r=r, p=p, maxmem=2**26, dklen=32)
    return base64.urlsafe_b64encode(key)


def create(path: Path, owner: tuple[int, int] | None = None) -> bool:
    """Make a key file with a fresh key if there is none; tell whether one was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return not path.exists() and write(path, Fernet.generate_key() + b"\n", owner)


def write(path: Path, content: bytes, owner: tuple[int, int] | None = None, *, replace: bool = False) -> bool:
    """Put a key file in its place, whole and on disk, for the user and group `owner`; tell whether it was free."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            if owner:
                os.fchown(handle, *owner)
            file.write(content)
            file.flush()
            os.fsync(handle)
        if replace:
            draft.replace(path)
        else:
            os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True
