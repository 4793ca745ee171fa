"""Power loss: what a disk may still hold of the database's files, from a recording of what the server wrote and synced.

The recording is strace's. Run as a module this is a server with a planted fault: commits that return before the sync.
"""

import contextlib
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crmbridge.sandbox.demo import Bridge
from tests.needs import require
from tests.waiting import until

SECTOR = 512  # a disk writes a sector whole or not at all
FILES = ("bridge.db", "bridge.db-wal")  # SQLite makes the -shm file anew
FOLDER = "."
_CALLS = "openat,pwrite64,pwritev,write,writev,fsync,fdatasync,ftruncate,fallocate,unlink,rename"

Kind = Literal["write", "truncate", "sync", "create", "unlink"]


def require_strace() -> None:
    """Skip the test unless strace is there and may trace."""
    require(shutil.which("strace") is not None, "strace is not installed")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    require(tried.returncode == 0, f"strace may not trace here: {tried.stderr.strip()[:200]}")


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of the server that changed or synced a file, or the folder; times are seconds since the epoch."""

    kind: Kind
    name: str
    begun: float
    ended: float
    offset: int = 0  # of a write; the new size for a truncation
    data: bytes = b""

    @property
    def counts_from(self) -> float:
        """A change may reach the disk once it has begun, a sync is worth something once it has returned."""
        return self.ended if self.kind == "sync" else self.begun


# --- the recording ---


class Recorded(Bridge):
    """A bridge whose server runs under strace from its first instruction; `module` may name a planted build.

    strace detaches into the background, so that the process that was started is the server itself.
    """

    def __init__(self, folder: Path, ini: str, module: str = "crmbridge") -> None:
        super().__init__(folder, ini)
        self._module = module
        self._var = (folder / "var").resolve()
        self._traces = folder / "traces"
        self._traces.mkdir()

    def _words(self, words: Sequence[str]) -> list[str]:
        command = [self._module if word == "crmbridge" else word for word in super()._words(words)]
        paths = [word for path in (self._var, *map(self._var.joinpath, FILES)) for word in ("-P", str(path))]
        form = ["-q", "-y", "-ttt", "-T", "-xx", "-s", "10000000", "-e", f"trace={_CALLS}"]
        output = ["-o", str(self._traces / "thread")]
        return ["strace", "-D", "-ff", "--seccomp-bpf", *form, *paths, *output, *command]

    def cut(self) -> list[Operation]:
        """End the server at once and return what was recorded, in order of time."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        tracer = int(re.findall(r"TracerPid:\s*(\d+)", status)[0])
        assert tracer, "the server is not being recorded"
        self._process.kill()
        self._process.wait()
        until(lambda: not _lives(tracer))
        return read(self._traces.glob("thread.*"), self._var)


def _lives(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


_LINE = re.compile(rb"(\d+\.\d+) (\w+)\((.*)\) += (-?\d+)[^=]* <(\d+\.\d+)>$")
_HANDLE = re.compile(rb"\d+<([^>]*)>")


def read(traces: Iterable[Path], folder: Path) -> list[Operation]:
    """Return the recorded operations on the database's files, in order of time."""
    found = []
    for trace in traces:
        with trace.open("rb") as lines:
            for line in lines:
                parts = _LINE.match(line)
                # A line that does not match is a call that the end of the server cut off, or its exit.
                operation = _operation(parts, folder) if parts and not parts[4].startswith(b"-") else None
                if operation:
                    found.append(operation)
    return sorted(found, key=lambda operation: operation.counts_from)


def _operation(parts: re.Match[bytes], folder: Path) -> Operation | None:
    begun, call, arguments, result = float(parts[1]), parts[2].decode(), parts[3], int(parts[4])
    if call in ("unlink", "openat"):
        path = _plain(arguments.split(b'"')[1])
    else:
        handle = _HANDLE.match(arguments)
        path = _plain(handle[1]) if handle else b""
    name = os.path.relpath(path.decode(), folder)
    if name not in (*FILES, FOLDER):
        return None
    times = (name, begun, begun + float(parts[5]))
    if call in ("fsync", "fdatasync"):
        return Operation("sync", *times)
    if call == "openat":
        return Operation("create", *times) if b"O_CREAT" in arguments else None
    if call == "unlink":
        return Operation("unlink", *times)
    if call == "ftruncate":
        return Operation("truncate", *times, int(arguments.rpartition(b", ")[2]))
    if call == "pwrite64":
        _, data, _ = arguments.split(b'"')
        return Operation("write", *times, int(arguments.rpartition(b", ")[2]), _plain(data)[:result])
    raise AssertionError(f"the replay does not know {call} on {name}")


def _plain(text: bytes) -> bytes:
    return bytes.fromhex(text.replace(b"\\x", b" ").decode())


# --- the disk ---


@dataclass
class _File:
    data: bytearray
    pending: list[Operation] = field(default_factory=list)


class Disk:
    """The database's files at a moment: what is on the platter for certain, and what was only written."""

    def __init__(self, files: dict[str, bytes], recording: Sequence[Operation]) -> None:
        self._durable = {name: _File(bytearray(data)) for name, data in files.items()}
        self._visible = dict(self._durable)
        self._renamed: list[Operation] = []  # creations and deletions that the folder may forget
        self._ahead = list(reversed(recording))

    def run_until(self, at: float) -> None:
        """Let pass what happened up to a moment; never goes back."""
        while self._ahead and self._ahead[-1].counts_from <= at:
            self._apply(self._ahead.pop())

    def _apply(self, operation: Operation) -> None:
        name = operation.name
        if operation.kind == "create":
            if name not in self._visible:
                self._visible[name] = _File(bytearray())
                self._renamed.append(operation)
        elif operation.kind == "unlink":
            del self._visible[name]
            self._renamed.append(operation)
        elif operation.kind != "sync":
            self._visible[name].pending.append(operation)
        elif name == FOLDER:
            if all(entry.ended <= operation.begun for entry in self._renamed):
                self._durable, self._renamed = dict(self._visible), []
        else:
            _sync(self._visible[name], operation)

    def unsynced_bytes(self) -> int:
        """Return how many written bytes a loss of power may take now."""
        return sum(len(operation.data) for file in self._visible.values() for operation in file.pending)

    def lose_all(self) -> dict[str, bytes]:
        """Return the files when nothing but what was synced has survived."""
        return {name: bytes(file.data) for name, file in self._durable.items()}

    def lose_some(self, chance: random.Random) -> dict[str, bytes]:
        """Return the files when any of the unsynced sectors, sizes and folder entries have survived, in any order."""
        names = self._visible if chance.random() < 0.5 else self._durable
        return {name: _torn(file, chance) for name, file in names.items()}


def _sync(file: _File, sync: Operation) -> None:
    """Make durable what was written before the sync began."""
    left = []
    for operation in file.pending:
        if operation.ended > sync.begun:
            left.append(operation)
        elif operation.kind == "truncate":
            _resize(file.data, operation.offset)
        else:
            _write(file.data, operation.offset, operation.data)
    file.pending = left


def _torn(file: _File, chance: random.Random) -> bytes:
    data, survivors = bytearray(file.data), chance.random()
    for operation in chance.sample(file.pending, len(file.pending)):
        if operation.kind == "truncate":
            if chance.random() < survivors:
                _resize(data, operation.offset)
            continue
        for start, piece in _sectors(operation):
            if chance.random() < survivors:
                _write(data, start, piece)
    return bytes(data)


def _sectors(operation: Operation) -> Iterator[tuple[int, bytes]]:
    offset, data = operation.offset, operation.data
    while data:
        size = SECTOR - offset % SECTOR
        yield offset, data[:size]
        offset, data = offset + size, data[size:]


def _write(data: bytearray, offset: int, piece: bytes) -> None:
    if offset > len(data):
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(piece)] = piece


def _resize(data: bytearray, size: int) -> None:
    del data[size:]
    data.extend(bytes(size - len(data)))


# --- the check ---


@dataclass(frozen=True)
class Acknowledged:
    """A message that was answered with 200 or 202: Instagram's id of one that came in, ours of one to be sent."""

    at: float
    kind: Literal["inbound", "outbound"]
    id: str


_KEPT = {
    "inbound": "SELECT instagram_message_id FROM events JOIN deliveries ON event_id = events.id",
    "outbound": "SELECT outbound_messages.id FROM outbound_messages JOIN deliveries"
    " ON message_id = outbound_messages.id AND target = 'instagram'",
}


@dataclass(frozen=True)
class Found:
    """What SQLite made of a disk after the loss of power: damage, and acknowledged messages that are gone."""

    damage: str | None
    lost: list[Acknowledged]


def put(files: dict[str, bytes], folder: Path) -> Path:
    """Write the files into a folder, without any others of a database, and return the database's path."""
    folder.mkdir(exist_ok=True)
    for name in (*FILES, "bridge.db-shm"):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "bridge.db"


def check(files: dict[str, bytes], folder: Path, acknowledged: Iterable[Acknowledged]) -> Found:
    """Open the files as SQLite would after the loss of power, and look for every message with its delivery."""
    try:
        with contextlib.closing(sqlite3.connect(put(files, folder))) as connection:
            state = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
            kept = {kind: {row[0] for row in connection.execute(sql)} for kind, sql in _KEPT.items()}
    except sqlite3.DatabaseError as error:
        return Found(f"{type(error).__name__}: {error}", [])
    lost = [entry for entry in acknowledged if entry.id not in kept[entry.kind]]
    return Found(None if state == "ok" else state, lost)


# --- the planted fault ---


def _serve_unsynced() -> int:
    from crmbridge import cli as program
    from crmbridge.store import sqlite

    connect = sqlite.connect

    def connect_unsynced(*arguments: Any, **options: Any) -> Any:
        database = connect(*arguments, **options)
        database.pragma("synchronous", "normal", permanent=True)
        return database

    sqlite.connect = connect_unsynced
    return program.main()


if __name__ == "__main__":
    sys.exit(_serve_unsynced())
