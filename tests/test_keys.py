"""API keys under attack: who is throttled and who is not, and what the log says of it."""

import http.client
import json
import re
import secrets
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import bcrypt
import pytest

from crmbridge import apikey
from tests import served as servers
from tests import shop as shops
from tests import spec
from tests.rig import Rig
from tests.served import Served, wait_until
from tests.shop import Shop

ACCOUNTS = "/api/v1/accounts"
HERE, ELSEWHERE = "127.0.0.1", "127.0.0.9"
FLOODERS = 8


def ask(
    url: str, key: str | None, *, source: str = HERE, path: str = ACCOUNTS, seen: str | None = None
) -> tuple[int, Any]:
    """Call from an address of this machine, with `seen` as X-Forwarded-For; return the status and the headers."""
    host, port = url.removeprefix("http://").split(":")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if seen is not None:
        headers["X-Forwarded-For"] = seen
    connection = http.client.HTTPConnection(host, int(port), timeout=30, source_address=(source, 0))
    with closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        raw = answer.read()
    spec.hold_answer("GET", path, answer.status, answer.headers["Content-Type"], raw)
    body = json.loads(raw)
    if answer.status in (401, 429):
        assert body["error"] == ("unauthorized" if answer.status == 401 else "too_many_checks")
        assert body["correlation_id"] == answer.headers["X-Correlation-Id"]
        assert (int(answer.headers.get("Retry-After", 0)) > 0) == (answer.status == 429)
    return answer.status, answer.headers


def whole(head: str) -> str:
    """Return a key of the right form."""
    return head + apikey._checksum(head)


def head_of(key: str) -> str:
    """Return what comes before a key's secret."""
    return key[: len("crmb_") + 12 + 1]


def guess(key: str) -> str:
    """Return a key with the id of another and a secret of its own."""
    return whole(head_of(key) + secrets.token_hex(16))


def strange() -> str:
    """Return a key of the right form that is nobody's."""
    return whole(f"crmb_{secrets.token_hex(6)}_{secrets.token_hex(16)}")


def make_keys(shop: Shop, count: int) -> list[str]:
    words = ("key", "create", "--name", "good", "--account", shop.account_id)
    return [shop.bridge.command(*words) for _ in range(count)]


@contextmanager
def flood(url: str, make: Callable[[], str], seen: Callable[[], str | None] = lambda: None) -> Iterator[Counter[int]]:
    """Have clients try keys as fast as they can; yield how often each status was answered."""
    statuses, done = Counter[int](), threading.Event()

    def try_on() -> None:
        while not done.is_set():
            statuses[ask(url, make(), seen=seen())[0]] += 1

    with ThreadPoolExecutor(FLOODERS) as pool:
        running = [pool.submit(try_on) for _ in range(FLOODERS)]
        try:
            wait_until(lambda: sum(statuses.values()) > 3 * FLOODERS or any(one.done() for one in running), "no flood")
            yield statuses
        finally:
            done.set()
        for one in running:
            one.result()


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop that believes the X-Forwarded-For of this machine."""
    folder = tmp_path_factory.mktemp("proxied")
    with shops.opened(folder, shops.QUICK, CRMBRIDGE_WEB_TRUSTED_PROXY=HERE) as opened:
        yield opened


# --- a flood ---


@pytest.mark.parametrize("kind", ["one_known_id", "ids_of_nobody"])
def test_first_uses_of_good_keys_from_elsewhere_succeed_in_a_flood(fresh_shop: Shop, kind: str) -> None:
    shop = fresh_shop
    good = make_keys(shop, 6)
    assert ask(shop.url, shop.key)[0] == 200  # remembered from here on
    with flood(shop.url, strange if kind == "ids_of_nobody" else lambda: guess(shop.key)) as statuses:
        assert [ask(shop.url, key, source=ELSEWHERE)[0] for key in good] == [200] * 6
        # A key that is remembered is not throttled, not even where the flood comes from.
        assert [ask(shop.url, key)[0] for key in [*good, shop.key]] == [200] * 7
    assert set(statuses) == {401, 429}


def test_callers_behind_a_trusted_proxy_are_told_apart(proxied: Shop) -> None:
    good = make_keys(proxied, 6)
    with flood(proxied.url, lambda: guess(proxied.key), lambda: "198.51.100.7") as statuses:
        # What a caller wrote into the header itself stands before what the proxy adds.
        seen = ["203.0.113.5", "2001:db8::5", "198.51.100.7, 203.0.113.6", "[2001:db8:0:1::6]:4711", "a.name", "::1"]
        assert [ask(proxied.url, key, seen=one)[0] for key, one in zip(good, seen, strict=True)] == [200] * 6
    assert set(statuses) == {401, 429}


def test_an_untrusted_x_forwarded_for_is_not_believed(fresh_shop: Shop) -> None:
    numbers = iter(range(10**6))
    with flood(fresh_shop.url, lambda: guess(fresh_shop.key), lambda: f"198.51.{next(numbers) % 255}.1") as statuses:
        wait_until(lambda: statuses[429] > 100, "not throttled")
    assert statuses[401] < 100


def test_an_ipv6_network_is_one_caller(proxied: Shop) -> None:
    first = [ask(proxied.url, strange(), seen=f"2001:db8:7:7::{number:x}")[0] for number in range(1, 31)]
    assert (first[0], first[-1]) == (401, 429)
    assert ask(proxied.url, strange(), seen="2001:db8:7:8::1")[0] == 401


# --- the throttle, on a set clock ---


@pytest.fixture
def served(rig: Rig) -> Iterator[Served]:
    with servers.opened(rig) as opened:
        yield opened


def test_ten_failures_and_then_one_in_six_seconds(served: Served) -> None:
    good, other = served.make_key(), served.make_key()
    assert ask(served.url, good)[0] == 200
    assert [ask(served.url, guess(good) if number % 2 else strange())[0] for number in range(10)] == [401] * 10
    status, headers = ask(served.url, guess(good))
    assert (status, headers["Retry-After"]) == (429, "6")
    assert ask(served.url, other)[0] == 429  # it might be a guess
    assert ask(served.url, good)[0] == 200
    assert ask(served.url, None)[0] == ask(served.url, "no key")[0] == 401  # these cost nothing to tell
    assert ask(served.url, strange(), source=ELSEWHERE)[0] == 401
    served.pass_s(4)
    assert ask(served.url, other)[1]["Retry-After"] == "2"
    served.pass_s(2.1)
    assert ask(served.url, other)[0] == 200
    assert [ask(served.url, strange())[0] for _ in range(2)] == [401, 429]
    served.pass_s(70)
    assert [ask(served.url, strange())[0] for _ in range(11)] == [401] * 10 + [429]


def test_one_wrong_key_that_is_tried_for_ever_is_401_and_throttles_nobody(served: Served) -> None:
    good, wrong, expired = served.make_key(), strange(), served.make_key(expires_at="2020-01-01T00:00:00.000Z")
    near_miss = guess(good)
    for key in (wrong, near_miss, expired):
        assert [ask(served.url, key)[0] for _ in range(15)] == [401] * 15
    assert ask(served.url, good)[0] == 200


def test_a_key_that_expired_by_a_wrong_clock_is_good_again(served: Served) -> None:
    key = served.make_key(expires_at="2027-01-15T09:00:00.000Z")
    served.rig.now_s += 7200
    assert ask(served.url, key)[0] == 401
    served.rig.now_s -= 7200
    assert ask(served.url, key)[0] == 200


def test_a_secret_is_good_with_its_own_id_alone(served: Served) -> None:
    first, second = served.make_key(), served.make_key()
    mixed = [whole(head_of(one) + other[len(head_of(other)) : -6]) for one, other in ((first, second), (second, first))]
    for _ in range(2):
        assert [ask(served.url, key)[0] for key in (first, *mixed, second)] == [200, 401, 401, 200]


# --- the queue of checks ---

SLOW, VERY_SLOW = 13, 15  # bcrypt costs at which a check takes about half a second, and two


def begin(served: Served, key: str, source: str = HERE) -> socket.socket:
    """Send a request with a key, and see that the server has read it."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60, source_address=(source, 0))
    connection.sendall(f"GET {ACCOUNTS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
    return connection


def status_of(connection: socket.socket) -> int:
    return int(connection.recv(65_536).split()[1])


def slow_key(served: Served, cost: int = SLOW) -> str:
    key = served.make_key()
    secret_hash = bcrypt.hashpw(key[len(head_of(key)) : -6].encode(), bcrypt.gensalt(cost)).decode()
    changed = ("UPDATE api_keys SET secret_hash = ? WHERE id = ?", (secret_hash, "key_" + key.split("_")[1]))
    served.rig.db.write(lambda tx: tx.run(*changed))
    return key


def test_checks_take_the_callers_in_turn_and_hold_up_nothing_else(served: Served) -> None:
    slow, good = slow_key(served), served.make_key()
    with ExitStack() as stack:
        guesses = [stack.enter_context(begin(served, guess(slow))) for _ in range(6)]
        served.poke()  # answered by the one thread that there is for requests
        other = stack.enter_context(begin(served, good, ELSEWHERE))
        assert status_of(other) == 200
        answered, _, _ = select.select(guesses, [], [], 0)
        assert len(answered) <= 3
        assert [status_of(one) for one in guesses] == [401] * 6


def test_a_check_that_waits_for_three_seconds_is_429(served: Served) -> None:
    slow, good = slow_key(served, VERY_SLOW), served.make_key()
    with ExitStack() as stack:
        first = stack.enter_context(begin(served, slow))
        wait_until(lambda: any(thread.name == "keys" for thread in threading.enumerate()), "no check")
        late = [stack.enter_context(begin(served, good, source)) for source in (HERE, ELSEWHERE)]
        served.poke()
        served.pass_s(3.1)
        assert [status_of(one) for one in late] == [429, 429]
        assert status_of(first) == 200
    assert ask(served.url, good)[0] == 200


def test_a_full_queue_is_429_for_who_fills_it(served: Served) -> None:
    slow, good, other = slow_key(served, VERY_SLOW), served.make_key(), served.make_key()
    with ExitStack() as stack:
        first = stack.enter_context(begin(served, slow))
        wait_until(lambda: any(thread.name == "keys" for thread in threading.enumerate()), "no check")
        many = [stack.enter_context(begin(served, guess(good))) for _ in range(70)]
        served.poke()
        refused, _, _ = select.select(many, [], [], 0)
        assert len(refused) == 70 - 64
        elsewhere = stack.enter_context(begin(served, other, ELSEWHERE))
        assert status_of(elsewhere) == 200
        assert status_of(first) == 200
        assert Counter(status_of(one) for one in many) == {401: 10, 429: 60}


def test_many_first_uses_of_one_key_at_once_are_one_check(served: Served) -> None:
    slow = slow_key(served)
    with ExitStack() as stack:
        many = [stack.enter_context(begin(served, slow)) for _ in range(12)]
        assert [status_of(one) for one in many] == [200] * 12


# --- what the log says ---


def test_refusals_of_one_caller_are_a_line_and_then_one_a_minute(served: Served) -> None:
    for key in (None, "x", strange()):
        for _ in range(50):
            ask(served.url, key)
    ask(served.url, None, source=ELSEWHERE)
    ask(served.url, None, path="/nothing")
    lines = served.log("request")
    assert [re.findall(r"path=(\S+) status=(\d+)", line) for line in lines] == [
        [(ACCOUNTS, "401")],
        [(ACCOUNTS, "401")],
        [("/nothing", "404")],
    ]
    assert [f"remote={source}" in line for source, line in zip((HERE, ELSEWHERE), lines, strict=False)] == [True] * 2
    assert served.log("requests.refused") == []
    served.pass_s(61)  # and nobody else comes
    wait_until(lambda: served.log("requests.refused"), "the sum is not told")
    (line,) = served.log("requests.refused")
    assert f" warning requests.refused remote={HERE} count=149 seconds=61" in line


def test_an_hours_flood_writes_a_line_a_minute_and_then_the_caller_begins_anew(served: Served) -> None:
    for _ in range(60):
        for _ in range(5):
            ask(served.url, strange())
        served.pass_s(60)
    served.pass_s(60)
    sums = served.log("requests.refused")
    assert sum(int(re.findall(r"count=(\d+)", line)[0]) for line in sums) == 60 * 5 - 1
    assert (len(served.log("request")), len(sums)) == (1, 60)
    served.pass_s(60)
    ask(served.url, strange())
    assert len(served.log("request")) == 2


def test_what_is_not_told_yet_is_told_at_the_end(served: Served) -> None:
    for _ in range(5):
        ask(served.url, None)
    served.stop()
    assert [re.findall(r"count=(\d+)", line) for line in served.log("requests.refused")] == [["4"]]
