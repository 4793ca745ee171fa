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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
BESIDE = Path(sys.executable).parent / "litestream"


@pytest.fixture
def litestream() -> str:
    found = shutil.which("litestream") or (str(BESIDE) if BESIDE.exists() else None)
    require(found, "needs litestream, which tests/requirements.txt has for Linux on x86_64 and aarch64")
    return str(found)


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        yield Path(folder) / "socket"


def configured(shop: Shop, socket: Path) -> Path:
    """Write README's litestream.yml for this shop, with a socket by which a test can wait."""
    folder = shop.database.parent.parent
    (recipe,) = re.findall(r"```yaml\n([^`]*dbs:[^`]*)```", (ROOT / "README.md").read_text())
    recipe = recipe.replace("/var/lib/crmbridge/bridge.db", str(shop.database))
    path = folder / "litestream.yml"
    replica = recipe.replace("/mnt/elsewhere/crmbridge", str(folder / "replica"))
    path.write_text(f"{replica}\nsocket:\n  enabled: true\n  path: {socket}\n")
    return path


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
        while len(self.told) < number:
            self._end.wait(0.02)

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


def salt(shop: Shop) -> bytes:
    """Return what tells one beginning of the log from another."""
    with shop.database.with_name("bridge.db-wal").open("rb") as log:
        return log.read(24)[16:]


def test_what_was_synced_survives_the_loss_of_the_machine(fresh_shop: Shop, litestream: str, socket: Path) -> None:
    shop, folder = fresh_shop, fresh_shop.database.parent.parent
    config = configured(shop, socket)

    def run(*words: str) -> str:
        done = subprocess.run([litestream, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def replicate() -> "subprocess.Popen[bytes]":
        socket.unlink(missing_ok=True)
        process = subprocess.Popen([litestream, "replicate", "-config", str(config)], stdout=log, stderr=log)
        while not socket.exists():
            assert process.poll() is None
        return process

    with (folder / "litestream.log").open("wb") as log:
        process = replicate()
        begun_bytes = shop.database.stat().st_size
        writers = Writers(shop)
        try:
            for number in (200, 500, 800, 1100):
                writers.wait(number)
                before = list(writers.told)
                run("sync", "-wait", "-socket", str(socket), str(shop.database))
                if number < 1100:
                    wal_of = salt(shop)
                    process.kill() if number == 500 else process.terminate()
                    process.wait()
                    while salt(shop) == wal_of:  # until the log has begun anew
                        threading.Event().wait(0.01)
                    process = replicate()
            checkpointed_bytes = shop.database.stat().st_size
            process.kill()
            shop.kill()
        finally:
            writers.stop()
        process.wait()
        assert writers.refused == 0
        assert checkpointed_bytes > 2 * begun_bytes
        assert not re.search(r"storage\.(?!wal_large)| error ", shop.log())
        assert b"level=ERROR" not in (folder / "litestream.log").read_bytes()

        restored = folder / "restored.db"
        run("restore", "-config", str(config), "-o", str(restored), str(shop.database))
        assert copies.look_through(restored).rows["inbound_events"] >= len(before)
        shop.database.unlink()
        for side in ("-wal", "-shm"):
            shop.database.with_name(shop.database.name + side).unlink(missing_ok=True)
        shop.bridge.command("restore", str(restored))
        shop.start()
        process = replicate()  # onto the same replica, whose history this is not
        last = shop.meta.customer_says(SHOP_ID, "819", "after the loss")
        assert last.status == 200
        shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)], timeout_s=60)
        stored = {mid for (mid,) in shop.rows("SELECT instagram_message_id FROM inbound_events")}
        assert stored >= {*before, last.mid}
        run("sync", "-wait", "-socket", str(socket), str(shop.database))
        process.kill()
        process.wait()
        again = folder / "again.db"
        run("restore", "-config", str(config), "-o", str(again), str(shop.database))
        assert {mid for (mid,) in query(again, "SELECT instagram_message_id FROM inbound_events")} == stored
