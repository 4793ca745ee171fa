"""One open database: reads from any thread, writes one at a time."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import peewee
from playhouse.migrations import Runner

from crmbridge import log
from crmbridge.errors import Misconfigured, Unavailable
from crmbridge.events import instant
from crmbridge.store import schema, sqlite
from crmbridge.store.commits import Commits

T = TypeVar("T")
K = TypeVar("K")
Row = dict[str, Any]
IS_IT_MOUNTED = "is its disk mounted (df)? If it is lost: crmbridge restore FILE"
# A file that is locked, full, unreadable or no database; against statements that are wrong, which are ours to mend.
_BROKEN = (peewee.DatabaseError,)
_OURS = (peewee.IntegrityError, peewee.ProgrammingError, peewee.DataError)
_LOOK_FOR_SPACE_S = 2.0


class Reads:
    """Queries in plain SQL with ``?`` marks, on the calling thread's connection. They raise Unavailable."""

    def __init__(self, db: peewee.SqliteDatabase) -> None:
        self._db = db

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Return all rows of a query as dictionaries."""
        cursor = self._execute(sql, parameters)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Row | None:
        """Return the first row of a query, or None."""
        cursor = self._execute(sql, parameters)
        row = cursor.fetchone()
        if row is None:
            return None
        found = {column[0]: value for column, value in zip(cursor.description, row, strict=True)}
        cursor.close()
        return found

    def pages(self, sql: str, parameters: Sequence[Any] = (), *, key: Sequence[str], limit: int) -> Iterator[list[Row]]:
        """Yield the rows of a query a page at a time, in the order of the columns `key`.

        The query ends in a condition; that a row comes after the last one of the page before is added to it.
        """
        columns, marks, after = ", ".join(key), ", ".join("?" * len(key)), ""
        last: tuple[Any, ...] = ()
        while rows := self.rows(f"{sql}{after} ORDER BY {columns} LIMIT ?", (*parameters, *last, limit)):
            yield rows
            after = f" AND ({columns}) > ({marks})"
            last = tuple(rows[-1][name.rpartition(".")[2]] for name in key)

    def value(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """Return the first column of the first row, or None."""
        cursor = self._execute(sql, parameters)
        row = cursor.fetchone()
        cursor.close()
        return row[0] if row else None

    def _execute(self, sql: str, parameters: Sequence[Any]) -> Any:
        try:
            return self._db.execute_sql(sql, tuple(parameters))
        except _OURS:
            raise
        except _BROKEN as error:
            raise _unavailable(error) from error


class Tx(Reads):
    """A transaction under way on the calling thread: `now` and `now_s` are the time at which it began."""

    def __init__(self, db: peewee.SqliteDatabase, now_s: float) -> None:
        super().__init__(db)
        self.now_s, self.now = now_s, instant(now_s)
        self.acts: list[Callable[[], None]] = []

    def run(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return how many rows it touched."""
        return int(self._execute(sql, parameters).rowcount)

    def insert(self, table: str, values: Row, *, once: bool = False) -> bool:
        """Insert one row; with `once`, a row that is there already is left, and False returned."""
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        ending = " ON CONFLICT DO NOTHING" if once else ""
        return bool(self.run(f"INSERT INTO {table} ({names}) VALUES ({marks}){ending}", tuple(values.values())))

    def update(self, table: str, values: Row, where: str, parameters: Sequence[Any]) -> int:
        """Change columns of the rows that match; return how many there were."""
        assignments = ", ".join(f"{name} = ?" for name in values)
        return self.run(f"UPDATE {table} SET {assignments} WHERE {where}", (*values.values(), *parameters))

    def after(self, act: Callable[[], None]) -> None:
        """Do something once the transaction is on disk, and only then; a job itself may run twice."""
        self.acts.append(act)


class Database(Reads):
    """The bridge's tables.

    Every write goes through `write` or `write_last`: threads queue at `Commits`, and processes at a file lock. It keeps
    the commands beside the service out of SQLite's busy back-off, and a commit from beginning inside a checkpoint,
    which SQLite before 3.51.3 does not bear (its WAL-reset bug).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(sqlite.connect(path))
        self.path = path
        self.clock: Callable[[], float] = time.time
        self._commits = Commits(self._transaction)
        self._presence = sqlite.FileLock(_presence_of(path))
        if not self._presence.share():
            self._presence.close()
            raise Misconfigured(f"{path} is being migrated or restored: try again when that is done")
        self._file_lock = sqlite.FileLock(path.with_name(path.name + ".lock"))
        self._reserve = sqlite.Reserve(path.with_name(path.name + ".reserve"))
        self._looked_for_space_s = time.monotonic()
        self._reserve.take()

    # --- writing ---

    def write(self, job: Callable[[Tx], T]) -> T:
        """Run `job` in a transaction and return once it is on disk; jobs that wait together share the commit.

        A job may run twice (alone, after a neighbour failed), so it must do nothing but SQL; `Tx.after` takes what
        must happen once. Raises Unavailable while the disk is full: what little space there is belongs to what was
        acknowledged before.
        """
        if self.is_full:
            self._look_for_space()
        return self._commits.run(job)

    def write_last(self, job: Callable[[Tx], T]) -> T:
        """Like `write`, alone in its transaction and after the writes that wait already; also on a full disk."""
        was_full = self.is_full
        return self._commits.run_last(job, again=lambda: self.is_full and not was_full)  # the reserve was freed

    def in_steps(
        self,
        pages: Iterable[Sequence[K]],
        step: Callable[[Tx, Sequence[K]], int],
        *,
        until_s: float = math.inf,
        rest: float = 0,
        pause: Callable[[float], None] = time.sleep,
    ) -> int:
        """Work on many rows, a small write at a time; return how many they were, as the steps tell.

        `pages` finds a step's rows outside the write lock, so the step looks again before it touches them. After each
        the others have the disk for `rest` times as long; what is left at the monotonic `until_s` is left.
        """
        total, began_s = 0, time.monotonic()
        for rows in pages:
            total += self.write_last(lambda tx, rows=rows: step(tx, rows))  # type: ignore[misc]
            if rest:
                pause(rest * (time.monotonic() - began_s))
            began_s = time.monotonic()
            if began_s >= until_s:
                break
        return total

    def _look_for_space(self) -> None:
        """Go back to work when the disk has room for the reserve again. Raises Unavailable when it has not."""
        now_s = time.monotonic()
        if now_s - self._looked_for_space_s >= _LOOK_FOR_SPACE_S:
            self._looked_for_space_s = now_s
            if self._reserve.take():
                log.warning("storage.recovered", path=str(self.path))
                return
        raise Unavailable(
            "The disk is full: nothing new is taken until there is space.", code="storage_full", after_s=30
        )

    @property
    def is_full(self) -> bool:
        """Whether nothing new is taken for want of disk space. The reserve tells, to every process and the next one."""
        return not self._reserve.is_held()

    def _run_full(self) -> None:
        self._looked_for_space_s = time.monotonic()
        self._reserve.give_up()
        log.error("storage.full", path=str(self.path))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Callable[[], Tx]]:
        try:
            with self._file_lock.held():
                self._db.begin("IMMEDIATE")
                try:
                    now_s = self.clock()
                    yield lambda: Tx(self._db, now_s)
                    self._db.commit()
                except BaseException:
                    # SQLite rolls back by itself when the disk fails; a second roll-back would hide why.
                    if self._db.connection().in_transaction:
                        self._db.rollback()
                    raise
        except BaseException as error:
            if _is_full(error) and not self.is_full:
                self._run_full()
            if isinstance(error, _BROKEN) and not isinstance(error, _OURS):  # inside a job it is named already
                raise _unavailable(error) from error
            raise

    # --- the schema and the file ---

    def migrate(self) -> list[str]:
        """Bring the schema up to this version; return the names of the migrations that ran.

        Each runs in one transaction: a failure leaves schema and rows as they were before it. Raises Misconfigured.
        """
        runner = Runner(self._db, str(schema.MIGRATIONS))
        if not any(step.applied is None for step in self._steps(runner)):
            return []
        try:
            with self.alone(), self._commits.alone(), self._file_lock.held():
                return list(runner.up())
        except peewee.DatabaseError as error:
            raise Misconfigured(f"{self.path} cannot be migrated: {error}") from error

    def _steps(self, runner: Any) -> list[Any]:
        try:
            return list(runner.status())
        except peewee.DatabaseError as error:
            raise Misconfigured(f"{self.path} is not a usable database: {error}") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that has the database open, in any process. Raises Misconfigured when somebody else has."""
        try:
            with _whole(self._presence, self.path):
                yield
        finally:
            self._presence.share()

    def schema_problem(self) -> str | None:
        """Tell in a sentence why this version cannot run on the schema as it is, or return None.

        Migrations only add, so what a newer version has added is left alone.
        """
        try:
            status = Runner(self._db, str(schema.MIGRATIONS)).status()
        except peewee.DatabaseError as error:
            if "locked" in str(error):  # by somebody who does not go by our locks; nothing is wrong with it
                return f"another program keeps it locked; see which, and end it: fuser -v {self.path}"
            return f"it is not a usable database ({error}): put a backup back"
        if any(step.name == schema.FIRST for step in status):
            return schema.FIRST_EDITION
        strange = [step.name for step in status if step.path is None and step.name < newest_migration()]
        if strange:
            return f"the database is not of this program's making (it has {strange[-1]}): put a backup back"
        pending = [step.name for step in status if not step.applied]
        if pending:
            return f"the database lacks {len(pending)} migration(s): run 'crmbridge migrate'"
        return None

    def require_schema(self) -> None:
        """Raise Misconfigured unless the schema has all that this version needs."""
        problem = self.schema_problem()
        if problem:
            raise Misconfigured(f"{self.path}: {problem}")

    def checkpoint_here(self) -> None:
        """Make the calling thread's connection the one that checkpoints the log."""
        sqlite.checkpoint_here(self._db)

    def overwrite_what_is_deleted(self) -> None:
        """Leave no trace in the file of what the calling thread deletes from now on."""
        sqlite.overwrite_what_is_deleted(self._db)

    def be_the_only_one(self) -> bool:
        """Become the one process that serves this database, until it ends; False when another one is."""
        self._worker_lock = sqlite.FileLock(self.path.with_name(self.path.name + ".worker"))
        return self._worker_lock.take()

    def sizes(self) -> dict[str, int]:
        """Return what is on the disk: database_bytes, wal_bytes, free_bytes of it to use again, disk_free_bytes."""
        return sqlite.sizes(self._db, self.path)

    def free_bytes(self) -> int:
        """Return what of the file is free to be used again."""
        return sqlite.page_bytes(self._db, "freelist_count")

    def used_bytes(self) -> int:
        """Return what of the file is in use."""
        return sqlite.page_bytes(self._db, "page_count") - self.free_bytes()

    def can_shrink(self) -> bool:
        """Tell whether the file gives free pages back to the disk; one made by an early version does not."""
        return sqlite.can_shrink(self._db)

    def shrink(self, pages: int) -> int:
        """Give up to so many free pages back to the disk; return how many there were."""
        return self.write_last(lambda _: sqlite.shrink(self._db, pages))

    def checkpoint(self) -> bool:
        """Carry the log over into the database; False when a long read stood in the way of some of it.

        Nobody writes meanwhile, in no process. Raises Unavailable when it cannot be done.
        """
        with self._commits.alone():
            try:
                with self._file_lock.held():
                    return sqlite.checkpoint(self._db)
            except _BROKEN as error:
                raise _unavailable(error) from error

    def close_thread(self) -> None:
        """Close the calling thread's connection."""
        self._db.close()

    def close(self) -> None:
        """Close the calling thread's connection and the lock files."""
        self._db.close()
        self._file_lock.close()
        self._presence.close()


def _is_full(error: BaseException | None) -> bool:
    """Look behind the error, too: a roll-back that fails because SQLite has rolled back hides the first one."""
    while error is not None:
        if isinstance(error, peewee.OperationalError) and sqlite.is_full(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unavailable(error: BaseException) -> Unavailable:
    return Unavailable(f"the database cannot be used now: {error}", code="storage_unavailable", after_s=5)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep every process from opening the database. Raises Misconfigured when one has it open."""
    presence = sqlite.FileLock(_presence_of(path))
    try:
        with _whole(presence, path):
            yield
    finally:
        presence.close()


@contextlib.contextmanager
def _whole(presence: sqlite.FileLock, path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(presence.held())
        except peewee.OperationalError:
            raise Misconfigured(f"{path} is in use: stop the service first") from None
        yield


def _presence_of(path: Path) -> Path:
    return path.with_name(path.name + ".open")


def newest_migration() -> str:
    """Return the name of the last migration that this version has."""
    return schema.migrations()[-1]


def open_existing(path: Path, key_file: Path | None = None) -> Database:
    """Open the database file; raise Misconfigured when there is none. A key file tells that there was one."""
    if not path.exists():
        if key_file is not None and key_file.exists():
            raise Misconfigured(f"no database at {path}, though crmbridge was set up here: {IS_IT_MOUNTED}")
        raise Misconfigured(f"no database at {path}: run 'crmbridge init'")
    return Database(path)


def create(path: Path) -> Database:
    """Open the database file, made if missing, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600, exist_ok=True)
    return Database(path)
