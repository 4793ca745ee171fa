"""Alerts: told once, counted while they last, ended with an all-clear; and every kind of them by its real cause."""

import datetime
import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from crmbridge import config, log
from crmbridge.alerts import telling
from crmbridge.alerts.kinds import KINDS
from crmbridge.events import epoch_s, instant
from crmbridge.ops import alerts as ops
from crmbridge.ops import backup
from crmbridge.sandbox import LoopbackServer, wire
from crmbridge.store import alerts as record
from crmbridge.store import copies, database, dead, turn
from crmbridge.store.database import Tx
from crmbridge.upkeep import Upkeep
from crmbridge.web import webhooks
from tests import shop as shops
from tests.rig import START_S, Recorder, Rig
from tests.shop import CUSTOMER, SHOP_ID
from tests.test_cli import run
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent
DAY_S = 86_400.0


class Hook:
    """A web server that takes posted alerts, answering `status`; `took` is what it said 200 to."""

    def __init__(self) -> None:
        self.status, self.took, self.refused = 200, list[dict[str, Any]](), 0
        self.then: Callable[[], None] = lambda: None  # while the alert is being handed over
        self._changed = threading.Condition()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        posted = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        with self._changed:
            if self.status == 200:
                self.took.append(posted)
            else:
                self.refused += 1
            self._changed.notify_all()
        self.then()
        start_response(f"{self.status} X", [("Content-Length", "0")])
        return []

    def wait(self, number: int) -> None:
        """Wait until it took so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.took) >= number, PATIENCE_S), self.took


class Office:
    """Where the alerts of a rig arrive: the letters that its command got, and what its URL was given."""

    def __init__(self, folder: Path, rig: Rig, url: str, hook: Hook) -> None:
        self._folder, self._rig, self._url, self._hook = folder, rig, url, hook
        self.command = f'cat > "$(mktemp "{folder}/XXXXXXXX")"'
        self.open_again()

    def open_again(self) -> None:
        """Begin again as a process does that starts: with nothing but the database."""
        settings = {"command": self.command, "url": self._url}
        self.alarm = Recorder(self._rig.db, lambda: self._rig.now_s, **settings)
        self._rig.alarm = self.alarm
        self._rig.engine = self._rig.make_engine()

    def pass_s(self, seconds: float) -> None:
        """Let time pass, and the alerts' thread do what it would have done at each of its times."""
        end_s = self._rig.now_s + seconds
        next_s = self.alarm.pass_on()
        while next_s is not None and next_s <= end_s:
            self._rig.now_s = max(next_s, self._rig.now_s + 0.001)
            next_s = self.alarm.pass_on()
        self._rig.now_s = end_s
        self.alarm.pass_on()

    @property
    def posted(self) -> list[tuple[str, str]]:
        """What the URL took, as (state, kind)."""
        return [(entry["state"], entry["alert"]) for entry in self._hook.took]

    @property
    def letters(self) -> list[str]:
        return [path.read_text() for path in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)]


@pytest.fixture
def hook() -> Hook:
    return Hook()


@pytest.fixture
def office(rig: Rig, tmp_path: Path, hook: Hook) -> Iterator[Office]:
    folder = tmp_path / "letters"
    folder.mkdir()
    with LoopbackServer(hook) as server:
        yield Office(folder, rig, server.url, hook)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream, root = io.StringIO(), logging.getLogger()
    before, level = root.handlers[:], logging.getLogger("crmbridge").level
    log.setup("info", stream)
    yield stream
    root.handlers[:] = before
    logging.getLogger("crmbridge").setLevel(level)


def raise_some(office: Office, causes: int = 1, kind: str = "dead_letter", account: str = "acc_1") -> None:
    for _ in range(causes):
        office.alarm.alert(kind, "a delivery to the CRM is dead", account=account)


# --- from the first cause to the all-clear ---


def test_an_alert_is_told_to_log_command_and_url_and_so_is_its_all_clear(
    rig: Rig, office: Office, hook: Hook, lines: io.StringIO
) -> None:
    account = rig.account()
    office.alarm.alert("dead_letter", "a delivery is dead", account=account["id"], delivery="dlv_1")
    office.pass_s(7500)
    office.alarm.clear("dead_letter", account=account["id"])
    office.pass_s(7500)
    assert office.posted == [("raised", "dead_letter"), ("cleared", "dead_letter")]
    raised, cleared = hook.took
    assert set(raised) == {"alert", "state", "message", "account_id", "since", "count", "todo", "text"}
    assert (raised["account_id"], raised["count"], raised["since"]) == (account["id"], 1, "2027-01-15T08:00:00.000Z")
    assert raised["todo"].endswith(f"; crmbridge dlq retry --all --webhooks --account {account['id']}")
    assert "\n" not in raised["text"]
    assert cleared["todo"] is None
    first, second = office.letters
    assert re.match(r"crmbridge on \S+: ALERT: dead_letter of your_shop\n\nA delivery is dead\.\n", first)
    for words in (f"your_shop ({account['id']})", "Since 2027-01-15 08:00 UTC", "What to do: crmbridge dlq list"):
        assert words in first
    assert re.match(r"crmbridge on \S+: All clear: dead_letter of your_shop\n\nNo dead letter", second)
    assert "lasted 2 h 5 min" in second
    told = [line.split(" ", 1)[1] for line in lines.getvalue().splitlines() if " alert.dead_letter" in line]
    assert [line.split()[:3] for line in told] == [
        ["alert", "alert.dead_letter", "state=raised"],
        ["alert", "alert.dead_letter", "state=cleared"],
    ]
    assert "delivery=dlv_1" in told[0]


def test_ten_thousand_causes_make_a_handful_of_messages(office: Office) -> None:
    for _ in range(100):  # over two days
        raise_some(office, 100)
        office.pass_s(1728)
    office.alarm.clear("dead_letter", account="acc_1")
    office.pass_s(DAY_S)
    states = [state for state, _ in office.posted]
    assert states == ["raised", *["repeated"] * 5, "cleared"]  # after 1, 2, 4, 8 and 16 hours more
    assert re.search(r"And [\d,]+ more since it was last told; [\d,]+ since 2027-01-15 08:00 UTC", office.letters[1])
    assert "10,000 times in all" in office.letters[-1]
    assert record.everything(office.alarm._db)[0]["count"] == 10_000


def test_each_account_has_its_own(office: Office) -> None:
    for account in ("acc_1", "acc_2"):
        raise_some(office, 3, account=account)
    office.pass_s(60)
    office.alarm.clear("dead_letter", account="acc_2")
    office.pass_s(60)
    assert office.posted == [("raised", "dead_letter")] * 2 + [("cleared", "dead_letter")]
    assert list(office.alarm.opened("dead_letter")) == ["acc_1"]


def test_a_restart_neither_repeats_nor_forgets(office: Office) -> None:
    raise_some(office)
    office.pass_s(10)
    office.open_again()
    raise_some(office, 4)
    office.pass_s(1800)
    assert [state for state, _ in office.posted] == ["raised"]
    office.open_again()
    office.pass_s(1800)
    assert [state for state, _ in office.posted] == ["raised", "repeated"]
    assert "And 4 more" in office.letters[-1]
    office.open_again()
    office.alarm.clear("dead_letter", account="acc_1")
    office.pass_s(10)
    office.open_again()
    office.alarm.clear("dead_letter", account="acc_1")
    office.pass_s(DAY_S)
    assert [state for state, _ in office.posted] == ["raised", "repeated", "cleared"]


@pytest.mark.parametrize("well_in_between", [False, True])
def test_a_crash_loop_does_not_write_a_letter_each_time(office: Office, well_in_between: bool) -> None:
    for _ in range(50):
        office.open_again()
        raise_some(office)
        office.pass_s(5)
        if well_in_between:
            office.alarm.clear("dead_letter", account="acc_1")
        office.pass_s(5)
    assert [state for state, _ in office.posted] == ["raised", "cleared", "raised"][: 3 if well_in_between else 1]


def test_an_alert_that_comes_and_goes_is_told_of_a_few_times(office: Office) -> None:
    for _ in range(120):  # every minute for two hours
        raise_some(office)
        office.pass_s(30)
        office.alarm.clear("dead_letter", account="acc_1")
        office.pass_s(30)
    office.pass_s(DAY_S)
    assert [state for state, _ in office.posted] == ["raised", "cleared", "raised", "repeated", "cleared"]


def test_a_url_that_is_down_is_not_hammered_by_a_crash_loop(office: Office, hook: Hook) -> None:
    hook.status = 500
    raise_some(office)
    for _ in range(50):
        office.pass_s(1)
        office.open_again()
    assert hook.refused == 1
    hook.status = 200
    office.pass_s(3600)
    assert office.posted == [("raised", "dead_letter")]


def test_what_is_about_the_whole_bridge_is_told_first(office: Office) -> None:
    raise_some(office, 5)
    office.alarm.alert("system_fault", "a job failed")
    office.pass_s(10)
    told = [re.search("(?<=: )[a-z_]+", letter)[0] for letter in office.letters]  # type: ignore[index]
    assert told == ["system_fault", "dead_letter"]


def test_what_was_over_before_it_was_told_is_not_told_at_all(office: Office) -> None:
    raise_some(office)
    office.alarm.clear("dead_letter", account="acc_1")
    office.pass_s(10)
    assert office.posted == []


def test_an_all_clear_without_an_alert_does_nothing(office: Office) -> None:
    office.alarm.clear("dead_letter", account="acc_1")
    office.pass_s(10)
    assert office.posted == []
    assert record.everything(office.alarm._db) == []


def test_whoever_does_not_take_it_is_told_again_alone(office: Office, hook: Hook, lines: io.StringIO) -> None:
    hook.status = 500
    raise_some(office)
    office.pass_s(3600)
    assert hook.refused == 3
    assert lines.getvalue().count("alert.url_failed") == 3
    hook.status = 200
    office.pass_s(3600)
    assert len(office.letters) == 1
    assert office.posted == [("raised", "dead_letter")]


def test_a_database_that_cannot_be_written_stops_no_alert(rig: Rig, office: Office, lines: io.StringIO) -> None:
    columns = "(kind, account_id, since, last_at, count, message, told, told_at, told_count, reopened, cleared_at"
    rig.db.write(lambda tx: tx.run("DROP TABLE alerts"))
    raise_some(office, 2)
    office.pass_s(30)
    assert office.posted == [("raised", "dead_letter")]
    assert "alert.unsaved" in lines.getvalue()
    rig.db.write(lambda tx: tx.run(f"CREATE TABLE alerts {columns}, PRIMARY KEY (kind, account_id))"))
    office.pass_s(120)
    assert record.everything(rig.db)[0]["count"] == 2


def test_a_clock_that_was_set_back_silences_nothing(rig: Rig, office: Office) -> None:
    raise_some(office)
    office.pass_s(60)
    rig.now_s -= 365 * DAY_S
    raise_some(office)
    office.pass_s(3600)
    assert [state for state, _ in office.posted] == ["raised", "repeated"]


def test_a_command_that_hangs_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "COMMAND_S", 0.2)
    assert telling.run_command("sleep 60 & sleep 60", _news()) == "it took longer than 0.2 s"
    assert telling.run_command("echo no such host >&2; exit 3", _news()) == "exit status 3: no such host"
    assert (
        telling.run_command('test "$ALERT_STATE-$ALERT_KIND-$ALERT_ACCOUNT" = raised-dead_letter-acc_1', _news())
        is None
    )


def test_no_credential_is_told() -> None:
    secret = _news(message="the token IGAAabcdefghijkl is dead")
    assert "IGAA" not in telling.text(secret) + telling.body(secret).decode()
    assert json.loads(telling.body(secret))["message"] == "the token [secret] is dead"


def _news(**changes: Any) -> telling.News:
    facts: dict[str, Any] = {
        "kind": "dead_letter",
        "state": "raised",
        "message": "a delivery is dead",
        "todo": "crmbridge dlq list",
        "account_id": "acc_1",
        "account_name": None,
        "since_s": START_S,
        "now_s": START_S,
        "count": 1,
        "more": 1,
    }
    return telling.News(**{**facts, **changes})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (61, "1 min"), (7500, "2 h 5 min"), (86_400, "24 h"), (172_800, "2 d"), (266_400, "3 d 2 h")],
)
def test_durations_are_told_as_people_say_them(seconds: float, words: str) -> None:
    assert telling.span(seconds) == words


# --- the real causes ---


def passing(rig: Rig, office: Office, seconds: float) -> None:
    """Live through a while as the worker does, its alerts told at the end."""
    rig.live_through(seconds)
    office.pass_s(0)


def test_dead_letters_are_told_and_their_end_too(rig: Rig, office: Office) -> None:
    account = rig.account()
    rig.crm.answer_always(500)
    rig.say("the CRM cannot take this", "mid-1")
    passing(rig, office, 25 * 3600)
    rig.watch().look()
    office.pass_s(10)
    assert ("raised", "dead_letter") in office.posted
    assert ("cleared", "dead_letter") not in office.posted
    rig.crm.answer_always(None)
    rig.revive(rig.db.value("SELECT id FROM deliveries WHERE state = 'dead'"))
    rig.drain()
    rig.watch().look()
    office.pass_s(10)
    assert ("cleared", "dead_letter") in office.posted
    assert office.alarm.opened("dead_letter") == {}
    assert account["id"] in str(record.everything(rig.db))


def test_ten_thousand_dead_letters_make_a_handful_of_alerts(rig: Rig, office: Office) -> None:
    account = rig.account()
    rig.say("the first", "mid-1")
    (template,) = rig.db.rows("SELECT * FROM deliveries")
    del template["state"]  # it follows from the place

    def owe_many(tx: Tx) -> None:
        for number in range(10_000):
            copy = {**template, "position": None, "id": f"dlv_{number:05}", "contact": f"9{number:05}"}
            tx.insert("deliveries", copy)

    rig.db.write(owe_many)
    rig.now_s += 25 * 3600
    upkeep = Upkeep(rig.db, rig.settings.retention, rig.patience, office.alarm, clock=rig.clock)
    upkeep.expire()
    office.pass_s(2 * DAY_S)
    assert office.posted == [("raised", "dead_letter")]
    assert "10,001 times" in office.letters[0]
    assert office.alarm.opened("dead_letter").keys() == {account["id"]}


def test_a_401_is_told_and_the_next_success_ends_it(rig: Rig, office: Office) -> None:
    account = rig.account()
    rig.crm.answer(401)
    rig.say("one", "mid-1")
    rig.drain()
    office.pass_s(10)
    rig.say("two", "mid-2")
    rig.live_through(61)
    rig.watch().look()
    office.pass_s(10)
    raised = [("raised", "crm_unauthorized"), ("raised", "dead_letter")]
    assert office.posted == [*raised, ("cleared", "crm_unauthorized")]
    assert f"crmbridge account resume {account['id']} --deliveries" in office.letters[0]
    rig.resume(account, "deliveries")
    rig.drain()
    rig.watch().look()
    office.pass_s(10)
    assert office.posted[3:] == [("cleared", "dead_letter")]


def test_dead_letters_are_counted_and_told_of_even_if_their_alert_was_lost(rig: Rig, office: Office) -> None:
    account = rig.account()
    for number in range(3):
        rig.lose("refused", f"mid-{number}", contact=f"80{number}")
        rig.now_s += 1
    office.open_again()  # a crash before anything was stored
    assert office.alarm.opened("dead_letter") == {}
    rig.watch().look()
    office.pass_s(60)
    (row,) = record.everything(rig.db)
    oldest = rig.dead()[0]
    said = (
        f"3 deliveries to the CRM are dead, the oldest {oldest['id']}, since {oldest['finished_at']}: the CRM answered"
    )
    assert (row["kind"], row["account_id"], row["count"]) == ("dead_letter", account["id"], 3)
    assert row["message"].startswith(said)
    dead.discard(rig.db, oldest["id"], by="cli")
    rig.watch().look()
    office.pass_s(60)
    (row,) = record.everything(rig.db)
    assert (row["message"][:2], row["count"]) == ("2 ", 3)
    assert len(office.letters) == 1


@pytest.mark.parametrize("tried", [True, False])
def test_sends_that_instagram_was_not_there_for_are_told_of(rig: Rig, office: Office, tried: bool) -> None:
    account = rig.account()
    rig.meta.fault("messages", times=10_000, status=429, body="")
    message_id = rig.send(account)
    if tried:
        passing(rig, office, 24.5 * 3600)
    else:
        rig.now_s += 24.5 * 3600
        Upkeep(rig.db, rig.settings.retention, rig.patience, office.alarm, clock=rig.clock).expire()
        office.pass_s(0)
    assert rig.status(message_id)["status"] == "failed"
    assert ("raised", "sends_expired") in office.posted
    office.pass_s(3700)
    assert ("cleared", "sends_expired") in office.posted


def test_what_is_held_without_an_end_while_something_waits_is_recalled(rig: Rig, office: Office) -> None:
    account = rig.account()

    def pause(days: float | None) -> None:
        until_s = None if days is None else rig.now_s + days * DAY_S
        rig.pause(account, "deliveries", reason="stocktaking", until_s=until_s)

    def look(days: float) -> list[tuple[str, str]]:
        told = len(office.posted)
        passing(rig, office, days * DAY_S)
        rig.watch().listen()
        rig.watch().look()
        office.pass_s(10)
        return office.posted[told:]

    pause(7)
    rig.say("hello", "mid-1")
    assert look(2) == []
    pause(None)
    assert look(0) == [("raised", "held_long")]
    assert "Deliveries held since 2027-01-15T08:00:00.000Z: stocktaking." in office.letters[-1]
    rig.unpause(account, "deliveries")
    assert look(0) == [("cleared", "held_long")]
    pause(None)
    assert look(2) == []  # nothing waits
    rig.change_account(account, status="inactive")
    rig.unpause(account, "deliveries")
    rig.say("hello", "mid-2")
    assert look(0.9) == []
    assert look(0.2) == [("raised", "held_long")]


@pytest.mark.parametrize("target", ["crm", "instagram"])
def test_an_endpoint_that_is_down_for_long_is_told_and_its_recovery_too(rig: Rig, office: Office, target: str) -> None:
    account = rig.account()
    if target == "crm":
        rig.crm.answer_always(503)
        rig.say("one", "mid-1")
    else:
        rig.meet()
        rig.meta.fault(times=10_000, status=503, body="")
        rig.send(account)
    passing(rig, office, 890)
    assert office.posted == []
    passing(rig, office, 1500)
    assert office.posted == [("raised", f"{target}_down")]
    if target == "crm":
        rig.crm.answer_always(None)
    else:
        rig.meta.clear_faults()
    assert re.search(r"; what was tried is given up at 2027-01-16T08:0[01]:00.000Z", office.letters[0])
    passing(rig, office, 1200)
    assert office.posted == [("raised", f"{target}_down"), ("cleared", f"{target}_down")]
    assert "again." in office.letters[1]


def test_an_endpoint_that_nothing_waits_for_any_more_is_not_called_down(rig: Rig, office: Office) -> None:
    account = rig.account()
    rig.crm.answer_always(503)
    rig.say("one", "mid-1")
    passing(rig, office, 2000)
    rig.watch().look()
    assert rig.cleared == []
    rig.change_account(account, url=None)
    turn.end_leftovers(rig.db)
    rig.watch().look()
    office.pass_s(10)
    assert office.posted == [("raised", "crm_down"), ("cleared", "crm_down")]
    assert "Nothing waits any more; it was not seen to recover." in office.letters[1]


def test_a_send_in_doubt_is_told_until_it_is_settled(rig: Rig, office: Office) -> None:
    account = rig.account()
    rig.meta.fault("messages", drop=True, after_effect=True)
    rig.meta.fault("conversations", times=10_000, status=500)
    message_id = rig.send(account)
    passing(rig, office, 25 * 3600)
    assert rig.status(message_id)["error"]["code"] == "in_doubt"
    assert [posted for posted in office.posted if posted[1] == "in_doubt"] == [("raised", "in_doubt")]
    rig.watch().look()
    rig.meta.clear_faults()
    died = rig.db.value("SELECT id FROM deliveries WHERE state = 'dead' AND target = 'instagram'")
    rig.revive(died, force=True)
    rig.watch().look()
    office.pass_s(10)
    assert [posted for posted in office.posted if posted[1] == "in_doubt"][1:] == [("cleared", "in_doubt")]


def test_a_fault_of_our_own_is_over_after_an_hour_without_one(rig: Rig, office: Office) -> None:
    rig.account()
    rig.break_seal("crm")
    rig.say("one", "mid-1")
    rig.drain()
    office.pass_s(3500)
    assert office.posted == [("raised", "system_fault")]
    office.pass_s(200)
    assert office.posted == [("raised", "system_fault"), ("cleared", "system_fault")]


def test_a_disk_with_little_space_is_told_and_its_relief_too(rig: Rig, office: Office) -> None:
    rig.watch(disk_free_mb=0).disk()
    assert rig.alerts == []
    rig.watch(disk_free_mb=1_000_000_000).disk()
    office.pass_s(10)
    assert "MB are free on the disk of" in office.letters[0]
    free_mb = rig.db.sizes()["disk_free_bytes"] / 1_000_000
    rig.watch(disk_free_mb=free_mb * 0.9).disk()  # more than the limit, but not by a quarter
    office.pass_s(10)
    assert office.posted == [("raised", "disk_nearly_full")]
    rig.watch(disk_free_mb=free_mb * 0.5).disk()
    office.pass_s(10)
    assert office.posted == [("raised", "disk_nearly_full"), ("cleared", "disk_nearly_full")]


def test_a_database_without_a_backup_for_two_days_is_told_until_there_is_one(rig: Rig, office: Office) -> None:
    made = datetime.datetime.fromtimestamp(rig.now_s).isoformat(" ")  # noqa: DTZ006 - as it is stored
    rig.db.write(lambda tx: tx.run("UPDATE schema_migration SET applied = ?", (made,)))
    rig.watch().backups()
    rig.now_s += 1.9 * DAY_S
    rig.watch().backups()
    assert rig.alerts == []
    rig.now_s += 0.2 * DAY_S
    rig.watch().backups()
    office.pass_s(10)
    assert "There is no good backup." in office.letters[0]
    at = instant(rig.now_s)
    copies.remember(rig.db, {"began_at": at, "ended_at": at, "file": "it.db", "bytes": 1, "error": None})
    rig.watch().backups()
    office.pass_s(10)
    assert office.posted == [("raised", "backup_old"), ("cleared", "backup_old")]
    rig.now_s += 2.1 * DAY_S
    rig.watch().backups()
    office.pass_s(10)
    assert f"The last good backup is of {at[:16]}Z." in office.letters[2]


def test_a_backup_that_failed_is_told_with_its_reason_at_once(rig: Rig, office: Office, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(OSError, match="taken"):
        backup.run(rig.settings, f"{tmp_path}/taken/it.db", now_s=rig.now_s)
    rig.watch().backups()
    office.pass_s(10)
    assert re.search("failed: .*taken.*; there is no good backup", office.letters[0])
    backup.run(rig.settings, f"{tmp_path}/it.db", now_s=rig.now_s)
    rig.watch().backups()
    office.pass_s(10)
    assert office.posted == [("raised", "backup_old"), ("cleared", "backup_old")]


def test_a_full_disk_is_told_and_that_there_is_space_again(
    rig: Rig, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.watch().disk()
    rig.db._run_full()
    rig.watch().disk()
    office.pass_s(10)
    assert office.posted == [("raised", "disk_full")]
    monkeypatch.setattr(database, "_LOOK_FOR_SPACE_S", 0)
    rig.watch().disk()
    office.pass_s(10)
    assert office.posted == [("raised", "disk_full"), ("cleared", "disk_full")]


def talk(rig: Rig, days: int, hours: tuple[int, ...]) -> None:
    """Have a customer write at these hours of each of the days to come."""
    begin_s = rig.now_s
    for day in range(days):
        for hour in hours:
            rig.now_s = begin_s + day * DAY_S + hour * 3600
            rig.say("hello", f"mid-{day}-{hour}")


def test_an_account_that_usually_talks_and_falls_silent_is_told_of(rig: Rig, office: Office) -> None:
    rig.account()
    talk(rig, 10, (1, 5, 9))  # no pause over 16 hours
    watch = rig.watch()
    for _ in range(48):
        rig.now_s += 3600
        watch.listen()
    assert rig.alerts == []
    for _ in range(24):
        rig.now_s += 3600
        watch.listen()
        office.pass_s(0)
    assert office.posted == [("raised", "silence")]
    assert "until then no pause was over 16 hours" in office.letters[0]
    watch.look()
    rig.say("back again", "mid-back")
    watch.look()
    office.pass_s(10)
    assert office.posted == [("raised", "silence"), ("cleared", "silence")]


def test_looking_for_silence_costs_the_same_however_much_came(rig: Rig) -> None:
    account = rig.account()
    talk(rig, 1, (0,))
    copy = rig.db.rows("SELECT * FROM events")[0]
    begin_s, minutes = epoch_s(copy["received_at"]), 5000

    def hear_much(tx: Tx) -> None:
        for minute in range(minutes):
            at = instant(begin_s + 60 * minute)
            tx.insert("events", {**copy, "position": None, "id": f"evt_{minute}", "dedupe_key": at, "received_at": at})

    rig.db.write(hear_much)
    steps = [0]
    connection = rig.db._db.connection()
    connection.set_progress_handler(lambda: steps.append(steps.pop() + 1), 10)
    try:
        hours = record.active_hours(rig.db, account["id"], instant(begin_s))
    finally:
        connection.set_progress_handler(None, 0)
    assert hours == [int(begin_s) // 3600 + hour for hour in range(minutes // 60 + 1)]
    assert steps[0] * 10 < 50 * len(hours)  # steps of SQLite's machine


@pytest.mark.parametrize(
    ("days", "hours", "silent_h", "limit_h"),
    [
        pytest.param(6, (1, 9), 500, 24, id="talks on too few days"),
        pytest.param(10, (1,), 71, 24, id="three days' pause of one that talks once a day"),
        pytest.param(10, tuple(range(24)), 23, 24, id="no sooner than the limit"),
        pytest.param(10, (1, 9), 500, 0, id="switched off"),
    ],
)
def test_silence_that_is_usual_is_no_alert(
    rig: Rig, days: int, hours: tuple[int, ...], silent_h: int, limit_h: int
) -> None:
    rig.account()
    talk(rig, days, hours)
    rig.now_s += silent_h * 3600
    rig.watch(silence_hours=limit_h).listen()
    assert rig.alerts == []


def test_a_token_that_ends_is_told_of_three_times_and_then_that_it_is_dead(rig: Rig, office: Office) -> None:
    account = rig.account(token_expires_at=instant(rig.now_s + 20 * DAY_S))
    watch = rig.watch()

    def live(days: int) -> list[tuple[str, str]]:
        told = len(office.posted)
        for _ in range(days * 24):
            watch.listen()
            watch.look()
            office.pass_s(3600)
        return office.posted[told:]

    assert live(5) == []
    assert live(5) == [("raised", "token_expiring")]
    assert live(5) == [("repeated", "token_expiring")]
    assert live(4) == []
    assert live(3) == [("repeated", "token_expiring"), ("raised", "token_dead")]
    fresh = {"token_expires_at": instant(rig.now_s + 60 * DAY_S), "token_checked_at": instant(rig.now_s)}
    rig.change_account(account, **fresh)
    assert sorted(live(1)) == [("cleared", "token_dead"), ("cleared", "token_expiring")]


def test_a_deleted_account_has_no_open_alerts(rig: Rig, office: Office) -> None:
    account = rig.account()
    for kind in KINDS:
        raise_some(office, kind=kind, account=account["id"])
    turn.delete_account(rig.db, account["id"])
    rig.watch().look()
    assert sorted(rig.cleared) == sorted(KINDS)


@pytest.mark.parametrize("kind", ["crm_gone", "account_error"])
def test_what_stopped_an_account_is_told_until_somebody_lets_it_go_on(rig: Rig, office: Office, kind: str) -> None:
    account = rig.account()
    if kind == "crm_gone":
        rig.crm.answer(410)
        rig.say("one", "mid-1")
    else:
        rig.meta.fault("messages", status=403, body={"error": {"code": 200, "error_subcode": 2534041, "message": "x"}})
        rig.send(account)
    rig.drain()
    rig.watch().look()
    office.pass_s(130)
    assert office.posted == [("raised", kind)]
    if kind == "crm_gone":
        rig.resume(account, "deliveries")
    else:
        rig.change(account, status="active")
    rig.drain()
    rig.watch().look()
    office.pass_s(10)
    assert office.posted == [("raised", kind), ("cleared", kind)]


def test_a_few_wrong_signatures_are_noise_unless_they_go_on(rig: Rig, office: Office) -> None:
    form, noise = "sha256=" + "0" * 64, (None, "", "sha256=0", "sha1=" + "0" * 40, "x" * 71)
    signatures = webhooks._Signatures(office.alarm)
    for _ in range(100):
        for other in noise:
            signatures.wrong(other, rig.now_s)
    for _ in range(19):
        signatures.wrong(form, rig.now_s)
    signatures.right()
    for _ in range(4):
        rig.now_s += 600
        signatures.wrong(form, rig.now_s)
    assert rig.alerts == []
    signatures.wrong(form, rig.now_s)
    assert [kind for kind, _ in rig.alerts] == ["wrong_signatures"]
    signatures.right()
    assert rig.cleared == ["wrong_signatures"]


def test_a_running_bridge_tells_command_and_url_and_a_restart_repeats_nothing(tmp_path: Path, hook: Hook) -> None:
    letters = tmp_path / "letters"
    with LoopbackServer(hook) as server:
        told = f"\n[alerts]\ncommand = cat >> '{letters}'\nurl = {server.url}\n"
        with shops.opened(tmp_path, shops.QUICK + told) as shop:
            body = wire.webhook_body(wire.envelope(SHOP_ID, 1_800_000_000_000))
            for _ in range(20):
                headers = wire.signature_headers("another-secret", body)
                assert (
                    requests.post(
                        f"{shop.url}/webhooks/instagram", data=body, headers=headers, timeout=PATIENCE_S
                    ).status_code
                    == 401
                )
            hook.wait(1)
            shop.change("UPDATE api_keys SET accounts = 'no JSON' WHERE name = 'crm'")
            assert shop.call("GET", "/api/v1/accounts").status_code == 500
            hook.wait(2)
            shop.wait_rows("SELECT COUNT(*) FROM alerts WHERE told = 1", [(2,)])
            shop.bridge.stop()
            shop.start()
            assert shop.meta.customer_says(SHOP_ID, CUSTOMER, "hello").status == 200
            hook.wait(3)
            assert shop.call("GET", "/api/v1/accounts").status_code == 500
            shop.wait_rows("SELECT cleared_at IS NULL FROM alerts ORDER BY kind", [(1,), (0,)])
            still_open, listed = (shop.bridge.command("alert", "list", *words) for words in ((), ("--all",)))
            assert shop.bridge.command("alert", "test").splitlines() == [
                "log      written, on standard error", "command  took it", "url      took it",
            ]  # fmt: skip
            shop.bridge.stop()
    assert [(entry["state"], entry["alert"]) for entry in hook.took] == [
        ("raised", "wrong_signatures"),
        ("raised", "request_fault"),
        ("cleared", "wrong_signatures"),
        ("test", "test"),
    ]
    assert re.findall(r"^crmbridge on \S+: (.+)$", letters.read_text(), re.MULTILINE) == [
        "ALERT: wrong_signatures",
        "ALERT: request_fault",
        "All clear: wrong_signatures",
        "Test: test",
    ]
    assert listed.splitlines()[0].startswith("request_fault  open  since ")
    assert "what to do: look for request.fault in the log" in listed
    assert re.search("wrong_signatures  ended 2[0-9TZ:.-]+  since", listed)
    assert listed.startswith(still_open)
    assert "wrong_signatures" not in still_open
    assert "alert alert.wrong_signatures state=raised" in shop.log()


def test_a_test_alert_that_does_not_arrive_is_a_failure(
    tmp_path: Path, hook: Hook, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ops.test(config.Alerts()) == 0
    assert "to the log alone" in capsys.readouterr().out
    hook.status = 404
    with LoopbackServer(hook) as server:
        assert ops.test(config.Alerts(command="exit 7", url=server.url)) == 1
    out = capsys.readouterr().out
    assert "command  failed: exit status 7" in out
    assert "url      failed: HTTP 404" in out


def test_the_document_has_the_table_that_the_command_prints(tmp_path: Path) -> None:
    told = run(tmp_path, "alert", "kinds").stdout
    assert told.count("\n") == len(KINDS) + 2
    assert f"\n\n{told}\n" in (ROOT / "docs" / "operate.md").read_text()


def test_what_is_raised_while_another_is_told_is_stored_before_it_is_told(rig: Rig, office: Office, hook: Hook) -> None:
    stored: list[set[str]] = []

    def look() -> None:
        stored.append({row["kind"] for row in record.everything(rig.db)})
        office.alarm.alert("disk_full", "the disk is full")
        rig.db.close_thread()

    hook.then = look
    raise_some(office)
    office.pass_s(1)
    assert stored == [{"dead_letter"}, {"dead_letter", "disk_full"}]
