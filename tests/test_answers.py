"""What counts as a CRM's answer, and which connection is used again: odd answers, byte by byte, over real sockets."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crmbridge import config, crm, net
from crmbridge.events import epoch_s
from crmbridge.sandbox import wire
from tests import rig as rigs
from tests import shop as shops
from tests.far import ERROR, OK, Far, Step
from tests.rig import Rig
from tests.shop import SHOP_ID, Shop
from tests.tls import Authority

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
OTHER_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

Steps = Iterable[Step]
Outcome = tuple[str, str | None, int | None]


def trickle(*first: bytes) -> Iterator[Step]:
    yield from first
    for _ in range(6000):
        yield b"x"
        yield 0.01


def after(line: bytes, tail: Steps) -> Iterator[Step]:
    """Put a status line before what follows it, in one piece."""
    steps = iter(tail)
    first = next(steps, b"")
    yield from (line + first,) if isinstance(first, bytes) else (line, first)
    yield from steps


def flood(first: bytes, more: bytes) -> Iterator[Step]:
    yield first
    yield from itertools.repeat(more * (65_536 // len(more)))


class Desk:
    """A rig with a CRM at `far`, whose answer to "one" is scripted; to "two" it is 500, and to all else 200."""

    def __init__(self, rig: Rig, far: Far, timeout_s: float) -> None:
        self.rig, self.far = rig, far
        self.number = 0
        rig.db.close()
        rig.settings = replace(rig.settings, crm=replace(rig.settings.crm, timeout_s=timeout_s))
        rig.open()

    def open(self, script: Callable[[], Steps]) -> None:
        """Have a shop of its own for the next case."""
        self.number += 1
        self.script = script
        self.far.answer = lambda request: {"one": self.script(), "two": [ERROR]}.get(request.event["message"], [OK])
        self.far.forget()
        self.account = self.rig.account(str(self.number), url=self.far.url)

    def hear(self, text: str) -> Outcome:
        """Have a customer of their own write; return what became of it: state, code, HTTP status."""
        self.rig.hear_body(wire.webhook_body(wire.envelope(str(self.number), int(self.rig.now_s * 1000), {
            **self.rig.item({"message": {"mid": f"mid-{self.number}-{text}", "text": text}}, contact=f"9-{text}"),
            "recipient": {"id": str(self.number)},
        })))  # fmt: skip
        self.rig.drain()
        sql = """
            SELECT deliveries.state, last_code, last_http_status FROM deliveries JOIN events ON events.id = event_id
            WHERE deliveries.account_id = ? AND body LIKE ?"""
        (row,) = self.rig.db.rows(sql, (self.account["id"], f'%"{text}"%'))
        return row["state"], row["last_code"], row["last_http_status"]


@contextlib.contextmanager
def opened(folder: Path, timeout_s: float) -> Iterator[Desk]:
    with Far(lambda _: [OK]) as far, rigs.opened(folder) as rig:
        yield Desk(rig, far, timeout_s)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with opened(tmp_path_factory.mktemp("desk"), 15) as desk:
        yield desk


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk that waits for an answer for a second only."""
    with opened(tmp_path_factory.mktemp("hasty"), 1) as desk:
        yield desk


DONE = ("done", None, 200)


def retried(code: str, status: int | None = None) -> Outcome:
    return ("pending", code, status)


# --- interim answers ---

INTERIM: list[Any] = [
    pytest.param([HINTS, 0.4, OK], DONE, id="103"),
    pytest.param([b"HTTP/1.1 102 Processing\r\n\r\n", 0.4, OK], DONE, id="102"),
    pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n", 0.4, OK], DONE, id="100"),
    pytest.param([b"HTTP/1.1 199 Whatever\r\nX: y\r\n\r\n", 0.4, OK], DONE, id="199, which nobody knows"),
    pytest.param([b"HTTP/1.1 102 a\r\n\r\n", 0.1, HINTS, 0.1, HINTS, b"HTTP/1.1 100 c\r\n\r\n", 0.1, OK], DONE, id="4"),
    pytest.param([HINTS + OK], DONE, id="in one piece"),
    pytest.param([HINTS[:30], 0.1, HINTS[30:], 0.1, OK[:10], 0.1, OK[10:]], DONE, id="in pieces"),
    pytest.param([HINTS[:-2] + b"Link: </x>\r\n" * 500 + b"\r\n", 0.4, OK], DONE, id="500 headers"),
    pytest.param([b"HTTP/1.1 103 E\r\nLink : <x>\r\nno colon\r\n\r\n", 0.4, OK], DONE, id="headers that are none"),
    pytest.param([b"HTTP/1.1 103 E\r\nContent-Length: 50\r\n\r\n", 0.4, OK], DONE, id="a length of nothing"),
    pytest.param([HINTS, 0.4, b"HTTP/1.1 204 No Content\r\n\r\n"], ("done", None, 204), id="then 204"),
    pytest.param([HINTS, 0.4, ERROR], retried("crm_error", 500), id="then 500"),
    pytest.param([HINTS, 0.4, b"HTTP/1.1 302 F\r\nLocation: /\r\n" + EMPTY], retried("crm_redirect", 302), id="302"),
    pytest.param([HINTS, "close"], retried("connection_lost"), id="then the end"),
    pytest.param([HINTS, "reset"], retried("connection_lost"), id="then a reset"),
    pytest.param([HINTS, b"rubbish\r\n\r\n"], retried("connection_lost"), id="then rubbish"),
    pytest.param([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", 0.4, OK], retried("crm_error", 101),
                 id="101, which is final"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "outcome"), INTERIM)
def test_only_the_final_status_is_the_answer(desk: Desk, script: list[Step], outcome: Outcome) -> None:
    desk.open(lambda: script)
    assert desk.hear("one") == outcome
    assert desk.hear("two") == retried("crm_error", 500)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        pytest.param(lambda: [HINTS], "timeout", id="nothing"),
        pytest.param(lambda: trickle(HINTS, b"HTTP/1.1 103 x\r\nLink: "), "timeout", id="a header that never ends"),
        pytest.param(lambda: itertools.cycle([HINTS, 0.02]), "timeout", id="more of them, slowly"),
        pytest.param(lambda: flood(b"", HINTS), "connection_lost", id="more of them, fast"),
        pytest.param(lambda: flood(HINTS[:-2], b"Link: </x>\r\n"), "connection_lost", id="headers without an end"),
    ],
)
def test_an_interim_answer_alone_is_none(hasty: Desk, script: Callable[[], Steps], code: str) -> None:
    hasty.open(script)
    assert hasty.hear("one") == retried(code)
    assert hasty.hear("two") == retried("crm_error", 500)


def test_two_shops_on_one_crm_host_do_not_get_each_others_answers(desk: Desk) -> None:
    desk.open(lambda: [HINTS, 0.4, OK])
    assert desk.hear("one") == DONE
    desk.number += 1
    desk.account = desk.rig.account(str(desk.number), url=desk.far.url.replace("/hook", "/other"))
    assert desk.hear("two") == retried("crm_error", 500)
    assert [request.path for request in desk.far.requests] == ["/hook", "/other"]


# --- which connection is used again ---

AGAIN: list[Any] = [
    pytest.param([OK], id="a length"),
    pytest.param([HEAD + EMPTY], id="no body"),
    pytest.param([HEAD + b"Content-Length: 16384\r\n\r\n" + b"x" * 16_384], id="as long as is read"),
    pytest.param([HEAD + CHUNKED + b"2\r\nok\r\n0\r\n\r\n"], id="chunks"),
    pytest.param([HEAD + CHUNKED + b"2;x=y\r\nok\r\n0\r\nX-Trailer: y\r\n\r\n"], id="with a trailer"),
    pytest.param([b"HTTP/1.1 204 No Content\r\n\r\n"], id="204"),
    pytest.param([b"HTTP/1.1 304 Not Modified\r\n\r\n"], id="304"),
    pytest.param([b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + EMPTY], id="1.0 that keeps it"),
    pytest.param([HINTS, 0.1, OK], id="103 before"),
    pytest.param([b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"], id="500"),
    pytest.param([HEAD + b"X: y\r\n" * 150 + EMPTY], id="150 headers"),
    pytest.param([HEAD + b"X-Long: " + b"y" * 100_000 + b"\r\n" + EMPTY], id="a long header"),
    pytest.param([HEAD + b"Content-Length: 2, 2\r\nContent-Length: 2\r\n\r\nok"], id="one length thrice"),
    pytest.param([b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"], id="lines without a CR"),
]
NOT_AGAIN: list[Any] = [
    pytest.param([HEAD + b"Connection: close\r\n" + EMPTY], id="it says so"),
    pytest.param([b"HTTP/1.0 200 OK\r\n" + EMPTY], id="1.0"),
    pytest.param([OK + OTHER_ANSWER], id="more at once"),
    pytest.param([OK, 0.05, OTHER_ANSWER], id="more a little later"),
    pytest.param([HEAD + CHUNKED + b"0\r\n\r\n" + OTHER_ANSWER], id="more after the last chunk"),
    pytest.param([b"HTTP/1.1 204 No Content\r\n\r\n" + OTHER_ANSWER], id="204 with more"),
    pytest.param([b"HTTP/1.1 204 No Content\r\nContent-Length: 38\r\n\r\n"], id="204 that tells of a body"),
    pytest.param([b"HTTP/1.1 204 No Content\r\n" + CHUNKED], id="204 that tells of chunks"),
    pytest.param([b"HTTP/1.1 304 Not Modified\r\nContent-Length: 38\r\n\r\n"], id="304 that tells of a body"),
    pytest.param([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], id="101"),
    pytest.param([HEAD + b"Content-Length: 16385\r\n\r\n" + b"x" * 16_385], id="longer than is read"),
    pytest.param([HEAD + b"Content-Length: 0\r\n" + CHUNKED + b"0\r\n\r\n"], id="a length and chunks"),
    pytest.param([HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok", "close"], id="two lengths"),
    pytest.param([HEAD + b"Content-Length: +2\r\n\r\nok", "close"], id="no number"),
    pytest.param([HEAD + b"Content-Length : 2\r\n\r\nok"], id="a blank before the colon"),
    pytest.param([HEAD + b"no colon\r\n" + EMPTY], id="a header without a colon"),
    pytest.param([HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "close"], id="two codings"),
    pytest.param([HEAD + CHUNKED + b"-1\r\nok\r\n"], id="a chunk of less than nothing"),
    pytest.param([HEAD + CHUNKED + b"2\r\nok\r\n0x0\r\n\r\n"], id="a chunk that is no number"),
]


@pytest.mark.parametrize(("script", "again"), [
    *[pytest.param(*case.values, True, id=f"again: {case.id}") for case in AGAIN],
    *[pytest.param(*case.values, False, id=f"anew: {case.id}") for case in NOT_AGAIN],
])  # fmt: skip
def test_a_connection_is_used_again_only_when_its_answer_was_read_whole(
    desk: Desk, script: list[Step], again: bool
) -> None:
    desk.open(lambda: script)
    desk.hear("one")
    desk.far.wait_answered(1)  # what comes late is there
    assert desk.hear("two") == retried("crm_error", 500)
    first, second = desk.far.requests
    assert (first.connection == second.connection) == again


# --- the status line decides ---


def tails() -> dict[str, Callable[[], Steps]]:
    """What may follow a status line and its line end; Retry-After stands where it can be read in time."""
    hint = b"Retry-After: 7\r\n"
    return {
        "nothing": list,
        "the end": lambda: ["close"],
        "a reset": lambda: [hint, 0.1, "reset"],
        "a blank before the colon": lambda: [b"Content-Length : 2\r\n" + hint + b"\r\nok"],
        "a header without a colon": lambda: [hint + b"what is this\r\nContent-Length: 0\r\n\r\n"],
        "a header without a name": lambda: [hint + b": x\r\nContent-Length: 0\r\n\r\n"],
        "a folded header": lambda: [b"X: y\r\n  z\r\n" + hint + EMPTY],
        "bytes that are no text": lambda: [b"X: \x00\xff\r\n\xfe\x00: y\r\n" + hint + EMPTY],
        "101 headers": lambda: [hint + b"X: y\r\n" * 100 + EMPTY],
        "50,000 headers": lambda: [hint + b"X-Number: y\r\n" * 50_000 + EMPTY],
        "a header of 70 KB": lambda: [hint + b"X: " + b"y" * 70_000 + b"\r\n" + EMPTY],
        "a header of 1 MB": lambda: [hint + b"X: " + b"y" * 1_000_000 + b"\r\n" + EMPTY],
        "headers without an end": lambda: flood(hint, b"X-Number: y\r\n"),
        "headers without an end, slowly": lambda: trickle(hint, b"X: "),
        "a body without an end": lambda: flood(hint + b"\r\n", b"x"),
        "a body without an end, slowly": lambda: trickle(hint + b"Content-Length: 5000\r\n\r\n"),
        "a body that does not come": lambda: [hint + b"Content-Length: 5000\r\n\r\n"],
        "a body cut short": lambda: [hint + b"Content-Length: 5000\r\n\r\nok", "close"],
        "a body reset": lambda: [hint + b"Content-Length: 5000\r\n\r\nok", 0.1, "reset"],
        "a length that is no number": lambda: [hint + b"Content-Length: two\r\n\r\nok"],
        "a length below nothing": lambda: [hint + b"Content-Length: -1\r\n\r\nok"],
        "a huge length": lambda: [hint + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nok"],
        "two lengths": lambda: [hint + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok"],
        "a length and chunks": lambda: [hint + b"Content-Length: 2\r\n" + CHUNKED + b"zz\r\n"],
        "a broken chunk": lambda: [hint + CHUNKED + b"zz\r\nok\r\n0\r\n\r\n"],
        "a chunk below nothing": lambda: flood(hint + CHUNKED + b"-1\r\n", b"x"),
        "a chunk cut short": lambda: [hint + CHUNKED + b"5\r\nok", "close"],
        "chunks without an end": lambda: flood(hint + CHUNKED, b"1\r\nx\r\n"),
        "a chunk's size without an end": lambda: flood(hint + CHUNKED, b"0"),
        "a trailer without an end": lambda: flood(hint + CHUNKED + b"0\r\n", b"X: y\r\n"),
        "no last chunk": lambda: [hint + CHUNKED + b"2\r\nok\r\n"],
        "a coding nobody knows": lambda: [hint + b"Transfer-Encoding: rot13\r\n\r\nbx"],
        "what is not compressed": lambda: [hint + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nok"],
        "a redirect's address": lambda: [hint + b"Location: http://[\r\n" + EMPTY],
        "a cookie": lambda: [hint + b"Set-Cookie: \xff=; expires=never; domain=..\r\n" + EMPTY],
        "a type": lambda: [hint + b"Content-Type: ;;=\xff; charset=\r\n" + EMPTY],
    }


TAILS = tails()


@pytest.mark.parametrize("tail", TAILS)
def test_a_200_is_a_200_whatever_follows(desk: Desk, tail: str) -> None:
    desk.open(lambda: after(HEAD, TAILS[tail]()))
    assert desk.hear("one") == DONE
    assert desk.hear("two") == retried("crm_error", 500)


@pytest.mark.parametrize("tail", [tail for tail in TAILS if "slowly" not in tail and "does not come" not in tail])
def test_any_other_status_keeps_its_meaning_and_its_retry_after(desk: Desk, tail: str) -> None:
    desk.open(lambda: after(b"HTTP/1.1 503 Later\r\n", TAILS[tail]()))
    assert desk.hear("one") == retried("crm_error", 503)
    (row,) = desk.rig.db.rows("SELECT due FROM deliveries WHERE account_id = ?", (desk.account["id"],))
    assert round(epoch_s(row["due"]) - desk.rig.now_s) == (1 if tail in ("nothing", "the end") else 7)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (b"HTTP/1.1 201 Created\r\n", ("done", None, 201)),
        (b"HTTP/1.1 299 Whatever\r\n", ("done", None, 299)),
        (b"HTTP/1.0 200 OK\r\n", DONE),
        (b"HTTP/1.1 200\r\n", DONE),
        (b"HTTP/1.1 200 \xe2\x9c\x93\r\n", DONE),
        (b"HTTP/1.1 200 OK\n", DONE),
        (b"HTTP/1.1 200 OK", DONE),  # the end came in the reason, which nobody needs
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\n", retried("crm_redirect", 302)),
        (b"HTTP/1.1 429 Slow\r\n", retried("rate_limited", 429)),
        (b"HTTP/1.1 401 No\r\n", ("dead", "crm_unauthorized", 401)),
        (b"HTTP/1.1 300 Choices\r\n", retried("crm_redirect", 300)),
        (b"HTTP/1.1 199 What\r\n", retried("connection_lost")),
        (b"HTTP/1.1 999 What\r\n", retried("crm_error", 999)),
    ],
)
def test_the_status_line_alone_tells(desk: Desk, status: bytes, outcome: Outcome) -> None:
    desk.open(lambda: [status, "close"])
    assert desk.hear("one") == outcome


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\r\n", b"200 OK\r\n", b"HTTP/1.1 OK\r\n", b"HTTP/1.1 20", b"HTTP/1.1 200", b"HTTP/1.1 2000 OK\r\n",
        b"HTTP/1.1 0200 OK\r\n", b"HTTP/1.1 +200 OK\r\n", b"HTTP/1.1 2_00 OK\r\n", b"HTTP/1.1 099 OK\r\n",
        b"HTTP/1.1 200OK\r\n", b"HTTP/1.1200 OK\r\n", b"HTTP/2 200 OK\r\n", b"HTTP/2.0 200 OK\r\n",
        b"HTTP/1. 200 OK\r\n", b"http/1.1 200 OK\r\n", b"SMTP/1.1 200 OK\r\n",
        b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", b"{\"ok\": true}\r\n",
        b"\xef\xbb\xbfHTTP/1.1 200 OK\r\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["close", "reset"])
def test_without_a_status_line_there_is_no_answer(desk: Desk, line: bytes, end: Step) -> None:
    desk.open(lambda: [line, 0.05, end])
    assert desk.hear("one") == retried("connection_lost")


def test_a_status_line_that_does_not_come_to_its_end_is_a_timeout(hasty: Desk) -> None:
    hasty.open(lambda: trickle(b"HTTP/1.1 200 O"))
    assert hasty.hear("one") == retried("timeout")


@pytest.fixture(scope="module")
def busy_shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    many = shops.QUICK.replace("[delivery]", "[delivery]\nsenders = 33\nslots_per_endpoint = 31")
    with shops.opened(tmp_path_factory.mktemp("busy"), many) as shop:
        shop.bridge.stop()
        shop.bridge.environ["CRMBRIDGE_CRM_TIMEOUT_S"] = "300"
        shop.start()
        yield shop


@pytest.mark.parametrize("tail", ["a blank before the colon", "50,000 headers", "a header of 1 MB", "a broken chunk",
                                  "a body without an end", "a body without an end, slowly",
                                  "headers without an end, slowly", "a body reset"])  # fmt: skip
def test_thirty_customers_events_all_arrive_soon(busy_shop: Shop, tail: str) -> None:
    shop = busy_shop
    with Far(lambda _: after(HEAD, TAILS[tail]())) as far:
        assert shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"crm_webhook_url": far.url}).status_code == 200
        for number in range(30):
            assert shop.meta.customer_says(SHOP_ID, f"77{number}", f"{tail} {number}").status == 200
        done = f"""
            SELECT COUNT(*) FROM deliveries JOIN events ON events.id = event_id
            WHERE place = 'done' AND body LIKE '%"{tail} %'"""
        shop.wait_rows(done, [(30,)], timeout_s=30)
        assert sorted(one.event["message"] for one in far.requests) == sorted(f"{tail} {n}" for n in range(30))


# --- Instagram: the body is the answer ---


def test_instagram_gets_the_full_time_for_a_body_and_one_that_cannot_be_read_is_doubt(rig: Rig) -> None:
    sent = b'{"recipient_id": "900000000000001", "message_id": "aWdfZAG1fslow"}'
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(sent)
    scripts: list[list[Step]] = [
        [HINTS, 0.2, whole, 1.5, sent],
        [whole, sent[:20], "close"],
        [HEAD + CHUNKED + b"zz\r\n"],
    ]
    with Far(lambda _: scripts.pop(0)) as far:
        rig.db.close()
        rig.settings = replace(rig.settings, instagram=replace(rig.settings.instagram, graph_url=far.url))
        rig.open()
        account = rig.account(url=None)
        for contact, wanted in (("901", "sent"), ("902", "pending"), ("903", "pending")):
            message_id = rig.send(account, contact=contact)
            rig.drain()
            assert rig.status(message_id)["status"] == wanted
        doubts = rig.db.rows("SELECT in_doubt FROM deliveries WHERE target = 'instagram' ORDER BY position")
        assert [row["in_doubt"] for row in doubts] == [0, 1, 1]


# --- over TLS ---


def test_over_tls_what_is_left_of_an_answer_is_seen_too(tmp_path: Path) -> None:
    """The rest of a record that was decrypted is on no socket any more, and in no buffer of ours."""
    authority = Authority(tmp_path)
    head = HEAD + b"Content-Length: %d\r\n\r\n"
    first = head % (8192 - len(head) - 2)
    answers = iter([[first.ljust(8192, b"x") + OTHER_ANSWER], [ERROR], [ERROR]])
    with Far(lambda _: next(answers), tls=authority.server("127.0.0.1")) as far:
        session = crm.open_session(replace(LOOPBACK, ca_file=authority.ca_file), connections=1)
        told = [session.call("POST", far.url, headers={}, body=b"{}").status for _ in range(3)]
        assert len(first) + int(first.split()[-1]) == 8192
        assert told == [200, 500, 500]
        assert [one.connection for one in far.requests] == [0, 1, 1]


@pytest.mark.parametrize(
    "tail",
    ["nothing", "the end", "a body cut short", "a body reset", "a body without an end, slowly", "a broken chunk"],
)
def test_over_tls_the_status_line_decides_too(tmp_path: Path, tail: str) -> None:
    authority = Authority(tmp_path)
    with Far(lambda _: after(HEAD, TAILS[tail]()), tls=authority.server("127.0.0.1")) as far:
        session = crm.open_session(replace(LOOPBACK, ca_file=authority.ca_file), connections=1)
        assert session.call("POST", far.url, headers={}, body=b"{}").status == 200


LOOPBACK = replace(config.Crm(), allow_networks=config._networks("127.0.0.0/8 ::1/128"), allow_http=True)


@pytest.mark.parametrize("over_tls", [True, False])
def test_a_deadline_holds_while_a_large_body_is_sent(tmp_path: Path, over_tls: bool) -> None:
    """Somebody who reads a little now and then holds no call beyond its time, over TLS neither."""
    authority = Authority(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def sip() -> None:
            taken, _ = listening.accept()
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            if over_tls:
                taken = authority.server("127.0.0.1").wrap_socket(taken, server_side=True)
            with taken, contextlib.suppress(OSError):  # the caller gives up, maybe with a reset
                while not done.wait(0.05):
                    taken.recv(4000)

        thread = threading.Thread(target=sip, daemon=True)
        thread.start()
        kind = "https" if over_tls else "http"
        given = replace(LOOPBACK, ca_file=authority.ca_file, timeout_s=1.0)
        began = time.monotonic()
        with pytest.raises(net.CallFailed) as caught:
            crm.open_session(given, connections=1).call(
                "POST", f"{kind}://127.0.0.1:{listening.getsockname()[1]}/", headers={}, body=b"x" * 30_000_000
            )
        assert caught.value.code == "timeout"
        assert time.monotonic() - began < 30
        done.set()
        thread.join(5)
