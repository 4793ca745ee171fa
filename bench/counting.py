"""Counts what a process does: the SQL it runs and compiles, and the calls and moves between crmbridge's modules.

Nothing of crmbridge's own is asked for but where its files lie, so that any version of it can be counted.
"""

import re
import runpy
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FRAME = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")
_LATE_S = 0.05


class Counts:
    """What was counted so far; safe for threads, as each step is one that the interpreter does not break off."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.statements: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()  # by module
        self.moves: Counter[str] = Counter()  # from a module to another one

    def told(self) -> dict[str, dict[str, int]]:
        """Return all of it as what JSON can hold."""
        return {name: dict(found) for name, found in vars(self).items()}


def _words(sql: str) -> str:
    return re.sub(r"\s+", " ", sql).strip()


def count_sql(counts: Counts, of: str = "") -> Callable[[], None]:
    """Count what connections opened from now on run, of files whose name ends so; return what ends it.

    SQLite asks the authorizer when it compiles a statement, also when it does so again at a later run of the same.
    """
    opened = sqlite3.connect

    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, *more: Any) -> Any:
            self.connection.begin(sql)  # type: ignore[attr-defined]
            return super().execute(sql, *more)

        def executemany(self, sql: str, *more: Any) -> Any:
            self.connection.begin(sql)  # type: ignore[attr-defined]
            return super().executemany(sql, *more)

    class Connection(sqlite3.Connection):
        text = ""
        is_compiled = False

        def begin(self, sql: str) -> None:
            self.text, self.is_compiled = _words(sql), False

        def cursor(self, factory: Any = Cursor) -> Any:
            return super().cursor(factory)

        def execute(self, sql: str, *more: Any) -> Any:
            return self.cursor().execute(sql, *more)

        def ran(self, expanded: str) -> None:
            if expanded.startswith("--"):  # what a trigger does
                return
            word = _words(expanded).partition(" ")[0].upper()
            if word in _FRAME:
                counts.frames[word] += 1
            else:
                counts.statements[self.text] += 1

        def asked(self, what: int, *_: Any) -> int:
            if what != sqlite3.SQLITE_TRANSACTION and not self.is_compiled:  # Python compiles its COMMIT each time
                self.is_compiled = True
                counts.compiled[self.text] += 1
            return sqlite3.SQLITE_OK

    def connect(database: Any, *given: Any, **named: Any) -> Any:
        if not str(database).endswith(of):
            return opened(database, *given, **named)
        connection = opened(database, *given, **{"factory": Connection, **named})
        connection.set_trace_callback(connection.ran)
        connection.set_authorizer(connection.asked)
        return connection

    sqlite3.connect = connect

    def end() -> None:
        sqlite3.connect = opened

    return end


def count_calls(counts: Counts, package: Path) -> None:
    """Count calls of the package's functions, in threads started from now on and in this one.

    A comprehension is no call; a generator that goes on is one. A move is a call from another module of the package.
    """
    modules: dict[str, str | None] = {}

    def module(filename: str) -> str | None:
        if filename not in modules:
            path = Path(filename)
            is_ours = path.is_relative_to(package) and "sandbox" not in path.parts
            modules[filename] = str(path.relative_to(package).with_suffix("")) if is_ours else None
        return modules[filename]

    def seen(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or (code.co_name[0] == "<" and code.co_name != "<lambda>"):
            return
        here = module(code.co_filename)
        if here is None:
            return
        counts.calls[here] += 1
        caller = frame.f_back
        while caller is not None and (there := module(caller.f_code.co_filename)) is None:
            caller = caller.f_back
        if caller is not None and there != here:
            counts.moves[f"{there} -> {here}"] += 1

    threading.setprofile(seen)
    sys.setprofile(seen)


def late(until: Callable[[], None]) -> Callable[..., bool]:
    """Return a `threading.Condition.wait` that the engine leaves late: it records in one turn what came until then."""
    wait = threading.Condition.wait

    def waited(self: threading.Condition, timeout: float | None = None) -> bool:
        told = wait(self, timeout)
        if sys._getframe(1).f_code.co_filename.endswith("crmbridge/delivery.py"):
            self.release()
            until()
            self.acquire()
        return told

    return waited


def serve(how: str, *words: str) -> None:
    """Run crmbridge and count; each line on standard input is answered by the counts since the one before."""
    counts = Counts()
    count_sql(counts, "bridge.db")
    if how == "together":
        threading.Condition.wait = late(lambda: time.sleep(_LATE_S))  # type: ignore[method-assign]

    def answer() -> None:
        import json

        for _ in sys.stdin:
            told = counts.told()
            counts.clear()
            print(json.dumps(told), flush=True)

    threading.Thread(target=answer, daemon=True).start()
    count_calls(counts, Path.cwd() / "crmbridge")
    sys.argv = ["crmbridge", *words]
    runpy.run_module("crmbridge", run_name="__main__", alter_sys=True)


def table(found: Counter[str], number: int) -> list[str]:
    """Return lines of what was counted by message, the most frequent first."""
    return [f"{times / number:8.2f}  {name}" for name, times in found.most_common()]


if __name__ == "__main__":
    sys.path[0] = ""  # the rooms of bench are none of the counted version
    serve(sys.argv[1], *sys.argv[2:])
