"""Litestream beside the bridge, as docs/operate.md sets it up: the bridge alone checkpoints, and nothing is lost."""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crmbridge.store import copies
from tests.needs import require
from tests.shop import SHOP_ID, Shop
from tests.test_backup import query
from tests.test_cli import ROOT
from tests.waiting import BULK_S, PATIENCE_S, until

pytestmark = pytest.mark.slow
BESIDE = Path(sys.executable).parent / "litestream"
# as docs/operate.md says
AT_ITS_STOP = re.compile(r'.* level=ERROR msg="failed to close database" error="sync: [^"]*: EOF"\n')
MIDS = "SELECT instagram_message_id FROM events"


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        yield Path(folder) / "socket"


class Litestream:
    """The document's litestream.yml and scripts, for a database; with a socket by which a test can wait."""

    def __init__(self, database: Path, socket: Path) -> None:
        found = shutil.which("litestream") or (str(BESIDE) if BESIDE.exists() else None)
        require(found, "needs litestream, which tests/requirements.txt has for Linux on x86_64 and aarch64")
        self._socket, self._database, self._folder = socket, database, database.parent.parent
        self._environ = {**os.environ, "PATH": f"{Path(str(found)).parent}:{os.environ['PATH']}"}
        self._log = self._folder / "litestream.log"
        recipe = self._recipe(r"```yaml\n([^`]*dbs:[^`]*)```")
        (self._folder / "litestream.yml").write_text(f"{recipe}\nsocket:\n  enabled: true\n  path: {socket}\n")
        (self._folder / "replica").mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._ends: list[str] = []  # what it logged from each SIGTERM on

    def _recipe(self, pattern: str) -> str:
        """Return a block of docs/operate.md, with the places of this test."""
        (found,) = re.findall(pattern, (ROOT / "docs" / "operate.md").read_text())
        for theirs, ours in (
            ("/var/lib/crmbridge", self._database.parent),
            ("/mnt/elsewhere/crmbridge", self._folder / "replica"),
            ("/etc/litestream.yml", self._folder / "litestream.yml"),
        ):
            found = found.replace(theirs, str(ours))
        return str(found)

    def start(self) -> None:
        """Replicate, and wait until it can be asked."""
        self._socket.unlink(missing_ok=True)
        words = ["sh", "-c", self._recipe(r"```sh\n(#!/bin/sh\nrm -rf [^`]*litestream replicate[^`]*)```")]
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(words, env=self._environ, stdout=log, stderr=log)
        until(lambda: self._socket.exists() or process.poll() is not None)
        assert process.poll() is None, self.log()

    def stop(self, *, at_once: bool) -> None:
        if self._process is None:
            return
        said = len(self._log.read_text())
        self._process.kill() if at_once else self._process.terminate()
        self._process.wait()
        if not at_once:
            self._ends.append(self._log.read_text()[said:])

    def sync(self) -> None:
        """Wait until all that the database holds is in the replica."""
        self._run(f"litestream sync -wait -timeout {BULK_S:.0f} -socket {self._socket} {self._database}")

    def restore(self, file: Path) -> None:
        script = self._recipe(r"```sh\n([^`]*litestream restore[^`]*)crmbridge restore[^`]*```")
        self._run(script.replace("/root/restored.db", str(file)))

    def log(self) -> str:
        """Return all that it logged, but for what docs/operate.md says of its stops."""
        log = self._log.read_text()
        for end in self._ends:
            log = log.replace(end, AT_ITS_STOP.sub("", end, count=1), 1)
        return log

    def _run(self, script: str) -> None:
        words = ["sh", "-ec", script]
        done = subprocess.run(
            words, env=self._environ, capture_output=True, text=True, timeout=BULK_S + PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def litestream(fresh_shop: Shop, socket: Path) -> Iterator[Litestream]:
    made = Litestream(fresh_shop.database, socket)
    yield made
    made.stop(at_once=True)


class Writers:
    """Three customers who write as fast as they are answered; `told` are the messages that were acknowledged."""

    def __init__(self, shop: Shop) -> None:
        self._shop, self._end = shop, threading.Event()
        self.told: list[str] = []
        self.refused = 0
        self._threads = [threading.Thread(target=self._write, args=(f"81{number}",)) for number in range(3)]
        for thread in self._threads:
            thread.start()

    def _write(self, customer: str) -> None:
        while not self._end.is_set():
            posted = self._shop.meta.customer_says(SHOP_ID, customer, "hello " * 100)
            if posted.status == 200:
                self.told.append(posted.mid)
            elif posted.status:
                self.refused += 1

    def wait(self, number: int) -> None:
        until(lambda: len(self.told), lambda told: told >= number, timeout_s=BULK_S)

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


def salt(database: Path) -> bytes:
    """Return what tells one beginning of the log from another."""
    with database.with_name("bridge.db-wal").open("rb") as log:
        return log.read(24)[16:]


def lose(shop: Shop, what: str) -> None:
    """Lose the database, or the machine: all but the key file, of which docs/operate.md has a copy made elsewhere."""
    for path in shop.database.parent.iterdir():
        if path.name == "crmbridge.key" or (what == "database" and not path.name.startswith("bridge.db")):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("what", ["database", "machine"])
def test_what_was_synced_survives_the_loss_and_is_copied_again(
    fresh_shop: Shop, litestream: Litestream, what: str
) -> None:
    shop, folder = fresh_shop, fresh_shop.database.parent.parent
    litestream.start()
    begun_bytes = shop.database.stat().st_size
    writers = Writers(shop)
    try:
        for number in (200, 500, 800, 1100):
            writers.wait(number)
            before = list(writers.told)
            litestream.sync()
            if number < 1100:
                wal_of = salt(shop.database)
                litestream.stop(at_once=number == 500)
                until(lambda wal_of=wal_of: salt(shop.database) != wal_of, timeout_s=BULK_S)  # type: ignore[misc]
                litestream.start()
        checkpointed_bytes = shop.database.stat().st_size
        litestream.stop(at_once=True)
        shop.kill()
    finally:
        writers.stop()
    assert writers.refused == 0
    assert checkpointed_bytes > 2 * begun_bytes
    assert not re.search(r"storage\.(?!wal_large)| error ", shop.log())
    # Litestream's own snapshot may meet the log's new beginning; it makes another.
    assert "level=ERROR" not in re.sub(r".*compaction failed.*", "", litestream.log())

    restored = folder / "restored.db"
    litestream.restore(restored)
    assert copies.look_through(restored).rows["events"] >= len(before)
    lose(shop, what)
    shop.bridge.command("restore", str(restored))
    shop.start()
    litestream.start()
    last = shop.meta.customer_says(SHOP_ID, "819", "after the loss")
    assert last.status == 200
    # what was told after the last sync comes back from Instagram's conversations, and only then all is there
    shop.wait_rows("SELECT COUNT(*) FROM backfills", [(0,)])
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)], timeout_s=BULK_S)
    stored = {mid for (mid,) in shop.rows(MIDS)}
    assert stored >= {*before, last.mid}
    litestream.sync()
    litestream.stop(at_once=True)
    again = folder / "again.db"
    litestream.restore(again)
    assert copies.look_through(again).rows["accounts"] == 1  # and it is whole
    assert {mid for (mid,) in query(again, MIDS)} == stored
    assert "level=ERROR" not in litestream.log()


@pytest.mark.parametrize("at_once", [False, True], ids=["stopped", "killed"])
def test_a_log_that_began_anew_while_nobody_copied_it_leaves_no_hole(
    tmp_path: Path, socket: Path, at_once: bool
) -> None:
    """As in a quiet shop: what was copied last is still there in the log, behind what came after its new beginning."""
    database = tmp_path / "var" / "bridge.db"
    database.parent.mkdir()
    litestream = Litestream(database, socket)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, text)")
        connection.execute("CREATE INDEX texts ON events (text)")

        def write(number: int) -> None:
            for _ in range(number):
                connection.execute("INSERT INTO events (text) VALUES (hex(randomblob(300)))")

        write(30)
        litestream.start()
        litestream.sync()
        litestream.stop(at_once=at_once)
        began = salt(database)
        write(5)
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        write(1)
        assert salt(database) != began
        litestream.start()
        try:
            write(1)
            litestream.sync()
        finally:
            litestream.stop(at_once=True)
        stored = connection.execute("SELECT * FROM events").fetchall()
    litestream.restore(tmp_path / "restored.db")
    assert query(tmp_path / "restored.db", "SELECT * FROM events NOT INDEXED") == stored
    assert query(tmp_path / "restored.db", "PRAGMA integrity_check") == [("ok",)]
