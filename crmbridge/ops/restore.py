"""``crmbridge restore``: puts a backup in the database's place, nothing goes out twice and nothing is missed.

The file may come from anybody: what is in it is read by a process that has become the owner of the data folder, and
may take so much memory and time.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crmbridge import config, terminal, vault
from crmbridge.config import Settings
from crmbridge.errors import Misconfigured
from crmbridge.events import instant
from crmbridge.ops import owner
from crmbridge.ops.backup import INI_PLACE, passphrase, sync_folder
from crmbridge.store import copies, database

_MB = 10**6
_SPARE_BYTES = 16 * _MB  # for the draft's own reserve, lock and log
_LOOK_MB, _WORK_MB = 64, 256  # one reads page by page, the other may have to sort an index
_LEAST_S = 20  # of computing, and a second more for each MB: ten times what it takes


def run(
    settings: Settings,
    source: Path,
    *,
    ini: Path | None = None,
    passphrase_file: str | None = None,
    now_s: float | None = None,
) -> int:
    """Check the backup, make it ready beside the database, and put it in place at last; or change nothing.

    Where there is no configuration `ini`, the one in the backup comes there; until then `settings` say where to look.
    """
    secret = functools.cache(lambda: passphrase(passphrase_file))
    return _run(settings, source.absolute(), ini, secret, time.time() if now_s is None else now_s)


def _run(settings: Settings, source: Path, ini: Path | None, secret: Callable[[], str], now_s: float) -> int:
    place, key_file = settings.store.path, settings.vault.key_file
    whose = owner.of(place)
    with _workshop(place, whose) as draft:
        cpu_s = _LEAST_S + _copy(source, draft, whose) // _MB

        def apart(job: Callable[[], Any], memory_mb: int) -> Any:
            try:
                return owner.apart(whose, place.parent, job, memory_mb=memory_mb, cpu_s=cpu_s)
            except Misconfigured as error:
                words = error.message.replace(f"{draft}: ", "").replace(str(draft), "it")
                raise Misconfigured(f"{source} is not restored: {words}") from None

        found = copies.Contents(**apart(lambda: _look(draft), _LOOK_MB))
        lines, new_key = _keys(key_file, found, whose, secret)
        chosen, text, about_ini = _configuration(ini, settings, found, lines)
        places = chosen.store.path, chosen.vault.key_file
        if places == (place, key_file):
            _tell_contents(source, found)
            steps, sends = apart(lambda: _make_ready(draft, found.made_at, now_s), _WORK_MB)
            terminal.say(*(f"  migrated {step}" for step in steps))
            if new_key:
                with owner.acting(owner.beside(key_file, whose)):
                    vault.write(key_file, new_key, owner.ids(whose), replace=True)
                terminal.say(f"{'added to' if lines else 'made'} {key_file}: the key from the backup")
            if text is not None and ini is not None:
                _write(ini, text, whose, now_s)
            if about_ini:
                terminal.say(about_ini)
            if os.path.lexists(place):
                apart(lambda: copies.close_down(place), _WORK_MB)
            with owner.acting(whose):
                kept = _put(draft, place, now_s)
            terminal.say(f"{place}: restored" + (f"; what was there is {kept}" if kept else ""))
            _tell(found.made_at, sends, found.pending)
            return 0
    # The configuration in it names other places. It may come from the service's user, and lead root anywhere.
    if whose is not None or any(map(os.path.lexists, places)):
        raise Misconfigured(
            f"{source} is not restored: the configuration in it names {places[0]} and {places[1]}: put one at {ini} "
            "that names where it is to go, and restore again"
        )
    return _run(chosen, source, ini, secret, now_s)


@contextlib.contextmanager
def _workshop(place: Path, whose: owner.Owner | None) -> Iterator[Path]:
    """Keep others from the database, and give a name for the draft in a folder of its own, removed at the end."""
    workshop = place.with_name(place.name + ".restoring")
    with contextlib.ExitStack() as stack:
        with owner.acting(whose):
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(database.alone(place))
            shutil.rmtree(workshop, ignore_errors=True)  # of one that was killed
            workshop.mkdir(mode=0o700)
        try:
            yield workshop / place.name
        finally:
            with owner.acting(whose):
                shutil.rmtree(workshop, ignore_errors=True)


def _copy(source: Path, draft: Path, whose: owner.Owner | None) -> int:
    """Copy the backup, and a log beside it, as a file of the database's owner; return how many bytes there are.

    Each is opened once, so the copy that is checked is the one that is put in place.
    """
    copied = 0
    for side in ("", "-wal"):
        beside = source.with_name(source.name + side)
        if side and not os.path.lexists(beside):
            continue
        try:
            there = owner.opened(beside, owner.beside(beside, whose))
        except PermissionError:
            if owner.beside(beside, whose) is None:
                raise
            raise Misconfigured(
                f"{beside} lies among the service's files, and its user may not read it: copy it to a folder of root's "
                "first"
            ) from None
        with there:
            size, disk = os.fstat(there.fileno()).st_size, os.statvfs(draft.parent)
            needed = size + _SPARE_BYTES
            if disk.f_bavail * disk.f_frsize < needed:
                free = f"{disk.f_bavail * disk.f_frsize / _MB:.0f} MB are free"
                raise Misconfigured(
                    f"no space to restore in {draft.parent.parent}: {free}, {needed / _MB:.0f} MB are needed"
                )
            with owner.acting(whose):
                handle = os.open(draft.with_name(draft.name + side), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as here:
                while size > 0 and (part := there.read(min(size, 2**20))):  # it may grow for ever
                    size -= here.write(part)
                    copied += len(part)
                here.flush()
                os.fsync(handle)
    return copied


def _look(draft: Path) -> dict[str, Any]:
    return dataclasses.asdict(copies.look_through(draft, from_elsewhere=True))


def _make_ready(draft: Path, made_at: str, now_s: float) -> tuple[list[str], int]:
    """Bring the draft up to date and make it fit to go on; return the migrations, and the sends it will look for."""
    with contextlib.closing(database.Database(draft)) as db:
        steps = db.migrate()
        sends = copies.prepare(db, made_at, now_s)
    copies.close_down(draft)
    return steps, sends


def _keys(
    path: Path, found: copies.Contents, whose: owner.Owner | None, secret: Callable[[], str]
) -> tuple[list[str], bytes | None]:
    """Return the keys at hand, and what the key file is to hold unless it opens all secrets as it is."""
    with owner.acting(owner.beside(path, whose)):
        is_there = path.exists()
        lines = vault.read(path).split() if is_there else []
    sealed_ini = [found.sealed_ini] if found.sealed_ini else []
    if is_there and vault.opens(lines, [*found.secrets, *(sealed_ini if found.sealed_key else [])]):
        return lines, None
    if not found.secrets and not is_there and found.sealed_key is None:
        raise Misconfigured(f"no key file at {path}: 'crmbridge init' makes one")
    if found.sealed_key is None:
        raise Misconfigured(
            f"the key file {path} {'does not open' if lines else 'is gone, and only it opens'} the secrets in this "
            "backup: put the one from the backup's time there, mode 600"
        )
    own = vault.open_key(found.sealed_key, secret()).split()
    if not vault.opens(own, [*found.secrets, *sealed_ini]):
        raise Misconfigured("the key that is sealed in this backup does not open its secrets")
    lines = [*own, *(line for line in lines if line not in own)]
    return lines, "\n".join([*lines, ""]).encode()


def _configuration(
    ini: Path | None, settings: Settings, found: copies.Contents, keys: list[str]
) -> tuple[Settings, str | None, str]:
    """Return the settings to go on with, the configuration to write, if any, and what to say of it."""
    if ini is None:
        return settings, None, ""
    is_there = os.path.lexists(ini)
    if found.sealed_ini is None:
        if not is_there:
            raise Misconfigured(f"no configuration at {ini}, and none in this backup: put one there first")
        return settings, None, ""
    try:
        text = vault.Vault(keys).open(found.sealed_ini, *INI_PLACE)
        theirs = config.read(text, ini)
    except Misconfigured as error:
        if not is_there:
            raise Misconfigured(
                f"no configuration at {ini}, and the one in this backup cannot be used: {error.message}"
            ) from None
        return settings, None, f"kept {ini}: the one in the backup cannot be used: {error.message}"
    if not is_there:
        return theirs, text, f"made {ini}: the configuration from the backup"
    differing = config.differing(settings, theirs)
    if not differing:
        return settings, None, ""
    is_unused = not settings.instagram.app_secrets and (settings.store, settings.vault) == (theirs.store, theirs.vault)
    if is_unused:  # as a new installation leaves it: it takes nothing in
        return theirs, text, f"made {ini}: the configuration from the backup, as the one there had no app secret"
    names = ", ".join(differing)
    return settings, None, f"kept {ini}: the backup's differs in {names}; to have that one, move this one away first"


def _write(ini: Path, text: str, whose: owner.Owner | None, now_s: float) -> None:
    """Put a configuration in place as install.sh does, root's and for the service to read; keep the one before."""
    with owner.acting(owner.beside(ini, whose)):
        draft = ini.with_name(ini.name + ".restoring")
        draft.unlink(missing_ok=True)
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if whose:
                os.fchown(handle, -1, whose.gid)
                os.fchmod(handle, 0o640)
            file.write(text)
            file.flush()
            os.fsync(handle)
        if os.path.lexists(ini):
            ini.rename(ini.with_name(f"{ini.name}.before-{_stamp(now_s)}"))
        draft.replace(ini)
        sync_folder(ini.parent)


def _stamp(now_s: float) -> str:
    return instant(now_s).translate(str.maketrans("", "", "-:."))


def _put(draft: Path, place: Path, now_s: float) -> Path | None:
    """Exchange the files; at any moment there is a whole database in place."""
    kept = None
    if place.exists():
        for old in place.parent.glob(
            f"{place.name}.before-*"
        ):  # of one that was killed in between: still the same file
            if not old.is_symlink() and old.samefile(place):
                old.unlink()
        kept = place.with_name(f"{place.name}.before-{_stamp(now_s)}")
        os.link(place, kept)
        wal = place.with_name(place.name + "-wal")
        if wal.exists():  # it could not be carried over; it must not be taken for the new file's
            wal.rename(kept.with_name(kept.name + "-wal"))
        copies.discard(place, but_itself=True)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(place)
    sync_folder(place.parent)
    return kept


def _tell_contents(source: Path, found: copies.Contents) -> None:
    said = f"made {found.made_at}" + (f" by version {found.version}" if found.version else "")
    counted = ", ".join(f"{name} {number}" for name, number in found.rows.items())
    terminal.say(f"{source}: whole, {said}", f"  {counted}")
    if found.admins:
        terminal.say(f"  admin keys in it: {found.all_admins}; what you do not know, end: crmbridge key revoke ID")
        terminal.say(*(f"    {key}  made {made_at}  {name}" for key, name, made_at in found.admins))
    more = found.all_admins - len(found.admins)
    if more:
        terminal.say(f"    and {more} more admin keys, made before these: crmbridge key list")
    if found.keys:
        terminal.say(f"  ordinary keys in it: {found.keys}")


def _tell(made_at: str, sends: int, pending: int) -> None:
    made_at = terminal.escaped(made_at)
    told = f"""
What happens at the next start:
  {sends} send(s) were waiting at {made_at} and may have gone out since: each is looked for in its conversation, and
    sent only when it is not there. Where that cannot be told it ends in doubt, for a person:
    crmbridge dlq list --all --sends
  {pending - sends} other thing(s) were owed: a CRM that has them already knows them by their event ids.
  What Instagram told since is fetched again for every account, as far as it shows it, and comes to the CRM as new
    events with "recovered": true. The sequence of every conversation goes on far above the numbers that were in use.
Not known any more, as it was after {made_at}:
  sends that were accepted since (most have gone out: do not send them again), and what became of those that were
    waiting: one that was cancelled or failed since is taken up again. To look into it first, before the
    start: crmbridge account pause ACCOUNT --sends. Keys revoked, accounts changed or paused or deleted, and
    customers erased since: do that again.
Next: crmbridge check, then start the service."""
    terminal.say(*told.split("\n"))
