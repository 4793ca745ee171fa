"""Waitress as this server wants it: bounded, quiet, and open to the next connection whatever the others do."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import waitress.adjustments
import waitress.server
import waitress.task
import waitress.wasyncore

from crmbridge import log
from crmbridge.config import Web
from crmbridge.store.database import Database
from crmbridge.web.app import App
from crmbridge.web.door import Channel

_CONNECTIONS = 400  # each may hold two files, and a process often has no more than 1024
_ACCEPTED_AT_ONCE = 16
_HELD_BYTES = 32 * 2**20  # of all requests that are not whole
_COUNTED_EVERY_BYTES = 2**20
_HEADER_BYTES = 64 * 1024
_LOOK_S, _TELL_S = 0.5, 60.0
_PEACE_S = 0.5
_WAITING_PER_THREAD = 16


class House:
    """What all connections share: the application, the clock, and how many there may be."""

    def __init__(self, app: App, steady: Callable[[], float]) -> None:
        self.app = app
        self.steady = steady
        self.sockets: dict[int, Any] = {}  # what the loop waits for, by file descriptor
        self.rest_s = _LOOK_S  # and how long at most
        self._uncounted = 0
        self._closed: Counter[str] = Counter()
        self._look_s = self._tell_s = 0.0

    def look(self) -> None:
        """Close what is late, answer what is refused, and write the log lines that are due, twice a second."""
        now_s = self.steady()
        if now_s >= self._look_s:
            self._look_s = now_s + _LOOK_S
            self._dismiss("late", [channel for channel in self._channels() if channel.is_late(now_s)])
            for channel in self._channels():
                channel.look()
            self._tell(now_s)
            self.app.look()

    def make_room(self) -> bool:
        """Close what is missed least where it is full; tell whether another connection may be accepted."""
        now_s = self.steady()
        if len(self.sockets) + _ACCEPTED_AT_ONCE > _CONNECTIONS:
            excess = self._staying() + _ACCEPTED_AT_ONCE - _CONNECTIONS
            # Who came just now is left in peace: meanwhile the next ones wait to be accepted.
            old = [channel for channel in self._least_missed(lambda channel: 1) if channel.since_s <= now_s - _PEACE_S]
            self._dismiss("crowded", old[: max(excess, 0)])
        has_room = self._staying() < _CONNECTIONS
        self.rest_s = _LOOK_S if has_room else _PEACE_S / 5
        return has_room

    def _staying(self) -> int:
        return len(self.sockets) - sum(channel.will_close for channel in self._channels())

    def count(self, read_bytes: int) -> None:
        """Note what was read; when that is a lot, see that all that is held stays within bounds."""
        self._uncounted += read_bytes
        if self._uncounted < _COUNTED_EVERY_BYTES:
            return
        self._uncounted = 0
        excess = sum(channel.held_bytes() for channel in self._channels()) - _HELD_BYTES
        while excess > 0 and (found := self._least_missed(Channel.held_bytes)):
            excess -= found[0].held_bytes()
            self._dismiss("large", found[:1])

    def close(self) -> None:
        """Write what is left to tell."""
        self._tell(float("inf"))
        self.app.look(last=True)

    def _channels(self) -> list[Channel]:
        return [entry for entry in self.sockets.values() if isinstance(entry, Channel)]

    def _least_missed(self, weight: Callable[[Channel], int]) -> list[Channel]:
        """Return what can be closed: first what is answered, then, the oldest first, what the caller with most has."""
        free = [channel for channel in self._channels() if channel.is_free() and weight(channel)]
        of_caller: Counter[str] = Counter()
        for channel in free:
            of_caller[channel.caller] += weight(channel)
        most = max(of_caller.values(), default=0)
        found = [channel for channel in free if channel.lingers or of_caller[channel.caller] == most]
        return sorted(found, key=lambda channel: (not channel.lingers, channel.since_s))

    def _dismiss(self, why: str, channels: Iterable[Channel]) -> None:
        for channel in channels:
            if channel.is_unfinished():
                self._closed[why] += 1
            channel.dismiss()

    def _tell(self, now_s: float) -> None:
        if self._closed and now_s >= self._tell_s:
            log.warning("connections.closed", **self._closed)
            self._closed.clear()
            self._tell_s = now_s + _TELL_S


class Listener(waitress.server.TcpWSGIServer):  # type: ignore[misc]
    """A listening socket."""

    channel_class = Channel

    def __init__(self, house: House, application: Any, **options: Any) -> None:
        self.house = house
        super().__init__(application, house.sockets, **options)

    def readable(self) -> bool:
        # Before the events of a round, so that none of them is for a connection that is closed here.
        self.house.look()
        return bool(self.accepting and self.house.make_room())

    def handle_accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            before = len(self.house.sockets)
            super().handle_accept()
            if len(self.house.sockets) == before:
                return


class _Dispatcher(waitress.task.ThreadedTaskDispatcher):  # type: ignore[misc]
    """The threads that requests run in; each closes its connection to the database when it ends."""

    def __init__(self, db: Database) -> None:
        super().__init__()
        self._db = db

    def handler_thread(self, thread_no: int) -> None:
        super().handler_thread(thread_no)
        self._db.close_thread()


class Server:
    """The listening server. `run` serves until SystemExit is raised in it, from a signal handler for instance."""

    def __init__(self, app: App, settings: Web, *, steady: Callable[[], float] = time.monotonic) -> None:
        proxy: dict[str, Any] = {}
        if settings.trusted_proxy:
            proxy = {
                "trusted_proxy": settings.trusted_proxy,
                "trusted_proxy_count": 1,
                "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"},
            }
        adjustments = waitress.adjustments.Adjustments(
            host=settings.host,
            port=settings.port,
            max_request_header_size=_HEADER_BYTES,
            max_request_body_size=2**62,  # each route has its own limit
            clear_untrusted_proxy_headers=True,
            ident="crmbridge",
            **proxy,
        )
        self._dispatcher = _Dispatcher(app.db)
        self._dispatcher.set_thread_count(settings.threads)
        self._house = House(app, steady)
        self._listeners = [
            Listener(self._house, app, dispatcher=self._dispatcher, adj=adjustments, sockinfo=listened)
            for listened in adjustments.listen
        ]
        most = settings.threads * _WAITING_PER_THREAD
        app.busy = lambda: len(self._dispatcher.queue) > most
        self._host = settings.host

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._listeners[0].effective_port)

    @property
    def url(self) -> str:
        """The address that is listened on."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve in this thread until SystemExit or KeyboardInterrupt is raised in it; requests in work are finished."""
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            while True:
                waitress.wasyncore.poll2(self._house.rest_s, self._house.sockets)
        self._dispatcher.shutdown()

    def close(self) -> None:
        """Stop listening, and write what is left to tell."""
        for listener in self._listeners:
            # But not the pipe that wakes the loop: a thread that still works would write into what has its number next.
            waitress.wasyncore.dispatcher.close(listener)
        self._house.close()
