"""Reads an HTTP answer off a socket: its final status line first, all of it within a deadline and in bounded memory.

Needs the standard library alone, as ``crmbridge health`` loads next to nothing.
"""

import contextlib
import functools
import http.client
import io
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

HEAD_BYTES = 262_144  # of interim answers, the status line and all headers together
REST_S = 1.0  # so long headers and body may take where the status line decides
_READ_BYTES = 100_000
_BUFFER_BYTES = 8192
_STATUS_LINE = re.compile(rb"\s*HTTP/[01]\.\d+[ \t]+([1-9]\d\d)\s")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Deadline:
    """Until when something must be over, by the monotonic clock."""

    def __init__(self, timeout_s: float) -> None:
        self._ends = time.monotonic() + timeout_s

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._ends

    def left_s(self) -> float:
        """Return the seconds left. Raises TimeoutError when there are none."""
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        return left_s

    def shorten(self, left_s: float) -> None:
        """Leave so many seconds at most."""
        self._ends = min(self._ends, time.monotonic() + left_s)


class _Timed(io.RawIOBase):
    """A socket's bytes: each read ends with the deadline, however slowly they trickle."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline = deadline
        self._is_over = False

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._is_over:
            return None
        self._sock.settimeout(self._deadline.left_s())
        return self._raw.readinto(buffer)

    def end(self) -> bool:
        """Read no more; tell whether TLS still holds bytes that were received."""
        self._is_over = True
        return bool(self._sock.pending()) if hasattr(self._sock, "pending") else False

    def close(self) -> None:
        self._raw.close()
        super().close()


class Response(http.client.HTTPResponse):
    """An answer whose status is the final one: interim answers, 1xx but 101, are skipped.

    `status_decides` gives what follows the status line no more than REST_S. `has_status` tells whether the line came;
    `headers` holds those that were read. `is_whole` tells at the end whether the connection may be used again: the
    answer was read to its end, by a length or a last chunk, and nothing came after it. Raises OSError or HTTPException.
    """

    headers: http.client.HTTPMessage
    length: int | None
    _method: str | None

    def __init__(
        self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None,
        *, deadline: Deadline, status_decides: bool = False,
    ) -> None:  # fmt: skip
        self._timed = _Timed(sock, deadline)
        super().__init__(self._timed, debuglevel, method, url)  # type: ignore[arg-type]
        self.has_status = self.is_whole = False
        self._deadline, self._status_decides = deadline, status_decides
        self._head_left = HEAD_BYTES
        self._has_ended = False

    def begin(self) -> None:
        """Read the status line and the headers."""
        line, status = self._status_line()
        while 100 <= status < 200 and status != 101:
            while self._line() not in (b"\r\n", b"\n", b""):
                pass
            line, status = self._status_line()
        version, _, reason = (*line.decode("latin-1").split(None, 2), "")[:3]
        self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
        self.code = self.status = status
        self.reason = reason.strip()
        self.headers = self.msg = http.client.HTTPMessage()
        self.has_status = True
        if self._status_decides:
            self._deadline.shorten(REST_S)
        self._frame(self._fields())

    def _status_line(self) -> tuple[bytes, int]:
        line = self._line()
        if not line:
            raise http.client.RemoteDisconnected("the connection was closed without an answer")
        found = _STATUS_LINE.match(line)
        if found is None:
            raise http.client.BadStatusLine(repr(line[:200]))
        return line, int(found[1])

    def _line(self) -> bytes:
        line = self.fp.readline(self._head_left + 1)
        self._head_left -= len(line)
        if self._head_left < 0:
            raise http.client.HTTPException(f"the headers have more than {HEAD_BYTES} bytes")
        return line

    def _fields(self) -> bool:
        """Read the header lines; tell whether each is as it must be. Others are read as they are meant, or skipped."""
        all_good = True
        while (line := self._line()) not in (b"\r\n", b"\n"):
            if not line:
                raise http.client.IncompleteRead(b"")
            name, _, value = line.decode("latin-1").partition(":")
            all_good &= _FIELD_NAME.fullmatch(name) is not None
            if _FIELD_NAME.fullmatch(name.strip()):
                self.headers.set_raw(name.strip(), value.strip())
        return all_good

    def _frame(self, all_good: bool) -> None:
        """Find out where the body ends. What leaves a doubt about it is read as it seems, and the connection closed."""
        coded = [value.lower() for value in self.headers.get_all("Transfer-Encoding", [])]
        told = self.headers.get_all("Content-Length", [])
        sizes = {size.strip() for value in told for size in value.split(",")}
        del self.headers["Content-Length"]  # urllib3 has an opinion on each that is odd
        self.chunked = coded == ["chunked"]
        self.chunk_left = self.length = None
        if not coded and len(sizes) == 1 and re.fullmatch(r"[0-9]{1,15}", size := sizes.pop()):
            self.length = int(size)
            self.headers.set_raw("Content-Length", size)
        is_clear = all_good and not (coded and told) and (self.chunked or self.length is not None)
        if self._method == "HEAD" or self.status in (101, 204, 304):
            # A body that is told of nevertheless may come behind.
            has_none = self._method == "HEAD" or not (coded or (told and self.length != 0))
            is_clear = all_good and has_none and self.status != 101
            self.chunked, self.length = False, 0
        self.will_close = not is_clear or bool(super()._check_close())  # type: ignore[misc]

    def _read_next_chunk_size(self) -> int:
        line = self.fp.readline(HEAD_BYTES + 1)
        size = line.partition(b";")[0].strip()
        # int() would take -1, which reads without a bound.
        if not line.endswith(b"\n") or not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
            raise http.client.IncompleteRead(b"")
        return int(size, 16)

    def _read_and_discard_trailer(self) -> None:
        super()._read_and_discard_trailer()  # type: ignore[misc]
        self._has_ended = True

    def _close_conn(self) -> None:
        has_ended = self._has_ended if self.chunked else self.length == 0
        is_more = self._timed.end() or bool(self.fp.peek())
        self.is_whole = has_ended and not self.will_close and not is_more
        super()._close_conn()  # type: ignore[misc]


def get(
    connection: http.client.HTTPConnection, path: str, *, timeout_s: float, headers: Mapping[str, str]
) -> tuple[int, bytes]:
    """Ask for a path and close the connection; return the status and a bounded body.

    Raises OSError or HTTPException.
    """
    connection.response_class = functools.partial(Response, deadline=Deadline(timeout_s))  # type: ignore[assignment]
    with contextlib.closing(connection):
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(_READ_BYTES)
