"""The web server in this process, on clocks that a test sets, over real HTTP; its log is what it wrote so far."""

import contextlib
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from crmbridge import apikey, bridge, log
from crmbridge.events import instant
from crmbridge.store import keys
from crmbridge.web.server import Server
from tests.rig import Rig


class Served:
    """A server at `url`; `steady_s` is what its monotonic clock shows."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.steady_s = 1000.0
        self._app = bridge.make_app(rig.rooms, lambda _: None, clock=lambda: rig.now_s, steady=lambda: self.steady_s)
        self._server = Server(self._app, replace(rig.settings.web, port=0, threads=1), steady=lambda: self.steady_s)
        self.url = self._server.url
        self._stream = io.StringIO()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._server.run()
        self.rig.db.close_thread()

    def log(self, name: str) -> list[str]:
        """Return the lines of one name."""
        return [line for line in self._stream.getvalue().splitlines() if line.split()[2] == name]

    def pass_s(self, seconds: float) -> None:
        """Let time pass, and the server's loop notice. What was sent or answered before belongs to the time before."""
        self.poke()
        self.steady_s += seconds
        self.rig.now_s += seconds
        self.poke()

    def poke(self) -> None:
        """Have the loop go round, at least twice."""
        for _ in range(2):
            with self.connect() as one:
                one.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                while one.recv(4096):
                    pass

    def connect(self) -> socket.socket:
        """Open a connection."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def make_key(self, **changes: Any) -> str:
        """Store a key of an administrator and return it."""
        key, key_id, secret_hash = apikey.make()
        row = {"id": key_id, "name": "served", "secret_hash": secret_hash, "admin": 1, "accounts": []}
        keys.create(self.rig.db, {**row, "permissions": [], "created_at": instant(self.rig.now_s), **changes})
        return key

    def start(self) -> None:
        log.setup("info", self._stream)
        self._thread.start()

    def stop(self) -> None:
        """Stop it as a signal would; what is left to log is logged."""

        def end() -> None:
            raise SystemExit

        if not self._thread.is_alive():
            return
        look, self._app.look = self._app.look, end  # which the loop does once a second
        self.steady_s += 2
        self._thread.join(20)
        self._app.look = look
        self._server.close()
        for entry in list(self._server._house.sockets.values()):
            entry.close()


@contextlib.contextmanager
def opened(rig: Rig) -> Iterator[Served]:
    """Yield a server for a rig's rooms."""
    root = logging.getLogger()
    before, level = root.handlers[:], logging.getLogger("crmbridge").level
    served = Served(rig)
    served.start()
    try:
        yield served
    finally:
        served.stop()
        root.handlers[:] = before
        logging.getLogger("crmbridge").setLevel(level)


def wait_until(ready: Callable[[], Any], what: str, timeout_s: float = 20) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
