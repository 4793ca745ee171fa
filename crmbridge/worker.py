"""Huey as the engine's clock: the bell that says "look now", the sweep, the heartbeat and upkeep.

The queue holds nothing but bells; every row that is due is found without it.
"""

import contextlib
import datetime
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huey import Huey
from huey.consumer import Consumer, Scheduler
from huey.registry import Message
from huey.serializer import Serializer
from huey.signals import SIGNAL_ERROR
from huey.storage import MemoryStorage, SqliteStorage

from crmbridge import log
from crmbridge.delivery import Engine
from crmbridge.errors import Misconfigured
from crmbridge.store import sqlite

TICK_S = 5
_HEALTH_S = 10
_IDLE_WAIT_S = 5.0
_FILE_WAIT_S = 0.2  # for who has it locked


class _File(SqliteStorage):  # type: ignore[misc]
    """Huey's queue in its file."""

    def _create_connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite.guard(super()._create_connection())
        return connection


class _Storage(_File):
    """Huey's queue of this process, which stays in memory; of the file it takes the bells of other processes.

    It is no record: a bell that is lost is rung again. So nobody waits for a file that is locked, full or lost, and the
    readers sleep until something is enqueued.
    """

    blocking = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._own = MemoryStorage()
        self._news = threading.Condition()
        self._count = 0
        self._file = threading.Lock()
        self._is_closed = False
        self.on_bell: Callable[[], None] = lambda: None
        super().__init__(*args, **kwargs)

    def enqueue(self, data: bytes, priority: float | None = None) -> None:
        self._own.enqueue(data, priority)
        with self._news:
            self._count += 1
            self._news.notify()

    def dequeue(self) -> bytes | None:
        with self._news:
            seen = self._count
        data: bytes | None = self._own.dequeue()
        if data is None:
            with self._news:
                if self._count == seen:
                    self._news.wait(_IDLE_WAIT_S)
        return data

    def add_to_schedule(self, data: bytes, ts: datetime.datetime) -> None:
        self._own.add_to_schedule(data, ts)

    def read_schedule(self, ts: datetime.datetime) -> list[bytes]:
        """Return what is due, which Huey asks once a second; whatever stands in the file is a bell."""
        is_rung = False
        with self._file, contextlib.suppress(sqlite3.Error):
            if not self._is_closed and self.sql("SELECT 1 FROM task LIMIT 1", results=True):
                self.sql("DELETE FROM task", commit=True)
                is_rung = True
        if is_rung:
            self.on_bell()
        due: list[bytes] = self._own.read_schedule(ts)
        return due

    def close(self) -> bool:
        with self._file:
            self._is_closed = True
            return bool(super().close())

    def peek_many(self, keys: Sequence[str]) -> dict[str, Any]:
        """Answer whether tasks are revoked: none ever is."""
        return {}

    def delete_data(self, key: str) -> bool:
        """Answer whether a task's revocation was there to be dropped, which Huey asks after each: there is none."""
        return False

    def notify_all(self) -> None:
        with self._news:
            self._count += 1
            self._news.notify_all()


class _Json(Serializer):  # type: ignore[misc]
    """Huey's messages as JSON; nothing in the queue can be made to run code."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data, default=lambda value: {"at": value.isoformat()}).encode()

    def _deserialize(self, data: bytes) -> Any:
        def restore(value: dict[str, Any]) -> Any:
            return datetime.datetime.fromisoformat(value["at"]) if set(value) == {"at"} else value

        value = json.loads(bytes(data), object_hook=restore)
        return Message(*value) if isinstance(value, list) else value


class _Scheduler(Scheduler):  # type: ignore[misc]
    periodic_task_seconds = TICK_S


class _Consumer(Consumer):  # type: ignore[misc]
    scheduler_class = _Scheduler

    def _set_signal_handlers(self) -> None:
        """Leave the process's signals to its main thread."""


@dataclass(frozen=True)
class Job:
    """A piece of upkeep that runs every `every_s` seconds, give or take a tick of five."""

    name: str
    every_s: int
    run: Callable[[], None]


class Helper(Protocol):
    """A thread of its own that is started and ended with the worker."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Worker:
    """Runs the engine and the upkeep on Huey's threads, and helpers beside them."""

    def __init__(
        self,
        engine: Engine,
        queue_path: Path,
        jobs: list[Job],
        *,
        helpers: Sequence[Helper] = (),
        on_wake: Callable[[], None] = lambda: None,
        alert: Callable[..., None] = lambda *_: None,
        on_thread: Callable[[], None] = lambda: None,
        on_thread_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._helpers = helpers
        self._on_wake = on_wake
        self._queue_path = queue_path
        self._clock = clock
        self._lock = threading.Lock()
        self._rung = False
        self._scheduled_s: float | None = None
        self._ended = threading.Event()
        self._huey = self._open_queue()
        self._huey.on_startup("connection")(on_thread)
        self._huey.on_shutdown("connection")(on_thread_end)
        self._huey.signal(SIGNAL_ERROR)(lambda _signal, task, error: alert("system_fault", _failed(task, error)))
        self._drain_task = self._huey.task(name="drain")(self._drain)
        self._huey.storage.on_bell = self.wake
        for job in jobs:
            self._register(job)
        self._consumer = _Consumer(self._huey, workers=3, scheduler_interval=1)

    def _open_queue(self) -> Huey:
        """Open Huey's queue, emptied: bells of an earlier run mean nothing now."""
        _require_queue(self._queue_path)
        for name in (self._queue_path, *(Path(f"{self._queue_path}-{part}") for part in ("wal", "shm"))):
            name.unlink(missing_ok=True)
        self._queue_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _open(_Storage, self._queue_path)
        except sqlite3.Error as error:
            raise Misconfigured(f"[store] queue_path: {self._queue_path} cannot be made: {error}") from None

    def _register(self, job: Job) -> None:
        last = time.monotonic()

        def is_due(_: datetime.datetime) -> bool:
            nonlocal last
            now = time.monotonic()
            if now - last < job.every_s - TICK_S / 2:
                return False
            last = now
            return True

        def run() -> None:
            job.run()

        self._huey.periodic_task(is_due, name=job.name)(run)

    # --- bells ---

    def wake(self, accounts: Collection[str] | None = None) -> None:
        """Have new rows of these accounts, or of any, looked at; many calls at once ring one bell."""
        self._on_wake()
        if self._engine.tell(accounts):
            return
        with self._lock:
            if self._rung:
                return
            self._rung = True
        self._drain_task()

    def _drain(self) -> None:
        with self._lock:
            self._rung = False
        next_s = self._engine.drain()
        if next_s is not None and not self._ended.is_set():
            self._schedule(next_s)

    def _schedule(self, at_s: float) -> None:
        with self._lock:
            now_s = self._clock()
            pending = self._scheduled_s
            if pending is not None and now_s < pending <= at_s:
                return
            self._scheduled_s = at_s
        self._drain_task.schedule(eta=datetime.datetime.fromtimestamp(max(at_s, now_s), datetime.UTC))

    def ring(self) -> None:
        """Ring whatever was rung before: a bell that was lost must not stay lost."""
        with self._lock:
            self._rung = False
        self.wake()

    # --- life ---

    def start(self) -> None:
        """Start Huey's threads and the helpers, and ring once."""
        self._consumer.start()
        threading.Thread(target=self._watch, name="worker-health", daemon=True).start()
        for helper in self._helpers:
            helper.start()
        self.ring()

    def stop(self, grace_s: float) -> bool:
        """Finish the calls in flight within the grace, then end the threads; False when calls were left."""
        self._ended.set()
        for helper in self._helpers:
            helper.stop()
        clean = self._engine.stop(grace_s)
        self._consumer.stop()
        self._huey.storage.notify_all()
        self._huey.storage.close()
        return clean

    def _watch(self) -> None:
        while not self._ended.wait(_HEALTH_S):
            self._consumer.check_worker_health()


_SQLITE = b"SQLite format 3\0"


def _require_queue(path: Path) -> None:
    """Raise Misconfigured unless the file is a queue of Huey's, or not there yet: it is about to be emptied.

    One that a power loss has torn is removed: nothing in it counts.
    """
    if not path.exists() or not path.stat().st_size:
        return
    try:
        # Immutable: a lock that another program holds says nothing of what it is.
        with contextlib.closing(sqlite.open_file(f"file:{path}?mode=ro&immutable=1", uri=True)) as queue:
            tables = {name for (name,) in queue.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        with path.open("rb") as file:
            head = file.read(len(_SQLITE))
        if head.strip(b"\0") and head != _SQLITE:
            tables = {"?"}
        else:
            log.warning("queue.damaged", path=str(path))
            path.unlink()
            return
    if not tables <= {"kv", "schedule", "task", "counter"}:
        raise Misconfigured(f"[store] queue_path: {path} is something else than the queue, and is left alone")


def _failed(task: Any, error: BaseException) -> str:
    return f"the worker's job {task.name.rsplit('.', 1)[-1]} failed with {type(error).__name__}; the log tells where"


def _open(storage: type[SqliteStorage], path: Path) -> Huey:
    return Huey(
        "crmbridge",
        results=False,
        storage_class=storage,
        filename=str(path),
        fsync=False,
        timeout=_FILE_WAIT_S,
        cache_mb=1,
        serializer=_Json(),
    )


def ring(queue_path: Path) -> None:
    """Ring the service from another process: it looks at everything within two seconds, else within five."""
    if not queue_path.exists():
        return  # none has run here
    try:
        huey = _open(_File, queue_path)
        huey.task(name="bell")(_open)()
        huey.storage.close()
    except sqlite3.Error as error:
        log.debug("bell.unheard", error=str(error))
