"""The guarded HTTP session: which addresses a call may reach, how long it may take, how much it may read.

Knows neither CRMs nor Instagram; they pass in what is allowed.
"""

import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.poolmanager import PoolManager
from urllib3.util.ssl_ import create_urllib3_context

from crmbridge import answers, dial, urls
from crmbridge.errors import Invalid, Misconfigured

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
READ_BYTES = 16_384
_IDLE_S = 15.0
_QUICK_ACK = getattr(socket, "TCP_QUICKACK", None)
_FAILED = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA has given out as global unicast
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: leads to the IPv4 address in its last four bytes
# What IANA's registries of special addresses take out of the public ones, named here because an "is global" test tells
# something else on each Python. The ranges for the Internet's own protocols go whole: nobody's CRM is there.
_SPECIAL = [
    ipaddress.ip_network(net)
    for net in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    )
]  # fmt: skip


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
        ip: urls.Address = ipaddress.ip_address(address.partition("%")[0])
        judged = [ip]
        if isinstance(ip, ipaddress.IPv6Address):
            if ip.ipv4_mapped:
                judged = [ip.ipv4_mapped]
            elif ip in _NAT64:
                judged.append(ipaddress.IPv4Address(int(ip) % 2**32))
        if self.any_address or any(one in network for network in self.networks for one in judged):
            return True
        is_unicast = judged[-1].version == 4 or judged[-1] in _UNICAST
        return is_unicast and not any(judged[-1] in network for network in _SPECIAL)

    def check_url(self, url: str, field: str) -> None:
        """Raise Invalid when the URL can be seen to lead nowhere that is allowed, before any name is resolved."""

        def refuse(problem: str) -> Invalid:
            return Invalid(f"{field} {problem}.", code="url_refused", details=[{"field": field, "problem": problem}])

        try:
            given = urls.read(url)
            place = urls.read(requests.Request("POST", url).prepare().url or "")
        except requests.RequestException:
            raise refuse("has a host that cannot be encoded for a look-up (IDNA)") from None
        except ValueError as error:
            raise refuse(str(error)) from None
        if place.parts.scheme == "http" and not self.http:
            raise refuse("must be https ([crm] allow_http permits http)")
        if given.parts.username is not None or given.parts.password is not None:
            raise refuse("must not carry a user name or password")
        if given.parts.fragment:
            raise refuse("must not carry a fragment")
        here = ["127.0.0.1", "::1"] if urls.is_localhost(place.host) else [str(place.address)] if place.address else []
        if here and not any(self.allows(address) for address in here):
            raise refuse(f"leads to {' or '.join(here)}, which [crm] allow_networks does not permit")


@dataclass(frozen=True)
class Answer:
    """A bounded answer: no more of the body than the session reads."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    ms: int


@functools.cache
def _public_trust() -> ssl.SSLContext:
    # One for all: to read the public CAs takes 20 ms and half a megabyte.
    return trust(None)


def trust(ca_file: Path | None) -> ssl.SSLContext:
    """Return what TLS trusts: the public CAs and, if a PEM file is named, its certificates. Raises Misconfigured."""
    context = create_urllib3_context()
    context.load_verify_locations(certifi.where())
    if ca_file is not None:
        certificates(ca_file)
        context.load_verify_locations(ca_file)
        # An intermediate CA or the CRM's own certificate may be what the file names, and a shop's own CA seldom has
        # every field of RFC 5280.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def certificates(ca_file: Path) -> int:
    """Return how many certificates a PEM file holds. Raises Misconfigured when there is none to be read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        ca_file.read_bytes()
        context.load_verify_locations(ca_file)
        held = context.cert_store_stats()["x509"]
    except ssl.SSLError:
        held = 0
    except OSError as error:
        raise Misconfigured(f"[crm] ca_file: {ca_file} cannot be read: {error.strerror}") from None
    if not held:
        raise Misconfigured(f"[crm] ca_file: {ca_file} holds no certificate in PEM form")
    return held


@dataclass
class _Call:
    """One call in progress: what it may do, and how far it came."""

    dialer: dial.Dialer
    tls: ssl.SSLContext | None
    connect_timeout_s: float
    deadline: answers.Deadline
    status_decides: bool
    sent: bool = False
    answer: answers.Response | None = None

    def connect_s(self) -> float:
        """Return how long connecting may take. Raises TimeoutError."""
        return min(self.deadline.left_s(), self.connect_timeout_s)


_current = threading.local()


class _Guarded:
    """What both kinds of connection share; mixed in before urllib3's own class."""

    call: _Call
    sock: Any
    _last_used = 0.0

    def _new_conn(self) -> socket.socket:
        connection: Any = self
        sock = self.call.dialer.dial(connection._dns_host, connection.port, self.call.connect_s())
        sock.settimeout(self.call.connect_s())  # for TLS to be agreed on
        return sock

    @property
    def is_connected(self) -> bool:
        is_fresh = time.monotonic() - self._last_used < _IDLE_S
        return is_fresh and bool(super().is_connected)  # type: ignore[misc]

    @property
    def is_reusable(self) -> bool:
        """Whether the last answer was read whole, so that what comes next can only be the next call's."""
        return self.call.answer is not None and self.call.answer.is_whole

    def connect(self) -> None:
        self.call = _current.call
        super().connect()  # type: ignore[misc]

    def request(self, *args: Any, **kwargs: Any) -> None:
        self.call = _current.call
        super().request(*args, **kwargs)  # type: ignore[misc]
        self._last_used = time.monotonic()

    def send(self, data: bytes) -> None:
        if self.sock is not None:
            self.sock.settimeout(self.call.deadline.left_s())
        super().send(data)  # type: ignore[misc]
        self.call.sent = True
        if _QUICK_ACK is not None and self.sock is not None:
            # A server that writes head and body apart would else wait 40 ms for our delayed acknowledgement.
            self.sock.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)

    def response_class(self, *args: Any, **kwargs: Any) -> answers.Response:
        ends, decides = self.call.deadline, self.call.status_decides
        self.call.answer = answers.Response(*args, **kwargs, deadline=ends, status_decides=decides)
        return self.call.answer


class _Plain(_Guarded, HTTPConnection):  # type: ignore[misc]
    pass


class _Tls(_Guarded, HTTPSConnection):  # type: ignore[misc]
    def connect(self) -> None:
        self.ssl_context = _current.call.tls or _public_trust()
        super().connect()


class _Pool:
    """Takes a connection back only when nothing of its last answer can be left on it."""

    def _put_conn(self, connection: Any) -> None:
        if connection is not None and not connection.is_reusable:
            connection.close()
        super()._put_conn(connection)  # type: ignore[misc]


class _PlainPool(_Pool, HTTPConnectionPool):
    ConnectionCls = _Plain


class _TlsPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _Tls


class Session:
    """Makes bounded calls; safe for threads. Never follows a redirect, knows no proxy, keeps no cookie.

    Where `status_decides`, a status line is an answer, whatever follows it; else an answer must come whole, or up to
    `read_bytes` of its body. `tls` is what TLS trusts, by itself the public CAs.
    """

    def __init__(
        self,
        reach: Reach,
        *,
        connect_timeout_s: float,
        timeout_s: float,
        connections: int = 8,
        read_bytes: int = READ_BYTES,
        status_decides: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._dialer = dial.Dialer(reach.allows)
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._status_decides = status_decides
        self._read_bytes = read_bytes
        self._pools = PoolManager(num_pools=16, maxsize=connections)
        self._pools.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}

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
        ends = answers.Deadline(self._timeout_s)
        call = _Call(self._dialer, self._tls, self._connect_timeout_s, ends, self._status_decides)
        _current.call = call
        try:
            request = requests.Request(method, url, headers=dict(headers), params=list(query), data=body).prepare()
            response = self._pools.connection_from_url(request.url or "").urlopen(
                method,
                request.path_url,
                body=request.body,
                headers=request.headers,
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=self._timeout_s,
                preload_content=False,
                decode_content=False,
            )
            try:
                text = response.read(self._read_bytes, decode_content=False)
            finally:
                response.close()
                response.release_conn()
            return Answer(response.status, response.headers, text, _ms_since(started))
        except _FAILED as error:
            if self._status_decides and call.answer is not None and call.answer.has_status:
                read = urllib3.HTTPHeaderDict(call.answer.headers.items())
                return Answer(call.answer.status, read, b"", _ms_since(started))
            raise self._failure(error, call) from None

    def _failure(self, error: Exception, call: _Call) -> CallFailed:
        chain = list(_causes(error))

        def has(*kinds: type[BaseException]) -> bool:
            return any(isinstance(cause, kinds) for cause in chain)

        if has(dial.AddressRefused):
            refused = next(cause for cause in chain if isinstance(cause, dial.AddressRefused))
            return CallFailed("address_refused", str(refused), sent=False)
        if call.deadline.is_over or (call.sent and has(TimeoutError, urllib3.exceptions.TimeoutError)):
            return CallFailed("timeout", f"no answer within {self._timeout_s:g} s", sent=call.sent)
        if has(socket.gaierror, UnicodeError):
            return CallFailed("dns_failed", "the host name does not resolve", sent=False)
        if has(urllib3.exceptions.SSLError):
            return CallFailed("tls_failed", f"TLS failed: {_shortened(chain[-1])}", sent=call.sent)
        if not call.sent:
            return CallFailed("connect_failed", f"no connection: {_shortened(chain[-1])}", sent=False)
        if has(urllib3.exceptions.ProtocolError, OSError):
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
