"""Where a CRM may be: which addresses and URLs are taken, which of a name's addresses is connected to, and when."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crmbridge import config, crm, dial, net
from crmbridge.sandbox import Sandbox
from crmbridge.sandbox.demo import HopFailed
from tests import apart
from tests import shop as shops
from tests.apart import apart as in_a_network_of_its_own
from tests.far import OK, OK_ONCE, Far, dead_port
from tests.shop import SHOP_ID, Shop

PUBLIC = replace(config.Crm(), allow_http=True, connect_timeout_s=5, timeout_s=10)
LOOPBACK = replace(PUBLIC, allow_networks=config._networks("127.0.0.0/8 ::1/128"))
# IANA's registries of special-purpose addresses (IPv4 and IPv6, as of 2024), and what RFC 4291 reserves. All of it is
# refused: also the few parts that are globally reachable, as they are no place for a CRM.
_SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29 192.0.0.8/32
192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.88.99.0/24 192.88.99.2/32 192.168.0.0/16
198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 255.255.255.255/32
::1/128 ::/128 ::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128 2001:1::2/128
2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32 2002::/16
3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8 ::ffff:0:0:0/96
"""
# Globally reachable ranges of the registries that are ordinary otherwise, and well-known public addresses.
_ORDINARY = """
192.31.196.1 192.52.193.1 192.175.48.1 1.1.1.1 8.8.8.8 93.184.216.34 2620:4f:8000::1 2600:: 2606:4700:4700::1111
2a00:1450:4001::1 2000:: 3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2400:cb00::1
"""
_IN_IPV6 = """
0.0.0.0 10.0.0.1 127.0.0.1 169.254.169.254 192.168.1.1 100.64.0.1 224.0.0.1 255.255.255.255 192.0.0.9 198.18.0.1
93.184.216.34 8.8.8.8 172.15.255.255 172.32.0.0
"""


def addresses() -> dict[str, bool]:
    """Return the table: an address, and whether a CRM may be there when no network is allowed."""
    special: list[Any] = [ipaddress.ip_network(word) for word in _SPECIAL.split()]

    def is_ordinary(ip: Any) -> bool:
        in_use = ip.version == 4 or ip in ipaddress.ip_network("2000::/3")
        return in_use and not any(ip in one for one in special)

    edges = set()
    for one in special:
        first, last = int(one[0]), int(one[-1])
        inside = [one[0], one[-1]]
        outside = [type(one[0])(n) for n in (first - 1, last + 1) if 0 <= n < 2**one.max_prefixlen]
        edges |= {*inside, *outside}
    found = {str(ip): is_ordinary(ip) for ip in edges} | dict.fromkeys(_ORDINARY.split(), True)
    for address in _IN_IPV6.split():
        ip = ipaddress.IPv4Address(address)
        fine, number = is_ordinary(ip), int(ip)
        found[str(ipaddress.IPv6Address((0xFFFF << 32) + number))] = fine  # mapped
        found[str(ipaddress.IPv6Address((0x64FF9B << 96) + number))] = fine  # by NAT64
        found[str(ipaddress.IPv6Address((0x64FF9B0001 << 80) + number))] = False  # by a NAT64 of a network's own
        found[str(ipaddress.IPv6Address(number))] = False  # compatible
        found[str(ipaddress.IPv6Address((0xFFFF << 48) + number))] = False  # translated
        found[str(ipaddress.IPv6Address((0x2002 << 112) + (number << 80) + 1))] = False  # by 6to4
    found["64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff"] = found["64:ff9b::1:0:0"] = False
    return found


ADDRESSES = addresses()


def url_of(address: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}/hook"


def called(url: str, given: config.Crm = PUBLIC) -> str:
    """Call a URL as a CRM's; return "reached", or the code of what failed."""
    try:
        answer = crm.open_session(given, connections=1).call("POST", url, headers={}, body=b"{}")
    except net.CallFailed as failure:
        return failure.code
    return "reached" if answer.status == 200 else str(answer.status)


# --- addresses ---


def test_the_table_of_addresses_is_a_large_one() -> None:
    assert len(ADDRESSES) > 170
    assert sum(ADDRESSES.values()) > 50
    # What is taken is global by Python's own tables, too, but for addresses with an IPv4 address in them.
    plain = [address for address, fine in ADDRESSES.items() if fine and not address.startswith(("::ffff:", "64:ff9b:"))]
    assert [address for address in plain if not ipaddress.ip_address(address).is_global] == []


@in_a_network_of_its_own
def test_each_address_is_reached_or_refused_as_the_table_says(tmp_path: Path) -> None:
    """Where all addresses are this machine, by the address itself and by a name that leads to it."""
    with everywhere() as far:
        found = {address: called(url_of(address, far.port)) for address in ADDRESSES}
        wanted = {address: "reached" if fine else "address_refused" for address, fine in ADDRESSES.items()}
        assert found == wanted, {key: found[key] for key in found if found[key] != wanted[key]}
        apart.NAMES.update({f"a{number}.example": [address] for number, address in enumerate(ADDRESSES)})
        by_name = {address: called(f"http://a{n}.example:{far.port}/") for n, address in enumerate(ADDRESSES)}
        # The C library hands a mapped address out as the IPv4 address that it is, or not at all.
        odd = {key: by_name[key] for key in by_name if by_name[key] != wanted[key]}
        assert {key: code for key, code in odd.items() if not key.startswith("::ffff:")} == {}
        assert "reached" not in {code for key, code in odd.items() if not ADDRESSES[key]}


@in_a_network_of_its_own
def test_an_event_reaches_a_crm_by_nat64_and_of_two_addresses_only_the_permitted_one(tmp_path: Path) -> None:
    apart.NAMES.update(
        {
            "nat64.example": ["64:ff9b::5db8:d822"],
            "mixed.example": ["10.0.0.7", "93.184.216.34", "fd00::7", "64:ff9b::a00:7"],
            "private.example": ["10.0.0.7", "fd00::7"],
        }
    )
    with shops.opened(tmp_path, shops.QUICK) as shop, everywhere() as far:
        for number, host in enumerate(["nat64.example", "mixed.example", "[64:ff9b::5db8:d822]"]):
            point(shop, f"http://{host}:{far.port}/{number}")
            shop.meta.customer_says(SHOP_ID, f"70{number}", f"hello {host}")
            assert far.wait(number + 1)[-1].event["message"] == f"hello {host}"
        point(shop, f"http://private.example:{far.port}/")
        shop.meta.customer_says(SHOP_ID, "704", "hello nobody")
        line = shop.wait_log(r"delivery.attempted .*code=address_refused")
        assert "10.0.0.7" in line
        assert "fd00::7" in line
        assert {request.to for request in far.requests} <= {"93.184.216.34", "64:ff9b::5db8:d822"}
        assert len(far.requests) == 3


def everywhere() -> Far:
    """Return a CRM that listens on every address of this machine, in both families."""
    return Far(lambda _: [OK], host="::")


def point(shop: Shop, url: str) -> None:
    """Have the shop's account call another CRM."""
    answer = shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"crm_webhook_url": url})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("networks", "address", "fine"),
    [
        ("10.0.0.0/8", "10.255.255.255", True),
        ("10.0.0.0/8", "::ffff:10.0.0.1", True),
        ("10.0.0.0/8", "64:ff9b::10.0.0.1", True),
        ("10.0.0.0/8", "64:ff9b::11.0.0.1", True),  # public anyway
        ("10.0.0.0/8", "64:ff9b::192.168.0.1", False),
        ("10.0.0.0/8", "64:ff9b:1::10.0.0.1", False),
        ("10.0.0.0/8", "::10.0.0.1", False),
        ("10.0.0.0/8", "2002:a00:1::", False),
        ("64:ff9b:1::/48", "64:ff9b:1::10.0.0.1", True),
        ("64:ff9b::/96", "64:ff9b::10.0.0.1", True),
        ("fd00::/8", "fd00::1", True),
        ("fd00::/8", "fc00::1", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("", "fe80::1%eth0", False),
        ("::/0", "::ffff:10.0.0.1", False),  # it is an IPv4 address
        ("0.0.0.0/0", "::1", False),
        ("127.0.0.1/32", "127.0.0.2", False),
    ],
)
def test_allowed_networks_open_what_they_name_and_no_more(
    monkeypatch: pytest.MonkeyPatch, networks: str, address: str, fine: bool
) -> None:
    with _resolved(monkeypatch, [address]), Far(lambda _: [OK]) as far:
        given = replace(LOOPBACK, allow_networks=config._networks(networks), connect_timeout_s=0.5)
        refused = called(f"http://crm.example:{far.port}/", given) == "address_refused"
        assert refused == (not fine)


@contextlib.contextmanager
def _resolved(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> Iterator[list[str]]:
    """Let every name lead to these addresses, in this order; yield the names that were looked up."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        asked.append(host)
        numeric = [real(address, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST) for address in found]
        return [entry for entries in numeric for entry in entries]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", look_up)
        yield asked


ONE = replace(LOOPBACK, allow_networks=config._networks("127.0.0.1/32"))


@pytest.mark.parametrize(
    "found", [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"], ["::1", "127.0.0.2", "127.0.0.1"]]
)
def test_of_mixed_addresses_only_those_permitted_are_connected_to(
    monkeypatch: pytest.MonkeyPatch, found: list[str]
) -> None:
    with Far(lambda _: [OK]) as far, Far(lambda _: [OK], host="127.0.0.2", port=far.port) as other:
        with _resolved(monkeypatch, found):
            assert called(f"http://crm.example:{far.port}/", ONE) == "reached"
        assert other.requests == []


@pytest.mark.parametrize("found", [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]])
def test_when_the_permitted_address_is_down_the_other_one_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, found: list[str]
) -> None:
    with Far(lambda _: [OK], host="127.0.0.2") as other:
        with _resolved(monkeypatch, found):
            assert called(f"http://crm.example:{other.port}/", ONE) == "connect_failed"
        assert other.requests == []


def test_a_refusal_names_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with _resolved(monkeypatch, ["10.0.0.7", "fd00::7"]), pytest.raises(net.CallFailed) as caught:
        crm.open_session(PUBLIC, connections=1).call("POST", "http://crm.example/", headers={}, body=b"")
    assert caught.value.message == "the host leads to 10.0.0.7, fd00::7, which [crm] allow_networks does not permit"


# --- the race ---


@pytest.fixture
def dual() -> Iterator[tuple[Far, Far]]:
    """The same port at ::1 and at 127.0.0.1."""
    for _ in range(20):
        with Far(lambda _: [OK]) as v4:
            try:
                with Far(lambda _: [OK], host="::1", port=v4.port) as v6:
                    yield v4, v6
                    return
            except OSError:
                continue
    raise OSError("no port that is free in both families")


PATIENT = replace(LOOPBACK, connect_timeout_s=60, timeout_s=60)
BOTH = ["::1", "127.0.0.1"]


def test_a_dead_address_holds_nobody_up_and_what_worked_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with Far(lambda _: [OK_ONCE]) as v4, _resolved(monkeypatch, BOTH):
        session = crm.open_session(PATIENT, connections=1)
        url = f"http://crm.example:{v4.port}/"
        with dead_port(v4.port):
            assert session.call("POST", url, headers={}, body=b"").ms < 20_000
        with Far(lambda _: [OK_ONCE], host="::1", port=v4.port) as v6:
            for _ in range(3):
                session.call("POST", url, headers={}, body=b"")
            assert (len(v4.requests), len(v6.requests)) == (4, 0)
            other = crm.open_session(PATIENT, connections=1)
            other.call("POST", url, headers={}, body=b"")
            assert len(v6.requests) == 1  # who remembers nothing takes the resolver's order


@pytest.mark.parametrize("bad", ["::1", "127.0.0.3", "224.0.0.1"])  # the last one is no address of a TCP server
def test_one_that_refuses_is_followed_by_the_next_at_once(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setattr(dial, "NEXT_S", 50.0)
    given = replace(PATIENT, allow_networks=config._networks("0.0.0.0/0 ::/0"))
    with Far(lambda _: [OK_ONCE]) as v4, _resolved(monkeypatch, [bad, "127.0.0.1"]):
        session = crm.open_session(given, connections=1)
        for _ in range(2):
            assert session.call("POST", f"http://crm.example:{v4.port}/", headers={}, body=b"").ms < 20_000


def test_what_worked_and_works_no_more_is_left_for_another(
    monkeypatch: pytest.MonkeyPatch, dual: tuple[Far, Far]
) -> None:
    v4, v6 = dual
    v6.answer = v4.answer = lambda _: [OK_ONCE]
    with _resolved(monkeypatch, BOTH):
        session = crm.open_session(PATIENT, connections=1)
        url = f"http://crm.example:{v4.port}/"
        session.call("POST", url, headers={}, body=b"")
        assert (len(v4.requests), len(v6.requests)) == (0, 1)
        v6.close()
        session.call("POST", url, headers={}, body=b"")
        session.call("POST", url, headers={}, body=b"")
        assert (len(v4.requests), len(v6.requests)) == (2, 1)


def test_families_take_turns(monkeypatch: pytest.MonkeyPatch, dual: tuple[Far, Far]) -> None:
    """A second dead address of one family does not come before the first one of the other."""
    v4, v6 = dual
    with dead_port(v4.port, "127.0.0.2"), _resolved(monkeypatch, ["127.0.0.2", "127.0.0.1", "::1"]):
        assert called(f"http://crm.example:{v4.port}/", PATIENT) == "reached"
    assert (len(v4.requests), len(v6.requests)) == (0, 1)


def test_nobody_is_waited_for_longer_than_the_time_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    with Far(lambda _: [OK]) as v4:
        port = v4.port
    short = replace(LOOPBACK, connect_timeout_s=0.6, timeout_s=60)
    session = crm.open_session(short, connections=1)
    with (
        dead_port(port, "127.0.0.1"),
        dead_port(port),
        _resolved(monkeypatch, BOTH),
        pytest.raises(net.CallFailed) as caught,
    ):
        session.call("POST", f"http://crm.example:{port}/", headers={}, body=b"")
    assert (caught.value.code, caught.value.sent) == ("connect_failed", False)
    assert "timed out" in caught.value.message


# --- no way round ---


def test_proxies_of_the_environment_change_nothing(tmp_path: Path) -> None:
    with Far(lambda _: [b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"]) as proxy, Sandbox() as sandbox:
        shop = Shop(tmp_path, sandbox, shops.QUICK)
        environ = {key: value for key, value in shop.bridge.environ.items() if key.lower() != "no_proxy"}
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            environ |= dict.fromkeys((name, name.upper()), f"http://127.0.0.1:{proxy.port}")
        shop.bridge.environ = environ
        try:
            shop.start()
            shop.open()
            shop.meta.customer_says(SHOP_ID, "705", "past the proxy")
            shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "past the proxy")
            shop.send("and back", "proxy-1")
            shop.meta.wait_sent(1)
            with pytest.raises(HopFailed):  # it has something to tell of every sandbox
                shop.bridge.command("doctor", "--json")
        finally:
            shop.close()
        assert proxy.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with Far(lambda _: [OK]) as other:
        answer = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {other.url}\r\nContent-Length: 0\r\n\r\n".encode()
        with Far(lambda _: [answer]) as far:
            assert called(far.url, LOOPBACK) == str(status)
        assert other.requests == []
        assert len(far.requests) == 1
