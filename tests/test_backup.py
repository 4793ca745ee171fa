"""Backups taken under load, put back by the real program; and what goes wrong with either."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peewee
import pytest
from playhouse.migrations import Runner

from crmbridge import vault
from crmbridge.events import instant
from crmbridge.ops import backup, restore
from crmbridge.store import accounts, copies, database, schema, vitals
from tests.needs import require
from tests.rig import Rig
from tests.shop import CUSTOMER, SHOP_ID, Shop
from tests.test_cli import ROOT, run
from tests.test_feed import page
from tests.waiting import BULK_S, until

PASSPHRASE = "correct horse battery"
KINDS = "link,linkat,unlink,unlinkat,rename,renameat,renameat2,fsync,fdatasync,ftruncate"


def query(path: Path, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for sql in statements:
            connection.execute(sql)


def install(folder: Path) -> None:
    """Make an installation with an account whose secrets are sealed, a key and a passphrase file."""
    assert run(folder, "init").returncode == 0
    keys = vault.load(folder / "var" / "crmbridge.key")
    with contextlib.closing(database.Database(folder / "var" / "bridge.db")) as db:
        accounts.create(db, keys, {"instagram_account_id": "1"}, token="IGAA", url=None, secret=None)
    (folder / "passphrase").write_text(PASSPHRASE + "\nnot this line\n")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An installation of a test's own."""
    install(tmp_path)
    return tmp_path


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if re.search(r"\.part|restoring|before", path.name))


# --- under load ---


def test_what_was_acknowledged_before_a_backup_began_is_in_it_and_nobody_waits_for_it(fresh_shop: Shop) -> None:
    shop, folder = fresh_shop, fresh_shop.database.parent.parent
    padding = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 8000)"
    change(shop.database, f"{padding} INSERT INTO heartbeats SELECT 'pad' || i || hex(randomblob(1000)), '' FROM n")
    taken: list[list[str]] = [[], [], []]
    is_over = threading.Event()

    def write(number: int) -> None:
        while not is_over.is_set():
            mid = f"mid-{number}-{len(taken[number])}"
            shop.hears(f"81{number}", f"{number}-{len(taken[number])}", mid=mid)
            taken[number].append(mid)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            until(lambda wanted=10 * (number + 1): all(len(told) > wanted for told in taken))  # type: ignore[misc]
            before = [mid for told in taken for mid in told]
            file = folder / f"{number}.db"
            assert "found whole" in shop.bridge.command("backup", str(file))
            grown = [mid for told in taken for mid in told]
            assert {mid for (mid,) in query(file, "SELECT instagram_message_id FROM events")} >= set(before)
            assert len(grown) > len(before)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert [row[0] for row in shop.rows("SELECT error FROM backups")] == [None] * 3
    refused = run(folder, "restore", str(file))
    assert (refused.returncode, "in use: stop the service first" in refused.stderr) == (1, True)
    assert shop.bridge.stop() == 0
    shop.bridge.command("restore", str(file))
    assert {mid for (mid,) in shop.rows("SELECT instagram_message_id FROM events")} >= set(before)
    shop.start()
    shop.wait_rows("SELECT COUNT(*) FROM backfills", [(0,)])
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)], BULK_S)
    assert not left_over(folder)


# --- never twice ---


def back_up(rig: Rig, folder: Path) -> Path:
    file = folder / "backup.db"
    assert backup.run(rig.settings, str(file), now_s=rig.now_s) == 0
    return file


def put_back(rig: Rig, file: Path) -> None:
    """Restore while nothing runs, and start again."""
    rig.engine.stop(0)
    rig.db.close()
    assert restore.run(rig.settings, file, now_s=rig.now_s) == 0
    rig.open()
    rig.engine.recover()


def sent_texts(rig: Rig) -> list[str]:
    return [sent.payload["message"]["text"] for sent in rig.meta.sent]


@pytest.mark.parametrize("was", ["untried", "in flight", "failed once"])
def test_a_send_that_went_out_after_the_backup_is_found_and_not_sent_again(rig: Rig, tmp_path: Path, was: str) -> None:
    account = rig.account()
    rig.meet()
    message_id = rig.send(account)
    if was == "in flight":
        row = rig.db.row("SELECT * FROM deliveries WHERE target = 'instagram'")
        assert row is not None
        rig.claim(row, account)
    if was == "failed once":
        rig.meta.fault("messages", status=503)
        rig.drain()
    rig.now_s += 1
    file = back_up(rig, tmp_path)
    if was == "in flight":
        rig.engine.recover()
    rig.live_through(60)
    assert sent_texts(rig) == ["hello"]
    rig.now_s += 3600
    put_back(rig, file)
    waiting = rig.status(message_id)
    assert (waiting["status"], waiting["error"]["code"]) == ("pending", "in_doubt")
    rig.live_through(120)
    assert sent_texts(rig) == ["hello"]
    found = rig.status(message_id)
    assert (found["status"], found["error"], found["attempts"][-1]["kind"]) == ("sent", None, "look_up")
    assert "message.sent" in rig.events()


def test_a_clock_that_was_ahead_at_the_backup_sends_nothing_twice(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    message_id = rig.send(account)
    rig.now_s += 7200
    file = back_up(rig, tmp_path)
    rig.now_s -= 7200
    rig.live_through(5)
    assert sent_texts(rig) == ["hello"]
    rig.now_s += 60
    put_back(rig, file)
    assert rig.db.value("SELECT since FROM backfills") < instant(rig.now_s - 86_400)
    rig.live_through(300)
    assert sent_texts(rig) == ["hello"]
    assert rig.status(message_id)["status"] == "sent"


def test_what_did_not_go_out_is_sent_once_in_its_order(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    rig.meet(CUSTOMER, "900000000000002")
    for text in ("one", "two", "three"):
        rig.send(account, text)
    rig.send(account, "elsewhere", contact="900000000000002")
    file = back_up(rig, tmp_path)
    row = rig.db.row(
        "SELECT * FROM deliveries WHERE place = 'head' AND target = 'instagram' AND contact = ?", (CUSTOMER,)
    )
    assert row is not None
    token = accounts.token(rig.rooms.vault, account)
    rig.rooms.client.send(token, SHOP_ID, CUSTOMER, {"text": "one"})  # and then the disk died
    rig.now_s += 30 * 3600  # more than a send is tried
    put_back(rig, file)
    for contact in (CUSTOMER, "900000000000002"):  # within whose window they may be answered
        rig.say("are you still there?", f"mid-{contact}", contact=contact)
    rig.live_through(600)
    assert [text for text in sent_texts(rig) if text != "elsewhere"] == ["one", "two", "three"]
    assert sent_texts(rig).count("elsewhere") == 1
    assert not rig.dead()


def test_of_two_alike_of_which_one_went_out_a_person_decides(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    first, second = rig.send(account, "yes"), rig.send(account, "yes")
    file = back_up(rig, tmp_path)
    rig.live_through(10)
    assert sent_texts(rig) == ["yes", "yes"]
    put_back(rig, file)
    rig.live_through(600)
    assert sent_texts(rig) == ["yes", "yes"]
    assert {rig.status(first)["error"]["code"], rig.status(second)["error"]["code"]} == {"in_doubt"}


def test_a_crm_is_told_again_by_the_same_ids_and_no_number_is_used_twice(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    rig.say("before", "m-1")
    file = back_up(rig, tmp_path)
    made_at = instant(rig.now_s)
    rig.say("after", "m-2")
    rig.drain()
    cursor = page(rig).next_cursor
    rig.now_s += 30 * 3600
    put_back(rig, file)
    assert rig.db.rows("SELECT account_id, since FROM backfills") == [{"account_id": account["id"], "since": made_at}]
    rig.say("after", "m-2")  # as the backfill finds it
    rig.say("later", "m-3")
    rig.drain()
    told = [entry.event for entry in rig.taken()]
    assert [event["message"] for event in told] == ["before", "after", "before", "after", "later"]
    assert told[2]["event_id"] == told[0]["event_id"]
    numbers = [event["sequence"] for event in told]
    assert numbers[:3] == [1, 2, 1]
    assert 2 < numbers[3] < numbers[4] < 2**31
    assert [event["message"] for event in map(json.loads, page(rig, cursor).events)] == ["after", "later"]
    rig.now_s += 60
    put_back(rig, file)  # once more, from the same backup
    rig.say("again", "m-4")
    rig.drain()
    assert rig.taken()[-1].event["sequence"] > numbers[4]


def test_a_backup_from_before_the_first_event_skips_what_a_crm_read_since(rig: Rig, tmp_path: Path) -> None:
    rig.account()
    file = back_up(rig, tmp_path)
    rig.say("since", "m-1")
    rig.drain()
    cursor = page(rig).next_cursor
    put_back(rig, file)
    rig.say("later", "m-2")
    rig.drain()
    assert [event["message"] for event in map(json.loads, page(rig, cursor).events)] == ["later"]


def test_a_copy_by_another_program_is_taken_for_as_old_as_its_last_sign_of_life(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    vitals.beat(rig.db, "worker", rig.now_s)
    rig.now_s += 5
    message_id = rig.send(account)
    copy = tmp_path / "copy.db"
    with (
        contextlib.closing(sqlite3.connect(rig.db.path)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    rig.drain()
    put_back(rig, copy)
    rig.live_through(120)
    assert sent_texts(rig) == ["hello"]
    assert rig.status(message_id)["status"] == "sent"


# --- the key ---


def test_a_backup_with_its_key_needs_nothing_else(made: Path) -> None:
    key = (made / "var" / "crmbridge.key").read_bytes()
    done = run(made, "backup", "all.db", "--with-key", "--passphrase-file", "passphrase")
    assert (done.returncode, "the key is in it, sealed" in done.stdout) == (0, True), done.stderr
    assert key.strip() not in (made / "all.db").read_bytes()
    assert stat.S_IMODE((made / "all.db").stat().st_mode) == 0o600
    shutil.rmtree(made / "var")
    (made / "wrong").write_text("wrong horse\n")
    for words, said in (
        (["--passphrase-file", "wrong"], "not the one that the key was sealed with"),
        (["--passphrase-file", "missing"], "missing: No such file"),
        ([], "nobody is there to type the passphrase"),
    ):
        refused = run(made, "restore", "all.db", *words)
        assert (refused.returncode, said in refused.stderr) == (1, True), refused.stderr
        assert not (made / "var" / "bridge.db").exists()
        assert not (made / "var" / "crmbridge.key").exists()
    done = run(made, "restore", "all.db", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr
    assert (made / "var" / "crmbridge.key").read_bytes() == key
    assert run(made, "check").returncode == 0


def configured(folder: Path, **changes: str) -> str:
    """Set keys in the configuration; return its text."""
    text = (folder / "crmbridge.ini").read_text()
    for name, value in changes.items():
        text, number = re.subn(rf"^{name} =.*", f"{name} = {value}", text, flags=re.MULTILINE)
        assert number == 1
    (folder / "crmbridge.ini").write_text(text)
    return text


def test_a_backup_with_its_key_is_all_that_another_machine_needs(made: Path, tmp_path: Path) -> None:
    text = configured(made, app_secrets="0123456789abcdef" * 2, verify_token="to-be-told-to-meta")
    done = run(made, "backup", "all.db", "--with-key", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr
    whole = (made / "all.db").read_bytes()
    assert not [word for word in (b"0123456789abcdef", b"to-be-told", b"app_secrets") if word in whole]
    other = tmp_path / "other machine"
    other.mkdir()
    for name in ("all.db", "passphrase"):
        (made / name).rename(other / name)
    (other / "wrong").write_text("another passphrase\n")
    refused = run(other, "restore", "all.db", "--passphrase-file", "wrong")
    assert (refused.returncode, "not the one" in refused.stderr) == (1, True), refused.stderr
    assert not (other / "crmbridge.ini").exists()
    done = run(other, "restore", "all.db", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr
    assert f"made {other}/crmbridge.ini: the configuration from the backup" in done.stdout
    assert (other / "crmbridge.ini").read_text() == text
    assert stat.S_IMODE((other / "crmbridge.ini").stat().st_mode) == 0o600
    assert (other / "var" / "crmbridge.key").read_bytes() == (made / "var" / "crmbridge.key").read_bytes()
    assert query(other / "var" / "bridge.db", "SELECT instagram_account_id FROM accounts") == [("1",)]
    assert run(other, "check").returncode == 0


def test_without_the_key_in_it_a_backup_and_the_key_file_are(made: Path, tmp_path: Path) -> None:
    text = configured(made, port="8099")
    assert run(made, "backup", "bare.db").returncode == 0
    other = tmp_path / "other"
    (other / "var").mkdir(parents=True)
    (made / "bare.db").rename(other / "bare.db")
    refused = run(other, "restore", "bare.db")
    assert (refused.returncode, "is gone, and only it opens" in refused.stderr) == (1, True), refused.stderr
    shutil.copy(made / "var" / "crmbridge.key", other / "var")
    assert run(other, "restore", "bare.db").returncode == 0
    assert (other / "crmbridge.ini").read_text() == text


def test_a_configuration_that_is_there_is_kept_and_what_is_other_is_named(made: Path) -> None:
    configured(made, app_secrets="a" * 32, verify_token="old-and-secret")
    assert run(made, "backup", "it.db").returncode == 0
    done = run(made, "restore", "it.db")
    assert (done.returncode, "crmbridge.ini" in done.stdout) == (0, False), done.stdout
    text = configured(made, verify_token="new-and-secret", port="8099")
    done = run(made, "restore", "it.db")
    said = "crmbridge.ini: the backup's differs in [web] port, [instagram] verify_token; to have that one, move"
    assert (done.returncode, said in done.stdout, "-and-secret" in done.stdout) == (0, True, False), done.stdout
    assert (made / "crmbridge.ini").read_text() == text


def test_the_configuration_of_a_new_installation_gives_way(made: Path) -> None:
    fresh = (made / "crmbridge.ini").read_text()
    text = configured(made, app_secrets="a" * 32, port="8099")
    assert run(made, "backup", "it.db").returncode == 0
    (made / "crmbridge.ini").write_text(fresh)
    done = run(made, "restore", "it.db")
    assert (done.returncode, "the one there had no app secret" in done.stdout) == (0, True), done.stdout
    assert (made / "crmbridge.ini").read_text() == text
    (before,) = made.glob("crmbridge.ini.before-*")
    assert before.read_text() == fresh


def test_a_configuration_with_places_of_its_own_leads_there(made: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    text = configured(made, path=f"{place}/b.db", key_file=f"{place}/key").replace("[store]", f"[store]\n# {place}")
    (made / "crmbridge.ini").write_text(text)
    (made / "var").rename(place)
    (place / "bridge.db").rename(place / "b.db")
    (place / "crmbridge.key").rename(place / "key")
    done = run(made, "backup", "it.db", "--with-key", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place)
    (made / "crmbridge.ini").unlink()
    done = run(made, "restore", "it.db", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr
    assert query(place / "b.db", "SELECT instagram_account_id FROM accounts") == [("1",)]
    assert (place / "key").exists()
    assert not (made / "var" / "crmbridge.key").exists()


def test_a_configuration_of_another_version_is_no_hindrance_where_one_is_there(made: Path) -> None:
    text = (made / "crmbridge.ini").read_text()
    (made / "crmbridge.ini").write_text(text.replace("[web]", "[web]\n# kept as it is\n"))
    assert run(made, "backup", "it.db").returncode == 0
    sealed = vault.load(made / "var" / "crmbridge.key").seal(
        text.replace("[web]", "[web]\nsoon = 1"), *backup.INI_PLACE
    )
    change(made / "it.db", f"UPDATE backup_note SET sealed_ini = '{sealed}'")
    done = run(made, "restore", "it.db")
    assert (done.returncode, "there is no such key" in done.stdout) == (0, True), done.stderr
    (made / "crmbridge.ini").unlink()
    refused = run(made, "restore", "it.db")
    assert (refused.returncode, "cannot be used" in refused.stderr) == (1, True), refused.stderr


def test_a_configuration_leads_the_database_to_no_place_that_is_taken(made: Path) -> None:
    """Whoever has the key file can seal one in: it must not have root replace a file of its choice."""
    assert run(made, "backup", "it.db").returncode == 0
    victim = made / "etc" / "victim.conf"
    victim.parent.mkdir()
    victim.write_text("precious")
    text = (made / "crmbridge.ini").read_text()
    text = re.sub(r"^path = .*", f"path = {victim}", text, flags=re.MULTILINE)
    sealed = vault.load(made / "var" / "crmbridge.key").seal(text, *backup.INI_PLACE)
    change(made / "it.db", f"UPDATE backup_note SET sealed_ini = '{sealed}'")
    (made / "crmbridge.ini").unlink()
    refused = run(made, "restore", "it.db")
    assert (refused.returncode, f"the configuration in it names {victim}" in refused.stderr) == (1, True), (
        refused.stderr
    )
    assert victim.read_text() == "precious"
    assert not (made / "crmbridge.ini").exists()


def test_another_sealed_secret_is_not_taken_for_a_configuration(made: Path) -> None:
    assert run(made, "backup", "it.db").returncode == 0
    change(
        made / "it.db",
        "UPDATE backup_note SET sealed_ini = (SELECT secret_sealed FROM endpoints WHERE kind = 'instagram')",
    )
    (made / "crmbridge.ini").unlink()
    refused = run(made, "restore", "it.db")
    assert (refused.returncode, "was made for another row" in refused.stderr) == (1, True), refused.stderr
    assert not (made / "crmbridge.ini").exists()


def test_a_backup_without_a_key_file_is_made_and_says_what_it_lacks(made: Path) -> None:
    (made / "var" / "crmbridge.key").unlink()
    done = run(made, "backup", "it.db")
    assert (done.returncode, "the configuration is not in the backup: no key file" in done.stderr) == (0, True)


def test_a_key_file_of_another_database_is_refused_or_mended(made: Path) -> None:
    key_file = made / "var" / "crmbridge.key"
    assert run(made, "backup", "bare.db").returncode == 0
    assert run(made, "backup", "all.db", "--with-key", "--passphrase-file", "passphrase").returncode == 0
    old = key_file.read_text().split()
    key_file.unlink()
    vault.create(key_file)
    new = key_file.read_text().split()
    refused = run(made, "restore", "bare.db")
    assert (refused.returncode, "does not open the secrets in this backup" in refused.stderr) == (1, True)
    assert key_file.read_text().split() == new
    assert run(made, "restore", "all.db", "--passphrase-file", "passphrase").returncode == 0
    assert key_file.read_text().split() == old + new
    key_file.unlink()
    gone = run(made, "restore", "bare.db")
    assert (gone.returncode, "is gone, and only it opens" in gone.stderr) == (1, True)


def test_a_passphrase_that_is_too_short_is_refused(made: Path) -> None:
    (made / "passphrase").write_text("short\n")
    refused = run(made, "backup", "all.db", "--with-key", "--passphrase-file", "passphrase")
    assert (refused.returncode, "8 characters or more" in refused.stderr) == (1, True)
    assert not (made / "all.db").exists()


def test_a_passphrase_is_the_same_words_however_they_are_written(made: Path) -> None:
    (made / "passphrase").write_text("Schlüssel für Zürich")
    assert run(made, "backup", "all.db", "--with-key", "--passphrase-file", "passphrase").returncode == 0
    (made / "var" / "crmbridge.key").unlink()
    (made / "passphrase").write_bytes("Schlüssel für Zürich".encode("latin-1"))
    refused = run(made, "restore", "all.db", "--passphrase-file", "passphrase")
    assert (refused.returncode, refused.stderr) == (1, "crmbridge: the passphrase in passphrase is not UTF-8 text\n")
    (made / "passphrase").write_bytes(
        b"\xef\xbb\xbf" + unicodedata.normalize("NFD", "Schlüssel für Zürich\r\n").encode()
    )
    done = run(made, "restore", "all.db", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr


# --- what goes wrong ---


def spoil(file: Path, how: str) -> None:
    if how == "a page":
        with file.open("r+b") as there:
            there.seek(4096 * 20)
            there.write(b"\xff" * 4096 * 10)
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "no database":
        file.write_text("hello" * 1000)
    elif how == "another":
        file.unlink()
        change(file, "CREATE TABLE songs (title)")
    else:
        change(file, "INSERT INTO schema_migration (name, applied) VALUES ('9999_later', '2030-01-01')")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a page", "damaged|malformed"),
        ("cut", "damaged|malformed"),
        ("no database", "not a database"),
        ("another", "none of crmbridge"),
        ("newer", r"made by a newer version \(it has 9999_later\)"),
        ("missing", "No such file"),
    ],
)
def test_what_cannot_be_put_back_changes_nothing(made: Path, how: str, said: str) -> None:
    assert run(made, "backup", "it.db").returncode == 0
    if how == "missing":
        (made / "it.db").unlink()
    else:
        spoil(made / "it.db", how)
    before = query(made / "var" / "bridge.db", "SELECT * FROM accounts")
    refused = run(made, "restore", "it.db")
    assert refused.returncode == 1
    assert re.search(said, refused.stderr), refused.stderr
    assert query(made / "var" / "bridge.db", "SELECT * FROM accounts") == before
    assert not left_over(made / "var")


def test_a_damaged_database_fails_its_backup_and_gives_way_to_an_older_one(made: Path) -> None:
    assert run(made, "backup", "good.db").returncode == 0
    with contextlib.closing(sqlite3.connect(made / "var" / "bridge.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spoil(made / "var" / "bridge.db", "a page")
    failed = run(made, "backup", "bad.db")
    assert failed.returncode == 1
    assert re.search("damaged|malformed", failed.stderr)
    assert not list(made.glob("bad*"))
    done = run(made, "restore", "good.db")
    assert done.returncode == 0, done.stderr
    assert query(made / "var" / "bridge.db", "PRAGMA integrity_check") == [("ok",)]
    assert len(left_over(made / "var")) == 1


def make_older(path: Path) -> None:
    with contextlib.closing(peewee.SqliteDatabase(str(path))) as older:
        Runner(older, str(schema.MIGRATIONS)).up("0001_tables")


def test_an_older_schema_is_brought_up_to_date(made: Path) -> None:
    (made / "var" / "bridge.db").unlink()
    make_older(made / "var" / "bridge.db")
    assert run(made, "backup", "old.db").returncode == 0  # with no place to remember it
    done = run(made, "restore", "old.db")
    assert "migrated 0002_views" in done.stdout, done.stderr
    assert run(made, "check").returncode == 0


def test_a_folder_gets_dated_names_and_keeps_the_last(made: Path) -> None:
    folder = made / "backups"
    folder.mkdir()
    for name in ("crmbridge-20200101T000000Z.db", "crmbridge-20200102T000000Z.db", "crmbridge-mine.db", "other.db"):
        (folder / name).write_text("")
    (folder / "crmbridge-20200103T000000Z.db.part").write_text("of one that was killed")
    done = run(made, "backup", "backups", "--keep", "2")
    assert "removed crmbridge-20200101T000000Z.db\n" in done.stdout, done.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == "crmbridge-20200102T000000Z.db"
    assert re.fullmatch(r"crmbridge-20\d{6}T\d{6}Z\.db", names[1])
    assert names[2:] == ["crmbridge-mine.db", "other.db"]
    row = query(made / "var" / "bridge.db", "SELECT file, bytes, error FROM backups")
    assert row == [(str(folder / names[1]), (folder / names[1]).stat().st_size, None)]


def test_the_new_backup_is_kept_by_a_clock_that_is_behind_too(made: Path) -> None:
    folder = made / "backups"
    (folder / "crmbridge-20200101T000000Z.db").mkdir(parents=True)
    for name in ("crmbridge-20990101T000000Z.db", "crmbridge-20990102T000000Z.db"):
        (folder / name).write_text("")
    done = run(made, "backup", "backups", "--keep", "2")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert (len(names), names[0], names[2]) == (3, "crmbridge-20200101T000000Z.db", "crmbridge-20990102T000000Z.db")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("crmbridge.ini",), "is there already"),
        (("new.db", "--keep", "3"), "--keep"),
        (("backups/", "--keep", "0"), "--keep"),
        (("passphrase/new.db",), "passphrase"),
    ],
)
def test_a_backup_that_makes_no_sense_is_refused(made: Path, words: tuple[str, ...], said: str) -> None:
    before = sorted(path.name for path in made.iterdir())
    failed = run(made, "backup", *words)
    assert (failed.returncode, said in failed.stderr, "Traceback" in failed.stderr) == (1, True, False), failed.stderr
    assert sorted(path.name for path in made.iterdir()) == before


def test_why_a_backup_failed_is_noted_also_where_the_passphrase_is_missing(made: Path) -> None:
    failed = run(made, "backup", "backups/", "--with-key", "--passphrase-file", "gone")
    assert (failed.returncode, "gone: No such file" in failed.stderr) == (1, True), failed.stderr
    ((error,),) = query(made / "var" / "bridge.db", "SELECT error FROM backups")
    assert "No such file or directory: 'gone'" in error
    assert run(made, "backup", "backups/").returncode == 0
    assert run(made, "backup", "crmbridge.ini").returncode == 1  # a slip at the keyboard is no failed backup
    assert len(query(made / "var" / "bridge.db", "SELECT error FROM backups")) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2600k", "crmbridge-test", str(place)]
    require(subprocess.run(mount, check=False).returncode == 0, "cannot mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_nothing_of_a_backup(made: Path, small_disk: Path) -> None:
    change(made / "var" / "bridge.db", "INSERT INTO heartbeats SELECT hex(randomblob(600000)), ''")
    failed = run(made, "backup", str(small_disk))
    assert (failed.returncode, "no space for a backup" in failed.stderr) == (1, True), failed.stderr
    (error,) = query(made / "var" / "bridge.db", "SELECT error, bytes FROM backups")
    assert error[0].startswith("no space for a backup")
    (small_disk / "filler").write_bytes(bytes(2_200_000))
    failed = run(made, "backup", str(small_disk))
    assert failed.returncode == 1
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_disk_without_room_for_a_restore_keeps_what_it_has(made: Path, small_disk: Path) -> None:
    assert run(made, "backup", "it.db").returncode == 0
    moved = {
        "CRMBRIDGE_STORE_PATH": str(small_disk / "bridge.db"),
        "CRMBRIDGE_STORE_QUEUE_PATH": str(small_disk / "q.db"),
    }
    shutil.copy(made / "var" / "bridge.db", small_disk)
    assert run(made, "init", **moved).returncode == 0
    before = sorted(path.name for path in small_disk.iterdir())
    failed = run(made, "restore", "it.db", **moved)
    assert (failed.returncode, "no space to restore" in failed.stderr) == (1, True), failed.stderr
    assert sorted(path.name for path in small_disk.iterdir()) == before


# --- killed ---


def killed_at(folder: Path, number: int, *words: str) -> int:
    """Run a command that gets SIGKILL at its so-manieth call that changes the disk; return its exit status."""
    inject = f"inject={KINDS}:signal=KILL:when={number}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject, sys.executable, "-m", "crmbridge", *words],
        cwd=folder, env=env, capture_output=True, check=False,
    ).returncode  # fmt: skip


@pytest.mark.slow
def test_a_backup_killed_anywhere_leaves_the_service_well_and_the_next_one_clears_up(made: Path) -> None:
    require(shutil.which("strace"), "needs strace")
    number, status = 1, -9
    while status:
        status = killed_at(made, number, "backup", "backups/")
        for whole in (made / "backups").glob("*.db"):
            assert copies.look_through(whole).rows["accounts"] == 1
        assert query(made / "var" / "bridge.db", "PRAGMA integrity_check") == [("ok",)]
        number += 1
    assert number > 6
    assert not left_over(made / "backups")


@pytest.mark.slow
def test_a_restore_killed_anywhere_leaves_one_database_or_the_other(made: Path) -> None:
    require(shutil.which("strace"), "needs strace")
    database = made / "var" / "bridge.db"
    assert run(made, "backup", "it.db").returncode == 0
    old = "INSERT INTO contacts (account_id, contact, conversation_id, created_at) VALUES ('acc_1', 'new', 'cnv', '')"
    number, status, seen = 1, -9, set()
    while status:
        if not query(database, "SELECT 1 FROM contacts"):
            change(database, old)
        status = killed_at(made, number, "restore", "it.db")
        assert query(database, "PRAGMA integrity_check") == [("ok",)]
        contacts, asked = (query(database, f"SELECT COUNT(*) FROM {name}")[0][0] for name in ("contacts", "backfills"))
        assert (contacts, asked) in ((1, 0), (0, 1)) or (contacts, asked) == (1, 1)
        seen.add(contacts)
        number += 1
    assert seen == {0, 1}
    assert all(".before-" in name for name in left_over(made / "var"))
    assert run(made, "check").returncode == 0
