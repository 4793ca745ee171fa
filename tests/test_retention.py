"""What grows old goes, in small steps; what is owed and what tells repetitions stays; the files stay small."""

import contextlib
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from crmbridge.config import Retention
from crmbridge.events import instant
from crmbridge.ops import check
from crmbridge.sandbox import wire
from crmbridge.store import dead as dlq
from crmbridge.store import feed, inbound, retention, story, turn
from crmbridge.store.accounts import everyone
from crmbridge.store.database import Database, Tx
from crmbridge.upkeep import Upkeep
from tests.rig import Rig
from tests.shop import OTHER_ID, SHOP_ID, Shop
from tests.test_feed import Stopped, follower, hundreds_of_steps
from tests.waiting import BULK_S, until

DAY_S = 86_400
MB = 2**20


def upkeep(rig: Rig, **settings: int) -> Upkeep:
    return Upkeep(rig.db, Retention(**settings), rig.patience, rig.alarm, clock=rig.clock, pause=lambda seconds: None)


def prune(rig: Rig, days: float = 0, **settings: int) -> None:
    """Let days pass, then sweep until there is nothing left to do."""
    rig.now_s += days * DAY_S
    upkeep(rig, **settings).prune()


def column(rig: Rig, sql: str) -> list[Any]:
    return [next(iter(row.values())) for row in rig.db.rows(sql)]


def count(rig: Rig, what: str) -> int:
    return int(rig.db.value(f"SELECT COUNT(*) FROM {what}"))


def warned(caplog: pytest.LogCaptureFixture, name: str) -> list[dict]:
    return [record.facts for record in caplog.records if record.getMessage() == name]  # type: ignore[attr-defined]


def test_texts_go_first_then_rows_and_never_what_is_owed(rig: Rig) -> None:
    account = rig.account()
    rig.say("old and delivered", "mid-1")
    message_id = rig.send(account, "old and sent")
    rig.drain()
    rig.drain()
    rig.crm.answer_always(500)
    rig.say("old and owed", "mid-2", contact="900000000000002")
    prune(rig, 8)
    assert column(rig, "SELECT payload IS NOT NULL FROM events WHERE message_id IS NULL") == [0, 1]
    assert column(rig, "SELECT content FROM outbound_messages") == [None]
    assert column(rig, "SELECT DISTINCT body FROM events WHERE gone = 1") == [None]
    assert column(rig, "SELECT gone FROM deliveries ORDER BY position") == [1, 1, 1, 0]
    assert rig.status(message_id)["status"] == "sent"
    prune(rig, 84)
    assert count(rig, "events") == 1
    for table in ("outbound_messages", "history"):
        assert count(rig, table) == 0
    rig.crm.answer_always(None)
    rig.drain()
    assert rig.taken()[-1].event["message"] == "old and owed"


def test_a_text_lives_from_the_end_of_its_delivery_so_that_a_dead_one_can_be_tried_again(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(500)
    rig.meta.fault("messages", times=1000, status=400, body=wire.error_body(613, "Calls exceeded"))
    rig.say("dead after a day", "mid-1")
    message_id = rig.send(account, "dead, too")
    rig.live_through(1.1 * DAY_S)
    assert column(rig, "SELECT DISTINCT state FROM deliveries WHERE event <> 'message.failed'") == ["dead"]
    prune(rig, 6.5)
    dlq.revive_all(rig.db, dlq.Filter("crm"), rig.now_s, preview=False)
    rig.revive(str(rig.db.value("SELECT id FROM deliveries WHERE target = 'instagram'")))
    prune(rig, 20)
    rig.say("still there?", "mid-2")  # opens the window for the answer
    rig.crm.answer_always(None)
    rig.meta.clear_faults()
    rig.live_through(60)
    assert "dead after a day" in [entry.event.get("message") for entry in rig.taken()]
    assert rig.meta.sent[-1].text == "dead, too"
    prune(rig, 7.1)
    assert column(rig, "SELECT DISTINCT payload FROM events") == [None]
    assert rig.db.value("SELECT content FROM outbound_messages WHERE id = ?", (message_id,)) is None


def test_what_an_account_without_url_has_not_read_yet_lives_as_long(rig: Rig) -> None:
    rig.account(url=None)
    rig.say("read me", "mid-1")
    prune(rig, 6)
    assert len(feed.page(rig.db, everyone(rig.db), after=None, limit=9).events) == 1
    prune(rig, 2)
    cursor = feed.page(rig.db, everyone(rig.db), after=None, limit=9).next_cursor
    assert cursor is not None
    prune(rig, 90)
    assert count(rig, "deliveries") == 0
    rig.say("later", "mid-2")
    assert len(feed.page(rig.db, everyone(rig.db), after=cursor, limit=9).events) == 1


def test_a_held_echo_keeps_its_text_until_its_send_is_settled(rig: Rig) -> None:
    account = rig.account()
    rig.send(account, "in flight")
    (row,) = rig.due("instagram", account)
    rig.claim(row, account)
    rig.echo("typed in the app", "mid-echo")
    prune(rig, 30)
    assert column(rig, "SELECT state FROM events") == ["held"]
    assert column(rig, "SELECT payload IS NOT NULL FROM events") == [1]
    turn.delete_account(rig.db, account["id"])
    assert rig.db.rows("SELECT state, payload FROM events") == [{"state": "noted", "payload": None}]


def test_a_repetition_is_known_for_a_week_however_little_is_kept(rig: Rig) -> None:
    rig.account()
    body = rig.item({"message": {"mid": "mid-1", "text": "once"}})
    elsewhere = rig.item({"message": {"mid": "mid-2", "text": "for nobody"}})
    rig.hear(body)
    rig.hear(elsewhere, account=OTHER_ID)
    rig.drain()
    little = {"text_days": 1, "metadata_days": 7, "unrouted_days": 1, "max_mb": 1, "unrouted_max": 0}
    prune(rig, 6.9, **little)
    assert column(rig, "SELECT DISTINCT payload FROM events") == [None]
    assert [kept.state for kept in rig.hear(body)] == ["duplicate"]
    assert [kept.state for kept in rig.hear(elsewhere, account=OTHER_ID)] == ["duplicate"]
    prune(rig, 0.2, **little)
    assert count(rig, "events") == 0


def test_unrouted_events_are_bounded_in_number_the_oldest_go(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(30):
        rig.hear(rig.item({"message": {"mid": f"mid-{number}", "text": str(number)}}), account=OTHER_ID)
        rig.now_s += 1
    prune(rig, unrouted_max=10)
    assert column(rig, "SELECT state FROM events ORDER BY received_at") == ["dropped"] * 20 + ["unrouted"] * 10
    assert warned(caplog, "unrouted.dropped") == [{"events": 20}]
    rig.account(OTHER_ID)
    rig.say("first", "mid-x")
    Upkeep(rig.db, Retention(), rig.patience, rig.alarm, clock=rig.clock).sweep()
    rig.live_through(1)
    heard = [entry.event["message"] for entry in rig.taken()]
    assert heard == [str(number) for number in range(20, 30)]


def test_a_receipt_and_an_echo_of_ours_leave_no_text_behind(rig: Rig) -> None:
    account = rig.account()
    rig.send(account, "hello")
    rig.drain()
    rig.echo("hello", str(rig.meta.sent[0].mid))
    assert rig.db.rows("SELECT state, payload FROM events WHERE message_id IS NULL") == [
        {"state": "noted", "payload": None}
    ]


def _fill(db: Database, account_id: str, number: int, finished_at: str, *, size: int = 2000) -> None:
    """Write delivered messages of that age straight into the database."""
    rows = f"WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {number})"
    at = f"'{finished_at}'"
    first = int(db.value("SELECT COALESCE(MAX(position), 0) FROM deliveries"))
    event_id = f"printf('evt_%026d', n + {first})"

    def job(tx: Tx) -> None:
        tx.run(f"""
            INSERT INTO events (id, account_id, instagram_account_id, contact, kind, sequence, dedupe_key, state,
                payload, body, occurred_at, received_at, correlation_id)
            {rows} SELECT {event_id}, '{account_id}', '{SHOP_ID}', '1', 'message.received', n, {event_id}, 'forwarded',
                '{{"text": "' || hex(zeroblob({size // 2})) || '", "message_type": "text"}}',
                '{{"message": "' || hex(zeroblob({size // 2})) || '"}}', {at}, {at}, 'test'
            FROM number""")
        tx.run(f"""
            INSERT INTO deliveries (id, target, account_id, contact, event, event_id, place, due, correlation_id,
                accepted_at, aged_from, finished_at)
            {rows} SELECT 'dlv_' || (n + {first}), 'crm', '{account_id}', '1', 'message.received', {event_id}, 'done',
                {at}, 'test', {at}, {at}, {at}
            FROM number""")

    db.write_last(job)


def test_over_its_size_what_frees_pages_goes_oldest_first_and_no_more_of_it(rig: Rig) -> None:
    account, long, short = rig.account(), 6000, 900
    rig.now_s = 1_800_000_000.0  # 2027-01-15
    ages = {"old long": (20, long), "old short": (9, short), "long": (3, long), "short": (2, short), "young": (0, long)}
    for days, size in ages.values():
        _fill(rig.db, account["id"], 400, instant(rig.now_s - (days + 0.5) * DAY_S), size=size)
    kept = {"text_days": 30, "metadata_days": 90}

    def left() -> dict[str, list[int]]:
        """Return how many rows of each age there are, and how many of these have their texts."""
        counts = "SELECT COUNT(*) AS number, COALESCE(SUM(gone = 0), 0) AS texts FROM deliveries WHERE finished_at = ?"
        at = {name: instant(rig.now_s - (days + 0.5) * DAY_S) for name, (days, _) in ages.items()}
        return {name: list(rig.db.rows(counts, (at[name],))[0].values()) for name in ages}

    def bound(max_mb: int) -> None:
        prune(rig, **kept, max_mb=max_mb)
        assert rig.db.used_bytes() <= max_mb * MB
        assert not rig.alerts

    whole = {name: [400, 400] for name in ages}
    used_mb = rig.db.used_bytes() // MB
    bound(used_mb - 2)
    rows, texts = left()["old long"]
    assert left() == whole | {"old long": [rows, texts]}
    assert rows == 400
    assert 0 < texts < 400
    bound(used_mb - 9)
    rows, texts = left()["long"]
    assert left() == whole | {"old long": [0, 0], "old short": [0, 0], "long": [rows, texts]}
    assert rows == 400
    assert 0 < texts < 400


def test_over_its_size_no_text_goes_that_is_young_or_would_free_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    account = rig.account()
    rig.now_s = 1_800_000_000.0
    for age_s, size in ((14, 900), (20 * 3600, 6000), (6 * DAY_S, 900)):
        _fill(rig.db, account["id"], 750, instant(rig.now_s - age_s), size=size)
    used = rig.db.used_bytes()
    assert used > 6 * MB
    for _ in range(2):
        prune(rig, max_mb=6)
        assert column(rig, "SELECT DISTINCT gone FROM deliveries") == [0]
        assert rig.db.used_bytes() == used
    assert rig.alerts[-1] == (
        "database_large",
        f"the database uses {used / MB:.1f} MB, more than [retention] max_mb = 6: "
        "what is left is owed, or younger than 7 days",
    )
    assert warned(caplog, "storage.database_large")
    assert not rig.cleared
    prune(rig, max_mb=100)
    assert rig.cleared == ["database_large"]
    prune(rig, 1.1, max_mb=4)
    assert column(rig, "SELECT gone FROM deliveries ORDER BY finished_at") == [1] * 750 + [0] * 750, (
        "the rows that are a week old went, and the long texts; the short ones of yesterday stay"
    )


def test_what_is_owed_goes_for_no_size(rig: Rig) -> None:
    account = rig.account()
    _fill(rig.db, account["id"], 400, "2026-01-01T00:00:00.000Z", size=6000)
    rig.db.write_last(lambda tx: tx.run("UPDATE deliveries SET place = 'aside', finished_at = NULL"))
    prune(rig, max_mb=1)
    assert rig.alerts[-1][0] == "database_large"
    assert count(rig, "events WHERE gone = 0 AND body IS NOT NULL") == 400


def test_a_vacuum_closes_the_gaps_that_short_texts_left(rig: Rig) -> None:
    """As the alert says."""
    account = rig.account()
    _fill(rig.db, account["id"], 3000, instant(rig.now_s - 2 * DAY_S), size=900)
    used = rig.db.used_bytes()
    prune(rig, text_days=1)
    assert count(rig, "deliveries WHERE gone = 1") == 3000
    assert rig.db.used_bytes() > used * 0.9
    rig.db.close_thread()
    with contextlib.closing(sqlite3.connect(rig.db.path)) as connection:
        connection.execute("VACUUM")
    assert rig.db.can_shrink()
    assert rig.db.used_bytes() < used * 0.7


def test_a_run_ends_with_its_time_and_the_next_goes_on(rig: Rig) -> None:
    account = rig.account()
    _fill(rig.db, account["id"], 3000, "2026-01-01T00:00:00.000Z", size=100)
    terms = retention.Terms("2026-06", "2025", "2026", "2026", "2026", 0, 0)
    pauses: list[float] = []
    total = 0
    while swept := retention.sweep(rig.db, terms, budget_s=0.02, pause=pauses.append).texts:
        assert swept < 3000
        total += swept
    assert total == 3000
    assert min(pauses) > 0


def test_writers_need_not_wait_for_a_run(rig: Rig) -> None:
    """Among 5,000 old messages a write gets its turn within a few of the run's steps."""
    account = rig.account()
    _fill(rig.db, account["id"], 5000, "2026-01-01T00:00:00.000Z", size=100)
    swept: list[retention.Swept] = []
    terms = retention.Terms("2026-06", "2026-06", "2026", "2026", "2026", 0, 0)
    steps, waited = [0.0], list[int]()

    def sweep() -> None:
        swept.append(retention.sweep(rig.db, terms, budget_s=BULK_S, pause=steps.append))
        rig.db.close_thread()

    thread = threading.Thread(target=sweep)
    thread.start()
    while thread.is_alive():
        before = len(steps)
        rig.say("new", f"mid-{len(waited)}")
        waited.append(len(steps) - before)
        time.sleep(0.005)
    assert (swept[0].texts, swept[0].rows) == (5000, 5000)
    assert len(steps) > 10_000 / retention._MOST  # each of them short
    assert len(waited) > 20
    assert sorted(waited)[len(waited) * 9 // 10] <= 3


@pytest.mark.parametrize(
    ("kind", "index"),
    [
        (retention._texts("done", "2"), "deliveries_texts"),
        (retention._long_texts("2"), "events_long"),
        (retention._deliveries("2"), "deliveries_age"),
        (retention._events("noted", "2"), "events_age"),
        (retention._unrouted("2"), "events_age"),
    ],
)
def test_what_may_go_is_found_by_its_index_alone(rig: Rig, kind: retention._Kind, index: str) -> None:
    steps = rig.db.rows(f"EXPLAIN QUERY PLAN {kind.sql} LIMIT 9", kind.parameters)
    plan = " ".join(row["detail"] for row in steps)
    assert f"INDEX {index}" in plan
    assert "SCAN" not in plan
    assert "TEMP B-TREE" not in plan


@pytest.mark.parametrize(
    "kind",
    [retention._texts("done", "2027"), retention._deliveries("2027"), retention._events("noted", "2027")],
    ids=["texts", "deliveries", "events"],
)
def test_a_step_costs_the_same_however_much_is_old(rig: Rig, kind: retention._Kind) -> None:
    account = rig.account()
    _fill(rig.db, account["id"], 20_000, "2026-01-01T00:00:00.000Z", size=10)
    rig.db.write_last(lambda tx: tx.run("UPDATE events SET state = 'noted' WHERE rowid % 2 = 0"))
    keys = [next(iter(row.values())) for row in rig.db.rows(f"{kind.sql} LIMIT 50", kind.parameters)]
    taken = list[int]()
    steps = hundreds_of_steps(rig.db, lambda: taken.append(rig.db.write_last(lambda tx: kind.take(tx, keys))))
    assert taken == [50]
    assert steps < 200


def test_a_message_costs_the_same_among_20000(rig: Rig) -> None:
    """From its webhook to its delivery, with all that may follow it, and the stories of it."""
    account = rig.account()

    def work(name: str) -> None:
        rig.say(name, f"mid-{name}")
        message_id = rig.send(account, name)
        rig.drain()
        rig.echo(name, str(rig.meta.sent[-1].mid))
        rig.echo("typed elsewhere", f"mid-echo-{name}")
        rig.hear(rig.item({"read": {"mid": f"mid-echo-{name}"}}))
        for mid in (f"mid-{name}", f"mid-new-{name}"):
            rig.hear(rig.item({"message_edit": {"mid": mid, "text": "better", "num_edit": 1}}))
            rig.hear(rig.item({"reaction": {"mid": mid, "action": "react", "emoji": "x"}}))
        rig.hear(rig.item({"message_edit": {"mid": f"mid-new-{name}", "text": "", "num_edit": 0}}))
        reply = {"mid": f"mid-new-{name}", "text": "told late", "reply_to": {"mid": f"mid-{name}"}}
        rig.hear(rig.item({"message": reply}))
        rig.hear(rig.item({"message": {"mid": f"mid-{name}", "is_deleted": True}}))
        rig.drain()
        inbound.adopt(rig.db, account)
        story.of_message(rig.db, message_id, instant(rig.now_s))
        for kind, found in story.meanings(rig.db, f"mid-{name}"):
            assert kind == "event"
            story.of_event(rig.db, found, instant(rig.now_s))

    work("before")
    few = hundreds_of_steps(rig.db, lambda: work("few"))
    _fill(rig.db, account["id"], 20_000, "2026-01-01T00:00:00.000Z", size=10)
    rig.db.write_last(lambda tx: tx.run("UPDATE events SET instagram_message_id = 'm-' || id"))
    assert hundreds_of_steps(rig.db, lambda: work("many")) < 2 * few + 100


# --- the files ---


def test_the_file_shrinks_when_much_of_it_is_free(rig: Rig) -> None:
    account = rig.account()
    assert rig.db.can_shrink()
    _fill(rig.db, account["id"], 6000, "2026-01-01T00:00:00.000Z", size=4000)
    rig.db.checkpoint()
    before = rig.db.sizes()["database_bytes"]
    assert before > 48 * MB

    def free_after_a_run() -> int:
        prune(rig)
        return rig.db.free_bytes()

    until(free_after_a_run, lambda free: free <= retention.SPARE_BYTES)  # a slow disk takes more than one run's time
    rig.db.checkpoint()
    assert rig.db.sizes()["database_bytes"] < before / 2
    assert rig.db.value("PRAGMA integrity_check") == "ok"


def test_an_old_file_that_cannot_shrink_is_named(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    account = rig.account()
    rig.db.close_thread()
    with contextlib.closing(sqlite3.connect(rig.db.path)) as connection:
        connection.execute("PRAGMA journal_mode = delete")
        connection.execute("PRAGMA auto_vacuum = none")
        connection.execute("VACUUM")
    assert not rig.db.can_shrink()
    _fill(rig.db, account["id"], 3000, "2026-01-01T00:00:00.000Z", size=8000)
    prune(rig)
    assert rig.db.free_bytes() > retention.SPARE_BYTES
    check.run(rig.settings, rig.db.path, verbose=False)
    assert "auto_vacuum = incremental; VACUUM" in capsys.readouterr().out


def test_a_log_that_a_long_read_keeps_is_noticed_and_shrinks_after_it(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    account, job = rig.account(), upkeep(rig)
    with contextlib.closing(sqlite3.connect(rig.db.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM accounts").fetchall()
        _fill(rig.db, account["id"], 9000, "2027-01-01T00:00:00.000Z", size=2000)
        job.checkpoint()
        (warning,) = warned(caplog, "storage.wal_large")
        assert warning["wal_bytes"] > 32 * MB
    job.checkpoint()
    rig.say("a write begins the log anew", "mid-1")
    assert rig.db.sizes()["wal_bytes"] <= 8 * MB
    assert len(warned(caplog, "storage.wal_large")) == 1


def test_a_checkpoint_that_fails_is_a_log_line(rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    junk = tmp_path / "junk.db"
    junk.write_text("this is no database, and long enough to be looked at as one " * 20)
    with contextlib.closing(Database(junk)) as broken:
        Upkeep(broken, Retention(), rig.patience, rig.alarm).checkpoint()
    assert "not a database" in warned(caplog, "storage.checkpoint_failed")[0]["error"]


# --- over the real server ---


def test_a_follower_misses_nothing_through_a_restart_and_a_retention_run(fresh_shop: Shop) -> None:
    shop, kept = fresh_shop, dict[str, str | None]()
    shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"crm_webhook_url": None})

    def follow(wanted: int, cursor: str | None) -> str | None:
        """Follow until so many events were kept in all, and there is nothing more; return the cursor."""
        last = [cursor]

        def keep(events: list[dict], cursor: str | None) -> None:
            last[0] = cursor
            for event in events:
                assert event["event_id"] not in kept, "twice"
                kept[event["event_id"]] = event["message"]
            if len(kept) >= wanted and not events:
                raise Stopped

        with pytest.raises(Stopped):
            follower()(shop.url, shop.key, keep, cursor, every_s=0.01)
        return last[0]

    def say(first: int, end: int) -> None:
        for number in range(first, end):
            shop.hears(f"80{number % 5}", f"text {number}")

    say(0, 20)
    cursor = follow(20, None)
    say(20, 30)
    shop.kill()
    shop.start()
    cursor = follow(30, cursor)
    with contextlib.closing(sqlite3.connect(shop.database)) as connection, connection:
        old = "2020-01-01T00:00:00.000Z"
        connection.execute("UPDATE events SET received_at = ?", (old,))
        connection.execute("UPDATE deliveries SET accepted_at = ?, finished_at = ?", (old, old))
    say(30, 40)
    db = Database(shop.database)
    retention.sweep(db, retention.Terms("2021", "2021", "2021", "2021", "2021", 0, 0))
    db.close()
    # the server's own sweep may have taken some of it
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE accepted_at < '2021'", [(0,)])
    say(40, 50)
    follow(50, cursor)
    assert list(kept.values()) == [f"text {number}" for number in range(50)]
