"""What the migrations make, and what in a database they do not: a file from elsewhere may hold views, triggers and
expressions that run when somebody else reads it. Reads the schema's text alone and runs nothing of it.
"""

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from playhouse.migrations import Runner

from crmbridge.store import sqlite

MIGRATIONS = Path(__file__).parent / "migrations"
_SHOWN, _SHOWN_CHARS = 10, 60
FIRST = "0001_initial"  # of the first edition's migrations, which led to another schema
FIRST_EDITION = "it was made by the first edition, which was never released: this one cannot read it, and begins anew"
_TOKENS = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | \[[^\]]*\]   # quoted
        | --[^\n]* | /\*.*?(?:\*/|\Z) | [ \t\n\f\r]+             # comments and blanks
        | [\w$]+ | .""",
    re.DOTALL | re.VERBOSE,
)
_NO_WORDS = ("--", "/*", " ", "\t", "\n", "\f", "\r")
_Objects = dict[tuple[str, str, str], list[list[str]]]  # type, name, table: the texts it may have
NOTE = "CREATE TABLE backup_note (made_at TEXT NOT NULL, version TEXT NOT NULL, sealed_key TEXT, sealed_ini TEXT)"
# Beside the migrations' own: the note in a backup, as of each version, Litestream's marks, and what ANALYZE makes.
_OTHERS = (
    ("backup_note", NOTE),
    ("backup_note", "CREATE TABLE backup_note (made_at TEXT NOT NULL, version TEXT NOT NULL, sealed_key TEXT)"),
    ("_litestream_seq", "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)"),
    ("_litestream_lock", "CREATE TABLE _litestream_lock (id INTEGER)"),
    ("sqlite_stat1", "CREATE TABLE sqlite_stat1(tbl,idx,stat)"),
    ("sqlite_stat4", "CREATE TABLE sqlite_stat4(tbl,idx,neq,nlt,ndlt,sample)"),
)


def migrations() -> list[str]:
    """Return the names of this version's migrations, oldest first."""
    return sorted(path.stem for path in MIGRATIONS.glob("[0-9]*.py"))


def problem(applied: Sequence[str]) -> str | None:
    """Say why these are neither the migrations of this version nor the first of them, or return None."""
    known = migrations()
    if FIRST in applied:
        return FIRST_EDITION
    later = [name for name in applied if name > known[-1]]
    if later:
        return f"it was made by a newer version (it has {later[-1]}): install that version first"
    if not applied or list(applied) != known[: len(applied)]:
        return "it has been changed: no version of crmbridge has these migrations"
    return None


def strange(copy: sqlite3.Connection, applied: Sequence[str]) -> list[str]:
    """Name what is in a database with these migrations and is not theirs, and what of theirs is not in it."""
    allowed = _made(applied[-1])
    lacking = dict.fromkeys(allowed)
    for name, sql in _OTHERS:
        allowed.setdefault(("table", name, name), []).append(_words(sql))
    odd = []
    for kind, name, table, sql in copy.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"):
        lacking.pop((kind, name, table), None)
        known = allowed.get((kind, name, table))
        if known is None or _words(sql) not in known:
            odd.append(f"{kind} {name}"[:_SHOWN_CHARS])
    odd += [f"no {kind} {name}" for kind, name, _ in lacking]
    return odd[:_SHOWN] + ([f"{len(odd) - _SHOWN} more"] if len(odd) > _SHOWN else [])


def _made(upto: str) -> _Objects:
    database = sqlite.connect(Path(":memory:"))
    Runner(database, str(MIGRATIONS)).up(upto)
    rows = database.execute_sql("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    database.close()
    return {(kind, name, table): [_words(sql)] for kind, name, table, sql in rows}


def _words(sql: object) -> list[str]:
    """Return a statement without blanks and comments, which are as a version of SQLite, or a way back, left them."""
    return [word for word in _TOKENS.findall(str(sql)) if not word.startswith(_NO_WORDS)]
