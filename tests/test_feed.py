"""Events read by a cursor: all of them, once, in order, as they are pushed; through restarts, backups and retention."""

import itertools
import json
import re
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from crmbridge import config
from crmbridge.errors import Conflict, Invalid, Unavailable
from crmbridge.store import accounts, database, feed
from crmbridge.store.database import Database
from tests.rig import Rig
from tests.shop import OTHER_ID, OTHER_TOKEN, QUICK, SHOP_ID, Shop, opened
from tests.waiting import PATIENCE_S, free_port, until

DOCUMENT = (config.ROOT / "docs" / "crm.md").read_text()


class Stopped(Exception):
    """Ends the follower, which else goes on for ever."""


def follower() -> Callable[..., None]:
    """Return the document's."""
    (block,) = re.findall(r"```python\n([^`]*def follow\([^`]*)```", DOCUMENT)
    assert len(block.strip().splitlines()) <= 20
    room: dict[str, Any] = {}
    exec(block, room)
    found: Callable[..., None] = room["follow"]
    return found


def page(rig: Rig, after: str | None = None, *, limit: int = 50, only: list[str] | None = None) -> feed.Page:
    rows = [row for row in accounts.everyone(rig.db) if only is None or row["id"] in only]
    return feed.page(rig.db, rows, after=after, limit=limit)


def texts(events: list[str]) -> list[str]:
    return [json.loads(event).get("message") for event in events]


def pages(rig: Rig, after: str | None = None, *, limit: int = 50) -> Iterator[feed.Page]:
    """Follow to the present end."""
    while True:
        found = page(rig, after, limit=limit)
        yield found
        after = found.next_cursor
        if not found.has_more:
            return


def test_events_come_in_order_once_and_byte_for_byte_as_they_are_pushed(rig: Rig) -> None:
    account = rig.account()
    rig.say("pushed first", "mid-1")
    rig.send(account, "a reply")
    rig.drain()
    rig.crm.answer_always(500)
    for number in range(5):
        rig.say(f"read first {number}", f"mid-r{number}", contact=f"80{number}")
    found = [event for one in pages(rig, limit=2) for event in one.events]
    rig.crm.answer_always(None)
    rig.live_through(3600)
    assert len(found) == 7
    assert json.loads(found[1])["event"] == "message.sent"
    assert sorted(found) == sorted(entry.body.decode() for entry in rig.taken())
    assert [event for one in pages(rig, limit=3) for event in one.events] == found


def test_every_event_is_there_whatever_became_of_its_push(rig: Rig) -> None:
    rig.account()
    for number, answered in enumerate((200, 500, 401)):
        rig.crm.answer_always(answered)
        rig.say(f"answered {answered}", f"mid-{number}", contact=f"80{number}")
        rig.drain()
    states = rig.db.rows("SELECT state FROM deliveries ORDER BY position")
    assert [row["state"] for row in states] == ["done", "pending", "dead"]
    assert texts(page(rig).events) == ["answered 200", "answered 500", "answered 401"]


def test_the_cursor_stays_at_the_end_and_goes_on_with_what_is_new(rig: Rig) -> None:
    rig.account(url=None)
    assert page(rig) == feed.Page([], None, False, 0)
    rig.say("one", "mid-1")
    first = page(rig)
    assert (texts(first.events), first.has_more, first.expired) == (["one"], False, 0)
    again = page(rig, first.next_cursor)
    assert again == feed.Page([], first.next_cursor, False, 0)
    rig.say("two", "mid-2")
    assert texts(page(rig, again.next_cursor).events) == ["two"]
    event_id = json.loads(first.events[0])["event_id"]
    assert page(rig, event_id) == page(rig, first.next_cursor)


def test_a_page_is_bounded_in_bytes_but_never_empty(rig: Rig) -> None:
    rig.account(url=None)
    for number in range(4):
        rig.hear(rig.item({"message": {"mid": f"mid-{number}", "is_unsupported": True, "more": "x" * 600_000}}))
    found = list(pages(rig))
    assert [len(one.events) for one in found] in ([1, 1, 1, 1], [2, 2])
    assert [one.has_more for one in found][-1] is False


def test_what_retention_took_is_left_out_and_counted(rig: Rig) -> None:
    rig.account(url=None)
    for number in range(6):
        rig.say(f"text {number}", f"mid-{number}")
    start = page(rig, limit=1).next_cursor
    take = "UPDATE events SET gone = 1, body = NULL, payload = NULL WHERE position IN (1, 2, 3, 6)"
    rig.db.write_last(lambda tx: tx.run(take))
    found = page(rig, start, limit=1)
    assert (texts(found.events), found.has_more, found.expired) == (["text 3"], True, 2)
    rest = page(rig, found.next_cursor)
    assert (texts(rest.events), rest.has_more, rest.expired) == (["text 4"], False, 1)
    assert page(rig, rest.next_cursor).expired == 0
    assert (texts(page(rig).events), page(rig).expired) == (["text 3", "text 4"], 1)


def test_a_cursor_outlives_its_row(rig: Rig) -> None:
    rig.account(url=None)
    rig.say("one", "mid-1")
    cursor = page(rig).next_cursor
    rig.db.write_last(lambda tx: tx.run("DELETE FROM events"))
    assert page(rig, cursor) == feed.Page([], cursor, False, 0)
    rig.say("two", "mid-2")
    assert texts(page(rig, cursor).events) == ["two"]


def test_a_cursor_from_before_a_restored_backup_is_refused(rig: Rig) -> None:
    rig.account(url=None)
    rig.say("in the backup", "mid-1")
    good = page(rig)
    backup = rig.db.path.with_name("backup.db")
    with closing(sqlite3.connect(rig.db.path)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    rig.say("lost", "mid-2")
    lost = page(rig, good.next_cursor)
    restored = database.open_existing(backup)
    try:
        rows = accounts.everyone(restored)

        def refused() -> None:
            for after in (lost.next_cursor, json.loads(lost.events[0])["event_id"]):
                with pytest.raises(Conflict) as raised:
                    feed.page(restored, rows, after=after, limit=1)
                assert raised.value.code == "cursor_unknown"

        refused()
        rig.db, kept = restored, rig.db
        rig.say("in the same place", "mid-3")
        rig.db = kept
        refused()
        assert texts(feed.page(restored, rows, after=good.next_cursor, limit=9).events) == ["in the same place"]
    finally:
        restored.close()


@pytest.mark.parametrize(
    "after", ["", "1", "-1-abcdefgh", "1-ABCDEFGH", "1-abcdefgh\n", "²-abcdefgh", "evt_1", "9" * 30]
)
def test_a_malformed_cursor_is_named(rig: Rig, after: str) -> None:
    with pytest.raises(Invalid) as raised:
        page(rig, after)
    assert raised.value.code == "invalid_cursor"
    assert raised.value.details[0]["field"] == "after"


def test_several_accounts_come_in_one_order_and_none_sees_another(rig: Rig) -> None:
    ours, theirs = rig.account(url=None), rig.account(OTHER_ID, url=None)
    for number in range(9):
        item = rig.item({"message": {"mid": f"mid-{number}", "text": str(number)}})
        rig.hear(item, account=SHOP_ID if number % 3 else OTHER_ID)
    assert [text for one in pages(rig, limit=2) for text in texts(one.events)] == [str(number) for number in range(9)]
    assert texts(page(rig, only=[theirs["id"]]).events) == ["0", "3", "6"]
    foreign = json.loads(page(rig, only=[theirs["id"]]).events[0])["event_id"]
    with pytest.raises(Conflict):
        page(rig, foreign, only=[ours["id"]])


def test_an_event_that_cannot_be_rendered_stops_none_of_the_others(rig: Rig) -> None:
    rig.account(url=None)
    for number in range(3):
        rig.say(str(number), f"mid-{number}")
    rig.db.write_last(lambda tx: tx.run("UPDATE events SET payload = '[]' WHERE contact <> '' AND rowid = 2"))
    found = page(rig)
    assert (texts(found.events), found.expired) == (["0", "2"], 1)


def test_on_a_full_disk_events_are_read_all_the_same(rig: Rig) -> None:
    rig.account(url=None)
    rig.say("before", "mid-1")
    rig.db.path.with_name(rig.db.path.name + ".reserve").unlink()
    assert rig.db.is_full
    with pytest.raises(Unavailable):
        rig.say("refused", "mid-2")
    assert texts(page(rig).events) == ["before"]
    assert rig.db.value("SELECT COUNT(*) FROM events WHERE body IS NOT NULL") == 1


def hundreds_of_steps(db: Database, work: Callable[[], object]) -> int:
    """Count SQLite's own steps, a hundred at a time: what a machine's speed does not change."""
    count = itertools.count()
    connection = db._db.connection()
    connection.set_progress_handler(lambda: next(count) and 0, 100)
    try:
        work()
    finally:
        connection.set_progress_handler(None, 0)
    return next(count)


def test_a_page_costs_the_same_among_100000_events(rig: Rig) -> None:
    first, second = rig.account(url=None), rig.account(OTHER_ID, url=None)
    fill = f"""
        WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 100000)
        INSERT INTO events (id, account_id, contact, kind, sequence, message_id, state, body, gone, occurred_at,
            received_at, correlation_id)
        SELECT printf('evt_%026d', n), CASE n % 2 WHEN 0 THEN '{first["id"]}' ELSE '{second["id"]}' END, '1',
            'message.sent', n, 'msg_' || n, 'forwarded', '{{}}', n < 60000, '', '', '' FROM number"""
    rig.say("before", "mid-1")
    few = hundreds_of_steps(rig.db, lambda: page(rig, limit=20))
    rig.db.write_last(lambda tx: tx.run(fill))
    rig.db.write_last(lambda tx: tx.run("UPDATE events SET gone = 1 WHERE position = 1"))
    cursor = page(rig, f"evt_{80_000:026}", limit=20).next_cursor
    assert hundreds_of_steps(rig.db, lambda: page(rig, cursor, limit=20)) < few + 60
    assert hundreds_of_steps(rig.db, lambda: page(rig, limit=20)) < few + 60
    assert page(rig, f"evt_{50_000:026}", limit=1).expired == 9_999


# --- over the real server ---


def test_a_follower_misses_nothing_and_sees_nothing_twice_while_many_write(fresh_shop: Shop) -> None:
    shop, seen = fresh_shop, list[str]()
    shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"crm_webhook_url": None})
    wanted = 8 * 40

    def keep(events: list[dict], cursor: str | None) -> None:
        seen.extend(event["message"] for event in events)
        if len(seen) >= wanted and not events:
            raise Stopped

    def follow() -> None:
        with pytest.raises(Stopped):
            follower()(shop.url, shop.key, keep, every_s=0.01)

    reader = threading.Thread(target=follow)
    reader.start()
    with ThreadPoolExecutor(8) as pool:

        def say(turn: int) -> None:
            shop.hears(f"80{turn % 8}", f"text {turn}")

        list(pool.map(say, range(wanted)))
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    assert len(seen) == wanted
    assert set(seen) == {f"text {turn}" for turn in range(wanted)}


@pytest.fixture
def fixed_shop(tmp_path: Path) -> Iterator[Shop]:
    """A shop whose bridge has the same address after a restart."""
    with opened(tmp_path, QUICK, CRMBRIDGE_WEB_PORT=str(free_port())) as shop:
        yield shop


def test_a_follower_outlives_a_restart_of_the_bridge(fixed_shop: Shop) -> None:
    shop, seen, cursors = fixed_shop, list[str](), list[str | None]()
    shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"crm_webhook_url": None})

    def keep(events: list[dict], cursor: str | None) -> None:
        seen.extend(event["message"] for event in events)
        cursors.append(cursor)
        if len(seen) >= 20 and not events:
            raise Stopped

    def follow() -> None:
        with pytest.raises(Stopped):
            follower()(shop.url, shop.key, keep, every_s=0.01)

    def say(first: int) -> None:
        for number in range(first, first + 10):
            shop.hears("801", f"text {number}")

    say(0)
    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    until(lambda: len(seen) >= 10)
    shop.kill()
    read = len(cursors)
    with socket.create_server(("127.0.0.1", int(shop.url.rpartition(":")[2]))) as dead:
        for _ in range(3):  # it asks again and again
            dead.accept()[0].close()
    assert len(cursors) <= read + 1
    assert reader.is_alive()
    shop.start()
    say(10)
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    assert seen == [f"text {number}" for number in range(20)]


def test_a_follower_waits_where_it_is_told_to_and_stops_where_it_may_not_read() -> None:
    """Told by a server that answers as the bridge does when it is overloaded, behind a proxy, or knows another key."""
    page = {"events": [{"event_id": "evt_1"}], "next_cursor": "1-a", "has_more": True, "expired": 0}
    answers, asked = [503, 429, 200, 502, 200, 401], list[str]()

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps(page).encode()
            self.send_response(answers[len(asked) - 1])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    kept = list[str | None]()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with pytest.raises(requests.HTTPError, match="401"):
                follower()(
                    f"http://127.0.0.1:{server.server_port}", "key", lambda _, cursor: kept.append(cursor), every_s=0
                )
        finally:
            server.shutdown()
    assert kept == ["1-a", "1-a"]
    assert asked == ["/api/v1/events"] * 3 + ["/api/v1/events?after=1-a"] * 3


def test_the_route_asks_for_its_permission_and_its_account(shop: Shop) -> None:
    event = shop.meta.customer_says(SHOP_ID, "801", "for the route")
    assert event.status == 200
    found = shop.call("GET", f"/api/v1/events?account_id={shop.account_id}&limit=200")
    assert found.status_code == 200
    assert "for the route" in [one.get("message") for one in found.json()["events"]]
    other = shop.connect(instagram_account_id=OTHER_ID, access_token=OTHER_TOKEN).json()["account_id"]
    assert shop.call("GET", f"/api/v1/events?account_id={other}").json()["error"] == "wrong_account"
    assert shop.call("GET", "/api/v1/events?after=x").json()["error"] == "invalid_cursor"
    unknown = shop.call("GET", "/api/v1/events?after=999999999-abcdefgh")
    assert (unknown.status_code, unknown.json()["error"]) == (409, "cursor_unknown")
    sender = shop.bridge.command(
        "key", "create", "--name", "sends", "--account", shop.account_id, "--permission", "messages:send"
    )
    assert shop.call("GET", "/api/v1/events", key=sender).json()["error"] == "permission_missing"
    admin = shop.call("GET", "/api/v1/events", key=shop.admin_key).json()
    assert "for the route" in [one.get("message") for one in admin["events"]]
