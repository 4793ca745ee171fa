"""What the bridge asks Instagram by itself: names, tokens, subscriptions, and what it missed.

Nothing here holds up a message: the calls are made on threads of their own.
"""

import threading
from collections.abc import Callable, Sequence

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.store.database import Database

_FAULT_S = 60.0
_LONGEST_S = 3600.0


class Aside:
    """A thread beside the engine's: does its `work` when it is told of news, and when the work says that it is time.

    `work` returns the seconds after which it has something to do, or None.
    """

    work: Callable[[], float | None]

    def __init__(self, name: str, db: Database, alarm: Alarm) -> None:
        self._name = name
        self._db = db
        self._alarm = alarm
        self._news = threading.Event()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin, with a first look."""
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def tell(self) -> None:
        """Have it look again; costs next to nothing."""
        self._news.set()

    def stop(self) -> None:
        """Let it end after the call that it may be in."""
        self._stopping.set()
        self._news.set()

    def pause(self, seconds: float) -> None:
        """Wait within the work, unless it is to end."""
        self._stopping.wait(max(seconds, 0.0))

    def is_stopping(self) -> bool:
        """Tell whether the work should come to an end."""
        return self._stopping.is_set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._news.clear()
            try:
                wait_s = self.work()
            except Exception as error:  # noqa: BLE001 - told as an alert
                log.exception("tending.fault", thread=self._name)
                problem = f"{self._name} failed with {type(error).__name__}; the log tells where"
                self._alarm.alert("system_fault", problem)
                wait_s = _FAULT_S
            finally:
                self._db.close_thread()
            self._news.wait(_LONGEST_S if wait_s is None else min(max(wait_s, 0.0), _LONGEST_S))


class Rounds:
    """Jobs one after the other, each every so many seconds; all of them at the first go."""

    def __init__(self, jobs: Sequence[tuple[float, Callable[[], object]]], clock: Callable[[], float]) -> None:
        self._jobs = jobs
        self._due_s = [0.0] * len(jobs)
        self._clock = clock

    def go(self) -> float:
        """Do what is due; return the seconds until something is."""
        for place, (every_s, job) in enumerate(self._jobs):
            if self._clock() >= self._due_s[place]:
                self._due_s[place] = self._clock() + every_s
                job()
        return min(self._due_s) - self._clock()
