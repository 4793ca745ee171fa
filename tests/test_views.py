"""The views and docs/operate.md's queries, through the real sqlite3 program, while the bridge works."""

import re
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from crmbridge import config
from crmbridge.events import instant
from crmbridge.ops import explain
from crmbridge.sandbox import wire
from crmbridge.store import overview
from crmbridge.store.database import Row, Tx
from crmbridge.store.sqlite import shifted
from tests.rig import START_S, Rig
from tests.shop import CUSTOMER, OTHER_ID, SHOP_ID, Shop
from tests.waiting import PATIENCE_S

DOCUMENT = (config.ROOT / "docs" / "operate.md").read_text()
(BLOCK,) = re.findall(r"^```sql\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
QUERIES = [part.partition("\n")[::2] for part in re.split(r"^-- ", BLOCK, flags=re.MULTILINE)[1:]]
MAY_BE_EMPTY = {
    "What was slow?",
    "Which alerts are open?",
    "What was held back of late, by a pause or an account's status, and why?",
}
VIEWS = ("stuck", "dead", "recent", "slow", "account_overview", "latency_last_hour", "webhook_deliveries")


def sqlite(shop: Shop, *words: str) -> str:
    shell = ["sqlite3", "-readonly", "-cmd", ".timeout 5000", str(shop.database)]  # as docs/operate.md says
    done = subprocess.run([*shell, *words], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def load(shop: Shop, end: threading.Event) -> None:
    number = 0
    while not end.wait(0.01):
        number += 1
        shop.meta.customer_says(SHOP_ID, f"70{number % 50}", f"hello {number}")


def test_every_query_of_the_document_works_while_the_bridge_does(fresh_shop: Shop) -> None:
    shop, end = fresh_shop, threading.Event()
    shop.lose("a CRM never takes this")
    shop.crm.answer(401, event="message.failed")
    shop.meta.customer_says(SHOP_ID, "900000000000001", "good day")
    shop.meta.customer_says(OTHER_ID, "900000000000001", "nobody is here")
    shop.send("good day to you", "key-1")
    shop.wait_rows("SELECT status FROM outbound_messages", [("delivered",)])
    shop.meta.fault("messages", status=403)
    shop.send("this fails", "key-2")
    shop.wait_rows("SELECT COUNT(*) FROM outbound_messages WHERE status = 'failed'", [(1,)])
    path = f"/api/v1/accounts/{shop.account_id}/pause"
    assert shop.call("POST", path, {"what": ["sends"], "reason": "the shop is closed"}).status_code == 200
    shop.send("this waits", "key-3")
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead' AND target = 'crm'", [(2,)])
    shop.wait_rows(
        "SELECT kind FROM alerts WHERE cleared_at IS NULL ORDER BY 1", [("crm_unauthorized",), ("dead_letter",)]
    )
    checked = shop.bridge.command("check")
    stats = shop.call("GET", "/api/v1/admin/stats", key=shop.admin_key)
    thread = threading.Thread(target=load, args=(shop, end))
    thread.start()
    try:
        found = {question: sqlite(shop, query) for question, query in QUERIES}
        shown = {view: sqlite(shop, f".schema {view}") for view in VIEWS}
    finally:
        end.set()
        thread.join()
    assert len(QUERIES) > 15
    assert {question for question, rows in found.items() if not rows} <= MAY_BE_EMPTY
    assert f"crmbridge account resume {shop.account_id} --sends" in found["What is stuck, since when, and why?"]
    assert "no account here has the Instagram account id" in found["What is stuck, since when, and why?"]
    assert (
        f"crmbridge explain {shop.account_id}"
        in found["How late are we, but for what was held or tried again by a person?"]
    )
    assert "crmbridge dlq retry dlv_" in found["What died today?"]
    assert re.search(
        rf"warning: {shop.account_id} \(your_shop\) webhooks: \d+ pending.*, 2 dead; .* p99 \d+ ms", checked
    )
    assert re.search(rf"warning: {shop.account_id} \(your_shop\) sends: 1 pending since .*, 1 dead; ", checked)
    assert "warning: 1 event(s) for Instagram accounts that are not connected here" in checked
    assert f"warning: alert crm_unauthorized {shop.account_id} since" in checked
    (account,) = stats.json()["accounts"]
    assert (account["account_id"], account["status"], account["pending_sends"]) == (shop.account_id, "active", 1)
    assert (account["dead_webhooks"], account["dead_sends"]) == (2, 1)
    assert account["paused_since"]["sends"] is not None
    assert account["latency"]["webhooks"]["count"] > 0
    assert "crm_unauthorized" in {alert["alert"] for alert in stats.json()["alerts"]}
    assert stats.json()["storage"]["database_bytes"] > 100_000
    assert stats.json()["requests"]["count"] > 5
    assert all(text.startswith("CREATE VIEW") and "--" in text.splitlines()[0] for text in shown.values())


def test_every_row_of_a_view_says_what_to_type(rig: Rig) -> None:
    rig.account()
    rig.lose("one", "mid-1")
    rig.crm.answer_always(503)
    rig.say("two", "mid-2")
    rig.say("three", "mid-3")
    rig.live_through(7)
    rig.crm.answer_always(None)
    rig.live_through(20)
    rig.crm.answer_always(503)
    rig.say("four", "mid-4")
    rig.drain()
    for view in ("stuck", "dead", "recent", "slow", "account_overview"):
        found = rig.db.rows(f"SELECT to_type FROM {view}")
        assert found, view
        assert all(re.match(r"crmbridge (explain|dlq retry) (dlv|acc)_", row["to_type"]) for row in found), view


def test_stuck_shows_what_is_not_on_its_normal_way_alone(rig: Rig) -> None:
    account = rig.account()
    rig.say("well", "mid-1")
    rig.drain()
    rig.send(account)
    rig.drain()
    assert rig.db.rows("SELECT * FROM stuck") == []
    rig.crm.answer_always(503)
    rig.say("ill", "mid-2")
    rig.say("behind it", "mid-3")
    rig.pass_s(1)
    ill, behind = rig.db.rows("SELECT * FROM stuck ORDER BY id")
    assert (ill["why"], ill["last_http_status"]) == ("failed once: the CRM answered 503", 503)
    assert behind["why"] == f"waits behind {ill['id']}"
    assert behind["to_type"] == f"crmbridge explain {ill['id']}"


def test_what_is_held_says_how_it_is_let_go_and_has_no_end(rig: Rig) -> None:
    gone, paused, failed = rig.account(), rig.account(OTHER_ID), rig.account("17841400000000003")
    rig.crm.answer_always(410)
    rig.say("one", "mid-1")
    rig.drain()
    for what in ("sends", "deliveries"):
        rig.pause(paused, what, reason="new CRM")
    rig.send(paused)
    rig.meta.fault("messages", status=400, body=wire.error_body(190, "expired", subcode=463))
    rig.send(failed)
    rig.drain()
    rig.now_s += 3600
    found = {row["account_id"]: row for row in rig.db.rows("SELECT * FROM stuck")}
    assert set(found) == {gone["id"], paused["id"], failed["id"]}
    assert {row[end] for row in found.values() for end in ("next_try",)} == {None}
    assert found[paused["id"]]["to_type"] == f"crmbridge account resume {paused['id']} --sends"
    change, resume = (f"crmbridge account {what} {gone['id']}" for what in ("set", "resume"))
    mend = f"{change} --url URL (where the CRM is now), or {resume} --deliveries"
    assert found[gone["id"]]["to_type"] == mend
    (told,) = explain.explain(rig.db, found[gone["id"]]["id"], rig.now_s, rig.patience)["stories"]
    assert told["to_type"] == [mend]
    assert "token_expired" in found[failed["id"]]["why"]


def test_what_may_have_arrived_is_not_to_be_sent_again_without_a_look(rig: Rig) -> None:
    account = rig.account()
    rig.meta.fault("messages", drop=True, after_effect=True)
    rig.meta.fault("conversations", times=10_000, status=503, body="")
    rig.send(account)
    rig.live_through(25 * 3600)
    (row,) = rig.db.rows("SELECT * FROM dead WHERE target = 'instagram'")
    assert (row["last_code"], row["to_type"]) == ("in_doubt", f"crmbridge explain {row['id']}")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM stuck LIMIT 20",
        "SELECT * FROM dead LIMIT 20",
        "SELECT * FROM recent LIMIT 20",
        "SELECT * FROM recent WHERE account_id = 'a' AND contact = 'c' LIMIT 20",
        "SELECT * FROM slow LIMIT 20",
        "SELECT * FROM latency_last_hour",
        "SELECT * FROM account_overview",
    ],
)
def test_no_view_reads_a_whole_table(rig: Rig, query: str) -> None:
    assert not scans(rig, query, ("x",) * query.count("?"))


def test_no_explanation_reads_a_whole_table(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    account, look = rig.account(), rig.db.rows
    asked: list[tuple[str, Sequence[Any]]] = []

    def noting(sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        asked.append((sql, parameters))
        return look(sql, parameters)

    rig.say("hello", "mid-1")
    message_id = rig.send(account)
    rig.drain()
    monkeypatch.setattr(rig.db, "rows", noting)
    for given in ("mid-1", "key-0", "nothing", CUSTOMER, account["id"], message_id, "test"):
        explain.explain(rig.db, given, rig.now_s, rig.patience)
    monkeypatch.undo()
    assert len(asked) > 50
    assert not [(sql, found) for sql, given in asked if (found := scans(rig, sql, given))]


def scans(rig: Rig, query: str, parameters: Sequence[Any]) -> list[str]:
    """Return where a query reads all of a table that grows with the messages."""
    plan = [row["detail"] for row in rig.db.rows(f"EXPLAIN QUERY PLAN {query}", parameters)]
    large = ("deliveries", "waiting", "head", "events", "outbound_messages", "history")
    found = [step for step in plan if step.startswith("SCAN") and step.split()[1] in large]
    # In the order of its rows with a limit, or over an index that holds only what is asked for.
    partial = ("deliveries_expiry", "deliveries_dead", "deliveries_dead_account", "deliveries_slow", "events_unrouted")
    return [step for step in found if not step.endswith(partial) and "FROM recent LIMIT" not in query]


def test_latencies_are_percentiles_of_the_last_hour(rig: Rig) -> None:
    account = rig.account()

    def fill(tx: Tx) -> None:
        for number in range(1, 101):
            values = {"contact": "c", "event": "e", "due": "", "correlation_id": "x"}
            values |= {"id": f"dlv_{number}", "target": "crm", "account_id": account["id"], "place": "done"}
            tx.insert("deliveries", {**values, "accepted_at": "", "aged_from": "", "latency_ms": number})
        tx.run("UPDATE deliveries SET finished_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-59 minutes')")
        tx.run("UPDATE deliveries SET finished_at = '2020-01-01T00:00:00.000Z' WHERE latency_ms > 50")

    rig.db.write(fill)
    (row,) = overview.accounts(rig.db)
    assert row["latency"] == {
        "webhooks": {"count": 50, "p50_ms": 25, "p95_ms": 48, "p99_ms": 50, "max_ms": 50},
        "sends": None,
    }


def test_what_was_held_or_revived_lifts_no_percentile(rig: Rig) -> None:
    account = rig.account()
    rig.lose("dead for hours", "mid-1")
    rig.now_s += 2 * 3600
    rig.revive(rig.dead()[0]["id"])
    rig.drain()
    rig.pause(account, "deliveries", reason="new CRM")
    rig.say("held by a pause", "mid-2", contact="802")
    rig.send(account, "held by the account's status")
    rig.fail_account(account)
    rig.now_s += 2 * 3600
    rig.change_account(account, status="active")
    rig.unpause(account, "deliveries")
    rig.drain()
    rig.now_s += 1
    rig.say("at once", "mid-3", contact="803")
    rig.send(account, "at once")
    rig.drain()
    assert rig.db.value("SELECT COUNT(*) FROM deliveries WHERE latency_ms >= 7200000") == 3
    (held,) = rig.db.rows("SELECT held FROM slow WHERE contact = '802'")
    assert held["held"] == f"{instant(START_S + 7200)} to {instant(START_S + 14_400)}: new CRM"

    def to_the_last_hour(tx: Tx) -> None:
        by = f"{time.time() - 60 - rig.now_s:+.3f}"
        for table, columns in (("deliveries", ("accepted_at", "finished_at")), ("history", ("at", "until"))):
            moved = ", ".join(f"{column} = {shifted(column)}" for column in columns)
            tx.run(f"UPDATE {table} SET {moved}", [by] * len(columns))

    rig.db.write(to_the_last_hour)
    counted = rig.db.rows("SELECT target, count, max_ms FROM latency_last_hour ORDER BY target")
    assert counted == [
        {"target": "crm", "count": 3, "max_ms": 0},
        {"target": "instagram", "count": 1, "max_ms": 0},
    ]
