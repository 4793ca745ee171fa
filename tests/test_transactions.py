"""What a transaction promises to the rooms that write: its time, what follows it, and small steps for many rows."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crmbridge.events import instant
from crmbridge.store import database
from crmbridge.store.database import Database, Tx
from tests import waiting


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = database.create(tmp_path / "it.db")
    made.migrate()
    yield made
    made.close()


def beat(tx: Tx, name: str) -> None:
    tx.insert("heartbeats", {"name": name, "at": tx.now})


def test_what_is_to_happen_after_a_commit_happens_once_though_its_job_ran_twice(db: Database) -> None:
    """A neighbour in the same commit fails, so that each job is run again alone."""
    may_go, ran, told = threading.Event(), list[str](), list[str]()

    def first(tx: Tx) -> None:
        waiting.until(may_go.is_set)

    def good(tx: Tx) -> None:
        ran.append("good")
        beat(tx, "good")
        tx.after(lambda: told.append("good"))

    def bad(tx: Tx) -> None:
        ran.append("bad")
        beat(tx, "bad")
        tx.after(lambda: told.append("bad"))
        raise ValueError("it cannot be")

    def run_bad() -> None:
        with pytest.raises(ValueError, match="it cannot be"):
            db.write(bad)

    def started(job: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                job()
            finally:
                db.close_thread()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [started(lambda: db.write(first))]
    waiting.until(db._commits._turn.locked)
    for number, job in enumerate((lambda: db.write(good), run_bad), start=1):
        threads.append(started(job))
        waiting.until(lambda number=number: len(db._commits._waiting) == number)  # type: ignore[misc]
    may_go.set()
    for thread in threads:
        thread.join()
    assert sorted(ran) == ["bad", "bad", "good", "good"]
    assert told == ["good"]
    assert db.rows("SELECT name FROM heartbeats") == [{"name": "good"}]


def test_no_write_is_left_asleep(db: Database) -> None:
    """A leader that has looked at the queue for the last time misses no ticket that comes just then."""

    def write(thread: int) -> None:
        for number in range(100):
            db.write(lambda tx, number=number: beat(tx, f"{thread} {number}"))  # type: ignore[misc]
        db.close_thread()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(waiting.PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert db.value("SELECT COUNT(*) FROM heartbeats") == 600


def test_a_transaction_has_the_time_at_which_it_began(db: Database) -> None:
    times = iter([1_800_000_000.0, 1_800_000_060.0])
    db.clock = lambda: next(times)
    for name in ("one", "two"):
        db.write(lambda tx, name=name: beat(tx, name))  # type: ignore[misc]
    assert [row["at"] for row in db.rows("SELECT at FROM heartbeats ORDER BY name")] == [
        instant(1_800_000_000.0),
        instant(1_800_000_060.0),
    ]


def test_many_rows_are_worked_off_a_small_write_at_a_time(db: Database) -> None:
    for number in range(25):
        db.write(lambda tx, number=number: beat(tx, f"{number:02}"))  # type: ignore[misc]
    sizes, rests = list[int](), list[float]()

    def step(tx: Tx, rows: object) -> int:
        assert isinstance(rows, list)
        sizes.append(len(rows))
        for row in rows:
            tx.run("DELETE FROM heartbeats WHERE name = ?", (row["name"],))
        return len(rows)

    pages = db.pages("SELECT name FROM heartbeats WHERE name <> '07'", key=("name",), limit=10)
    assert db.in_steps(pages, step, rest=1, pause=rests.append) == 24
    assert (sizes, len(rests)) == ([10, 10, 4], 3)
    assert db.rows("SELECT name FROM heartbeats") == [{"name": "07"}]


def test_what_a_budget_leaves_is_left(db: Database) -> None:
    for number in range(25):
        db.write(lambda tx, number=number: beat(tx, f"{number:02}"))  # type: ignore[misc]
    pages = db.pages("SELECT name FROM heartbeats WHERE 1", key=("name",), limit=10)
    assert db.in_steps(pages, lambda _, rows: len(rows), until_s=0) == 10
