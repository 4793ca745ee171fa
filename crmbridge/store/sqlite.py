"""What only SQLite understands: how its file is opened, locked, checkpointed and measured."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peewee import SqliteDatabase

_CACHE_KIB = 1024
_CHECKPOINT_PAGES = 1000
# Without a worker that checkpoints, a writer takes over before the log grows past about 64 MB.
_CHECKPOINT_PAGES_OTHERS = 16_000
BUSY_TIMEOUT_S = 10


def connect(path: Path) -> SqliteDatabase:
    """Return the database at `path`; each thread gets a connection of its own at first use.

    WAL with synchronous=FULL: a commit that has returned survives the loss of power.
    """
    return SqliteDatabase(
        str(path),
        pragmas={
            "journal_mode": "wal",
            "synchronous": "full",
            "cache_size": -_CACHE_KIB,
            "foreign_keys": 0,
            "temp_store": "memory",
            "wal_autocheckpoint": _CHECKPOINT_PAGES_OTHERS,
        },
        timeout=BUSY_TIMEOUT_S,
        autoconnect=True,
    )


def checkpoint_here(database: SqliteDatabase) -> None:
    """Make the calling thread's connection the one that checkpoints."""
    database.execute_sql(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")


def file_bytes(path: Path) -> int:
    """Return the size of the database with its log, in bytes."""
    return sum(part.stat().st_size for part in (path, path.with_name(path.name + "-wal")) if part.exists())


def shifted(column: str) -> str:
    """Return an expression that moves a time column by the seconds given as its parameter."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column}, ? || ' seconds')"


class FileLock:
    """An advisory lock on a file beside the database, for processes to queue at; held by a thread at a time."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextmanager
    def held(self) -> Iterator[None]:
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def take(self) -> bool:
        """Take the lock until this process ends; tell whether it was free."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self._handle)
