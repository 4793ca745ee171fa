"""What only SQLite understands: how its file is opened, locked, checkpointed and measured."""

import contextlib
import fcntl
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peewee import OperationalError, SqliteDatabase

_CACHE_KIB = 1024
_CHECKPOINT_PAGES = 250
# Without a worker that checkpoints, a writer takes over before the log grows past about 64 MB.
_CHECKPOINT_PAGES_OTHERS = 16_000
_LOG_BYTES = 8 * 2**20  # what a log that had to grow keeps once it begins anew
BUSY_TIMEOUT_S = 4.0  # Meta waits five seconds for its answer
_INCREMENTAL = 2
_VALUE_BYTES = 64 * 2**20  # a webhook's body is 12 MB at most
_RESERVE_BYTES = 4 * 1024 * 1024


def guard(connection: Any) -> Any:
    """Have a connection trust nothing that its file says; every connection of the product comes by here.

    No view, trigger or index may call what has effects, each page is checked as it is read, and no value is larger than
    what crmbridge ever writes.
    """
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES)
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


def open_file(name: Path | str, **how: Any) -> sqlite3.Connection:
    """Open a file without what `connect` brings, for copies and looks."""
    connection: sqlite3.Connection = guard(sqlite3.connect(name, **how))
    return connection


class _Guarded(SqliteDatabase):
    def _connect(self) -> Any:
        return guard(super()._connect())  # type: ignore[misc]


def connect(path: Path) -> SqliteDatabase:
    """Return the database at `path`; each thread gets a connection of its own at first use.

    WAL with synchronous=FULL: a commit that has returned survives the loss of power.
    """
    return _Guarded(
        str(path),
        pragmas={
            "auto_vacuum": "incremental",  # takes effect when the file is made
            "journal_mode": "wal",
            "synchronous": "full",
            "cache_size": -_CACHE_KIB,
            "foreign_keys": 0,
            "temp_store": "memory",
            "wal_autocheckpoint": _CHECKPOINT_PAGES_OTHERS,
            "journal_size_limit": _LOG_BYTES,
        },
        timeout=BUSY_TIMEOUT_S,
        autoconnect=True,
    )


def checkpoint_here(database: SqliteDatabase) -> None:
    """Make the calling thread's connection the one that checkpoints."""
    database.execute_sql(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")


def overwrite_what_is_deleted(database: SqliteDatabase) -> None:
    """Have the calling thread's connection write zeros over what it deletes."""
    database.execute_sql("PRAGMA secure_delete = ON").fetchone()


def sizes(database: SqliteDatabase, path: Path) -> dict[str, int]:
    """Return the sizes of the file and its log, what of the file is free to be used again, and what the disk has."""
    disk, log = os.statvfs(path.parent), path.with_name(path.name + "-wal")
    return {
        "database_bytes": path.stat().st_size,
        "wal_bytes": log.stat().st_size if log.exists() else 0,
        "free_bytes": page_bytes(database, "freelist_count"),
        "disk_free_bytes": disk.f_bavail * disk.f_frsize,
    }


def _number(database: SqliteDatabase, pragma: str) -> int:
    return int(database.execute_sql(f"PRAGMA {pragma}").fetchone()[0])


def page_bytes(database: SqliteDatabase, pragma: str) -> int:
    """Return the size of the pages that a pragma counts."""
    return _number(database, pragma) * _number(database, "page_size")


def can_shrink(database: SqliteDatabase) -> bool:
    """Tell whether the file was made so that free pages can be given back."""
    return _number(database, "auto_vacuum") == _INCREMENTAL


def shrink(database: SqliteDatabase, pages: int) -> int:
    """Give up to so many free pages back to the disk, inside a write; return how many there were."""
    before = _number(database, "freelist_count")
    for _ in range(min(pages, before)):  # Python's sqlite3 ends this pragma after its first page
        database.execute_sql("PRAGMA incremental_vacuum(1)")
    return before - _number(database, "freelist_count")


def checkpoint(database: SqliteDatabase) -> bool:
    """Carry the log over into the database without waiting for readers; tell whether all of it was."""
    busy, in_log, carried = database.execute_sql("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return not busy and in_log == carried


LAST_POSITION = "SELECT seq FROM sqlite_sequence WHERE name = 'events'"


def shifted(column: str) -> str:
    """Return an expression that moves a time column by the seconds given as its parameter."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column}, ? || ' seconds')"


def shifted_at_most(column: str) -> str:
    """Like `shifted`, but to no later than the time given as its second parameter."""
    return f"MIN({shifted(column)}, ?)"


class FileLock:
    """An advisory lock on a file beside the database, for processes to queue at; held by a thread at a time."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for a while. Raises OperationalError when another process keeps it for too long."""
        deadline, pause_s = time.monotonic() + BUSY_TIMEOUT_S, 0.0005
        while not self.take():
            if time.monotonic() > deadline:
                raise OperationalError("another process keeps the lock")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.01)
        try:
            yield
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def share(self) -> bool:
        """Take, or keep, a part of the lock without waiting; tell whether nobody has the whole."""
        return self.take(fcntl.LOCK_SH)

    def take(self, how: int = fcntl.LOCK_EX) -> bool:
        """Take the lock without waiting; tell whether it was free."""
        try:
            fcntl.flock(self._handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self._handle)


def is_full(error: OperationalError) -> bool:
    """Tell whether a statement failed for want of disk space."""
    return "full" in str(error)


class Reserve:
    """A file beside the database that is given up when the disk is full, so that what is owed can still be settled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_held(self) -> bool:
        """Tell whether the space is held."""
        return self._path.exists()

    def give_up(self) -> None:
        """Free the space."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def take(self) -> bool:
        """Take the space, if the disk has several times as much; tell whether it is held."""
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._path.parent)
            free_bytes, all_bytes = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
            size = min(_RESERVE_BYTES, all_bytes // 8)
            if self._path.exists() and self._path.stat().st_size >= size:
                return True
            if free_bytes < 2 * size:
                return False
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError:
                self.give_up()
                return False
            finally:
                os.close(handle)
            return True
        return False
