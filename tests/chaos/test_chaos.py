"""Killed at any moment, under load and faults, the bridge keeps its promise; a bridge that does not is found out."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from crmbridge.sandbox import Sandbox
from tests.chaos import processes
from tests.chaos.history import CrmCall, Webhook
from tests.chaos.processes import Process
from tests.chaos.run import Plan, Stage, run
from tests.shop import CUSTOMER, QUICK, SHOP_ID, Shop
from tests.waiting import BULK_S, PATIENCE_S, SWEEP_S, free_port

pytestmark = pytest.mark.chaos
_TOLERANCE_S = 2.5
_TIMES = 10  # as long as what has its bell takes here, at this moment, may come to a sweep as well


def test_more_than_fifty_kills_break_no_promise(tmp_path: Path) -> None:
    """Two bridges at a time, so that each also meets a busy machine."""
    modes = {1: "serve", 2: "split", 3: "serve", 4: "split"}
    plans = [Plan(seed, 13, mode, least=(251, 51)) for seed, mode in modes.items()]
    folders = [tmp_path / str(plan.seed) for plan in plans]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, plans, folders))
    total = Counter[str]()
    for result in results:
        print(result.told())
        total.update(result.counts)
    print(f"all together: {total['kills']} kills")
    assert not [violation for result in results for violation in result.violations]
    assert total["kills"] >= 50
    # A run in which nothing happened proves nothing.
    for name in ("CRM duplicates, in flight at a kill", "attempts in_doubt", "attempts abandoned", "attempts absent"):
        assert total[name] > 0, name
    assert total["messages acknowledged"] > 1000
    assert total["sends acknowledged"] > 200


@pytest.mark.parametrize(
    ("plan", "rules"),
    [
        (Plan(1, 6, planted="ack_before_commit", outbound=0, quiet_s=15), {"acknowledged is delivered"}),
        (Plan(1, 0, planted="claim_without_fencing", quiet_s=20), {"no needless repetition"}),
        (Plan(1, 3, planted="huey_as_record", quiet_s=6), {"acknowledged is delivered", "nothing is left"}),
        (Plan(1, 4, planted="resend_without_asking", inbound=1, pause_s=0.02, quiet_s=20), {"one effect"}),
    ],
    ids=lambda value: value.planted if isinstance(value, Plan) else "",
)
def test_a_planted_bug_is_found(plan: Plan, rules: set[str], tmp_path: Path) -> None:
    found = Counter[str]()
    for seed in (1, 2, 3):  # a kill may miss the bug's moment, on a busy machine more often
        folder = tmp_path / str(seed)
        folder.mkdir()
        result = run(replace(plan, seed=seed), folder)
        found.update(violation.rule for violation in result.violations)
        print(plan.planted, dict(found))
        if rules <= set(found):
            return
    raise AssertionError(result.told())


@contextmanager
def still_shop(folder: Path) -> Iterator[tuple[Shop, dict[str, Process]]]:
    """Yield a shop and the processes that its bridge may be made of, none of them started."""
    with Sandbox() as sandbox:
        shop = Shop(folder, sandbox, QUICK)
        shop.bridge.environ["CRMBRIDGE_WEB_PORT"] = str(free_port())
        shop.start()
        shop.open()
        shop.close()
        environ = shop.bridge.environ
        parts = {
            name: Process(name, words, folder / "crmbridge.ini", environ, planted)
            for name, words, planted in (
                ("serve", ("serve",), None),
                ("web", ("serve", "--no-worker"), None),
                ("dying", ("serve", "--no-worker"), "die_before_ringing"),
                ("worker", ("worker",), None),
            )
        }
        try:
            yield shop, parts
        finally:
            for part in parts.values():
                part.stop()


@pytest.mark.parametrize("mode", processes.MODES)
def test_500_messages_acknowledged_before_a_kill_arrive_once_each(mode: str, tmp_path: Path) -> None:
    """The CRM answers 500 to everything, the bridge is killed after the last 200, the CRM recovers."""
    with still_shop(tmp_path) as (shop, all_parts):
        parts = [all_parts[name] for name in processes.MODES[mode]]
        for part in parts:
            part.spawn()
            part.wait_ready()
        shop.crm.answer_always(500)

        def say(number: int) -> int:
            return shop.meta.customer_says(SHOP_ID, f"83{number % 40}", f"in {number}").status

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(say, range(500))) == {200}
        for part in parts:
            part.kill()
        assert not [entry for entry in shop.crm.received if entry.answered == 200]
        shop.crm.answer_always(None)
        for part in parts:
            part.spawn()
        shop.crm.wait(500, timeout_s=BULK_S, where=lambda entry: entry.answered == 200)
        shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state <> 'done'", [(0,)])
        taken = [entry.event for entry in shop.crm.received if entry.answered == 200]
        assert Counter(event["message"] for event in taken) == {f"in {number}": 1 for number in range(500)}
        lanes: dict[str, int] = {}
        for event in taken:
            assert event["sequence"] > lanes.get(event["sender_id"], 0)
            lanes[event["sender_id"]] = event["sequence"]


def test_a_kill_between_commit_and_bell_delays_by_a_sweep_at_most(tmp_path: Path) -> None:
    with still_shop(tmp_path) as (shop, parts):
        for name in ("worker", "web"):
            parts[name].spawn()
            parts[name].wait_ready()
        began = time.monotonic()
        assert shop.meta.customer_says(SHOP_ID, CUSTOMER, "somebody rings").status == 200
        shop.crm.wait(1)
        at_most_s = SWEEP_S + _TOLERANCE_S + _TIMES * (time.monotonic() - began)
        parts["web"].kill()
        parts["dying"].spawn()
        parts["dying"].wait_ready()
        began = time.monotonic()
        assert shop.meta.customer_says(SHOP_ID, CUSTOMER, "nobody rang").status == 0
        assert parts["dying"].wait(PATIENCE_S) == 9
        shop.crm.wait(2)
        took_s = {"in": time.monotonic() - began}
        parts["dying"].spawn()
        parts["dying"].wait_ready()
        began = time.monotonic()
        with pytest.raises(OSError):  # requests' own errors are OSErrors
            shop.send("nobody rang", "bell-1")
        shop.meta.wait_sent(1)
        took_s["out"] = time.monotonic() - began
        print(f"at most {at_most_s:.1f} s: {took_s}")
        assert max(took_s.values()) < at_most_s
        # Both were kept, so Meta's and the client's repetitions change nothing.
        parts["web"].spawn()
        parts["web"].wait_ready()
        assert shop.send("nobody rang", "bell-1").status_code == 202
        assert shop.rows("SELECT COUNT(*) FROM outbound_messages") == [(1,)]
        assert [entry.text for entry in shop.meta.sent] == ["nobody rang"]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(7, 0, "serve", is_fair=True),
        Plan(7, 0, "split", is_fair=True),
        Plan(8, 0, "serve", is_fair=True, inbound=1, outbound=1, pause_s=2.0),  # so seldom that each needs a bell
    ],
    ids=["serve", "split", "seldom"],
)
def test_the_queue_may_be_deleted_under_load(plan: Plan, tmp_path: Path) -> None:
    def delete_the_queue(stage: Stage) -> None:
        for _ in range(5):
            time.sleep(2 if plan.pause_s > 1 else 0.7)
            for path in (stage.folder / "var").glob("queue.db*"):
                if not path.name.endswith(".bell"):
                    path.unlink(missing_ok=True)

    result = run(plan, tmp_path, delete_the_queue)
    print(result.told())
    assert not result.violations
    first: dict[str, float] = {}
    for call in result.history.of(CrmCall):
        first.setdefault(call.subject, call.at)
    late = [
        first[item.mid] - webhook.until
        for webhook in result.history.of(Webhook)
        if webhook.status == 200
        for item in webhook.items
        if item.kind == "message"
    ]
    print(f"median: {median(late):.3f} s, slowest: {max(late):.2f} s")
    assert max(late) < SWEEP_S + _TOLERANCE_S + _TIMES * median(late)
