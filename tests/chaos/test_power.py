"""Power is lost at many moments of a server under load: what was acknowledged is on the disk, and arrives."""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from crmbridge.sandbox import Sandbox
from crmbridge.sandbox.demo import Bridge, ini
from tests.chaos import power
from tests.chaos.power import Acknowledged, Disk, Operation, Recorded
from tests.shop import QUICK, SHOP_ID, Shop
from tests.waiting import BULK_S, until

SEED = 20_270_115
SPREAD, AFTER_ACKNOWLEDGEMENT, IN_CHECKPOINT = 40, 40, 20
TORN = 2  # disks with a random part of the unsynced sectors, besides the one without any of them


@dataclass
class Run:
    """A recorded run: the files at its start, what was done to them, and what was acknowledged when."""

    files: dict[str, bytes]
    recording: list[Operation]
    acknowledged: list[Acknowledged]


@dataclass
class Findings:
    """What became of the disks of one run."""

    points: int = 0
    disks: int = 0
    checked: int = 0
    lost: int = 0
    damaged: int = 0
    discarded_bytes: int = 0
    first: str = ""


def load(shop: Shop, acknowledged: list[Acknowledged], inbound: int, outbound: int) -> None:
    """Let customers and the CRM write at once, and note when each acknowledgement came."""
    lock = threading.Lock()

    def note(kind: str, identifier: str) -> None:
        at = time.time()
        with lock:
            acknowledged.append(Acknowledged(at, kind, identifier))  # type: ignore[arg-type]

    def say(number: int) -> None:
        # Some texts fill a page of the database, so that the log is checkpointed during the run.
        text = f"in {number}" + " lamp" * (number % 5 * 180)
        posted = shop.meta.customer_says(SHOP_ID, f"91{number % 25}", text)
        assert posted.status == 200, posted
        note("inbound", posted.mid)

    def send(number: int) -> None:
        answer = shop.send(f"out {number}", f"power-{number}", recipient_id=f"92{number % 25}")
        assert answer.status_code == 202, answer.text
        note("outbound", answer.json()["message_id"])

    with ThreadPoolExecutor(6) as pool:
        says, sends = pool.map(say, range(inbound)), pool.map(send, range(outbound))
        assert (len(list(says)), len(list(sends))) == (inbound, outbound)


def recorded_run(shop: Shop, module: str, *, inbound: int, outbound: int) -> Run:
    """Run a server under load and recording, and end it at the last acknowledgement."""
    shop.start()
    shop.open()
    shop.bridge.stop()
    folder = shop.database.parent
    files = {name: (folder / name).read_bytes() for name in power.FILES if (folder / name).exists()}
    bridge = Recorded(shop.bridge.folder, (shop.bridge.folder / "crmbridge.ini").read_text(), module)
    shop.bridge = bridge
    shop.start()
    acknowledged: list[Acknowledged] = []
    load(shop, acknowledged, inbound, outbound)
    return Run(files, bridge.cut(), acknowledged)


def checkpoints(recording: Sequence[Operation]) -> list[tuple[float, float]]:
    """Return when the log was carried over into the database: from the first page written to the sync of it."""
    found, begun = [], None
    for operation in recording:
        if operation.name == "bridge.db" and operation.kind == "write" and begun is None:
            begun = operation.begun
        if operation.name == "bridge.db" and operation.kind == "sync" and begun is not None:
            found.append((begun, operation.ended))
            begun = None
    return found


def moments(run: Run, chance: random.Random) -> list[float]:
    """Choose when the power goes: anywhere, directly after an acknowledgement, amid a checkpoint, and at the end."""
    times = sorted(entry.at for entry in run.acknowledged)
    chosen = [chance.uniform(times[0], times[-1]) for _ in range(SPREAD)]
    chosen += chance.sample(times, AFTER_ACKNOWLEDGEMENT)
    inside = checkpoints(run.recording)
    chosen += [chance.uniform(*chance.choice(inside)) for _ in range(IN_CHECKPOINT)] if inside else []
    return [*sorted(chosen), times[-1]]


def examine(run: Run, scratch: Path) -> Findings:
    """Lose the power at every chosen moment and look at what is left."""
    chance = random.Random(SEED)
    disk, findings = Disk(run.files, run.recording), Findings()
    for at in moments(run, chance):
        disk.run_until(at)
        findings.points += 1
        findings.discarded_bytes += disk.unsynced_bytes()
        owed = [entry for entry in run.acknowledged if entry.at <= at]
        for number in range(1 + TORN):
            files = disk.lose_some(chance) if number else disk.lose_all()
            found = power.check(files, scratch, owed)
            findings.disks += 1
            findings.checked += len(owed)
            findings.lost += len(found.lost)
            findings.damaged += bool(found.damage)
            if (found.lost or found.damage) and not findings.first:
                findings.first = f"disk {number} at {at:.6f}: {found.damage or found.lost[0]}"
    print(f"{len(run.acknowledged)} acknowledged, {len(run.recording)} calls recorded: {findings}")
    return findings


def test_the_replayed_disk_holds_what_was_synced_and_nothing_else_for_certain() -> None:
    def operation(
        kind: power.Kind, at: float, offset: int = 0, data: bytes = b"", name: str = "bridge.db"
    ) -> Operation:
        return Operation(kind, name, at, at + 0.5, offset, data)

    recording = [
        operation("write", 1, 0, b"a" * 1024),
        operation("sync", 2),
        operation("write", 3, 512, b"b" * 1024),
        operation("create", 4, name="bridge.db-wal"),
        operation("write", 5, 0, b"c", name="bridge.db-wal"),
        operation("sync", 6, name="bridge.db-wal"),
    ]
    disk = Disk({"bridge.db": b""}, recording)
    disk.run_until(2.4)
    assert disk.lose_all() == {"bridge.db": b""}, "a sync is worth nothing before it returns"
    disk.run_until(7)
    assert disk.lose_all() == {"bridge.db": b"a" * 1024}, "a file needs its folder's sync too"
    assert disk.unsynced_bytes() == 1024
    torn = [disk.lose_some(random.Random(seed)) for seed in range(200)]
    whole = b"a" * 512 + b"b" * 1024
    assert {files["bridge.db"] for files in torn} == {
        b"a" * 1024, whole, whole[:1024], b"a" * 1024 + b"b" * 512,
    }  # fmt: skip
    assert {files.get("bridge.db-wal") for files in torn} == {None, b"c"}


@pytest.mark.chaos
def test_what_was_acknowledged_survives_the_loss_of_power(tmp_path: Path) -> None:
    power.require_strace()
    with Sandbox() as sandbox:
        shop = Shop(tmp_path, sandbox, QUICK)
        try:
            run = recorded_run(shop, "crmbridge", inbound=600, outbound=200)
            assert checkpoints(run.recording), "the log was never checkpointed: the run is too short"
            findings = examine(run, tmp_path / "disk")
            assert (findings.lost, findings.damaged) == (0, 0), findings
            assert findings.discarded_bytes
            arrives_after_the_power_is_back(shop, run)
        finally:
            shop.close()


def arrives_after_the_power_is_back(shop: Shop, run: Run) -> None:
    """Start the server on the disk as the end of the run left it, and await all that was acknowledged."""
    disk = Disk(run.files, run.recording)
    disk.run_until(max(entry.at for entry in run.acknowledged))
    power.put(disk.lose_all(), shop.database.parent)
    shop.bridge = Bridge(shop.bridge.folder, ini(shop.sandbox) + QUICK)
    shop.start()
    wanted = {entry.id for entry in run.acknowledged if entry.kind == "inbound"}
    until(lambda: wanted - arrived(shop), lambda missing: not missing, timeout_s=BULK_S)
    wanted_texts = {f"out {number}" for number in range(len(run.acknowledged) - len(wanted))}
    shop.meta.wait_sent(len(wanted_texts), timeout_s=BULK_S)
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE target = 'instagram' AND state <> 'done'", [(0,)])
    sent = Counter(entry.text for entry in shop.meta.sent)
    assert sent == dict.fromkeys(wanted_texts, 1), sent - Counter(wanted_texts)


def arrived(shop: Shop) -> set[str]:
    """Return what the CRM took, by Instagram's id."""
    received = list(shop.crm.received)
    return {entry.event.get("instagram_message_id", "") for entry in received if entry.answered == 200}


@pytest.mark.chaos
def test_a_build_that_does_not_sync_its_commits_is_caught(tmp_path: Path) -> None:
    power.require_strace()
    with Sandbox() as sandbox:
        shop = Shop(tmp_path, sandbox, QUICK)
        try:
            run = recorded_run(shop, "tests.chaos.power", inbound=200, outbound=60)
            findings = examine(run, tmp_path / "disk")
            assert findings.lost
            assert not findings.damaged, "synchronous=NORMAL loses commits, but keeps the file sound"
        finally:
            shop.close()
