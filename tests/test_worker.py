"""Huey as the bell: heard at once, coalesced, kept for later; its queue is no record."""

import contextlib
import datetime
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crmbridge.errors import Misconfigured
from crmbridge.store import sqlite
from crmbridge.worker import Job, Worker, ring
from tests.waiting import PATIENCE_S, assert_rung, until


class FakeEngine:
    """Stands for the engine: counts drains, and returns when it wants to be called again."""

    def __init__(self) -> None:
        self.drains: list[float] = []
        self.next_s: float | None = None
        self.changed = threading.Condition()

    def tell(self, accounts: object = None) -> bool:
        return False

    def drain(self) -> float | None:
        with self.changed:
            self.drains.append(time.time())
            self.changed.notify_all()
            next_s, self.next_s = self.next_s, None
            return next_s

    def stop(self, grace_s: float) -> bool:
        return True

    def wait(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.drains) >= number, PATIENCE_S), self.drains


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[FakeEngine, Worker]]]:
    started = []

    def begin(*jobs: Job, alert: Any = lambda *_: None) -> tuple[FakeEngine, Worker]:
        engine = FakeEngine()
        worker = Worker(engine, tmp_path / "queue.db", list(jobs), alert=alert)  # type: ignore[arg-type]
        worker.start()
        started.append(worker)
        engine.wait(1)  # a start rings once
        return engine, worker

    yield begin
    for worker in started:
        worker.stop(0)


def test_a_bell_is_heard(start: Callable[..., tuple[FakeEngine, Worker]]) -> None:
    engine, worker = start()
    assert_rung(lambda _: worker.wake(), lambda number: engine.wait(number + 2))


def test_many_bells_before_a_drain_are_one(start: Callable[..., tuple[FakeEngine, Worker]]) -> None:
    engine, worker = start()
    with engine.changed:  # the first drain is stuck here, so the others are unheard
        for _ in range(50):
            worker.wake()
    engine.wait(2)
    worker.wake()
    engine.wait(3)
    assert len(engine.drains) <= 6  # the first, one for each of Huey's threads to be stuck in, one more, and the last


@pytest.mark.slow
def test_a_drain_comes_back_when_the_next_row_is_due(start: Callable[..., tuple[FakeEngine, Worker]]) -> None:
    engine, worker = start()
    asked = time.time()
    engine.next_s = asked + 2.5
    worker.wake()
    engine.wait(3)
    assert engine.drains[2] - asked >= 2.4


def test_another_process_can_ring_and_a_missing_service_is_no_error(
    start: Callable[..., tuple[FakeEngine, Worker]], tmp_path: Path
) -> None:
    ring(tmp_path / "nobody.db")
    assert not (tmp_path / "nobody.db").exists()
    engine, _ = start()
    for number in range(2):
        ring(tmp_path / "queue.db")
        engine.wait(2 + number)


def test_whatever_stands_in_the_queues_file_is_a_bell(
    start: Callable[..., tuple[FakeEngine, Worker]], tmp_path: Path
) -> None:
    engine, _ = start()
    for number, junk in enumerate((b"no message", b'["x", "rm", {}]', b"", 0)):
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as queue, queue:
            queue.execute("INSERT INTO task (queue, data) VALUES ('crmbridge', ?)", (junk,))
        engine.wait(2 + number)


def test_a_locked_queue_holds_nobody_up(start: Callable[..., tuple[FakeEngine, Worker]], tmp_path: Path) -> None:
    engine, worker = start()
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ring(tmp_path / "queue.db")  # it is not heard, and no error
        worker.wake()
        engine.wait(2)


@pytest.mark.slow
def test_jobs_run_again_and_again_and_one_that_fails_stops_no_other(
    start: Callable[..., tuple[FakeEngine, Worker]],
) -> None:
    ran = threading.Semaphore(0)

    def broken() -> None:
        raise ValueError("planned")

    alerts: list[tuple[str, str]] = []
    start(Job("broken", 5, broken), Job("fine", 5, ran.release), alert=lambda *told: alerts.append(told))
    assert ran.acquire(timeout=PATIENCE_S)
    assert ran.acquire(timeout=PATIENCE_S)
    until(lambda: alerts)
    assert alerts[0][0] == "system_fault"
    assert "job broken failed with ValueError" in alerts[0][1]


@pytest.mark.parametrize("content", [b"a key", b""])
def test_a_file_that_is_no_queue_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "queue.db"
    path.write_bytes(content)
    if content:
        with pytest.raises(Misconfigured):
            Worker(FakeEngine(), path, [])  # type: ignore[arg-type]
        assert path.read_bytes() == content
    else:
        Worker(FakeEngine(), path, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("torn", ["zeros", "first page", "cut short"])
def test_a_queue_that_a_power_loss_has_torn_is_made_anew(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "queue.db"
    Worker(FakeEngine(), path, [])  # type: ignore[arg-type]
    with contextlib.closing(sqlite3.connect(path)) as queue:
        queue.execute("CREATE TABLE IF NOT EXISTS task (id INTEGER)")
        queue.commit()
    whole = path.read_bytes()
    path.write_bytes(
        {"zeros": b"\0" * 8192, "first page": whole[:100] + b"\xff" * 3996 + whole[4096:], "cut short": whole[:1000]}[
            torn
        ]
    )
    Worker(FakeEngine(), path, [])  # type: ignore[arg-type]


def test_a_bell_is_heard_though_the_queue_cannot_be_written(
    start: Callable[..., tuple[FakeEngine, Worker]], tmp_path: Path
) -> None:
    engine, worker = start()
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as other:
        other.execute("DROP TABLE task")
        other.commit()
        worker.wake()
        engine.wait(2)


def test_a_worker_that_has_ended_opens_the_queue_no_more(
    start: Callable[..., tuple[FakeEngine, Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads may be at a last look, or at a last task, when the file is closed."""
    made, guard = list[sqlite3.Connection](), sqlite.guard

    def note(connection: sqlite3.Connection) -> Any:
        made.append(connection)
        return guard(connection)

    monkeypatch.setattr(sqlite, "guard", note)
    engine, worker = start()
    worker.wake()
    engine.wait(2)
    worker.stop(0)
    opened, storage = len(made), worker._huey.storage
    storage.read_schedule(datetime.datetime.now(datetime.UTC))
    storage.delete_data("revoked")
    assert storage.peek_many(["revoked"]) == {}
    assert len(made) == opened
    for connection in made:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")
