"""A far side on a bare socket: it answers each request with exactly the bytes and the pauses that a test says."""

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

# Bytes are sent, numbers are seconds to wait; without an end the connection stays for the next request.
Step = bytes | float | Literal["close", "reset"]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
OK_ONCE = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
ERROR = b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Request:
    """A request as it came; `connection` counts connections from 0, `to` is the address that was connected to."""

    connection: int
    to: str
    head: str
    body: bytes

    @property
    def path(self) -> str:
        return self.head.split()[1]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Far:
    """A server for any number of connections, each in a thread of its own; `answer` is asked for each request."""

    def __init__(
        self,
        answer: Callable[[Request], Iterable[Step]],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.answered = 0
        self._tls = tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = {"dualstack_ipv6": True} if host == "::" else {}
        self._listening = socket.create_server((host, port), family=family, backlog=128, **both)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http{'s' * (tls is not None)}://{f'[{host}]' if ':' in host else host}:{self.port}/hook"
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def wait(self, n: int, timeout_s: float = 10) -> list[Request]:
        """Wait until so many requests came."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.requests) >= n, timeout_s):
                raise TimeoutError(f"{len(self.requests)} of {n} requests")
            return list(self.requests)

    def wait_answered(self, n: int, timeout_s: float = 10) -> None:
        """Wait until so many answers were sent, to the last byte or to the end of the connection."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.answered >= n, timeout_s):
                raise TimeoutError(f"{self.answered} of {n} answers")

    def forget(self) -> None:
        """Forget the requests that came."""
        with self._changed:
            self.requests, self.answered = [], 0

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection and listen no more."""
        self._closing.set()
        for sock in [self._listening, *self._connections]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                number = len(self._threads) - 1
                self._connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(number, connection), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, number: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            if self._tls is not None:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
                self._connections.append(connection)
            to = str(connection.getsockname()[0]).removeprefix("::ffff:")
            received = connection.makefile("rb")
            while (request := _read(number, to, received)) is not None:
                with self._changed:
                    self.requests.append(request)
                    self._changed.notify_all()
                try:
                    if not self._play(connection, self.answer(request)):
                        return
                finally:
                    with self._changed:
                        self.answered += 1
                        self._changed.notify_all()

    def _play(self, connection: socket.socket, steps: Iterable[Step]) -> bool:
        for step in steps:
            if self._closing.is_set() or step == "close":
                return False
            if step == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return False
            if isinstance(step, bytes):
                connection.sendall(step)
            elif isinstance(step, float):
                self._closing.wait(step)
        return True


def _read(number: int, to: str, received: Any) -> Request | None:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = received.readline()
        if not line:
            return None
        head += line
    text = head.decode("latin-1")
    length = next((int(line[15:]) for line in text.lower().splitlines() if line.startswith("content-length:")), 0)
    return Request(number, to, text, received.read(length))


def dead_port(port: int, host: str = "::1") -> contextlib.ExitStack:
    """Occupy a port so that nobody gets a connection there, nor a refusal: what is sent to it is lost."""
    stack = contextlib.ExitStack()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(0)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # until its queue is full
        knocking = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        knocking.settimeout(0.3)
        try:
            knocking.connect((host, port))
        except TimeoutError:
            return stack
    raise TimeoutError(f"{host}:{port} still answers")
