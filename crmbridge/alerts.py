"""What an administrator must know: one log line each, and to a command and a URL, throttled by kind and subject."""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from queue import Full, Queue
from typing import Any, Protocol

from crmbridge import log, net

_WAITING = 100
_COMMAND_S = 30
_REMEMBERED = 1000


class Alarm(Protocol):
    """What the other rooms see of the alerts. Both may be called from any thread, often, and hold nobody up."""

    def alert(
        self, kind: str, message: str, *, account: str | None = None, todo: str | None = None, **facts: Any
    ) -> None:
        """Raise an alert of a kind, or count one more cause of the one that is open; `todo` is what to type."""

    def clear(self, kind: str, *, account: str | None = None, message: str | None = None) -> None:
        """Give the all-clear, if such an alert is open."""


class Alerts:
    """Raises alerts; the command and the URL are called from a thread of its own, so that nobody waits for them."""

    def __init__(
        self,
        *,
        command: str,
        url: str,
        repeat_after_s: float,
        session: net.Session,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._command = command
        self._url = url
        self._repeat_after_s = repeat_after_s
        self._session = session
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self._queue: Queue[dict[str, Any]] = Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def alert(
        self, kind: str, message: str, *, account: str | None = None, todo: str | None = None, **facts: Any
    ) -> None:
        """Raise an alert, unless the same kind for the same account was raised a short while ago."""
        now_s, subject = self._clock(), (kind, account or "")
        with self._lock:
            if now_s - self._last.get(subject, -self._repeat_after_s) < self._repeat_after_s:
                return
            if len(self._last) >= _REMEMBERED:
                self._last.clear()
            self._last[subject] = now_s
            if (self._command or self._url) and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
                self._thread.start()
        facts = {**facts, "todo": todo}
        log.error("alert." + kind, message=message, account=account, **facts)
        if not (self._command or self._url):
            return
        try:
            self._queue.put_nowait({"alert": kind, "message": message, "account_id": account, **facts})
        except Full:
            log.error("alert.dropped", kind=kind)

    def clear(self, kind: str, *, account: str | None = None, message: str | None = None) -> None:
        """Give the all-clear, if such an alert is open."""
        with self._lock:
            self._last.pop((kind, account or ""), None)

    def flush(self, timeout_s: float) -> None:
        """Wait for a while until every alert raised so far was handed over."""
        with self._queue.all_tasks_done:
            self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, timeout_s)

    def _run(self) -> None:
        while True:
            facts = self._queue.get()
            if self._command:
                self._run_command(facts)
            if self._url:
                self._post(facts)
            self._queue.task_done()

    def _run_command(self, facts: dict[str, Any]) -> None:
        text = "\n".join(f"{name}: {value}" for name, value in facts.items() if value is not None) + "\n"
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", self._command],
                input=text,
                text=True,
                capture_output=True,
                timeout=_COMMAND_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.error("alert.command_failed", error=type(error).__name__)
            return
        if done.returncode:
            log.error("alert.command_failed", exit=done.returncode)

    def _post(self, facts: dict[str, Any]) -> None:
        body = json.dumps(facts, default=str).encode()
        try:
            answer = self._session.call("POST", self._url, headers={"Content-Type": "application/json"}, body=body)
        except net.CallFailed as failure:
            log.error("alert.url_failed", error=failure.message)
            return
        if not 200 <= answer.status < 300:
            log.error("alert.url_failed", http=answer.status)
