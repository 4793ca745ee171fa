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


@pytest.mark.parametrize("is_alone", [False, True])
def test_who_waits_is_poked_once_the_turn_is_free(
    db: Database, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    """Whoever is poked before tries, does not get the turn, and sleeps again: for ever, as nobody pokes any more."""
    commits, turn, may_go = db._commits, threading.Lock(), threading.Event()

    class Turn:
        acquire, locked = turn.acquire, turn.locked

        def release(self) -> None:
            for ticket in list(commits._waiting):  # who was poked already has the time to try
                waiting.until(lambda ticket=ticket: not ticket.poked.is_set())  # type: ignore[misc]
            turn.release()

    monkeypatch.setattr(commits, "_turn", Turn())

    def lead() -> None:
        if is_alone:
            with commits.alone():
                waiting.until(may_go.is_set)
        else:
            db.write(lambda _: waiting.until(may_go.is_set))
        db.close_thread()

    def follow() -> None:
        db.write(lambda tx: beat(tx, "follower"))
        db.close_thread()

    threads = [threading.Thread(target=lead, daemon=True), threading.Thread(target=follow, daemon=True)]
    threads[0].start()
    waiting.until(turn.locked)
    threads[1].start()
    waiting.until(lambda: len(commits._waiting) == 1)
    may_go.set()
    for thread in threads:
        thread.join(10)
    assert db.rows("SELECT name FROM heartbeats") == [{"name": "follower"}]


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
