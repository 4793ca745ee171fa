"""``crmbridge restore``: puts a backup in the database's place, nothing goes out twice and nothing is missed."""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from crmbridge import terminal, vault
from crmbridge.config import Settings
from crmbridge.errors import Misconfigured
from crmbridge.events import instant
from crmbridge.ops import owner
from crmbridge.ops.backup import passphrase, sync_folder
from crmbridge.store import copies, database
from crmbridge.store.deliveries import Patience

_MB = 10**6
_SPARE_BYTES = 16 * _MB  # for the draft's own reserve, lock and log


def run(
    settings: Settings, source: Path, patience: Patience, *, passphrase_file: str | None, now_s: float | None = None
) -> int:
    """Check the backup, make it ready beside the database, and put it in place at last; or change nothing."""
    place, now_s = settings.store.path, time.time() if now_s is None else now_s
    whose, workshop = owner.of(place), place.with_name(place.name + ".restoring")
    with owner.acting(whose):
        place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with owner.acting(whose):
            stack.enter_context(database.alone(place))
            shutil.rmtree(workshop, ignore_errors=True)  # of one that was killed
            workshop.mkdir(mode=0o700)
            stack.callback(shutil.rmtree, workshop, ignore_errors=True)
            draft = workshop / place.name
        _copy(source, draft, whose)
        with owner.acting(whose):
            found = copies.look_through(draft, change=True)
        said = f"made {found.made_at}" + (f" by version {found.version}" if found.version else "")
        counted = ", ".join(f"{name} {number}" for name, number in found.rows.items())
        terminal.say(f"{source}: whole, {said}", f"  {counted}")
        keys = _keys(settings, found, draft, whose, passphrase_file)
        with owner.acting(whose), contextlib.closing(database.Database(draft)) as db:
            for step in db.migrate():
                terminal.say(f"  migrated {step}")
            sends = copies.prepare(db, found.made_at, patience, now_s)
        if keys:
            content, is_new = keys
            vault.write(settings.vault.key_file, content, owner.ids(whose), replace=True)
            terminal.say(f"{'made' if is_new else 'added to'} {settings.vault.key_file}: the key from the backup")
        with owner.acting(whose):
            kept = _put(draft, place, now_s)
    terminal.say(f"{place}: restored" + (f"; what was there is {kept}" if kept else ""))
    _tell(found.made_at, sends, found.pending)
    return 0


def _copy(source: Path, draft: Path, whose: owner.Owner | None) -> None:
    """Copy the backup, and a log that lies beside it, as a file of the database's owner."""
    for side in ("", "-wal"):
        beside = source.with_name(source.name + side)
        if side and not beside.exists():
            continue
        with _opened(beside, whose) as there:
            needed, disk = os.fstat(there.fileno()).st_size + _SPARE_BYTES, os.statvfs(draft.parent)
            if disk.f_bavail * disk.f_frsize < needed:
                free = f"{disk.f_bavail * disk.f_frsize / _MB:.0f} MB are free"
                raise Misconfigured(
                    f"no space to restore in {draft.parent.parent}: {free}, {needed / _MB:.0f} MB are needed"
                )
            with owner.acting(whose):
                handle = os.open(draft.with_name(draft.name + side), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as here:
                shutil.copyfileobj(there, here, 2**20)
                here.flush()
                os.fsync(handle)


def _opened(path: Path, whose: owner.Owner | None) -> BinaryIO:
    """Open a file of the backup; where the database's owner may have laid it, only what they may read."""
    reader = owner.beside(path, whose)
    try:
        with owner.acting(reader):
            return path.open("rb")
    except PermissionError:
        if reader is None:
            raise
        raise Misconfigured(
            f"{path} lies among the service's files, and its user may not read it: copy it to a folder of root's first"
        ) from None


def _keys(
    settings: Settings, found: copies.Contents, draft: Path, whose: owner.Owner | None, passphrase_file: str | None
) -> tuple[bytes, bool] | None:
    """Return what the key file is to hold, and whether it is new; None when it opens all secrets as it is."""
    path = settings.vault.key_file
    with owner.acting(whose):
        sealed = copies.sealed_secrets(draft)
    with owner.acting(owner.beside(path, whose)):
        lines = vault.read(path).split() if path.exists() else []
    if path.exists() and vault.opens(lines, sealed):
        return None
    if not sealed and not path.exists() and found.sealed_key is None:
        raise Misconfigured(f"no key file at {path}: 'crmbridge init' makes one")
    if found.sealed_key is None:
        raise Misconfigured(
            f"the key file {path} {'does not open' if lines else 'is gone, and only it opens'} the secrets in this "
            "backup: put the one from the backup's time there, mode 600"
        )
    own = vault.open_key(found.sealed_key, passphrase(passphrase_file)).split()
    if not vault.opens(own, sealed):
        raise Misconfigured("the key that is sealed in this backup does not open its secrets")
    return "\n".join([*own, *(line for line in lines if line not in own), ""]).encode(), not lines


def _put(draft: Path, place: Path, now_s: float) -> Path | None:
    """Exchange the files; at any moment there is a whole database in place."""
    kept = None
    copies.close_down(draft)
    if place.exists():
        for old in place.parent.glob(
            f"{place.name}.before-*"
        ):  # of one that was killed in between: still the same file
            if old.samefile(place):
                old.unlink()
        copies.close_down(place)
        stamp = instant(now_s).translate(str.maketrans("", "", "-:."))
        kept = place.with_name(f"{place.name}.before-{stamp}")
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


def _tell(made_at: str, sends: int, pending: int) -> None:
    made_at = terminal.escaped(made_at)
    told = f"""
What happens at the next start:
  {sends} send(s) were waiting at {made_at} and may have gone out since: each is looked for in its conversation, and
    sent only when it is not there. Where that cannot be told it ends in doubt, for a person: crmbridge dlq list --sends
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
