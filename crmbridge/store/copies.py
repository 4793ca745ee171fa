"""Copies of the database: made while it is in use, looked through, and made ready to take its place.

The copy reads in one transaction, so that it is of one moment and never begins anew, however much is written
meanwhile; and page by page, so that its check speaks for the original as well. It is made in small steps, with as long
a rest after each: VACUUM INTO, or one large step, doubles the slowest commits of the others.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crmbridge.errors import Misconfigured
from crmbridge.events import epoch_s, instant
from crmbridge.store import accounts, deliveries, questions, sqlite
from crmbridge.store.database import Database, Row, newest_migration
from crmbridge.store.deliveries import SEND, Patience

_STEP_PAGES = 256
_SYNC_STEPS = 16  # a sync of everything at the end would hold up the others' commits
_MOST_REST_S = 0.5
_TABLES = ("accounts", "contacts", "inbound_events", "outbound_messages", "deliveries")
_SIDE = ("-wal", "-shm", "-journal")
_KEPT_NOTES = 100
_GAP = 1000
_UNSURE_S = 7 * 86_400.0
_BEGIN_S = epoch_s("2020-01-01T00:00:00.000Z")


@dataclass(frozen=True)
class Contents:
    """What a copy tells of itself: when and by which version it was made, its rows, and the key sealed into it.

    `made_at` is no later than the moment of which it is a copy; `schema` is its newest migration.
    """

    made_at: str
    version: str | None
    schema: str
    rows: dict[str, int]
    pending: int
    sealed_key: str | None


def size(connection: sqlite3.Connection) -> int:
    """Return how many bytes a copy takes."""
    pages, page = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * page)


@contextlib.contextmanager
def reading(source: Path) -> Iterator[sqlite3.Connection]:
    """Hold the database as it is now for `write`; others go on writing. Raises Misconfigured."""
    with contextlib.closing(sqlite3.connect(source, timeout=sqlite.BUSY_TIMEOUT_S, isolation_level=None)) as connection:
        with _named(source):
            connection.execute("BEGIN")
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        yield connection


def write(
    source: sqlite3.Connection, draft: Path, handle: int, note: Row, *, pause: Callable[[float], None] = time.sleep
) -> None:
    """Write what `reading` holds into an empty file, open as `handle`, and sync it. Raises Misconfigured."""
    steps, began_s = 0, time.monotonic()

    def rest(_status: int, _left: int, _all: int) -> None:
        nonlocal steps, began_s
        steps += 1
        if steps % _SYNC_STEPS == 0:
            os.fsync(handle)
        pause(min(time.monotonic() - began_s, _MOST_REST_S))
        began_s = time.monotonic()

    with _named(draft), contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as copy:
        copy.execute("PRAGMA synchronous = OFF")
        source.backup(copy, pages=_STEP_PAGES, progress=rest)
        copy.execute("PRAGMA journal_mode = DELETE").fetchone()  # one file, with nothing beside it
        copy.execute("DROP TABLE IF EXISTS backup_note")
        copy.execute("CREATE TABLE backup_note (made_at TEXT NOT NULL, version TEXT NOT NULL, sealed_key TEXT)")
        copy.execute("INSERT INTO backup_note VALUES (:made_at, :version, :sealed_key)", note)
    os.fsync(handle)


def look_through(path: Path, *, change: bool = False) -> Contents:
    """Check a copy from end to end and count what is in it; with `change` its log may be carried over.

    Raises Misconfigured for what is damaged, is not ours, or was made by a newer version.
    """
    with (
        _named(path),
        contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rw' if change else 'ro'}", uri=True)
        ) as copy,
    ):
        if change:
            copy.execute("PRAGMA journal_mode = DELETE").fetchone()
        found = [row[0] for row in copy.execute("PRAGMA integrity_check(3)")]
        if found != ["ok"]:
            raise Misconfigured(f"{path} is damaged: {'; '.join(found).replace(chr(10), ' ')}")
        tables = {row[0] for row in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables.issuperset((*_TABLES, "schema_migration")):
            raise Misconfigured(f"{path} is a database, but none of crmbridge")
        schema = str(copy.execute("SELECT MAX(name) FROM schema_migration").fetchone()[0])
        if schema > newest_migration():
            raise Misconfigured(f"{path} was made by a newer version (it has {schema}): install that version first")
        note: tuple[str, str | None, str | None] | None = None
        if "backup_note" in tables:
            note = copy.execute("SELECT made_at, version, sealed_key FROM backup_note").fetchone()
        if note is None:  # made by another program: the last sign of life is no later than what it is a copy of
            at = copy.execute("SELECT COALESCE(MAX(at), (SELECT MAX(accepted_at) FROM deliveries)) FROM heartbeats")
            note = (at.fetchone()[0] or instant(0), None, None)
        rows = {table: int(copy.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]) for table in _TABLES}
        pending = int(copy.execute("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'").fetchone()[0])
    return Contents(note[0], note[1], schema, rows, pending, note[2])


def sealed_secrets(path: Path) -> list[str]:
    """Return what the accounts in a copy keep sealed."""
    sql = "SELECT access_token_sealed FROM accounts UNION ALL SELECT webhook_secret_sealed FROM accounts"
    with _named(path), contextlib.closing(sqlite3.connect(path)) as copy:
        return [row[0] for row in copy.execute(sql) if row[0]]


def discard(path: Path, *, but_itself: bool = False) -> None:
    """Remove a database file and what SQLite keeps beside it; the file last, as what is left is found by it."""
    for side in _SIDE if but_itself else (*_SIDE, ""):
        path.with_name(path.name + side).unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Misconfigured(f"{path}: {error}") from error


# --- what was backed up ---


def remember(db: Database, row: Row) -> None:
    """Note a backup, or a try that failed; a database of an older version has no place for it."""

    def job() -> None:
        if db.value("SELECT 1 FROM sqlite_master WHERE name = 'backups'"):
            db.insert("backups", row)
            db.run("DELETE FROM backups WHERE position <= (SELECT MAX(position) FROM backups) - ?", (_KEPT_NOTES,))

    db.write_last(job)


def last(db: Database, *, good: bool = True) -> Row | None:
    """Return the last backup that was made and verified, or the last try of all."""
    return db.row(f"SELECT * FROM backups {'WHERE error IS NULL' if good else ''} ORDER BY position DESC LIMIT 1")


# --- to take the database's place ---


def prepare(db: Database, made_at: str, patience: Patience, now_s: float) -> int:
    """Make a copy fit to go on where the original may have gone further; return how many sends it asks about.

    What was owed then may have been done since. A CRM tells a repeated event by its id; a send is looked for in the
    conversation first, as one in doubt. No number of a conversation that may be in use is given out again.
    """
    if epoch_s(made_at) > now_s:  # the clock was ahead then: when it really was, nothing tells
        made_at = instant(now_s - _UNSURE_S)
    now, gap_s = instant(now_s), now_s - epoch_s(made_at)
    owed = "state = 'pending' AND target = 'instagram' AND event = ?"

    def job() -> int:
        for row in db.rows(f"SELECT * FROM deliveries WHERE {owed} AND claim_id IS NOT NULL", (SEND,)):
            deliveries.release(db, row, due=now, in_doubt=True, now=now)
        deliveries.note(db, owed, [SEND], "restored", now)
        sends = db.run(
            f"""
            UPDATE deliveries SET in_doubt = 1, look_ups = 0, attempts = attempts + 1, due = ?,
                tried_at = MIN(COALESCE(tried_at, ?), ?), last_code = 'restored' WHERE {owed}""",
            (now, made_at, made_at, SEND),
        )
        doubt: Row = {
            "error_code": "in_doubt",
            "error_retryable": 0,
            "error_message": "a backup was put back: looked for",
        }
        waiting = "status = 'pending' AND id IN (SELECT message_id FROM deliveries WHERE in_doubt = 1)"
        db.update("outbound_messages", doubt, waiting, [])
        # Nobody but a person says that what had died is to be sent once more.
        db.run("UPDATE deliveries SET retry_asked_at = NULL WHERE state = 'dead' AND target = 'instagram'")
        for target in ("crm", "instagram"):  # it could not be tried meanwhile
            later = sqlite.shifted_at_most("expires_at")
            where = "state = 'pending' AND target = ? AND expires_at < ?"
            full = instant(now_s + patience.of(target))
            db.run(f"UPDATE deliveries SET expires_at = {later} WHERE {where}", (f"{gap_s:+.3f}", full, target, full))
        # More than was given out since, also when this is restored once more: no conversation has an event each second.
        number = int(now_s - _BEGIN_S)
        db.run("UPDATE contacts SET crm_sequence = MAX(crm_sequence + ?, ?)", (_GAP, number))
        missing = "NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'deliveries')"
        db.run(f"INSERT INTO sqlite_sequence (name, seq) SELECT 'deliveries', 0 WHERE {missing}")  # never had a row
        skip = "UPDATE sqlite_sequence SET seq = MAX(seq, ?) WHERE name = 'deliveries'"
        db.run(skip, (number * 1000,))  # so a CRM's cursor from the time since then stays good
        db.run("DROP TABLE IF EXISTS backup_note")
        return sends

    for account in accounts.everyone(db):
        questions.ask_backfill(db, account["id"], made_at, now)
    return db.write_last(job)


def close_down(path: Path) -> None:
    """Carry over what a database's log holds, so that the file is all of it.

    Raises Misconfigured while another program has it open; what is damaged stays as it is, its log kept beside.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=1)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise Misconfigured(f"{path} is open in another program: close it first") from None
        raise Misconfigured(f"{path}: {error}") from None
    except sqlite3.DatabaseError:
        return
