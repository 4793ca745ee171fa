"""Copies of the database: made while it is in use, looked through, and made ready to take its place.

The copy reads in one transaction, so that it is of one moment and never begins anew, however much is written
meanwhile; and page by page, so that its check speaks for the original as well. It is made in small steps, with as long
a rest after each: VACUUM INTO, or one large step, doubles the slowest commits of the others.
"""

import contextlib
import datetime
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crmbridge.errors import Misconfigured
from crmbridge.events import epoch_s, instant
from crmbridge.store import accounts, deliveries, history, questions, schema, sqlite
from crmbridge.store.database import Database, Row, Tx
from crmbridge.store.deliveries import SEND

_STEP_PAGES = 256
_SYNC_STEPS = 16  # a sync of everything at the end would hold up the others' commits
_MOST_REST_S = 0.5
_TABLES = ("accounts", "endpoints", "contacts", "events", "outbound_messages", "deliveries")
_SIDE = ("-wal", "-shm", "-journal")
_KEPT_NOTES = 100
_ADMINS = 20
_GAP = 1000
_UNSURE_S = 7 * 86_400.0
_BEGIN_S = epoch_s("2020-01-01T00:00:00.000Z")


@dataclass(frozen=True)
class Contents:
    """What a copy tells of itself: when and by which version it was made, and its rows.

    `made_at` is no later than the moment of which it is a copy. `strange` tells what restore will refuse it for,
    `secrets` are what the accounts keep sealed, `admins` the id, name and making of the newest keys that may do
    everything, `all_admins` the number of those, `keys` that of the others; keys that were revoked are in none.
    """

    made_at: str
    version: str | None
    rows: dict[str, int]
    pending: int
    strange: list[str]
    secrets: list[str]
    admins: list[list[str]]
    all_admins: int
    keys: int
    sealed_key: str | None = None
    sealed_ini: str | None = None


def size(connection: sqlite3.Connection) -> int:
    """Return how many bytes a copy takes."""
    pages, page = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * page)


@contextlib.contextmanager
def reading(source: Path) -> Iterator[sqlite3.Connection]:
    """Hold the database as it is now for `write`; others go on writing. Raises Misconfigured."""
    with contextlib.closing(
        sqlite.open_file(source, timeout=sqlite.BUSY_TIMEOUT_S, isolation_level=None)
    ) as connection:
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

    with _named(draft), contextlib.closing(sqlite.open_file(draft, isolation_level=None)) as copy:
        copy.execute("PRAGMA synchronous = OFF")
        source.backup(copy, pages=_STEP_PAGES, progress=rest)
        copy.execute("PRAGMA journal_mode = DELETE").fetchone()  # one file, with nothing beside it
        copy.execute("DROP TABLE IF EXISTS backup_note")
        copy.execute(schema.NOTE)
        copy.execute("INSERT INTO backup_note VALUES (:made_at, :version, :sealed_key, :sealed_ini)", note)
    os.fsync(handle)


def foreign(database: sqlite3.Connection) -> list[str]:
    """Name what is in an open database and not of this version's making, by its schema's text: nothing of it is run."""
    if not database.execute(
        "SELECT 1 FROM sqlite_master WHERE name = 'schema_migration' AND type = 'table'"
    ).fetchone():
        return ["no schema_migration"]
    applied = [row[0] for row in database.execute("SELECT name FROM schema_migration ORDER BY name")]
    problem = schema.problem(applied)
    return [problem] if problem else schema.strange(database, applied)


def look_through(path: Path, *, from_elsewhere: bool = False) -> Contents:
    """Check a copy from end to end and count what is in it.

    Of one `from_elsewhere` the log is carried over, and what no migration makes is refused before any of it is run.
    Raises Misconfigured for what is damaged, is not ours, or was made by a newer version.
    """
    name = f"{path.absolute().as_uri()}?mode={'rw' if from_elsewhere else 'ro'}"
    with _named(path), contextlib.closing(sqlite.open_file(name, uri=True)) as copy:
        if from_elsewhere:
            copy.execute("PRAGMA journal_mode = DELETE").fetchone()
        tables = {row[0] for row in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables.issuperset((*_TABLES, "schema_migration")):
            raise Misconfigured(f"{path} is a database, but none of crmbridge")
        strange = _strange(copy, is_refused=from_elsewhere)
        found = [row[0] for row in copy.execute("PRAGMA integrity_check(3)")]
        if found != ["ok"]:
            raise Misconfigured(f"{path} is damaged: {'; '.join(found).replace(chr(10), ' ')}")
        for table in ("accounts", "api_keys"):  # whoever lists them would meet a value that is larger than the limit
            for _ in copy.execute(f"SELECT * FROM {table}"):
                pass
        admin = "FROM api_keys WHERE revoked_at IS NULL AND admin IS NOT 0"
        return Contents(
            **_note(copy, path, has_note="backup_note" in tables),
            rows={
                table: int(_value(copy, f"SELECT COUNT(*) FROM {table}")) for table in _TABLES if table != "endpoints"
            },
            pending=int(_value(copy, "SELECT COUNT(*) FROM deliveries WHERE finished_at IS NULL")),
            strange=strange,
            secrets=[
                str(sealed)
                for column in ("secret_sealed", "old_secret_sealed")
                for (sealed,) in copy.execute(f"SELECT {column} FROM endpoints WHERE {column} IS NOT NULL")
            ],
            admins=[
                [str(value) for value in row]
                for row in copy.execute(
                    f"SELECT id, substr(name, 1, 60), substr(created_at, 1, 19) {admin} "
                    f"ORDER BY created_at DESC, id LIMIT {_ADMINS}"
                )
            ],
            all_admins=int(_value(copy, f"SELECT COUNT(*) {admin}")),
            keys=int(_value(copy, "SELECT COUNT(*) FROM api_keys WHERE revoked_at IS NULL AND admin IS 0")),
        )


def _strange(copy: sqlite3.Connection, *, is_refused: bool) -> list[str]:
    """Name what is not of this version's making in a copy, or refuse the copy for it."""
    applied = [row[0] for row in copy.execute("SELECT name FROM schema_migration ORDER BY name")]
    problem = schema.problem(applied)
    if problem and is_refused:
        raise Misconfigured(problem)
    strange = [problem] if problem else schema.strange(copy, applied)
    if strange and is_refused:
        raise Misconfigured(
            f"it is not as crmbridge makes it: {', '.join(strange)}. What stands in it beside may run when it is "
            "read. If it is your own, take it out of a copy, as by: sqlite3 COPY 'DROP VIEW name'"
        )
    return strange


def _note(copy: sqlite3.Connection, path: Path, *, has_note: bool) -> dict[str, Any]:
    note: dict[str, Any] = {"version": None}
    if has_note:
        rows = copy.execute("SELECT * FROM backup_note")
        note |= dict(zip((column[0] for column in rows.description), rows.fetchone() or (), strict=False))
    if "made_at" not in note:  # made by another program: the last sign of life is no later than what it is a copy of
        at = _value(copy, "SELECT COALESCE(MAX(at), (SELECT MAX(accepted_at) FROM deliveries)) FROM heartbeats")
        note["made_at"] = at or instant(0)
    note["made_at"] = str(note["made_at"])
    try:
        epoch_s(note["made_at"])
    except ValueError:
        raise Misconfigured(f"{path} does not tell when it was made") from None
    return note


def _value(copy: sqlite3.Connection, sql: str) -> Any:
    return copy.execute(sql).fetchone()[0]


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

    def job(tx: Tx) -> None:
        if tx.value("SELECT 1 FROM sqlite_master WHERE name = 'backups'"):
            tx.insert("backups", row)
            tx.run("DELETE FROM backups WHERE position <= (SELECT MAX(position) FROM backups) - ?", (_KEPT_NOTES,))

    db.write_last(job)


def last(db: Database, *, good: bool = True) -> Row | None:
    """Return the last backup that was made and verified, or the last try of all."""
    return db.row(f"SELECT * FROM backups {'WHERE error IS NULL' if good else ''} ORDER BY position DESC LIMIT 1")


def made_s(db: Database) -> float:
    """Return when the database was made, in seconds since the epoch."""
    return datetime.datetime.fromisoformat(db.value("SELECT MIN(applied) FROM schema_migration")).timestamp()


# --- to take the database's place ---


def prepare(db: Database, made_at: str, now_s: float) -> int:
    """Make a copy fit to go on where the original may have gone further; return how many sends it asks about.

    What was owed then may have been done since. A CRM tells a repeated event by its id; a send is looked for in the
    conversation first, as one in doubt. No number of a conversation that may be in use is given out again.
    """
    if epoch_s(made_at) > now_s:  # the clock was ahead then: when it really was, nothing tells
        made_at = instant(now_s - _UNSURE_S)
    now = instant(now_s)
    owed = "finished_at IS NULL AND target = 'instagram' AND event = ?"

    def job(tx: Tx) -> int:
        for row in tx.rows(f"SELECT * FROM deliveries WHERE {owed} AND claim_id IS NOT NULL", (SEND,)):
            deliveries.release(tx, row, due=now, in_doubt=True)
        history.note_where(tx, "restored", owed, [SEND])
        sends = tx.run(
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
        tx.update("outbound_messages", doubt, waiting, [])
        # It could not be tried meanwhile.
        tx.run("UPDATE endpoints SET aged_from = ?, acted_at = ?", (now, now))
        # More than was given out since, also when this is restored once more: no conversation has an event each second.
        number = int(now_s - _BEGIN_S)
        tx.run("UPDATE contacts SET crm_sequence = MAX(crm_sequence + ?, ?)", (_GAP, number))
        missing = "NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'events')"
        tx.run(f"INSERT INTO sqlite_sequence (name, seq) SELECT 'events', 0 WHERE {missing}")  # never had a row
        skip = "UPDATE sqlite_sequence SET seq = MAX(seq, ?) WHERE name = 'events'"
        tx.run(skip, (number * 1000,))  # so a CRM's cursor from the time since then stays good
        tx.run("DROP TABLE IF EXISTS backup_note")
        return sends

    for account in accounts.everyone(db):
        questions.ask_backfill(db, account["id"], made_at)
    return db.write_last(job)


def close_down(path: Path) -> None:
    """Carry over what a database's log holds, so that the file is all of it.

    Raises Misconfigured while another program has it open; what is damaged stays as it is, its log kept beside.
    """
    try:
        with contextlib.closing(sqlite.open_file(path, timeout=1)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise Misconfigured(f"{path} is open in another program: close it first") from None
        raise Misconfigured(f"{path}: {error}") from None
    except sqlite3.DatabaseError:
        return
