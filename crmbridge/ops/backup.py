"""``crmbridge backup``: a verified copy of the database while the service runs, with the key sealed in when asked."""

import contextlib
import fcntl
import getpass
import os
import re
import sqlite3
import time
from pathlib import Path

from crmbridge import __version__, terminal, vault
from crmbridge.config import Settings
from crmbridge.errors import BridgeError, Misconfigured
from crmbridge.events import instant
from crmbridge.ops import owner
from crmbridge.store import copies, database

_OURS = re.compile(r"crmbridge-\d{8}T\d{6}Z\.db")
_DRAFT = ".part"
_MB = 10**6
_SPARE_BYTES = 2 * _MB
_SHORTEST = 8
INI_PLACE = ("backup_note", "sealed_ini")


def run(
    settings: Settings,
    target: str,
    *,
    ini: Path | None = None,
    with_key: bool = False,
    passphrase_file: str | None = None,
    keep: int | None = None,
    now_s: float | None = None,
) -> int:
    """Make a backup at `target`, a file or a folder, tell of it, and leave the last `keep` in the folder.

    The configuration `ini` is sealed in with the key file's key, and that key, when asked, with a passphrase.
    """
    began_s, monotonic_s = time.time() if now_s is None else now_s, time.monotonic()
    place, file = settings.store.path, _file(target, keep, began_s)
    secret: str | BridgeError | OSError | None = None
    try:
        secret = _new_passphrase(passphrase_file) if with_key else None
    except (BridgeError, OSError) as error:
        secret = error  # to be remembered where there is a place for it
    whose = owner.of(place)
    writer = owner.beside(file, whose)  # beside the service's own files it is theirs, too
    if writer is not None:  # then nothing at all is root's to do
        owner.become(writer, place.parent)
        whose = writer = None
    with contextlib.ExitStack() as stack:
        with owner.acting(whose):
            db = stack.enter_context(contextlib.closing(database.open_existing(place, settings.vault.key_file)))
        size, problem = None, None
        try:
            if isinstance(secret, Exception):
                raise secret
            with owner.acting(whose):
                source = stack.enter_context(copies.reading(place))
                note: dict[str, str | None] = {"made_at": instant(began_s), "version": __version__}
                unsealed = _seal(note, settings.vault.key_file, ini, secret)
            if whose is not None and (odd := copies.foreign(source)):  # it would be run as root, in this process
                raise Misconfigured(
                    f"root copies no database that holds what crmbridge does not make ({', '.join(odd)}): back up to "
                    f"{place.parent}/backups/, as its owner, and take the file from there"
                )
            with owner.acting(writer):
                made = _make(source, settings, file, note)
                size = file.stat().st_size
        except BaseException as error:
            problem = str(error) or type(error).__name__
            raise
        finally:
            row = {
                "began_at": instant(began_s),
                "ended_at": instant(began_s + time.monotonic() - monotonic_s),
                "file": str(file),
            }
            with owner.acting(whose), contextlib.suppress(BridgeError):
                copies.remember(db, {**row, "bytes": size, "error": problem})
    terminal.say(f"backed up {place}", f"to        {file}")
    took_s = time.monotonic() - monotonic_s
    terminal.say(f"  {size / _MB:.1f} MB in {took_s:.1f} s; opened, checked from end to end and found whole")
    counted = ", ".join(f"{table} {number}" for table, number in made.rows.items())
    terminal.say(f"  {counted} ({made.pending} still owed)")
    if keep is not None:
        with owner.acting(writer):
            _prune(file, keep)
    if unsealed:
        terminal.complain(f"the configuration is not in the backup: {unsealed}")
    if made.strange:
        terminal.complain(f"restore will refuse it: {', '.join(made.strange)}")
    if with_key:
        terminal.say("  the key is in it, sealed: keep the passphrase elsewhere, nothing else opens it")
    else:
        terminal.say(f"  it needs the key file: keep a copy of {settings.vault.key_file}, but not beside the backups")
    return 0


def _file(target: str, keep: int | None, began_s: float) -> Path:
    is_folder = target.endswith("/") or Path(target).is_dir()
    if keep is not None and (keep < 1 or not is_folder):
        raise Misconfigured("--keep says how many backups to leave in a FOLDER, one or more")
    name = f"crmbridge-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(began_s))}.db"
    file = (Path(target, name) if is_folder else Path(target)).absolute()
    if os.path.lexists(file):
        raise Misconfigured(f"{file} is there already: a backup overwrites nothing")
    return file


def _seal(note: dict[str, str | None], key_file: Path, ini: Path | None, secret: str | None) -> str | None:
    """Add the key and the configuration to the note, sealed; say why there is no configuration, if so."""
    note |= {"sealed_key": None, "sealed_ini": None}
    if secret is not None:
        note["sealed_key"] = vault.seal_key(vault.read(key_file), secret)
    if ini is None:
        return None
    try:
        note["sealed_ini"] = vault.load(key_file).seal(ini.read_text(encoding="utf-8-sig"), *INI_PLACE)
    except (Misconfigured, OSError, UnicodeDecodeError) as error:  # the rows count for more
        return str(error)
    return None


def _prune(file: Path, keep: int) -> None:
    """Leave the last backups with a name of ours; the new one stays, whatever the clock says."""
    others = [path for path in file.parent.iterdir() if _OURS.fullmatch(path.name) and path.is_file() and path != file]
    for old in sorted(others)[: max(len(others) - keep + 1, 0)]:
        old.unlink()
        terminal.say(f"  removed {old.name}")


def _make(source: sqlite3.Connection, settings: Settings, file: Path, note: dict[str, str | None]) -> copies.Contents:
    """Write, check and put in place; or leave nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"*{_DRAFT}"):  # by one that was killed
        if left.name == file.name + _DRAFT or _OURS.fullmatch(left.name.removesuffix(_DRAFT)):
            _remove_unlocked(left)
    draft = file.with_name(file.name + _DRAFT)
    handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        _require_space(settings, source, file.parent)
        copies.write(source, draft, handle, note)
        made = copies.look_through(draft)
        put(draft, file)
    finally:
        copies.discard(draft)
        os.close(handle)
    return made


def _remove_unlocked(draft: Path) -> None:
    with contextlib.suppress(BridgeError, OSError), owner.opened(draft, None) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        copies.discard(draft)


def _require_space(settings: Settings, source: sqlite3.Connection, folder: Path) -> None:
    disk, needed = os.statvfs(folder), copies.size(source) + _SPARE_BYTES
    is_same = folder.stat().st_dev == settings.store.path.stat().st_dev
    spare = settings.alerts.disk_free_mb * _MB if is_same else 0
    if disk.f_bavail * disk.f_frsize < needed + spare:
        left = (
            f", and leave {settings.alerts.disk_free_mb} MB ([alerts] disk_free_mb) to the service" if is_same else ""
        )
        free = f"{disk.f_bavail * disk.f_frsize / _MB:.0f} MB are free in {folder}"
        raise Misconfigured(f"no space for a backup: {free}; it would take {needed / _MB:.0f} MB{left}")


def put(draft: Path, file: Path) -> None:
    """Give a finished file its name, for good; overwrites nothing. Raises Misconfigured when the name is taken."""
    try:
        os.link(draft, file)
    except FileExistsError:
        raise Misconfigured(f"{file} is there already: a backup overwrites nothing") from None
    except OSError:  # a disk without links
        draft.rename(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def passphrase(file: str | None) -> str:
    """Return what seals or opens the key in a backup: a file's first line, or what is typed."""
    if file is not None:
        try:
            return (Path(file).read_text(encoding="utf-8-sig").splitlines() or [""])[0]
        except UnicodeDecodeError:
            raise Misconfigured(f"the passphrase in {file} is not UTF-8 text") from None
    try:
        return getpass.getpass("Passphrase of the key in the backup: ")
    except EOFError:
        raise Misconfigured("nobody is there to type the passphrase: name a --passphrase-file") from None


def _new_passphrase(file: str | None) -> str:
    given = passphrase(file)
    if len(given) < _SHORTEST:
        raise Misconfigured(f"the passphrase must have {_SHORTEST} characters or more")
    if file is None and passphrase(None) != given:
        raise Misconfigured("that was another one")
    return given
