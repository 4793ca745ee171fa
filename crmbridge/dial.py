"""Connects to a host: each of its addresses is judged, those permitted race, and what worked is tried first."""

import collections
import errno
import itertools
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

NEXT_S = 0.25  # RFC 8305, section 5: so long an address may take before the next one is tried beside it
_REMEMBERED = 1000
_UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)


class AddressRefused(OSError):
    """The host leads to no address that may be connected to."""


class Dialer:
    """Opens TCP connections to addresses that `allows` permits; safe for threads."""

    def __init__(self, allows: Callable[[str], bool]) -> None:
        self._allows = allows
        self._worked: dict[tuple[str, int], str] = {}

    def dial(self, host: str, port: int, timeout_s: float) -> socket.socket:
        """Return a connected socket within `timeout_s` of the name's resolution, which has no deadline of its own.

        The name is resolved once, so that a second look-up cannot change what was judged. Raises OSError.
        """
        found = dict.fromkeys(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
        allowed = [entry for entry in found if self._allows(str(entry[4][0]))]
        if not allowed:
            told = ", ".join(sorted({str(entry[4][0]) for entry in found})[:4])
            raise AddressRefused(f"the host leads to {told}, which [crm] allow_networks does not permit")
        sock, address = _race(_in_turn(allowed, self._worked.get((host, port))), timeout_s)
        if len(self._worked) >= _REMEMBERED:
            self._worked.clear()
        self._worked[host, port] = address
        return sock


def _in_turn(found: list[Any], worked: str | None) -> list[Any]:
    """Let the families take turns (RFC 8305, section 4), beginning with the address that worked, or its family."""
    if worked is not None:
        found = sorted(found, key=lambda entry: (entry[4][0] != worked, (":" in entry[4][0]) != (":" in worked)))
    lead = [entry for entry in found if entry[0] == found[0][0]]
    rest = [entry for entry in found if entry[0] != found[0][0]]
    return [entry for pair in itertools.zip_longest(lead, rest) for entry in pair if entry is not None]


def _race(addresses: list[Any], timeout_s: float) -> tuple[socket.socket, str]:
    """Try one address after another, each a moment after the last one or when that one failed; the first wins."""
    ends = time.monotonic() + timeout_s
    waiting, next_at = collections.deque(addresses), 0.0
    failed: OSError = TimeoutError("timed out")
    with selectors.DefaultSelector() as trying:
        try:
            while waiting or trying.get_map():
                now = time.monotonic()
                if now >= ends:
                    raise TimeoutError("timed out")
                if waiting and now >= next_at:
                    entry, next_at = waiting.popleft(), now + NEXT_S
                    try:
                        trying.register(_begin(entry), selectors.EVENT_WRITE, str(entry[4][0]))
                    except OSError as error:
                        failed, next_at = error, 0.0
                    continue
                for key, _ in trying.select((min(ends, next_at) if waiting else ends) - now):
                    sock: Any = key.fileobj
                    trying.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        return sock, key.data
                    sock.close()
                    failed, next_at = OSError(code, os.strerror(code)), 0.0
            raise failed
        finally:
            for key in trying.get_map().values():
                key.fileobj.close()  # type: ignore[union-attr]


def _begin(entry: Any) -> socket.socket:
    """Begin to connect to one address."""
    family, kind, protocol, _, address = entry
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code not in _UNDER_WAY:
            raise OSError(code, os.strerror(code))
    except OSError:
        sock.close()
        raise
    return sock
