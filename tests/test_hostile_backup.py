"""A backup may come from anybody, or lie where others can change it: restore takes what crmbridge made, or nothing."""

import contextlib
import os
import re
import shutil
import sqlite3
import stat
import struct
import threading
import time
from pathlib import Path

import pytest

from crmbridge.ops import restore
from crmbridge.store import database, schema
from crmbridge.worker import Worker
from tests.rig import Rig
from tests.test_backup import change, install, left_over, make_older, query
from tests.test_cli import run
from tests.typed import typed
from tests.waiting import PATIENCE_S

PAGE = 4096
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    install(folder)
    done = run(folder, "backup", "it.db", "--with-key", "--passphrase-file", "passphrase")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def backup(installed: Path, tmp_path: Path) -> Path:
    """A good backup, made with its key, in the folder of an installation."""
    return shutil.copytree(installed, tmp_path / "it") / "it.db"


def refused(file: Path, said: str, *, within_s: float = PATIENCE_S) -> str:
    """Restore a file, see that it is refused with these words and that nothing changes; return all that was said."""
    folder, began_s = file.parent, time.monotonic()
    before = query(folder / "var" / "bridge.db", "SELECT * FROM accounts")
    status, told = typed(folder, "restore", str(file))
    assert (status, bool(re.search(said, told))) == (1, True), told
    assert time.monotonic() - began_s < within_s
    assert query(folder / "var" / "bridge.db", "SELECT * FROM accounts") == before
    assert not left_over(folder / "var")
    return told


def test_a_value_larger_than_any_that_is_written_is_refused(backup: Path) -> None:
    change(backup, "UPDATE accounts SET username = zeroblob(100000000)")
    refused(backup, "too big|not whole|damaged|cannot be")


# --- what no migration makes ---


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (f"CREATE VIEW bomb AS {ENDLESS}", "view bomb"),
        ("CREATE TRIGGER quiet AFTER UPDATE ON contacts BEGIN DELETE FROM accounts; END", "trigger quiet"),
        ("CREATE INDEX long ON api_keys (length(hex(zeroblob(400000000))))", "index long"),
        ("CREATE TABLE deep (b, a AS (hex(zeroblob(400000000))))", "table deep"),
        ("CREATE TEMP TABLE x (y); CREATE TABLE \"a\n\x1b[2Jb\" (c)", r"table a\\n\\x1b\[2Jb"),
        ("DROP VIEW stuck; CREATE VIEW stuck AS SELECT * FROM api_keys", "view stuck"),
        ("DROP INDEX events_dedupe", "no index events_dedupe"),
        ("ALTER TABLE contacts ADD COLUMN more AS (hex(contact))", "table contacts"),
        ("ALTER TABLE heartbeats RENAME COLUMN at TO \"at\u00a0\"", "table heartbeats"),
        ("ALTER TABLE accounts ADD COLUMN more CHECK (more IS NOT '--')", "table accounts"),
        ("CREATE TABLE sqlit (tbl, idx, stat, more)", "table sqlit"),
        ("DELETE FROM schema_migration", "no version of crmbridge has these migrations"),
        ("UPDATE schema_migration SET name = '0002_vews' WHERE name = '0002_views'", "has these migrations"),
        ("UPDATE backup_note SET made_at = 'yesterday'", "does not tell when it was made"),
    ],
)  # fmt: skip
def test_what_no_migration_makes_is_refused_and_named(backup: Path, planted: str, said: str) -> None:
    change(backup, *planted.split("; CREATE ")[:1], *("CREATE " + more for more in planted.split("; CREATE ")[1:]))
    refused(backup, said, within_s=10)


def test_in_an_older_schema_too(backup: Path) -> None:
    folder = backup.parent
    (folder / "var" / "bridge.db").unlink()
    make_older(folder / "var" / "bridge.db")
    assert run(folder, "backup", "old.db").returncode == 0
    change(folder / "old.db", f"CREATE VIEW bomb AS {ENDLESS}")
    refused(folder / "old.db", "view bomb")
    change(folder / "old.db", "DROP VIEW bomb")
    assert run(folder, "restore", "old.db").returncode == 0


def test_what_others_leave_in_a_copy_by_right_is_no_hindrance(backup: Path) -> None:
    """ANALYZE, Litestream, and comments that a dropped column left."""
    change(
        backup,
        "ANALYZE",
        "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)",
        "CREATE TABLE _litestream_lock (id INTEGER)",
        "ALTER TABLE accounts ADD COLUMN more TEXT /* gone again */",
        "ALTER TABLE accounts DROP COLUMN more",
    )
    assert run(backup.parent, "restore", "it.db").returncode == 0


def test_a_backup_of_a_database_with_something_more_says_that_it_will_be_refused(backup: Path) -> None:
    folder = backup.parent
    change(folder / "var" / "bridge.db", "CREATE VIEW mine AS SELECT 1")
    done = run(folder, "backup", "more.db")
    assert (done.returncode, "restore will refuse it" in done.stderr, "view mine" in done.stderr) == (0, True, True)
    refused(folder / "more.db", "DROP VIEW name")
    change(folder / "more.db", "DROP VIEW mine")
    assert run(folder, "restore", "more.db").returncode == 0


def test_an_older_version_backs_up_what_a_newer_one_left_and_says_so(backup: Path) -> None:
    folder = backup.parent
    later = "INSERT INTO schema_migration (name, applied) VALUES ('9999_later', '2030-01-01')"
    change(folder / "var" / "bridge.db", later, "CREATE TABLE later (x)")
    done = run(folder, "backup", "later.db")
    assert (done.returncode, "restore will refuse it: it was made by a newer" in done.stderr) == (0, True), done.stderr
    refused(folder / "later.db", r"made by a newer version \(it has 9999_later\)")


def test_every_connection_trusts_no_schema(rig: Rig, tmp_path: Path) -> None:
    queue = Worker(rig.engine, tmp_path / "queue.db", [])._huey.storage
    for connection in (rig.db._db.connection(), queue.conn):
        pragmas = [connection.execute(f"PRAGMA {name}").fetchone() for name in ("trusted_schema", "cell_size_check")]
        assert pragmas == [(0,), (1,)]
    queue.close()


# --- bombs ---


def endless(file: Path) -> None:
    """Make the schema's tree 500 times as wide at each of its levels: all of them lead to the same page."""

    def inner(child: int, start: int) -> bytearray:
        page, at = bytearray(PAGE), PAGE
        page[start] = 5
        for number in range(500):
            at -= 5
            page[at : at + 5] = struct.pack(">IB", child, 1)
            struct.pack_into(">H", page, start + 12 + 2 * number, at)
        struct.pack_into(">HHxI", page, start + 3, 500, at, child)
        return page

    pages = bytearray(file.read_bytes())
    last = len(pages) // PAGE
    first = inner(last + 1, 100)
    first[:100] = pages[:100]
    struct.pack_into(">I", first, 28, last + 6)
    pages[:PAGE] = first
    for level in range(1, 6):
        pages += inner(last + level + 1, 0)
    leaf, row = bytearray(PAGE), bytes([6, 1, 6, 0, 0, 0, 0, 0])
    leaf[0], leaf[PAGE - len(row) :] = 13, row
    struct.pack_into(">HHxH", leaf, 3, 1, PAGE - len(row), PAGE - len(row))
    file.write_bytes(pages + leaf)


def test_a_tree_that_never_ends_does(backup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless(backup)
    monkeypatch.setattr(restore, "_LEAST_S", 1)
    refused(backup, "took more than 1 s of computing", within_s=20)


def test_a_value_that_fills_the_memory_is_refused(backup: Path) -> None:
    columns = "account_id, contact, conversation_id, created_at"
    for number in range(2):  # which are compared with each other
        change(backup, f"INSERT INTO contacts ({columns}) VALUES ('a', zeroblob({60_000_000 + number}), '', '')")
    done = run(backup.parent, "restore", "it.db")
    assert (done.returncode, "took more than 64 MB of memory" in done.stderr) == (1, True), done.stderr


def test_a_file_of_holes_is_no_reason_to_fill_the_disk(backup: Path) -> None:
    os.truncate(backup, 2**40)
    refused(backup, "no space to restore", within_s=10)


# --- names that lead elsewhere ---


@pytest.mark.parametrize("side", ["", "-wal"])
@pytest.mark.parametrize("what", ["link", "dangling", "fifo", "folder", "device", "socket"])
def test_what_is_no_file_is_refused_and_not_waited_for(backup: Path, what: str, side: str) -> None:
    place = backup.with_name(f"an odd\nname.db{side}")
    if side:
        shutil.copy(backup, place.with_name("an odd\nname.db"))
    if what in ("link", "dangling"):
        place.symlink_to(backup if what == "link" else "nowhere")
    elif what == "fifo":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    elif what == "device":
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    else:
        os.mknod(place, stat.S_IFSOCK | 0o600)
    told = refused(place.with_name("an odd\nname.db"), "is a link|is no file|No such device", within_s=10)
    assert len(told.splitlines()) == 1


def test_the_file_that_was_checked_is_the_one_that_is_put_in_place(backup: Path) -> None:
    folder, source = backup.parent, backup.with_name("source.db")
    evil = backup.with_name("evil.db")
    shutil.copy(backup, evil)
    shutil.copy(backup, source)
    change(evil, "CREATE VIEW bomb AS SELECT 1", "UPDATE accounts SET username = 'evil'")
    is_over = threading.Event()

    def exchange() -> None:
        while not is_over.is_set():
            for one in (evil, backup):
                draft = backup.with_name("draft")
                shutil.copy(one, draft)
                draft.replace(source)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        ended = [run(folder, "restore", "source.db").returncode for _ in range(6)]
    finally:
        is_over.set()
        thread.join()
    assert set(ended) <= {0, 1}
    assert query(folder / "var" / "bridge.db", "SELECT username FROM accounts") == [(None,)]
    assert not query(folder / "var" / "bridge.db", "SELECT 1 FROM sqlite_master WHERE name = 'bomb'")


def test_names_that_others_left_beside_the_database_and_the_backups_stay(backup: Path) -> None:
    folder = backup.parent
    var, backups = folder / "var", folder / "backups"
    backups.mkdir()
    victim = folder / "victim"
    victim.write_text("not theirs")
    (var / "bridge.db.before-nothing").symlink_to("nowhere")
    os.mkfifo(backups / "crmbridge-20200101T000000Z.db.part")
    (backups / "crmbridge-20200102T000000Z.db.part").symlink_to(victim)
    (backups / "crmbridge-20200103T000000Z.db.part").mkdir()
    odd = ["before-9.0.0-20200101T000000.db", f"x {victim} ", "crmbridge-20200101T000000Z.db\n", "-rf", "old\nname.db"]
    for name in odd:
        (backups / name.replace("/", "\u2044")).write_text("")
    before = {path.name for path in backups.iterdir()}
    for number in range(2):
        done = run(folder, "backup", "backups/", "--keep", "1")
        assert done.returncode == 0, done.stderr
        time.sleep(1.1 - number)  # their names tell the second
    after = {path.name for path in backups.iterdir()}
    assert before <= after
    assert len(after - before) == 1
    assert victim.read_text() == "not theirs"
    (new,) = after - before
    assert run(folder, "restore", f"backups/{new}").returncode == 0


# --- keys ---


def test_admin_keys_are_listed_and_counted_apart_from_ordinary_ones(backup: Path) -> None:
    folder = backup.parent
    (here,) = query(backup, "SELECT COUNT(*) FROM api_keys WHERE admin")[0]
    names = "id, name, secret_hash, admin, accounts, permissions, created_at, revoked_at"
    rows = ["'key_planted', 'sup\x1bport', '', 'x', '[]', '[]', '2027-01-01T00:00:00.000Z', NULL",
            "'key_ended', 'old', '', 1, '[]', '[]', '2025-01-01T00:00:00.000Z', '2025-02-01T00:00:00.000Z'",
            "'key_oldest', 'first', '', 1, '[]', '[]', '2020-01-01T00:00:00.000Z', NULL",
            "'key_crm', 'crm', '', 0, '[]', '[]', '2028-01-01T00:00:00.000Z', NULL"]  # fmt: skip
    change(backup, *(f"INSERT INTO api_keys ({names}) VALUES ({row})" for row in rows))
    told = run(folder, "restore", "it.db").stdout
    assert f"  admin keys in it: {here + 2}; what you do not know, end: crmbridge key revoke ID\n" in told
    assert "    key_planted  made 2027-01-01T00:00:00  sup\\x1bport\n" in told
    assert "    key_oldest  made " in told
    assert "more admin keys" not in told
    assert "  ordinary keys in it: 1\n" in told
    more = [
        f"'key_{number}', 'n', '', 1, '[]', '[]', '2026-01-{number}T00:00:00.000Z', NULL" for number in range(10, 30)
    ]
    change(backup, *(f"INSERT INTO api_keys ({names}) VALUES ({row})" for row in more))
    told = run(folder, "restore", "it.db").stdout
    shown = [line.split()[0] for line in told.splitlines() if "  made 20" in line]
    assert (len(shown), "key_planted" in shown, "key_oldest" in shown) == (20, True, False)
    assert f"    and {here + 2} more admin keys, made before these: crmbridge key list\n" in told
    assert "  ordinary keys in it: 1\n" in told
    assert "key_ended" not in told
    assert run(folder, "key", "revoke", "key_planted").returncode == 0
    assert query(folder / "var" / "bridge.db", "SELECT revoked_at IS NULL FROM api_keys WHERE id = 'key_planted'") == [
        (0,)
    ]


def test_the_schema_is_compared_word_for_word(tmp_path: Path) -> None:
    """A text that only looks the same to a careless reader is another one."""
    made_db = database.create(tmp_path / "a.db")
    made_db.migrate()
    made_db.close()
    applied = schema.migrations()
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'alerts'").fetchone()
        for other, is_ours in (
            (sql.replace("\n", "\r\n\t"), True),
            (re.sub(r"--[^\n]*", "/* x */", sql), True),
            (sql.replace("NOT NULL", "NOT /* */ NULL", 1), True),
            (sql.replace("NOT NULL", "/* NOT NULL */", 1), False),
            (sql.replace("told       INTEGER", "told\u00a0INTEGER"), False),
            (sql.replace("count      INTEGER NOT NULL,", "count INTEGER NOT NULL DEFAULT '--',"), False),
            (sql + "\0", False),
        ):
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'alerts'", (other,))
            assert schema.strange(connection, applied) == ([] if is_ours else ["table alerts"]), other
