"""The guarded session against servers that misbehave, over real sockets."""

import contextlib
import http.server
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from crmbridge import net
from crmbridge.errors import Invalid

LOOPBACK = net.Reach(networks=(ipaddress.ip_network("127.0.0.0/8"),), http=True)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.contextmanager
def server(*answers: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve one connection after another, each by the next behaviour."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answer in answers:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hook"
    finally:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def session(reach: net.Reach = LOOPBACK, timeout_s: float = 60) -> net.Session:
    return net.Session(reach, connect_timeout_s=2, timeout_s=timeout_s)


def post(url: str, **options: float) -> net.Answer:
    return session(**options).call("POST", url, headers={}, body=b"{}")  # type: ignore[arg-type]


def failure(url: str, **options: float) -> tuple[str, bool]:
    with pytest.raises(net.CallFailed) as caught:
        post(url, **options)
    return caught.value.code, caught.value.sent


def answer_with(text: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(text)

    return answer


def trickle(prefix: bytes) -> Callable[[socket.socket], None]:
    """Send a byte every little while, for longer than any test waits."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(prefix)
        ticking = threading.Event()
        for _ in range(2000):
            connection.sendall(b"x")
            ticking.wait(0.01)

    return answer


def reset(connection: socket.socket) -> None:
    connection.recv(65_536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_an_answer_is_returned_whatever_its_status() -> None:
    with server(answer_with(OK), answer_with(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")) as url:
        assert (post(url).status, post(url).status) == (200, 503)


def test_a_redirect_is_not_followed() -> None:
    with server(answer_with(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")) as url:
        assert post(url).status == 302


def test_a_huge_answer_is_read_up_to_the_bound() -> None:
    with server(answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 100_000)) as url:
        assert len(post(url).body) == 16_384


@pytest.mark.parametrize(
    "prefix", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"]
)
def test_a_trickling_answer_is_cut_at_the_total_deadline(prefix: bytes) -> None:
    with server(trickle(prefix)) as url:
        assert failure(url, timeout_s=2) == ("timeout", True)


def test_the_far_side_going_away_is_told_from_never_having_been_there() -> None:
    with server(reset, answer_with(b""), answer_with(b"rubbish\r\n\r\n")) as url:
        for _ in range(3):
            assert failure(url) == ("connection_lost", True)
    assert failure(url) == ("connect_failed", False)
    assert failure("http://does-not-exist.invalid/") == ("dns_failed", False)
    with server(answer_with(b"not TLS")) as url:
        assert failure(url.replace("http:", "https:"))[0] == "tls_failed"


def test_a_refused_address_is_never_connected_to() -> None:
    touched = threading.Event()
    with server(lambda connection: touched.set()) as url:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(net.CallFailed) as caught:
                session(net.Reach(http=True)).call("POST", url.replace("127.0.0.1", host), headers={}, body=b"")
            assert (caught.value.code, caught.value.sent) == ("address_refused", False)
        assert not touched.is_set()


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that changes its address between two look-ups (DNS rebinding) gains nothing."""
    lookups: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, *rest: object, **options: object) -> object:
        lookups.append(host)
        return real("127.0.0.1" if len(lookups) == 1 else "127.0.0.2", *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with server(answer_with(OK)) as url:
        one = net.Reach(networks=(ipaddress.ip_network("127.0.0.1/32"),), http=True)
        assert session(one).call("POST", url.replace("127.0.0.1", "crm.example"), headers={}, body=b"").status == 200
    assert lookups == ["crm.example"]


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "192.168.1.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "fec0::1",
        "::10.0.0.1",
        "::ffff:0:10.0.0.1",
        "192.88.99.1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not net.Reach().allows(address)
    assert net.Reach(any_address=True).allows(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://crm.example/",
        "ftp://crm.example/",
        "https://",
        "https://user:pw@crm.example/",
        "https://crm.example:0/",
        "https://[::1",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://localhost/",
        "https://crm.example/#part",
        "https://crm.example:99999/",
    ],
)
def test_urls_that_can_be_seen_to_be_wrong_are_refused(url: str) -> None:
    with pytest.raises(Invalid) as caught:
        net.Reach().check_url(url, "crm_webhook_url")
    assert caught.value.details[0]["field"] == "crm_webhook_url"


def test_an_idle_connection_is_used_again() -> None:
    connections = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            connections.append(self.client_address)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        calls = session()
        for _ in range(3):
            calls.call("POST", f"http://127.0.0.1:{serving.server_port}/", headers={}, body=b"{}")
        serving.shutdown()
    assert len(set(connections)) == 1
