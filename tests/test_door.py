"""Requests that never become whole, and what is known of a request before its body is taken; without a proxy."""

import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from crmbridge import signing
from crmbridge.sandbox import wire
from crmbridge.sandbox.meta import APP_SECRET
from tests import served as servers
from tests import spec
from tests.rig import Rig
from tests.served import Served, wait_until
from tests.shop import CUSTOMER, SHOP_ID, Shop
from tests.test_keys import ELSEWHERE, ask, guess, make_keys, strange

HOOK, SEND = "/webhooks/instagram", "/api/v1/messages/send"
HALF_SENT = 600
MB = 2**20
_numbers = itertools.count()


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def connect(url: str) -> socket.socket:
    return socket.create_connection(address_of(url), timeout=30)


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: bridge", *lines, "", ""]).encode()


def said(text: str, size: int = 0) -> tuple[bytes, str]:
    """Return a webhook's body in which a customer writes, and its signature."""
    message = {"mid": f"mid-door-{next(_numbers)}", "text": text}
    item = {
        "sender": {"id": CUSTOMER},
        "recipient": {"id": SHOP_ID},
        "timestamp": 1_800_000_000_000,
        "message": message,
    }
    body = json.dumps(wire.envelope(SHOP_ID, 1_800_000_000_000, item)).encode()
    body += b" " * max(size - len(body), 0)
    return body, signing.hub_signature(APP_SECRET, body)


def works(shop: Shop, times: int = 10) -> None:
    """See that signed webhooks are answered within five seconds and reach the CRM, and that good keys work."""
    texts = [f"in spite of all {next(_numbers)}" for _ in range(times)]
    for text in texts:
        body, signature = said(text)
        began = time.monotonic()
        answer = requests.post(shop.url + HOOK, data=body, headers={"X-Hub-Signature-256": signature}, timeout=10)
        assert (answer.status_code, time.monotonic() - began < 5) == (200, True)
    shop.crm.wait(times, timeout_s=30, where=lambda entry: entry.event.get("message") in texts)
    assert shop.send("an answer", f"door-{next(_numbers)}").status_code == 202
    [fresh] = make_keys(shop, 1)
    assert ask(shop.url, fresh, source=ELSEWHERE)[0] == 200


def held_bytes(shop: Shop) -> int:
    """Return how much the server keeps in memory and in files without a name."""
    process = shop.bridge._process
    assert process is not None
    kept = 0
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(entry).endswith("(deleted)"):
                kept += entry.stat().st_size
    status = Path(f"/proc/{process.pid}/status").read_text()
    return kept + 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


def connections(shop: Shop) -> int:
    """Return how many connections the server has accepted and not closed."""
    _, port = address_of(shop.url)
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(fields[1].endswith(f":{port:04X}") and fields[3] == "01" for fields in lines)


# --- many that never become whole ---

KINDS: dict[str, bytes] = {
    "nothing": b"",
    "a_line_end": b"\r\n",
    "headers_begun": b"POST /webhooks/instagram HTTP/1.1\r\nHost: bridge\r\nX-Hub",
    "body_begun": head("POST", HOOK, "Content-Length: 5000") + b"{",
    "chunk_begun": head("POST", HOOK, "Transfer-Encoding: chunked") + b"10\r\n{",
    "chunk_line_begun": head("POST", HOOK, "Transfer-Encoding: chunked") + b"1",
    "trailer_begun": head("POST", HOOK, "Transfer-Encoding: chunked") + b"0\r\nX-",
    "told_to_go_on": head("POST", HOOK, "Content-Length: 5000", "Expect: 100-continue"),
    "pipelined": head("GET", "/health/live") + head("POST", HOOK, "Content-Length: 5000") + b"{",
    "answer_not_read": head("GET", "/docs/swagger-ui.css"),
    "refused_and_not_read": head("POST", SEND, "Content-Length: 5000"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_half_sent_requests_do_not_stop_it(shop: Shop, kind: str) -> None:
    with ExitStack() as stack:
        for _ in range(HALF_SENT):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little is received that is not read
            one.connect(address_of(shop.url))
            with contextlib.suppress(ConnectionError):  # it may be closed before it said a word
                one.sendall(KINDS[kind])
        works(shop)
        if kind != "refused_and_not_read":
            wait_until(lambda: 300 < connections(shop) <= 400, "it keeps others than its hundreds")
    wait_until(lambda: connections(shop) < 20, "they stay")
    works(shop, 1)


@pytest.mark.slow
def test_clients_that_come_back_and_drip_do_not_stop_it(shop: Shop) -> None:
    """Six hundred that send a byte a second, and connect anew when they are closed."""
    done = threading.Event()
    half = itertools.cycle(b"POST /webhooks/instagram HTTP/1.1\r\nHost: bridge\r\nX-A: " + b"a" * 500)

    def drip() -> None:
        with ExitStack() as stack:
            slow = [stack.enter_context(connect(shop.url)) for _ in range(HALF_SENT)]
            while not done.wait(1):
                for number, one in enumerate(slow):
                    try:
                        one.sendall(bytes([next(half)]))
                    except OSError:
                        one.close()
                        slow[number] = stack.enter_context(connect(shop.url))

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        for _ in range(3):
            works(shop)
    finally:
        done.set()
        dripping.join()
    wait_until(lambda: connections(shop) < 20, "they stay")


@pytest.mark.parametrize("kind", ["body_begun", "many_bytes"])
def test_who_keeps_many_is_closed_before_who_keeps_one_however_old(shop: Shop, kind: str) -> None:
    body, signature = said("the oldest of all", 4 * MB)
    headers = head("POST", HOOK, f"Content-Length: {len(body)}", f"X-Hub-Signature-256: {signature}")
    with ExitStack() as stack:
        honest = socket.create_connection(address_of(shop.url), timeout=30, source_address=(ELSEWHERE, 0))
        stack.enter_context(honest).sendall(headers + body[: 3 * MB])
        for _ in range(HALF_SENT if kind == "body_begun" else 12):
            one = stack.enter_context(connect(shop.url))
            if kind == "body_begun":
                with contextlib.suppress(ConnectionError):  # it may be closed before it said a word
                    one.sendall(KINDS[kind])
            else:
                one.sendall(head("POST", HOOK, f"Content-Length: {8 * MB}"))
                push(one, 7 * MB)
        works(shop, 1)
        honest.sendall(body[3 * MB :])
        assert answer_to(honest)[0] == 200


LARGE: dict[str, Callable[[Shop], tuple[str, str, list[str]]]] = {
    "without_a_key": lambda shop: ("POST", SEND, []),
    "no_key_at_all": lambda shop: ("PUT", "/api/v1/accounts/acc_1", ["Authorization: Bearer hello"]),
    "a_key_of_nobody": lambda shop: ("POST", SEND, [f"Authorization: Bearer {strange()}"]),
    "a_guess": lambda shop: ("POST", SEND, [f"Authorization: Bearer {guess(shop.key)}"]),
    "no_such_path": lambda shop: ("POST", "/nothing", []),
    "no_such_method": lambda shop: ("PATCH", HOOK, []),
    "a_body_for_get": lambda shop: ("GET", "/health", []),
    "over_the_webhooks_limit": lambda shop: ("POST", HOOK, []),
    "over_a_forms_limit": lambda shop: ("POST", "/privacy/deletion", []),
    "told_to_go_on": lambda shop: ("POST", SEND, ["Expect: 100-continue"]),
}


def push(one: socket.socket, body_bytes: int, *, chunked: bool = False) -> None:
    """Send so much of a body, or what is taken of it."""
    piece = b"x" * 65_536
    with contextlib.suppress(OSError):
        for _ in range(body_bytes // len(piece)):
            one.sendall(b"10000\r\n" + piece + b"\r\n" if chunked else piece)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_body_that_will_be_refused_is_not_taken(shop: Shop, kind: str, chunked: bool) -> None:
    before = held_bytes(shop)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {12 * MB}"
    with ExitStack() as stack:
        many = [stack.enter_context(connect(shop.url)) for _ in range(30)]
        for one in many:
            method, path, lines = LARGE[kind](shop)
            one.sendall(head(method, path, length, *lines))
        pushing = [threading.Thread(target=push, args=(one, 11 * MB), kwargs={"chunked": chunked}) for one in many]
        for thread in pushing:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in pushing):
            most = max(most, held_bytes(shop) - before)
            time.sleep(0.01)
        works(shop, 1)
    assert most < 96 * MB  # 32 of bodies that may be legal, and what memory they cost in passing
    wait_until(lambda: held_bytes(shop) - before < 64 * MB, "it is kept")


def test_half_sent_bodies_for_a_route_without_a_key_have_a_budget(fresh_shop: Shop) -> None:
    shop = fresh_shop
    before = held_bytes(shop)
    with ExitStack() as stack:
        for number in range(60):
            one = stack.enter_context(connect(shop.url))
            chunked = bool(number % 2)
            length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {8 * MB}"
            one.sendall(head("POST", HOOK, length))
            push(one, 7 * MB, chunked=chunked)
        works(shop)
        assert held_bytes(shop) - before < 96 * MB
        body, signature = said("a large one beside them", 8 * MB)
        answer = requests.post(shop.url + HOOK, data=body, headers={"X-Hub-Signature-256": signature}, timeout=20)
        assert answer.status_code == 200
    wait_until(lambda: held_bytes(shop) - before < 64 * MB, "it is kept")
    shop.wait_log(r"connections\.closed .*large=\d")


# --- what is answered before the body ---


def answer_to(one: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Read one answer: status, headers and JSON."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = one.recv(65_536)
        assert part, data
        data += part
    lines, _, body = data.partition(b"\r\n\r\n")
    first, *rest = lines.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
    while len(body) < int(headers["content-length"]):
        body += one.recv(65_536)
    status = int(first.split()[1])
    if status >= 400:
        spec.hold_answer("", "", status, headers["content-type"], body)
    return status, headers, json.loads(body)


REFUSED: dict[str, tuple[str, str, list[str], int, str]] = {
    "no_key": ("POST", SEND, [], 401, "unauthorized"),
    "malformed": ("POST", SEND, ["Authorization: Bearer x"], 401, "unauthorized"),
    "another_scheme": ("POST", SEND, ["Authorization: Basic eDp5"], 401, "unauthorized"),
    "no_key_and_too_large": ("POST", SEND, ["Content-Length: 13000000"], 401, "unauthorized"),
    "no_path": ("POST", "/nothing", [], 404, "not_found"),
    "no_path_and_too_large": ("POST", "/nothing", ["Content-Length: 99999999999"], 404, "not_found"),
    "no_method": ("DELETE", HOOK, [], 405, "method_not_allowed"),
    "webhook_too_large": ("POST", HOOK, [f"Content-Length: {8 * MB + 1}"], 413, "body_too_large"),
    "webhook_too_large_with_a_slash": ("POST", HOOK + "/", [f"Content-Length: {8 * MB + 1}"], 413, "body_too_large"),
    "form_too_large": ("POST", "/privacy/deletion", ["Content-Length: 262145"], 413, "body_too_large"),
    "send_too_large": ("POST", SEND, ["KEY", "Content-Length: 262145"], 413, "body_too_large"),
    "first_use_and_too_large": ("POST", SEND, ["FRESH", "Content-Length: 262145"], 413, "body_too_large"),
    "may_not": ("POST", "/api/v1/accounts", ["KEY"], 403, "permission_missing"),
    "guess": ("POST", SEND, ["GUESS"], 401, "unauthorized"),
    "of_nobody": ("POST", SEND, ["STRANGE"], 401, "unauthorized"),
    "revoked": ("POST", SEND, ["REVOKED"], 401, "unauthorized"),
    "revoked_after_use": ("POST", SEND, ["REVOKED_AFTER_USE"], 401, "unauthorized"),
    "expired": ("POST", SEND, ["EXPIRED"], 401, "unauthorized"),
}


@pytest.fixture(scope="module")
def every_key(shop: Shop) -> dict[str, str]:
    fresh, revoked, used, expired = make_keys(shop, 4)
    assert shop.call("GET", "/api/v1/accounts", key=used).status_code == 200
    for key in (revoked, used):
        shop.bridge.command("key", "revoke", "key_" + key.split("_")[1])
    shop.change(f"UPDATE api_keys SET expires_at = '2020' WHERE id = 'key_{expired.split('_')[1]}'")
    return {
        "KEY": shop.key,
        "FRESH": fresh,
        "GUESS": guess(shop.key),
        "STRANGE": strange(),
        "REVOKED": revoked,
        "REVOKED_AFTER_USE": used,
        "EXPIRED": expired,
    }


@pytest.mark.parametrize("expects", [False, True], ids=["", "expect"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_comes_before_the_body(shop: Shop, every_key: dict[str, str], case: str, expects: bool) -> None:
    method, path, given, status, slug = REFUSED[case]
    lines = [f"Authorization: Bearer {every_key[line]}" if line in every_key else line for line in given]
    if not any(line.startswith("Content-Length") for line in lines):
        lines.append("Content-Length: 100")
    request_id = f"door-{case}-{expects}"
    with connect(shop.url) as one:
        one.sendall(head(method, path, f"X-Request-Id: {request_id}", *lines, *["Expect: 100-continue"] * expects))
        told, headers, error = answer_to(one)
        assert (told, error["error"]) == (status, slug)
        assert error["correlation_id"] == headers["x-correlation-id"] == request_id
        assert headers["connection"] == "close"
        assert ("www-authenticate" in headers, "allow" in headers) == (status == 401, status == 405)
        one.sendall(b"x" * 100)  # nobody is cut off for being slow to read
        assert one.recv(100) == b""
    if status != 401:  # of those there is one line for many
        slugs = "" if status in (404, 405) else f".*code={slug}"
        shop.wait_log(f" request method={method} path={path} status={status} {slugs}.*correlation={request_id}")


@pytest.mark.parametrize("expects", [False, True], ids=["", "expect"])
@pytest.mark.parametrize("first", [False, True], ids=["known", "first"])
def test_a_good_key_is_told_to_go_on_and_its_body_is_taken(shop: Shop, first: bool, expects: bool) -> None:
    key = make_keys(shop, 1)[0] if first else shop.key
    body = json.dumps(
        {
            "account_id": shop.account_id,
            "recipient_id": CUSTOMER,
            "message": "in two parts",
            "idempotency_key": f"parts-{first}-{expects}",
        }
    ).encode()
    with connect(shop.url) as one:
        lines = [f"Authorization: Bearer {key}", f"Content-Length: {len(body)}", "Content-Type: application/json"]
        one.sendall(head("POST", SEND, *lines, *["Expect: 100-continue"] * expects))
        if expects:
            assert one.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        one.sendall(body[:20])
        one.sendall(body[20:])
        assert answer_to(one)[0] == 202
        one.sendall(head("GET", "/health/live"))  # the connection stays
        assert answer_to(one)[0] == 200


def test_who_sends_a_large_body_before_reading_still_gets_the_answer(shop: Shop) -> None:
    for path, headers, status in (
        (SEND, {}, 401),
        (SEND, {"Authorization": f"Bearer {guess(shop.key)}"}, 401),
        (SEND, {"Authorization": f"Bearer {shop.key}"}, 413),
        (HOOK, {}, 413),
        ("/nothing", {}, 404),
    ):
        for body in (b"x" * (12 * MB), iter([b"x" * MB] * 12)):
            assert requests.post(shop.url + path, data=body, headers=headers, timeout=30).status_code == status


def test_a_refused_request_that_is_whole_costs_no_connection(shop: Shop) -> None:
    with connect(shop.url) as one:
        for lines in (["Content-Length: 100"], ["Transfer-Encoding: chunked"]):
            body = b"x" * 100 if "chunked" not in lines[0] else b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n"
            for path, status in ((SEND, 401), (HOOK, 401), ("/nothing", 404)):
                one.sendall(head("POST", path, *lines))
                one.sendall(body)
                assert answer_to(one)[0] == status


def test_requests_one_behind_the_other_are_answered_in_order(shop: Shop) -> None:
    fresh, other = make_keys(shop, 2)

    def send(key: str, number: int) -> bytes:
        body = {
            "account_id": shop.account_id,
            "recipient_id": CUSTOMER,
            "message": "hi",
            "idempotency_key": f"p{number}",
        }
        text = json.dumps(body).encode()
        kind = "Content-Type: application/json"
        return head("POST", SEND, f"Authorization: Bearer {key}", f"Content-Length: {len(text)}", kind) + text

    many = head("GET", "/health/live")
    many += b"".join(send(key, number) for number, key in enumerate((fresh, other, fresh, shop.key)))
    many += head("GET", "/nothing") + b"\r\n" + head("GET", "/api/v1/accounts")
    many += head("POST", SEND, "Content-Length: 5") + b"12345" + head("GET", "/health/live", "Connection: close")
    with connect(shop.url) as one:
        for at in range(0, len(many), 700):
            one.sendall(many[at : at + 700])
        data = b""
        while part := one.recv(65_536):
            data += part
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", *[b"202"] * 4, b"404", b"401", b"401", b"200"]


def test_a_large_legal_webhook_is_taken(shop: Shop) -> None:
    items = [
        {
            "sender": {"id": f"88{number}"},
            "recipient": {"id": SHOP_ID},
            "timestamp": 1_800_000_000_000 + number,
            "message": {"mid": f"mid-door-large-{number}", "text": "\\ud83d\\udca1" * 50},
        }
        for number in range(1000)
    ]
    body = json.dumps(wire.envelope(SHOP_ID, 1_800_000_000_000, *items)).encode()
    body += b" " * (8 * MB - len(body))
    headers = {"X-Hub-Signature-256": signing.hub_signature(APP_SECRET, body)}
    for data in (body, iter([body[at : at + 100_000] for at in range(0, len(body), 100_000)])):
        assert requests.post(shop.url + HOOK, data=data, headers=headers, timeout=30).status_code == 200
    shop.crm.wait(
        1000,
        timeout_s=60,
        where=lambda entry: str(entry.event.get("instagram_message_id")).startswith("mid-door-large-"),
    )


@pytest.mark.parametrize(
    "sent",
    [
        head("POST", HOOK, "Transfer-Encoding: chunked") + b"5;" + b"a" * 100_000,
        head("POST", HOOK, "Transfer-Encoding: chunked") + b"0\r\n" + b"X-A: b\r\n" * 10_000,
        head("POST", HOOK, "Transfer-Encoding: chunked") + b"1\r\nabcd",
        b"GET / HTTP/1.1\r\nX-A: " + b"a" * 70_000,
    ],
    ids=["chunk_line", "trailer", "chunk", "headers"],
)
def test_what_never_ends_is_refused_early(shop: Shop, sent: bytes) -> None:
    with connect(shop.url) as one:
        one.sendall(sent)
        status, _, error = answer_to(one)
    assert (status, error["error"]) in ((400, "invalid_request"), (431, "headers_too_large"))


def test_a_stop_is_clean_whatever_is_half_sent(fresh_shop: Shop) -> None:
    with ExitStack() as stack:
        for kind in (*KINDS, *KINDS):
            stack.enter_context(connect(fresh_shop.url)).sendall(KINDS[kind])
        works(fresh_shop, 1)
        assert fresh_shop.bridge.stop() == 0
    assert "Traceback" not in fresh_shop.log()
    assert "rror" not in fresh_shop.log().replace("calls_left", "").split("serve.stopping")[1]


# --- how long a request may take, on a set clock ---


@pytest.fixture
def served(rig: Rig) -> Iterator[Served]:
    with servers.opened(rig) as opened:
        yield opened


def is_closed(one: socket.socket) -> bool:
    """Tell whether the server closed a connection; what it sent before is read."""
    one.settimeout(0.01)
    try:
        while one.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_a_slow_client_has_twenty_seconds_from_the_first_byte_to_the_last(served: Served) -> None:
    body, signature = said("slow but honest")
    whole = head("POST", HOOK, f"Content-Length: {len(body)}", f"X-Hub-Signature-256: {signature}") + body
    with served.connect() as honest, served.connect() as slow:
        served.pass_s(15)  # nothing has begun
        for at in range(0, len(whole), len(whole) // 8):
            honest.sendall(whole[at : at + len(whole) // 8])
            slow.sendall(whole[at // 2 : (at + len(whole) // 8) // 2])
            served.pass_s(2)
        assert answer_to(honest)[0] == 200
        served.pass_s(8)
        wait_until(lambda: is_closed(slow), "it stays")
        assert not is_closed(honest)
        served.pass_s(45)
        honest.settimeout(20)
        honest.sendall(head("GET", "/health/live"))  # after a while of rest
        assert answer_to(honest)[0] == 200
        served.pass_s(55)
        assert not is_closed(honest)
        served.pass_s(6)
        wait_until(lambda: is_closed(honest), "it stays")
    wait_until(lambda: served.log("connections.closed"), "nothing is told")
    assert " warning connections.closed late=1" in served.log("connections.closed")[0]


def test_line_ends_keep_no_connection(served: Served) -> None:
    with served.connect() as one:
        for _ in range(6):
            one.sendall(b"\r\n\r\n")
            served.pass_s(11)
        wait_until(lambda: is_closed(one), "it stays")
    assert served.log("connections.closed") == []


def test_bytes_that_keep_coming_make_no_time(served: Served) -> None:
    for start in (b"GET / HTTP/1.1\r\nX: ", head("POST", HOOK, "Content-Length: 5000")):
        with served.connect() as one:
            one.sendall(start)
            with contextlib.suppress(OSError):
                for _ in range(25):
                    one.sendall(b"x")
                    served.pass_s(1)
            wait_until(lambda: is_closed(one), "it stays")


def test_an_answer_that_is_not_read_keeps_no_connection(served: Served) -> None:
    with served.connect() as one:
        one.sendall(head("POST", SEND, "Content-Length: 5"))
        for _ in range(2):
            served.pass_s(0.6)
        wait_until(lambda: is_closed(one), "it stays")  # as far as it can be seen
        served.pass_s(6)  # the rest was listened to for five
        with pytest.raises(OSError):  # noqa: PT012
            for _ in range(100):
                one.sendall(b"x")
                served.poke()
