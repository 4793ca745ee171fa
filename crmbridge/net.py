"""The guarded HTTP session: which addresses a call may reach, how long it may take, how much it may read.

Knows neither CRMs nor Instagram; they pass in what is allowed.
"""

import contextlib
import heapq
import ipaddress
import itertools
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.poolmanager import PoolManager

from crmbridge.errors import Invalid

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_IDLE_S = 15.0
READ_BYTES = 16_384
_QUICK_ACK = getattr(socket, "TCP_QUICKACK", None)
# Ranges that an "is global" test lets through on some Python: addresses that carry an IPv4 address inside
# (6to4, NAT64, Teredo, IPv4-compatible and -translated), site-local ones, relays, documentation and segment routing.
_NOT_PUBLIC = [
    ipaddress.ip_network(net)
    for net in (
        "2002::/16", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "::/96", "::ffff:0:0:0/96", "fec0::/10",
        "3fff::/20", "5f00::/16", "192.88.99.0/24", "192.0.0.0/24",
    )
]  # fmt: skip


class AddressRefused(OSError):
    """The host's address is not one that this call may reach."""


class CallFailed(Exception):
    """No answer. `sent` tells whether the request may have reached the far side.

    `code` is one of connect_failed, dns_failed, tls_failed, address_refused, timeout, connection_lost, bad_answer.
    """

    def __init__(self, code: str, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.sent = sent


@dataclass(frozen=True)
class Reach:
    """Which addresses calls may lead to. `any_address` is for a far side named in the configuration itself."""

    networks: tuple[Network, ...] = ()
    http: bool = False
    any_address: bool = False

    def allows(self, address: str) -> bool:
        """Tell whether an IP address may be connected to."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        if self.any_address or any(ip in network for network in self.networks):
            return True
        return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)

    def check_url(self, url: str, field: str) -> None:
        """Raise Invalid when the URL can be seen to lead nowhere that is allowed, before any name is resolved."""

        def refuse(problem: str) -> Invalid:
            return Invalid(f"{field} {problem}.", code="url_refused", details=[{"field": field, "problem": problem}])

        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise refuse("is not a URL") from None
        if parts.scheme not in ("http", "https") or not host or port == 0:
            raise refuse("is not an http or https URL with a host")
        if parts.scheme == "http" and not self.http:
            raise refuse("must be https ([crm] allow_http permits http)")
        if parts.username is not None or parts.password is not None:
            raise refuse("must not carry a user name or password")
        if parts.fragment:
            raise refuse("must not carry a fragment")
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            if not self.allows(host):
                raise refuse("leads to an address that [crm] allow_networks does not permit")
        if host == "localhost" and not (self.allows("127.0.0.1") or self.allows("::1")):
            raise refuse("leads to an address that [crm] allow_networks does not permit")


@dataclass(frozen=True)
class Answer:
    """A bounded answer: no more of the body than the session reads."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    ms: int


class _Watchdog:
    """Cuts the connection of a call that outlives its deadline, however slowly its bytes trickle."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, _Call]] = []
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def watch(self, call: "_Call") -> None:
        with self._changed:
            heapq.heappush(self._heap, (call.deadline, next(self._numbers), call))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._heap:
                    self._changed.wait()
                deadline, _, call = self._heap[0]
                left = deadline - time.monotonic()
                if left > 0 and not call.over:
                    self._changed.wait(left)
                    continue
                heapq.heappop(self._heap)
            call.cut()


class _Call:
    """One call in progress: its deadline and the connection it uses."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.connection: HTTPConnection | None = None
        self.sent = False
        self.over = False
        self.was_cut = False
        self._lock = threading.Lock()

    def cut(self) -> None:
        with self._lock:
            if self.over:
                return
            self.was_cut = True
            sock = self.connection.sock if self.connection is not None else None
            if sock is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def finish(self) -> None:
        with self._lock:
            self.over = True


_watchdog = _Watchdog()
_current = threading.local()


def _connect(connection: HTTPConnection, reach: Reach) -> socket.socket:
    """Resolve, check every address, and connect to one that was checked: a second look-up cannot change it."""
    call: _Call = _current.call
    host = connection._dns_host
    try:
        found = socket.getaddrinfo(host, connection.port, 0, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise urllib3.exceptions.NameResolutionError(host, connection, socket.gaierror(str(error))) from None
    allowed = [entry for entry in found if reach.allows(str(entry[4][0]))]
    if not allowed:
        raise AddressRefused(f"{host} leads to an address that is not permitted")
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in allowed:
        sock = socket.socket(family, kind, protocol)
        left = max(call.deadline - time.monotonic(), 0.001)
        sock.settimeout(min(left, _current.connect_timeout_s))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            last = error
    raise urllib3.exceptions.NewConnectionError(connection, f"cannot connect: {last}") from last


def _pools(reach: Reach) -> dict[str, Any]:
    class Guarded:
        """What both kinds of connection share; mixed in before urllib3's own class."""

        last_used = 0.0

        def _new_conn(self) -> socket.socket:
            return _connect(self, reach)  # type: ignore[arg-type]

        @property
        def is_connected(self) -> bool:
            fresh = time.monotonic() - self.last_used < _IDLE_S
            return fresh and bool(super().is_connected)  # type: ignore[misc]

        def connect(self) -> None:
            _current.call.connection = self
            super().connect()  # type: ignore[misc]

        def request(self, *args: Any, **kwargs: Any) -> None:
            _current.call.connection = self
            super().request(*args, **kwargs)  # type: ignore[misc]
            self.last_used = time.monotonic()

        def send(self, data: Any) -> None:
            super().send(data)  # type: ignore[misc]
            _current.call.sent = True
            if _QUICK_ACK is not None and self.sock is not None:  # type: ignore[attr-defined]
                # A server that writes head and body apart would else wait 40 ms for our delayed acknowledgement.
                self.sock.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)  # type: ignore[attr-defined]

    class Plain(Guarded, HTTPConnection):
        pass

    class Tls(Guarded, HTTPSConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}


class _Adapter(HTTPAdapter):
    def __init__(self, reach: Reach, connections: int) -> None:
        self._reach = reach
        super().__init__(pool_connections=16, pool_maxsize=connections, max_retries=0)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **kwargs: Any) -> None:
        self.poolmanager = PoolManager(num_pools=connections, maxsize=maxsize, block=block, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self._reach)


class Session:
    """Makes bounded calls; safe for threads. Never follows a redirect, never reads the environment's proxies."""

    def __init__(
        self,
        reach: Reach,
        *,
        connect_timeout_s: float,
        timeout_s: float,
        connections: int = 8,
        read_bytes: int = READ_BYTES,
    ) -> None:
        self._read_bytes = read_bytes
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.clear()
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        adapter = _Adapter(reach, connections)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def call(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        query: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """Make one call and return its answer, whatever its status. Raises CallFailed when there is none."""
        started = time.monotonic()
        call = _Call(started + self._timeout_s)
        _current.call = call
        _current.connect_timeout_s = self._connect_timeout_s
        _watchdog.watch(call)
        try:
            with self._session.request(
                method,
                url,
                params=list(query) or None,
                data=body,
                headers=dict(headers),
                timeout=(self._connect_timeout_s, self._timeout_s),
                allow_redirects=False,
                stream=True,
            ) as response:
                text = response.raw.read(self._read_bytes, decode_content=False)
                answer = Answer(response.status_code, response.headers, text, _ms_since(started))
            if call.was_cut:
                raise CallFailed("timeout", f"no complete answer within {self._timeout_s:g} s", sent=True)
            return answer
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise self._failure(error, call) from None
        finally:
            call.finish()

    def _failure(self, error: Exception, call: _Call) -> CallFailed:
        chain = list(_causes(error))

        def has(*kinds: type[BaseException]) -> bool:
            return any(isinstance(cause, kinds) for cause in chain)

        if has(AddressRefused):
            return CallFailed("address_refused", "the host leads to an address that is not permitted", sent=False)
        if call.was_cut or (call.sent and has(TimeoutError, urllib3.exceptions.TimeoutError, requests.Timeout)):
            return CallFailed("timeout", f"no complete answer within {self._timeout_s:g} s", sent=call.sent)
        if has(urllib3.exceptions.NameResolutionError):
            return CallFailed("dns_failed", "the host name does not resolve", sent=False)
        if has(urllib3.exceptions.SSLError, requests.exceptions.SSLError):
            return CallFailed("tls_failed", f"TLS failed: {_shortened(chain[-1])}", sent=call.sent)
        if not call.sent:
            return CallFailed("connect_failed", f"no connection: {_shortened(chain[-1])}", sent=False)
        if has(urllib3.exceptions.ProtocolError, requests.ConnectionError, OSError):
            return CallFailed("connection_lost", "the connection broke before the answer", sent=True)
        return CallFailed("bad_answer", f"not an HTTP answer ({type(chain[-1]).__name__})", sent=True)


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    pending = [error]
    while pending:
        cause = pending.pop(0)
        if cause is None or cause in found:
            continue
        found.append(cause)
        pending += [cause.__cause__, cause.__context__, getattr(cause, "reason", None)]
        pending += [argument for argument in cause.args if isinstance(argument, BaseException)]
        pending = [entry for entry in pending if isinstance(entry, BaseException)]
    return found


def _shortened(error: BaseException) -> str:
    """Name a failure by the system's words or its type: a library's own sentence may quote the whole URL."""
    if isinstance(error, TimeoutError):
        return "timed out"
    text = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return " ".join(text.split())[:200]


def _ms_since(started: float) -> int:
    return int((time.monotonic() - started) * 1000)
