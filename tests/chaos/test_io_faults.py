"""The disk fails under a running server: errors on write and on sync, and a disk that is really full.

Whatever was acknowledged is kept and delivered, the rest is refused with 503, and no restart is needed afterwards.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import requests

from crmbridge.sandbox import Sandbox
from tests.chaos import power
from tests.needs import require
from tests.shop import QUICK, SHOP_ID, Shop
from tests.waiting import BULK_S, PATIENCE_S, until

CUSTOMERS = 12
BURST_S = 1.0
DISK_BYTES = 32 << 20
MAIN = ("bridge.db", "bridge.db-wal")
QUEUE = ("queue.db", "queue.db-wal", "queue.db-shm")
ALL = (*MAIN, "bridge.db-shm", *QUEUE)
WRITES, SYNCS = "pwrite64", "fsync,fdatasync"
BOTH = "pwrite64,fsync,fdatasync,ftruncate,fallocate"
# What SQLite calls each fault. A sync that finds no space is an I/O error to it.
CAUSES = {
    (WRITES, "EIO"): "disk I/O error",
    (WRITES, "ENOSPC"): r"disk is full|storage\.full",
    (SYNCS, "EIO"): "disk I/O error",
    (SYNCS, "ENOSPC"): "disk I/O error",
    (BOTH, "EIO"): "disk I/O error",
    (BOTH, "ENOSPC"): r"disk is full|storage\.full",
}
TAKEN = {"in": 200, "out": 202}


@dataclass(frozen=True)
class Answer:
    """What the server said to one try; status 0: nothing."""

    status: int
    body: str


class Callers:
    """Meta and the CRM: each message is one text, tried again with the same ids, and every answer is kept."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self._began_ms = int(time.time() * 1000)
        self._count = 0
        self._lock = threading.Lock()

    def try_one(self, way: str) -> Answer:
        """Make a new message, ``in`` or ``out``, and try it once."""
        with self._lock:
            self._count += 1
            text = f"{way} {self._count}"
        return self.try_again(text)

    def try_again(self, text: str) -> Answer:
        """Try a message with the ids that it had before."""
        way, number = text.split()
        contact = f"{'93' if way == 'in' else '94'}{int(number) % CUSTOMERS}"
        if way == "in":
            at_ms = self._began_ms + int(number)
            posted = self.shop.meta.customer_says(SHOP_ID, contact, text, mid=f"mid-{number}", timestamp_ms=at_ms)
            answer = Answer(posted.status, posted.body)
        else:
            try:
                sent = self.shop.send(text, f"key-{number}", recipient_id=contact)
                answer = Answer(sent.status_code, sent.text)
            except requests.RequestException as error:
                answer = Answer(0, f"{type(error).__name__}: {error}")
        with self._lock:
            self.answers[text].append(answer)
        return answer

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Try new messages both ways, from several threads, until the block ends."""
        ended = threading.Event()

        def work(way: str) -> None:
            while not ended.wait(0.02):
                self.try_one(way)

        threads = [threading.Thread(target=work, args=(way,)) for way in ("in", "in", "in", "out", "out")]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def taken(self) -> set[str]:
        """Return the texts that were acknowledged at some try."""
        return {text for text, tries in self.answers.items() if any(was_taken(text, one) for one in tries)}

    def refused(self) -> set[str]:
        """Return the texts that were never acknowledged."""
        return set(self.answers) - self.taken()

    def mend(self) -> None:
        """Try again what was refused, as Meta and a CRM would, until it is taken."""
        for text in sorted(self.refused()):
            until(partial(self.try_again, text), partial(was_taken, text), pause_s=0.2)


def was_taken(text: str, answer: Answer) -> bool:
    return answer.status == TAKEN[text.split(maxsplit=1)[0]]


def stored(shop: Shop) -> set[str]:
    """Return the texts that the database holds, each with its delivery."""
    inbound = shop.rows(
        "SELECT json_extract(payload, '$.text') FROM events"
        " JOIN deliveries ON event_id = events.id WHERE kind = 'message.received'"
    )
    outbound = shop.rows(
        "SELECT json_extract(content, '$.text') FROM outbound_messages"
        " JOIN deliveries ON message_id = outbound_messages.id AND target = 'instagram'"
    )
    return {row[0] for row in inbound + outbound}


def arrived(shop: Shop) -> Counter[str]:
    """Count what the CRM took of what came in, and what Instagram took of what went out, by text."""
    received = list(shop.crm.received)
    texts = [
        entry.event["message"]
        for entry in received
        if entry.answered == 200 and entry.event["event"] == "message.received"
    ]
    return Counter([*texts, *(entry.text or "" for entry in list(shop.meta.sent))])


def wait_healthy(shop: Shop) -> None:
    until(lambda: shop.call("GET", "/health").status_code, lambda status: status == 200)


def wait_arrived(shop: Shop, texts: set[str]) -> None:
    """Wait until each text has come to its other side."""
    until(lambda: texts - set(arrived(shop)), lambda missing: not missing, timeout_s=BULK_S)


def assert_honest(callers: Callers) -> None:
    """Assert that every answer was an acknowledgement or a 503 that says so in JSON."""
    for text, tries in callers.answers.items():
        for answer in tries:
            if was_taken(text, answer):
                continue
            assert answer.status == 503, (text, answer)
            body = json.loads(answer.body)
            assert set(body) == {"error", "message", "details", "correlation_id", "timestamp"}
            assert "Traceback" not in answer.body
    assert "request.fault" not in callers.shop.log()


def assert_whole(shop: Shop) -> None:
    """Assert that nothing is damaged, and nothing half there."""
    assert shop.rows("PRAGMA integrity_check") == [("ok",)]
    ownerless = """
        SELECT id FROM events WHERE state = 'forwarded' AND NOT EXISTS
            (SELECT 1 FROM deliveries WHERE event_id = events.id AND target = 'crm')
        UNION ALL SELECT id FROM outbound_messages WHERE NOT EXISTS
            (SELECT 1 FROM deliveries WHERE message_id = outbound_messages.id AND target = 'instagram')
        UNION ALL SELECT id FROM outbound_messages WHERE status <> 'pending' AND NOT EXISTS
            (SELECT 1 FROM history WHERE subject = outbound_messages.id AND kind = 'status' AND code = status)
        UNION ALL SELECT id FROM deliveries WHERE event_id IS NOT NULL AND NOT EXISTS
            (SELECT 1 FROM events WHERE id = deliveries.event_id) AND event LIKE 'message.received'"""
    assert shop.rows(ownerless) == []


def assert_each_once(shop: Shop, texts: set[str]) -> None:
    """Assert that all arrived, and nothing twice: no process died, so nothing excuses a repetition."""
    wait_arrived(shop, texts)
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)])
    counts = arrived(shop)
    assert {text: number for text, number in counts.items() if number != 1} == {}
    assert set(counts) == texts


def pid(shop: Shop) -> int:
    process = shop.bridge._process
    assert process is not None
    assert process.poll() is None, "the server ended"
    return process.pid


@contextlib.contextmanager
def failing(shop: Shop, calls: str, error: str, when: str, files: tuple[str, ...]) -> Iterator[Path]:
    """Let calls on the server's files fail; yields where strace writes the calls it saw."""
    report = shop.bridge.folder / f"injected.{time.monotonic_ns()}"
    paths = [word for name in files for word in ("-P", str((shop.database.parent / name).resolve()))]
    fault = ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"]
    command = ["strace", "-f", "-y", "-s", "0", "-p", str(pid(shop)), *paths, *fault, "-o", str(report)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stderr is not None
            for line in tracer.stderr:
                if "attached" in line:
                    break
            else:
                pytest.fail("strace did not attach")
            yield report
        finally:
            tracer.terminate()
            tracer.communicate(timeout=PATIENCE_S)


def injected(report: Path) -> int:
    return report.read_text(errors="replace").count("(INJECTED)")


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("calls", "error", "files"),
    [
        (WRITES, "EIO", MAIN),
        (WRITES, "ENOSPC", MAIN),
        (SYNCS, "EIO", MAIN),
        (SYNCS, "ENOSPC", MAIN),
        (BOTH, "EIO", ALL),
        (BOTH, "ENOSPC", ALL),
    ],
    ids=lambda value: value.replace(",", "+") if isinstance(value, str) else "all-files" if value == ALL else "main",
)
def test_bursts_of_errors_cost_refusals_and_nothing_else(
    fresh_shop: Shop, calls: str, error: str, files: tuple[str, ...]
) -> None:
    power.require_strace()
    shop, callers = fresh_shop, Callers(fresh_shop)
    server, faults = pid(shop), 0
    with callers.busy():
        time.sleep(0.5)
        for when in ("1+", "3+4", "1+"):
            with failing(shop, calls, error, when, files) as report:
                time.sleep(BURST_S)
                until(partial(injected, report))
                until(callers.refused)
            faults += injected(report)
            time.sleep(0.5)
    assert faults, "no fault was injected"
    assert callers.refused(), "the faults touched no request"
    assert_honest(callers)
    held = stored(shop)
    taken, refused = callers.taken(), callers.refused()
    assert taken <= held, f"acknowledged, but not stored: {sorted(taken - held)}"
    print(f"{faults} faults: {len(taken)} taken, {len(refused)} refused, of these stored: {len(refused & held)}")
    assert not refused & held, "refused, and stored nevertheless"
    assert re.search(r" error request\.failed status=503 code=storage_\w+", shop.log())
    assert re.search(CAUSES[calls, error], shop.log()), "the log does not say what is wrong"
    callers.mend()
    assert_each_once(shop, set(callers.answers))
    assert_whole(shop)
    assert pid(shop) == server
    wait_healthy(shop)


@pytest.mark.chaos
def test_a_log_that_cannot_be_carried_over_refuses_nobody(fresh_shop: Shop) -> None:
    """Only the log is needed to take a message; the checkpoint is made up for when the database can be written."""
    power.require_strace()
    shop, callers = fresh_shop, Callers(fresh_shop)
    size = shop.database.stat().st_size
    with callers.busy(), failing(shop, BOTH, "EIO", "1+", ("bridge.db",)) as report:
        until(lambda: injected(report), lambda faults: faults >= 3)  # checkpoints that were tried
    assert not callers.refused()
    assert_honest(callers)
    assert_each_once(shop, set(callers.answers))
    with callers.busy():
        until(lambda: shop.database.stat().st_size, lambda now: now > size)  # a checkpoint was made
    assert_each_once(shop, set(callers.answers))
    assert_whole(shop)


@pytest.mark.chaos
def test_killed_while_syncs_fail_a_refused_message_may_be_there_but_never_twice(fresh_shop: Shop) -> None:
    """SQLite has written the commit when its sync fails; a process that lives forgets it, a new one may find it."""
    power.require_strace()
    shop, callers = fresh_shop, Callers(fresh_shop)
    shop.crm.answer_always(503)
    for _ in range(10):
        assert was_taken("in", callers.try_one("in"))
    with failing(shop, SYNCS, "EIO", "1+", MAIN):
        with callers.busy():
            until(callers.refused)
        shop.kill()
    assert_honest(callers)
    shop.crm.answer_always(None)
    shop.start()
    held, refused = stored(shop), callers.refused()
    assert callers.taken() <= held
    print(f"{len(callers.taken())} taken, {len(refused)} refused, of these stored: {sorted(refused & held)}")
    callers.mend()
    wait_arrived(shop, set(callers.answers))
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)])
    assert Counter(entry.text for entry in shop.meta.sent).most_common(1)[0][1] == 1
    ids: dict[str, set[str]] = defaultdict(set)
    for entry in shop.crm.received:
        if entry.event["event"] == "message.received":
            ids[entry.event["message"]].add(entry.event["event_id"])
    assert {text: events for text, events in ids.items() if len(events) != 1} == {}
    assert_whole(shop)


# --- a disk that is full ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose ``var`` is a disk of a few megabytes."""
    var = tmp_path / "var"
    var.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "crmbridge-test", str(var)]
    has_mount = shutil.which("mount") is not None
    mounted = subprocess.run(command, capture_output=True, text=True, check=False) if has_mount else None
    require(mounted is not None and mounted.returncode == 0, "a small disk cannot be mounted here")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", str(var)], check=True)


def fill(folder: Path, name: str = "filler") -> Path:
    """Take all the space that the disk has left; return the file that holds it."""
    filler = folder / name
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
        while out.write(bytes(4096)):
            pass
    assert os.statvfs(folder).f_bavail == 0
    return filler


def know_customers(shop: Shop) -> None:
    """Have those who will be written to write first: Instagram's conversations then tell what a 503 leaves open."""
    for number in range(CUSTOMERS):
        shop.meta.customer_says(SHOP_ID, f"94{number}", "good day")
    shop.crm.wait(CUSTOMERS)
    shop.crm.received.clear()


@pytest.fixture
def small_shop(small_disk: Path) -> Iterator[Shop]:
    """A shop on the small disk whose CRM and Instagram are down, and which has acknowledged messages."""
    with Sandbox() as sandbox:
        shop = Shop(small_disk, sandbox, QUICK)
        try:
            shop.start()
            shop.open()
            know_customers(shop)
            shop.crm.answer_always(503)
            shop.meta.fault("messages", times=100_000, status=503, body="")
            yield shop
        finally:
            shop.close()


def come_back(shop: Shop) -> None:
    shop.crm.answer_always(None)
    shop.meta.clear_faults()


def take(callers: Callers, number: int) -> None:
    for one in range(number):
        way = "in" if one % 3 else "out"
        assert was_taken(way, callers.try_one(way))


def try_until_refused(callers: Callers) -> None:
    """Try until both ways are refused; the log that is there is written anew from its start, so some may fit in."""
    refused = dict.fromkeys(TAKEN, 0)
    for _ in range(2000):
        for way in TAKEN:
            refused[way] += callers.try_one(way).status == 503
        if min(refused.values()) >= 10:
            return
    pytest.fail(f"the full disk refused too little: {refused}")


@pytest.mark.chaos
def test_a_full_disk_refuses_new_messages_and_delivers_what_was_acknowledged(small_shop: Shop) -> None:
    shop, callers, server = small_shop, Callers(small_shop), pid(small_shop)
    take(callers, 120)
    filler = fill(shop.database.parent)
    try_until_refused(callers)
    before = callers.taken()
    print(f"full: {len(before)} taken, {len(callers.refused())} refused")
    assert shop.call("GET", "/health").status_code == 503
    assert shop.call("GET", "/health/live").status_code == 200
    assert re.search(r" error storage\.full ", shop.log())
    come_back(shop)
    wait_arrived(shop, before)
    while_full = arrived(shop)
    assert while_full == dict.fromkeys(callers.taken(), 1)
    for way in TAKEN:
        assert callers.try_one(way).status == 503
    filler.unlink()
    callers.mend()
    assert_honest(callers)
    assert_each_once(shop, set(callers.answers))
    assert_whole(shop)
    assert pid(shop) == server
    wait_healthy(shop)


@pytest.mark.chaos
def test_a_disk_on_which_even_the_reserve_was_taken_loses_nothing(small_shop: Shop) -> None:
    shop, callers, server = small_shop, Callers(small_shop), pid(small_shop)
    take(callers, 60)
    fillers = [fill(shop.database.parent, "filler")]
    try_until_refused(callers)
    fillers.append(fill(shop.database.parent, "filler-of-the-reserve"))
    come_back(shop)
    time.sleep(3)
    for way in TAKEN:
        assert callers.try_one(way).status == 503
    print(f"{len(callers.taken())} taken, {len(arrived(shop))} of these arrived while there was no space at all")
    for filler in fillers:
        filler.unlink()
    callers.mend()
    assert_honest(callers)
    assert_each_once(shop, set(callers.answers))
    assert_whole(shop)
    assert pid(shop) == server


@pytest.mark.chaos
def test_a_restart_on_a_full_disk_keeps_the_space_for_what_was_acknowledged(small_shop: Shop) -> None:
    shop, callers = small_shop, Callers(small_shop)
    take(callers, 60)
    filler = fill(shop.database.parent)
    try_until_refused(callers)
    shop.kill()
    shop.start()
    try_until_refused(callers)
    come_back(shop)
    wait_arrived(shop, callers.taken())
    filler.unlink()
    callers.mend()
    assert_honest(callers)
    wait_arrived(shop, set(callers.answers))
    assert_whole(shop)
