"""The server as a process: kill -9, restarts, a lost queue and load."""

import contextlib
import sqlite3
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.shop import CUSTOMER, QUICK, SHOP_ID, Shop, opened
from tests.waiting import BULK_S, PATIENCE_S, assert_rung


def texts(shop: Shop) -> Counter[str]:
    """Count what the CRM took with 2xx, by text."""
    return Counter(
        entry.event["message"]
        for entry in shop.crm.received
        if entry.answered == 200 and entry.event["event"] == "message.received"
    )


def test_killed_between_accepting_and_delivering_everything_arrives_once(fresh_shop: Shop) -> None:
    shop = fresh_shop
    shop.meta.customer_says(SHOP_ID, CUSTOMER, "from before")
    shop.crm.wait(1)
    shop.crm.reset()
    shop.crm.answer_always(500)
    shop.meta.fault("messages", times=10_000, status=503, body="")
    for number in range(40):
        shop.hears(f"80{number % 7}", f"in {number}")
    sent = [shop.send(f"out {number}", f"kill-{number}").json()["message_id"] for number in range(5)]
    shop.kill()
    assert not texts(shop)
    shop.crm.answer_always(None)
    shop.meta.clear_faults()
    shop.start()
    wanted = {f"in {number}" for number in range(40)}
    shop.crm.wait(40, where=lambda entry: entry.answered == 200 and entry.event.get("message") in wanted)
    shop.meta.wait_sent(5)
    shop.crm.wait(5, where=lambda entry: entry.event["event"] == "message.sent")
    assert texts(shop) == dict.fromkeys(wanted, 1)
    assert [entry.text for entry in shop.meta.sent] == [f"out {number}" for number in range(5)]
    assert all(shop.status(message_id)["status"] in ("sent", "delivered") for message_id in sent)


def test_the_queue_may_be_deleted_while_stopped(tmp_path: Path) -> None:
    with opened(tmp_path, QUICK) as shop:
        shop.crm.answer_always(500)
        for number in range(5):
            shop.meta.customer_says(SHOP_ID, f"80{number}", f"in {number}")
        assert shop.bridge.stop() == 0
        for path in shop.database.parent.glob("queue.db*"):
            path.unlink()
        shop.crm.answer_always(None)
        shop.start()
        shop.crm.wait(5, where=lambda entry: entry.answered == 200)
        assert set(texts(shop).values()) == {1}


def test_a_queue_that_another_program_locks_holds_up_neither_webhooks_nor_the_sweep(fresh_shop: Shop) -> None:
    shop = fresh_shop
    queue = shop.database.with_name("queue.db")
    pause = "UPDATE endpoints SET paused_at = aged_from WHERE kind = 'crm'"
    with contextlib.closing(sqlite3.connect(queue, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for number in range(10):
            posted = shop.meta.customer_says(SHOP_ID, f"80{number}", f"in {number}")
            assert (posted.status, posted.ms < 3000) == (200, True)
        shop.crm.wait(10, timeout_s=30)
        shop.change(pause)
        shop.meta.customer_says(SHOP_ID, "900", "found by the sweep")
        shop.change("UPDATE endpoints SET paused_at = NULL")  # nobody rings for it
        shop.crm.wait(1, timeout_s=60, where=lambda entry: entry.event.get("message") == "found by the sweep")
        shop.kill()
        shop.start()
        shop.meta.customer_says(SHOP_ID, "901", "after a start")
        shop.crm.wait(1, timeout_s=30, where=lambda entry: entry.event.get("message") == "after a start")


@pytest.mark.slow
def test_3000_messages_over_16_connections_arrive_once_each(fresh_shop: Shop) -> None:
    shop = fresh_shop

    def say(number: int) -> None:
        shop.hears(f"81{number % 200}", f"load {number}")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(say, range(3000)))
    assert shop.rows("SELECT COUNT(*) FROM events WHERE kind = 'message.received'") == [(3000,)]
    shop.crm.wait(3000, timeout_s=BULK_S)
    assert texts(shop) == {f"load {number}": 1 for number in range(3000)}
    lanes: dict[str, int] = {}
    for entry in shop.crm.received:
        contact, sequence = entry.event["sender_id"], entry.event["sequence"]
        assert sequence > lanes.get(contact, 0)
        lanes[contact] = sequence


@pytest.mark.slow
def test_500_messages_delivered_twice_at_once_are_forwarded_once(fresh_shop: Shop) -> None:
    shop = fresh_shop

    def say(number: int) -> None:
        about = {"mid": f"mid-twice-{number % 500}", "timestamp_ms": 1_770_000_000_000 + number % 500}
        shop.hears(f"82{number % 50}", f"twice {number % 500}", **about)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(say, [number for one in range(500) for number in (one, one + 500)]))
    shop.crm.wait(500, timeout_s=BULK_S)
    shop.hears("82last", "the last")
    shop.crm.wait(1, where=lambda entry: entry.event["message"] == "the last")
    assert texts(shop) == {**{f"twice {number}": 1 for number in range(500)}, "the last": 1}


def test_a_delivery_starts_at_once_when_idle(fresh_shop: Shop) -> None:
    assert_rung(
        lambda number: fresh_shop.meta.customer_says(SHOP_ID, CUSTOMER, f"bell {number}"),
        lambda number: fresh_shop.crm.wait(number + 1),
    )


def test_a_stop_is_clean_and_finishes_what_is_in_flight(tmp_path: Path) -> None:
    with opened(tmp_path, f"timeout_s = 60\n{QUICK}stop_grace_s = 60\n") as shop:
        shop.crm.answer(200, delay_s=600)
        shop.meta.customer_says(SHOP_ID, CUSTOMER, "in flight")
        shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE claim_id IS NOT NULL", [(1,)])
        process = shop.bridge._process
        assert process is not None
        process.terminate()
        shop.wait_log("serve.stopping")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        shop.crm.close()  # it answers at last
        assert shop.bridge.stop() == 0
        assert shop.rows("SELECT state, claim_id FROM deliveries") == [("done", None)]
        assert "calls_left=false" in shop.log()


def test_a_second_server_on_the_same_port_or_database_says_so(fresh_shop: Shop, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "crmbridge", "serve", "--config", str(fresh_shop.bridge.folder / "crmbridge.ini")]
    second = subprocess.run(
        words, capture_output=True, text=True, env=fresh_shop.bridge.environ, timeout=PATIENCE_S, check=False
    )
    assert second.returncode == 1
    assert "another crmbridge is running" in second.stderr
    environ = {**fresh_shop.bridge.environ, "CRMBRIDGE_WEB_PORT": fresh_shop.url.rsplit(":", 1)[1]}
    words = [sys.executable, "-m", "crmbridge"]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere: dict[str, Any] = {"cwd": folder, "env": environ, "capture_output": True, "timeout": PATIENCE_S}
    subprocess.run([*words, "init"], check=True, **elsewhere)
    taken = subprocess.run([*words, "serve"], check=False, text=True, **elsewhere)
    assert taken.returncode == 1
    assert "cannot listen on 127.0.0.1" in taken.stderr


@pytest.mark.slow
def test_the_demo_makes_its_round_trip(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crmbridge", "demo", "--once"],
        capture_output=True,
        text=True,
        timeout=BULK_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pending -> sent -> delivered -> read" in done.stdout
