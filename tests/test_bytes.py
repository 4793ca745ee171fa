"""What stands around a request: the slash after a path, a mark before JSON, blanks around what is signed."""

import codecs
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from crmbridge import signing
from crmbridge.sandbox import wire
from crmbridge.sandbox.meta import APP_SECRET, VERIFY_TOKEN
from tests import shop as shops
from tests.shop import CUSTOMER, SHOP_ID, Shop

HOOK = "/webhooks/instagram"
SEND = "/api/v1/messages/send"
_numbers = itertools.count()


def said(text: str) -> bytes:
    """Return a webhook's body in which a customer writes."""
    message = {"mid": f"mid-bytes-{next(_numbers)}", "text": text}
    item = {
        "sender": {"id": CUSTOMER},
        "recipient": {"id": SHOP_ID},
        "timestamp": 1_800_000_000_000,
        "message": message,
    }
    return json.dumps(wire.envelope(SHOP_ID, 1_800_000_000_000, item)).encode()


def post(shop: Shop, body: bytes, *, secret: str = APP_SECRET, signed: bytes | None = None, path: str = HOOK) -> Any:
    """Post a webhook; `signed` are the bytes that its signature is made over, if they are others."""
    signature = signing.hub_signature(secret, body if signed is None else signed)
    headers = {"X-Hub-Signature-256": signature, "Content-Type": "application/json"}
    return requests.post(shop.url + path, data=body, headers=headers, timeout=30, allow_redirects=False)


def arrives(shop: Shop, text: str) -> None:
    """Wait until the CRM has what a customer wrote, as a message that was understood."""
    (entry,) = shop.crm.wait(1, where=lambda entry: entry.event.get("message") == text)
    assert entry.event["event"] == "message.received"


# --- the slash ---


def test_the_webhook_takes_a_slash_at_the_end_of_its_path(shop: Shop) -> None:
    assert post(shop, said("after a slash"), path=HOOK + "/").json() == {"status": "accepted"}
    arrives(shop, "after a slash")
    asked = {"hub.mode": "subscribe", "hub.verify_token": VERIFY_TOKEN, "hub.challenge": "1158201444"}
    answer = requests.get(shop.url + HOOK + "/", params=asked, timeout=10, allow_redirects=False)
    assert (answer.status_code, answer.text) == (200, "1158201444")
    shop.wait_log(r" request method=POST path=/webhooks/instagram/ status=200")
    assert post(shop, said("unsigned"), path=HOOK + "/", secret="another").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/accounts/", 200),
        ("GET", "/api/v1/accounts/?limit=1", 200),
        ("GET", "/health/", 200),
        ("GET", "/docs/", 200),
        ("POST", "/api/v1/messages/send/", 400),  # the route's own answer to no body
        ("PUT", "/api/v1/accounts/", 405),
        ("GET", "/api/v1/accounts//", 404),
        ("GET", "/webhooks/instagram//", 404),
        ("GET", "/nothing/", 404),
        ("GET", "//", 302),  # leading slashes are one, and that is the home page
    ],
)
def test_one_slash_at_the_end_of_any_path_changes_nothing(shop: Shop, method: str, path: str, status: int) -> None:
    assert shop.call(method, path, allow_redirects=False).status_code == status


def test_a_slash_that_belongs_to_an_id_stays(shop: Shop) -> None:
    assert shop.send("order", "order/7/").status_code == 202
    found = shop.call("GET", "/api/v1/admin/explain/order/7/", key=shop.admin_key)
    assert found.status_code == 200, found.text
    assert shop.call("GET", "/api/v1/admin/explain/order/7", key=shop.admin_key).status_code == 404


# --- the mark before JSON, and other encodings ---


def body_of(shop: Shop, key: str, text: str = "hi") -> str:
    wanted = {"account_id": shop.account_id, "recipient_id": CUSTOMER, "message": text, "idempotency_key": key}
    return json.dumps(wanted, ensure_ascii=False)


def put(shop: Shop, method: str, path: str, body: bytes) -> Any:
    headers = {"Authorization": f"Bearer {shop.key}", "Content-Type": "application/json"}
    return requests.request(method, shop.url + path, data=body, headers=headers, timeout=30)


def test_a_byte_order_mark_before_a_requests_json_is_no_part_of_it(shop: Shop) -> None:
    marks = b"\n" + codecs.BOM_UTF8 + b" " + codecs.BOM_UTF8
    first = put(shop, "POST", SEND, marks + body_of(shop, "marked", "grüß dich").encode())
    assert first.status_code == 202, first.text
    again = put(shop, "POST", SEND, body_of(shop, "marked", "grüß dich").encode())
    assert (again.status_code, again.json()["message_id"]) == (202, first.json()["message_id"])
    shop.crm.wait(1, where=lambda entry: entry.event.get("message_id") == first.json()["message_id"])
    assert "grüß dich" in [sent.text for sent in shop.meta.sent]
    account = f"/api/v1/accounts/{shop.account_id}"
    for method, path, body in (
        ("PUT", account, b'{"status": "active"}'),
        ("POST", account + "/pause", b'{"what": ["deliveries"]}'),
        ("POST", account + "/resume", b"{}"),
    ):
        assert put(shop, method, path, codecs.BOM_UTF8 + body).status_code == 200, path


def test_what_is_wrong_after_the_mark_is_named_as_without_it(shop: Shop) -> None:
    plain, marked = (put(shop, "POST", SEND, mark + b'{"message": 5}').json() for mark in (b"", codecs.BOM_UTF8))
    assert plain["details"]
    assert marked["details"] == plain["details"]
    for body in (b"", b"{", codecs.BOM_UTF8):
        assert put(shop, "POST", SEND, codecs.BOM_UTF8 + body).json()["error"] == "malformed_json"


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32"),
        ("utf-32-be", "UTF-32"),
        ("latin-1", "not UTF-8 (byte "),
        ("cp1252", "0xfc"),
    ],
)
def test_a_body_in_another_encoding_is_told_so(shop: Shop, encoding: str, named: str) -> None:
    refused = put(shop, "POST", SEND, body_of(shop, "encoded", "grüß dich").encode(encoding))
    assert (refused.status_code, refused.json()["error"]) == (400, "malformed_json")
    assert named in refused.json()["message"]
    assert "UTF-8" in refused.json()["message"]


def test_a_byte_order_mark_before_metas_json_is_signed_and_not_read(shop: Shop) -> None:
    marked = codecs.BOM_UTF8 + said("after the mark")
    assert post(shop, marked, signed=marked.removeprefix(codecs.BOM_UTF8)).status_code == 401
    assert post(shop, marked).status_code == 200
    arrives(shop, "after the mark")


# --- what is signed ---


@pytest.mark.parametrize(("before", "after"), [(b"", b"\n"), (b" ", b""), (b"\r\n\t", b" \r\n"), (b"", b" " * 4096)])
def test_the_signature_is_over_the_bytes_as_they_came(shop: Shop, before: bytes, after: bytes) -> None:
    text = f"between blanks {next(_numbers)}"
    inner = said(text)
    body = before + inner + after
    assert post(shop, body, signed=inner).status_code == 401
    assert post(shop, inner, signed=body).status_code == 401
    assert post(shop, body).status_code == 200
    arrives(shop, text)


@pytest.fixture(scope="module")
def many_secrets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    app_secrets = "the-first-secret the-second-secret the-third-secret"
    folder = tmp_path_factory.mktemp("secrets")
    with shops.opened(folder, shops.QUICK, CRMBRIDGE_INSTAGRAM_APP_SECRETS=app_secrets) as opened:
        yield opened


def test_each_of_the_app_secrets_signs(many_secrets: Shop) -> None:
    for secret in ("the-first-secret", "the-second-secret", "the-third-secret"):
        assert post(many_secrets, said(f"signed with {secret}"), secret=secret).status_code == 200
        arrives(many_secrets, f"signed with {secret}")
    for secret in ("the-fourth-secret", "the-first-secret the-second-secret the-third-secret", "THE-FIRST-SECRET"):
        assert post(many_secrets, said("a stranger"), secret=secret).status_code == 401
