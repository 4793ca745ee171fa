"""Group commit: writes that wait at the same time share one transaction.

1. A write is a ticket in one queue. Its thread sleeps until the ticket is done or may lead.
2. Whoever gets the turn leads: it takes up to 64 tickets, the oldest first, and runs their jobs in one transaction.
3. The leader leads on until its own ticket is done. Then it ends its turn and pokes the first ticket that waits.
4. The look at the queue comes after the end of the turn. A ticket that comes later finds the turn free by itself.
5. A job that fails rolls all of them back. Then each runs in a transaction of its own, and only the failed one fails.
6. A transaction that cannot begin fails all of its tickets: what is locked is locked for each of them.

So a job may run twice, and does nothing but SQL. What its transaction's `acts` hold happens once, after the commit, in
the ticket's own thread.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar


class Transaction(Protocol):
    """What a job is given: it holds what is to be done once it is on disk."""

    @property
    def acts(self) -> list[Callable[[], None]]: ...


X = TypeVar("X", bound=Transaction)
T = TypeVar("T")
_TOGETHER = 64


class _Ticket(Generic[X, T]):
    """A write that waits for its commit."""

    def __init__(self, job: Callable[[X], T]) -> None:
        self.job = job
        self.done = False
        self.poked = threading.Event()
        self._tx: X
        self._result: T
        self._error: BaseException | None = None  # of the last try

    def run(self, tx: X) -> None:
        self._tx = tx
        self._result = self.job(tx)

    def settle(self, error: BaseException | None = None) -> None:
        self._error = error
        self.done = True
        self.poked.set()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        for act in self._tx.acts:
            act()
        return self._result


class Commits(Generic[X]):
    """One queue of writes. `transaction` begins one, yields what makes a transaction for each job, and commits."""

    def __init__(self, transaction: Callable[[], AbstractContextManager[Callable[[], X]]]) -> None:
        self._transaction = transaction
        self._turn = threading.Lock()
        self._waiting: deque[_Ticket[X, Any]] = deque()

    def run(self, job: Callable[[X], T]) -> T:
        """Run a job with whoever waits meanwhile; return what it returns once it is on disk."""
        ticket = _Ticket(job)
        self._waiting.append(ticket)
        while not ticket.done:
            if not self._turn.acquire(blocking=False):
                ticket.poked.wait()
                ticket.poked.clear()
                continue
            try:
                while not ticket.done:
                    self._commit_waiting()
            finally:
                self._pass_on()
        return ticket.result()

    def run_last(self, job: Callable[[X], T], *, again: Callable[[], bool] = lambda: False) -> T:
        """Run a job after what waits already, alone in its transaction; once more when that failed and `again` says so.

        What comes meanwhile must not hold it up for ever.
        """
        ticket = _Ticket(job)
        with self.alone():
            self._commit_waiting()
            if not self._commit([ticket]) and again():
                self._commit([ticket])
        return ticket.result()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every write of this process waiting."""
        self._turn.acquire()
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        self._turn.release()
        with contextlib.suppress(IndexError):
            self._waiting[0].poked.set()

    def _commit_waiting(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _TOGETHER))]
        if batch and not self._commit(batch):
            for ticket in batch:
                if not ticket.done:
                    self._commit([ticket])

    def _commit(self, batch: list[_Ticket[X, Any]]) -> bool:
        """Run tickets in one transaction; tell whether that is on disk. Several with a bad one are not done yet."""
        began = False
        try:
            with self._transaction() as make:
                began = True
                for ticket in batch:
                    ticket.run(make())
        except BaseException as error:  # noqa: BLE001 - handed to the thread whose job it was
            if len(batch) == 1 or not began:
                for ticket in batch:
                    ticket.settle(error)
            return False
        for ticket in batch:
            ticket.settle()
        return True
