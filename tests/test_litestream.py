"""Litestream beside the running bridge, as README sets it up: the bridge alone checkpoints, and nothing is lost."""

import re
import shutil
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
from tests.waiting import BULK_S, until

pytestmark = pytest.mark.slow
BESIDE = Path(sys.executable).parent / "litestream"
MIDS = "SELECT instagram_message_id FROM inbound_events"


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        yield Path(folder) / "socket"


class Litestream:
    """The program, and README's litestream.yml for a shop, with a socket by which a test can wait."""

    def __init__(self, shop: Shop, socket: Path) -> None:
        found = shutil.which("litestream") or (str(BESIDE) if BESIDE.exists() else None)
        require(found, "needs litestream, which tests/requirements.txt has for Linux on x86_64 and aarch64")
        folder = shop.database.parent.parent
        (recipe,) = re.findall(r"```yaml\n([^`]*dbs:[^`]*)```", (ROOT / "README.md").read_text())
        recipe = recipe.replace("/var/lib/crmbridge/bridge.db", str(shop.database))
        recipe = recipe.replace("/mnt/elsewhere/crmbridge", str(folder / "replica"))
        self._program, self._socket, self._database = str(found), socket, shop.database
        self._config, self._log = folder / "litestream.yml", folder / "litestream.log"
        self._config.write_text(f"{recipe}\nsocket:\n  enabled: true\n  path: {socket}\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Replicate, and wait until it can be asked."""
        self._socket.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            words = [self._program, "replicate", "-config", str(self._config)]
            self._process = process = subprocess.Popen(words, stdout=log, stderr=log)
        until(lambda: self._socket.exists() or process.poll() is not None)
        assert process.poll() is None, self.log()

    def stop(self, *, at_once: bool) -> None:
        if self._process is not None:
            self._process.kill() if at_once else self._process.terminate()
            self._process.wait()

    def sync(self) -> None:
        """Wait until all that the database holds is in the replica."""
        words = ["-wait", "-timeout", str(int(BULK_S)), "-socket", str(self._socket), str(self._database)]
        self._run("sync", *words)

    def restore(self, file: Path) -> None:
        self._run("restore", "-config", str(self._config), "-o", str(file), str(self._database))

    def log(self) -> str:
        return self._log.read_text()

    def _run(self, *words: str) -> None:
        done = subprocess.run([self._program, *words], capture_output=True, text=True, timeout=BULK_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def litestream(fresh_shop: Shop, socket: Path) -> Iterator[Litestream]:
    made = Litestream(fresh_shop, socket)
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


def salt(shop: Shop) -> bytes:
    """Return what tells one beginning of the log from another."""
    with shop.database.with_name("bridge.db-wal").open("rb") as log:
        return log.read(24)[16:]


def lose(shop: Shop, what: str) -> None:
    """Lose the database, or the machine: all but the key file, of which README has a copy made elsewhere."""
    for path in shop.database.parent.iterdir():
        if path.name == "crmbridge.key" or (what == "database" and not path.name.startswith("bridge.db")):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("what", ["database", "machine"])
def test_what_was_synced_survives_the_loss_and_the_replica_goes_on_with_what_was_restored(
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
                wal_of = salt(shop)
                litestream.stop(at_once=number == 500)
                until(lambda wal_of=wal_of: salt(shop) != wal_of, timeout_s=BULK_S)  # type: ignore[misc]
                litestream.start()
        checkpointed_bytes = shop.database.stat().st_size
        litestream.stop(at_once=True)
        shop.kill()
    finally:
        writers.stop()
    assert writers.refused == 0
    assert checkpointed_bytes > 2 * begun_bytes
    assert not re.search(r"storage\.(?!wal_large)| error ", shop.log())
    assert "level=ERROR" not in litestream.log()

    restored = folder / "restored.db"
    litestream.restore(restored)
    assert copies.look_through(restored).rows["inbound_events"] >= len(before)
    lose(shop, what)
    shop.bridge.command("restore", str(restored))
    shop.start()
    litestream.start()  # onto the same replica, whose history this is not
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
