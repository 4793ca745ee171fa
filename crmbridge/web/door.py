"""The door before the application: whose body is taken, and how long a request may take to arrive.

Waitress alone takes every body before the application hears of the request, and waits as long as bytes come.
"""

import contextlib
import io
import json
import socket
import time
from concurrent.futures import Future
from typing import Any

import waitress.channel
import waitress.parser
import waitress.proxy_headers
import waitress.task
import waitress.utilities

from crmbridge.errors import BridgeError, TooLarge
from crmbridge.events import instant, new_id
from crmbridge.web.app import REFUSAL, Asked
from crmbridge.web.callers import group

_REQUEST_S = 20.0  # from a request's first byte to its last
_IDLE_S = 60.0
_LINGER_S = 5.0  # what was not taken is read so long, as a reset would overtake the answer
_CHUNK_LINE_BYTES, _TRAILER_BYTES = 1024, 8192
_SLUGS = {413: "body_too_large", 431: "headers_too_large", 501: "not_implemented"}


class Request(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """A request that has its headers read, is judged by them, and only then has its body taken."""

    # Waitress' own
    error: Any
    body_rcv: Any
    completed: bool
    expect_continue: bool

    is_judged = False
    refusal: BridgeError | None = None
    is_last = False  # nothing that follows can be read: it may be the rest of the body
    was_seen_refused = False
    _body_bytes = 0
    _expects_continue = False

    def parse_header(self, header_plus: bytes) -> None:
        """Read the headers. The client is told to go on when the request is let in, and not before."""
        self.header_plus = b""
        super().parse_header(header_plus)
        self._expects_continue = self.expect_continue and self.has_body
        self.expect_continue = False

    @property
    def has_body(self) -> bool:
        """Whether there is a body to take."""
        return self.body_rcv is not None

    def received(self, data: bytes) -> int:
        """Take what belongs to this request and return how many bytes that were."""
        taken = int(super().received(data))
        if self.chunked and self.is_judged and self.error is None:
            body = self.body_rcv
            if len(body) > self._body_bytes:
                self.refuse(TooLarge(f"The body has over {self._body_bytes} bytes; this route takes no more."))
            elif len(body.control_line) > _CHUNK_LINE_BYTES or len(body.trailer) > _TRAILER_BYTES:
                self.error = waitress.utilities.BadRequest("a chunk's line or the trailer is too long")
        if self.error is not None:
            self.completed = self.is_last = True
        return taken

    def held_bytes(self) -> int:
        """Return how much of it is kept, be it in memory or in a file."""
        body = self.body_rcv
        more = 0 if body is None else len(body) + (len(body.control_line) + len(body.trailer) if self.chunked else 0)
        return int(self.header_bytes_received) + more

    def let_in(self, body_bytes: int) -> None:
        """Have the body taken, up to so many bytes."""
        self.is_judged, self._body_bytes = True, body_bytes
        self.expect_continue = self._expects_continue

    def refuse(self, error: BridgeError) -> None:
        """Have the request answered with an error, and nothing of its body kept.

        What is under way is read all the same: not every client, and hardly a proxy, reads before it has sent all.
        """
        self.is_judged, self.refusal = True, error
        self.expect_continue = False
        if self.has_body:
            self.close()
            self.body_rcv.buf = _Nothing()
            if self._expects_continue:
                self.cut_short()

    def cut_short(self) -> None:
        """Have it answered without the rest of its body, and the connection closed."""
        self.completed = self.is_last = True
        self.headers["CONNECTION"] = "close"


class _Nothing:
    """A buffer for what is not kept."""

    def append(self, data: bytes) -> None:
        pass

    def __len__(self) -> int:
        return 0

    def getfile(self) -> io.BytesIO:
        return io.BytesIO()

    def close(self) -> None:
        pass


class _Task(waitress.task.WSGITask):  # type: ignore[misc]
    def service(self) -> None:
        try:
            super().service()
        finally:
            self.channel.since_s = self.channel.server.house.steady()

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        if self.request.refusal is not None:
            environ[REFUSAL] = self.request.refusal
        return environ


class _JsonError(waitress.task.ErrorTask):  # type: ignore[misc]
    """What Waitress itself refuses: requests that it cannot parse, or whose headers are far too large."""

    def execute(self) -> None:
        error = self.request.error
        correlation = new_id("req")
        body = json.dumps(
            {
                "error": _SLUGS.get(error.code, "invalid_request"),
                "message": f"{error.reason}: the request cannot be read.",
                "details": [],
                "correlation_id": correlation,
                "timestamp": instant(time.time()),
            }
        ).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Correlation-Id", correlation)]
        self.content_length = len(body)
        self.set_close_on_finish()
        self.write(body)


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """One connection. `server.house` is what all of them share. All here runs in the thread of the loop."""

    task_class = _Task
    error_task_class = _JsonError
    parser_class = Request
    # Waitress' own
    request: Request | None
    connected: bool
    will_close: bool
    close_when_flushed: bool
    sent_continue: bool

    lingers = False  # it was answered, and is only listened to, so that the client can read the answer
    _unheard = False  # something came, or may come, that is not taken

    def __init__(self, server: Any, sock: socket.socket, addr: Any, adj: Any, map: Any = None) -> None:
        self._unread = b""
        self._check: Future[bool] | None = None
        self.since_s: float = server.house.steady()  # when it began to wait for what it waits for
        self._idle_since_s = self.since_s
        self.caller = group(str(addr[0]))
        super().__init__(server, sock, addr, adj, map=map)

    # --- what the connection is at ---

    def is_free(self) -> bool:
        """Whether it could be closed without taking back an answer."""
        return not self.requests and not self.will_close

    def is_unfinished(self) -> bool:
        """Whether a request has begun and is not whole."""
        return self.request is not None

    def is_late(self, now_s: float) -> bool:
        """Whether what it waits for took too long."""
        if self.requests or self._check is not None:
            return False
        if self.request is None and self.total_outbufs_len:  # the client takes its answer slowly, or not at all
            return bool(time.time() - self.last_activity > _IDLE_S)
        most_s = _LINGER_S if self.lingers else _IDLE_S if self.request is None else _REQUEST_S
        return now_s - self.since_s > most_s

    def look(self) -> None:
        """Answer, at the second look, what was refused and still sends its body."""
        request = self.request
        if request is None or request.refusal is None or self.will_close:
            return
        if request.was_seen_refused:
            with self.requests_lock:
                request.cut_short()
                self._pass_on(request)
        request.was_seen_refused = True

    def held_bytes(self) -> int:
        """Return how much of a request that is not whole is kept."""
        request = self.request
        return len(self._unread) + (request.held_bytes() if request is not None else 0)

    def dismiss(self) -> None:
        """Have it closed, and free what it holds at once."""
        self.will_close = True
        self._forget()

    def _forget(self) -> None:
        self._unread, self._check = b"", None
        if self.request is not None:
            self.request.close()

    # --- the loop's side ---

    def readable(self) -> bool:
        if self.will_close:  # here, as a client that reads nothing is never found writable
            self.handle_close()
        if self._check is not None and self._check.done():
            self._resume()
        return bool(self.connected and self._check is None and super().readable())

    def writable(self) -> bool:
        return bool(self.connected and super().writable())

    def handle_read(self) -> None:
        if not self.lingers:
            super().handle_read()
            return
        try:
            self.recv(self.adj.recv_bytes)
        except OSError:
            self.handle_close()

    def handle_write(self) -> None:
        if not self.close_when_flushed or not self._unheard:
            super().handle_write()
            return
        self._flush_exception(self._flush_some)
        if self.connected and not self.will_close and not self.total_outbufs_len:
            self.close_when_flushed, self.lingers, self.since_s = False, True, self.server.house.steady()
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def handle_close(self) -> None:
        super().handle_close()
        self._forget()

    def received(self, data: bytes) -> bool:
        """Read what came; the requests that are whole by it go to the threads, one after the other."""
        with self.requests_lock:
            if self.will_close or self.close_when_flushed or not self.connected:
                return False
            self._unread += data
            self._read_on()
        self.server.house.count(len(data))
        return True

    def _read_on(self) -> None:
        while self._check is None and self.connected:
            if self.request is None:
                if not self._unread:
                    return
                self.request = self.parser_class(self.adj)
                self._idle_since_s, self.since_s = self.since_s, self.server.house.steady()
            request = self.request
            if self._unread and not request.completed:
                taken = request.received(self._unread)
                self._unread = self._unread[taken:]
            if request.headers_finished and not request.is_judged and not request.error and not request.empty:
                self._judge(request)
                if not request.is_judged:
                    return
            if request.expect_continue and not request.completed and not self.requests and not self.sent_continue:
                self.send_continue()
            if request.completed:
                self._pass_on(request)
            elif not self._unread:
                return

    def _judge(self, request: Request) -> None:
        path = request.path
        asked = Asked(
            method=request.command.upper(),
            path="/" + path.lstrip("/") if path.startswith("/") else path,
            authorization=request.headers.get("AUTHORIZATION", ""),
            address=self._address(request),
            has_body=request.has_body,
            body_bytes=request.content_length,
        )
        self.caller = group(asked.address)
        try:
            found = self.server.house.app.admit(asked)
        except BridgeError as error:
            request.refuse(error)
            return
        if isinstance(found, Future):
            self._check = found
            found.add_done_callback(lambda _: self.server.pull_trigger())
        else:
            request.let_in(found)

    def _address(self, request: Request) -> str:
        """Return who calls, as Waitress tells the application later."""
        environ = {"REMOTE_ADDR": self.addr[0], "HTTP_X_FORWARDED_FOR": request.headers.get("X_FORWARDED_FOR", "")}
        if self.adj.trusted_proxy in ("*", self.addr[0]):
            with contextlib.suppress(waitress.proxy_headers.MalformedProxyHeader):
                waitress.proxy_headers.parse_proxy_headers(
                    environ,
                    trusted_proxy_count=self.adj.trusted_proxy_count,
                    trusted_proxy_headers=self.adj.trusted_proxy_headers & {"x-forwarded-for"},
                )
        return str(environ["REMOTE_ADDR"])

    def _resume(self) -> None:
        """Go on with a request whose key was checked."""
        with self.requests_lock:
            check, self._check = self._check, None
            self.since_s = self.server.house.steady()
            if check is None or self.request is None:
                return
            error = check.exception()
            if isinstance(error, BridgeError):
                self.request.refuse(error)
            self._read_on()

    def _pass_on(self, request: Request) -> None:
        self.request, self.sent_continue = None, False
        if request.empty:  # a line end between two requests
            self.since_s = self._idle_since_s
            return
        if request.is_last:
            self._unread, self._unheard = b"", True
        self.requests.append(request)
        if len(self.requests) == 1:  # else `service` comes to it
            self.server.add_task(self)
