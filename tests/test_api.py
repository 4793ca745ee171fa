"""The API over real HTTP: keys and permissions, accounts, sends, and what happens to bad requests."""

import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import yaml

from crmbridge import apikey, config
from crmbridge.sandbox import wire
from tests import spec
from tests.shop import CUSTOMER, OTHER_ID, OTHER_SCOPED_ID, OTHER_TOKEN, SHOP_ID, TOKEN, Shop
from tests.waiting import BULK_S, PATIENCE_S, until

SEND = "/api/v1/messages/send"
ACCOUNTS = "/api/v1/accounts"


def error(answer: requests.Response, status: int) -> dict[str, Any]:
    """Check that an answer is an error as the contract says, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    found: dict[str, Any] = answer.json()
    assert found["correlation_id"] == answer.headers["X-Correlation-Id"]
    return found


def fields(answer: requests.Response) -> set[str]:
    return {entry["field"] for entry in error(answer, 400)["details"]}


# --- keys ---


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Basic abc",
        "Bearer crmb_000000000000_" + "0" * 38,
        "Bearer " + "x" * 5000,
    ],
)
def test_no_or_a_wrong_key_is_401_before_anything_else(shop: Shop, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = requests.post(shop.url + SEND, data=b"not json", headers=headers, timeout=PATIENCE_S)
    assert error(answer, 401)["error"] == "unauthorized"
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_key_with_a_wrong_secret_is_401(shop: Shop) -> None:
    forged, _, _ = apikey.make()
    body = forged[: len("crmb_")] + shop.key.split("_")[1] + "_" + forged.split("_")[2][:32]
    assert error(shop.call("GET", ACCOUNTS, key=body + apikey._checksum(body)), 401)


def test_a_revoked_or_expired_key_ends_at_once(shop: Shop) -> None:
    for words in (("--expires-days", "0.00002"), ()):
        key = shop.bridge.command("key", "create", "--name", "short", "--account", shop.account_id, *words)
        if words:
            expires = shop.rows("SELECT MAX(expires_at) FROM api_keys")[0][0]
            while shop.call("GET", "/health/live").json()["timestamp"] <= expires:
                pass
        else:
            assert shop.call("GET", ACCOUNTS, key=key).status_code == 200
            shop.bridge.command("key", "revoke", "key_" + key.split("_")[1])
        error(shop.call("GET", ACCOUNTS, key=key), 401)


def test_a_key_does_what_it_may_on_its_accounts_alone(shop: Shop) -> None:
    reader = shop.bridge.command(
        "key", "create", "--name", "reader", "--account", shop.account_id, "--permission", "messages:read"
    )
    body = {"account_id": shop.account_id, "recipient_id": CUSTOMER, "message": "x", "idempotency_key": "perm"}
    assert error(shop.call("POST", SEND, body, key=reader), 403)["error"] == "permission_missing"
    assert error(shop.call("POST", ACCOUNTS, {}), 403)["error"] == "permission_missing"
    for account_id in ("acc_" + "0" * 26, "nonsense"):
        assert error(shop.call("GET", f"{ACCOUNTS}/{account_id}"), 403)["error"] == "wrong_account"
        assert (
            error(shop.call("GET", f"{ACCOUNTS}/{account_id}", key=shop.admin_key), 404)["error"] == "account_not_found"
        )
        assert error(shop.send("x", "k", account_id=account_id), 403)["error"] == "wrong_account"


def test_each_operation_answers_the_keys_that_its_permission_names_and_no_others(shop: Shop) -> None:
    """The matrix of all operations that need a key, as the specification tells, and all kinds of keys."""
    paths = yaml.safe_load((config.ROOT / "api-spec.yaml").read_text())["paths"]
    needed = {
        (method.upper(), path): named[1]
        for path, methods in paths.items()
        for method, operation in methods.items()
        if method in ("get", "put", "post", "patch", "delete")
        and (named := re.match(r"\*\*Permission:\*\* `?([a-z:]+)", operation.get("description", "")))
    }
    assert len(needed) >= 18
    assert set(needed.values()) == {*apikey.PERMISSIONS, "admin"}
    forged, _, _ = apikey.make()
    keys = {"none": None, "forged": forged, "admin": shop.admin_key} | {
        name: shop.bridge.command("key", "create", "--name", name, "--account", shop.account_id, "--permission", name)
        for name in apikey.PERMISSIONS
    }
    wrong = {}
    for (method, path), permission in needed.items():
        for name, key in keys.items():
            named = path.format(account_id="acc_" + "0" * 26, message_id="msg_" + "0" * 26, id="dlv_" + "0" * 26)
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            body: dict[str, Any] | None = None if method in ("GET", "DELETE") else {}
            answer = requests.request(method, shop.url + named, json=body, headers=headers, timeout=PATIENCE_S)
            refused = {401: "unauthorized", 403: "permission_missing"}
            code = answer.json().get("error") if answer.status_code in refused else None
            is_let_in = code not in refused.values()
            if is_let_in != (name in (permission, "admin")) or (name in ("none", "forged")) != (code == "unauthorized"):
                wrong[method, path, name] = answer.status_code, code
    assert wrong == {}


def test_no_operation_touches_an_account_that_the_key_is_not_bound_to(shop: Shop) -> None:
    paths = spec.load()["paths"]
    named = [
        (method.upper(), path) for path, methods in paths.items() for method in methods if "{account_id}" in path
        and method in ("get", "put", "post", "patch", "delete")
    ]  # fmt: skip
    assert ("POST", "/api/v1/accounts/{account_id}/pause") in named
    other = shop.connect(instagram_account_id=OTHER_ID, access_token=OTHER_TOKEN).json()["account_id"]
    before = shop.call("GET", f"{ACCOUNTS}/{other}", key=shop.admin_key).json()
    body = {"what": ["sends"], "status": "inactive"}
    for method, path in named:
        answer = shop.call(method, path.format(account_id=other), body if method in ("PUT", "POST") else None)
        assert error(answer, 403)["error"] in ("wrong_account", "permission_missing"), path
        if method != "DELETE":  # for admins alone
            assert answer.json()["error"] == "wrong_account", path
    assert shop.call("GET", f"{ACCOUNTS}/{other}", key=shop.admin_key).json() == before
    shop.call("DELETE", f"{ACCOUNTS}/{other}", key=shop.admin_key)


def test_a_message_of_another_account_looks_like_none(shop: Shop) -> None:
    message_id = shop.send("private", "private-1").json()["message_id"]
    other = shop.connect(instagram_account_id=OTHER_ID, access_token=OTHER_TOKEN).json()["account_id"]
    key = shop.bridge.command("key", "create", "--name", "other", "--account", other)
    answers = [shop.call("GET", f"/api/v1/messages/{one}/status", key=key) for one in (message_id, "msg_" + "0" * 26)]
    assert [error(answer, 404)["message"] for answer in answers] == ["There is no such message."] * 2
    assert [row["account_id"] for row in shop.call("GET", ACCOUNTS, key=key).json()["accounts"]] == [other]
    assert shop.call("DELETE", f"{ACCOUNTS}/{other}", key=shop.admin_key).json() == {
        "account_id": other,
        "deleted": True,
    }


def test_no_credential_is_in_the_database_the_log_or_an_answer(shop: Shop) -> None:
    shop.call("GET", f"{ACCOUNTS}/{shop.account_id}")
    stored = b"".join(path.read_bytes() for path in shop.database.parent.glob("bridge.db*"))
    answer = shop.call("GET", f"{ACCOUNTS}/{shop.account_id}").text
    for secret in (TOKEN, "sandbox-webhook-secret", shop.key, shop.key.split("_")[2], shop.admin_key):
        assert secret.encode() not in stored
        assert secret not in shop.log()
        assert secret not in answer


# --- accounts ---


def test_an_account_shows_what_was_learned(shop: Shop) -> None:
    found = shop.call("GET", f"{ACCOUNTS}/{shop.account_id}").json()
    assert (found["instagram_account_id"], found["username"], found["status"]) == (SHOP_ID, "your_shop", "active")
    assert found["subscription"] == {"ok": True, "error": None}
    assert found["token_checked_at"]
    assert shop.meta.accounts[SHOP_ID].subscribed


def test_a_duplicate_account_is_409(shop: Shop) -> None:
    assert error(shop.connect(), 409)["error"] == "account_exists"


@pytest.mark.parametrize("form", ["flat", "data"])
def test_the_app_scoped_id_is_replaced_by_the_routing_id(fresh_shop: Shop, form: str) -> None:
    fresh_shop.meta.me_form = form
    found = fresh_shop.connect(instagram_account_id=OTHER_SCOPED_ID, access_token=OTHER_TOKEN)
    assert (found.status_code, found.json()["instagram_account_id"]) == (201, OTHER_ID)
    mismatch = error(fresh_shop.connect(instagram_account_id="123", access_token=OTHER_TOKEN), 400)
    assert mismatch["error"] == "account_mismatch"
    assert OTHER_ID in mismatch["message"]
    assert OTHER_SCOPED_ID in mismatch["message"]


def test_an_invalid_token_is_400_with_details_and_nothing_is_stored(fresh_shop: Shop) -> None:
    refused = error(fresh_shop.connect(instagram_account_id=OTHER_ID, access_token="IGAAwrong"), 400)
    assert refused["error"] == "token_invalid"
    assert refused["details"][0]["field"] == "access_token"
    assert "190" in refused["details"][0]["problem"]
    fresh_shop.meta.fault("me", status=500, body="<html>")
    unavailable = fresh_shop.connect(instagram_account_id=OTHER_ID, access_token=OTHER_TOKEN)
    assert error(unavailable, 503)["error"] == "instagram_unavailable"
    assert unavailable.headers["Retry-After"]
    assert fresh_shop.rows("SELECT COUNT(*) FROM accounts") == [(1,)]


def test_a_failed_subscription_shows_and_does_not_undo_the_account(fresh_shop: Shop) -> None:
    fresh_shop.meta.fault("subscribed_apps", status=400, body=wire.error_body(200, "Permissions error"))
    found = fresh_shop.connect(instagram_account_id=OTHER_ID, access_token=OTHER_TOKEN)
    assert found.status_code == 201
    subscription = found.json()["subscription"]
    assert subscription["ok"] is False
    assert "200" in subscription["error"]


def test_an_update_changes_what_it_names(fresh_shop: Shop) -> None:
    path = f"{ACCOUNTS}/{fresh_shop.account_id}"
    assert fresh_shop.call("PUT", path, {}).status_code == 200
    assert fresh_shop.call("PUT", path, {"status": "inactive"}).json()["status"] == "inactive"
    assert error(fresh_shop.send("x", "inactive-1"), 409)["error"] == "account_inactive"
    assert fresh_shop.call("PUT", path, {"status": "active"}).json()["status"] == "active"
    assert error(fresh_shop.call("PUT", path, {"access_token": OTHER_TOKEN}), 400)["error"] == "account_mismatch"
    assert error(fresh_shop.call("PUT", path, {"status": "error"}), 400)["details"][0]["field"] == "status"
    assert error(fresh_shop.call("PUT", path, {"status": None, "access_token": None}), 400)["details"]
    assert error(fresh_shop.call("PUT", path, {"webhook_secret": None}), 400)
    fresh_shop.meta.customer_says(SHOP_ID, CUSTOMER, "one")
    fresh_shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "one")
    fresh_shop.crm.secrets["/webhook/new"] = "a-new-secret"
    changed = {"webhook_secret": "a-new-secret", "crm_webhook_url": fresh_shop.sandbox.crm_webhook_url + "/new"}
    fresh_shop.call("PUT", path, changed)
    fresh_shop.meta.customer_says(SHOP_ID, CUSTOMER, "two")
    received = fresh_shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "two")[0]
    assert (received.path, received.verified) == ("/webhook/new", True)
    assert fresh_shop.call("PUT", path, {"crm_webhook_url": None}).json()["crm_webhook_url"] is None


@pytest.mark.parametrize(
    "url",
    [
        "https://169.254.169.254/latest",
        "https://10.0.0.1/",
        "ftp://crm.example/",
        "https://u:p@crm.example/",
        "nonsense",
    ],
)
def test_a_crm_url_leads_only_where_it_may(shop: Shop, url: str) -> None:
    path = f"{ACCOUNTS}/{shop.account_id}"
    assert fields(shop.call("PUT", path, {"crm_webhook_url": url})) == {"crm_webhook_url"}


def test_a_deleted_account_is_gone_and_its_secrets_with_it(fresh_shop: Shop) -> None:
    fresh_shop.meta.fault("messages", times=1000, status=503, body="")
    message_id = fresh_shop.send("never", "deleted-1").json()["message_id"]
    path = f"{ACCOUNTS}/{fresh_shop.account_id}"
    assert fresh_shop.call("DELETE", path, key=fresh_shop.admin_key).status_code == 200
    assert error(fresh_shop.call("GET", path, key=fresh_shop.admin_key), 404)
    assert not fresh_shop.meta.accounts[SHOP_ID].subscribed
    path = f"/api/v1/messages/{message_id}/status"
    status = until(
        lambda: fresh_shop.call("GET", path, key=fresh_shop.admin_key).json(), lambda found: found["status"] == "failed"
    )
    assert status["error"]["code"] == "account_deleted"
    assert fresh_shop.rows("SELECT * FROM endpoints") == []  # with its secrets
    fresh_shop.meta.customer_says(SHOP_ID, CUSTOMER, "still there?")
    again = fresh_shop.connect()
    assert again.status_code == 201
    fresh_shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "still there?")


def test_accounts_are_listed_in_pages(shop: Shop) -> None:
    everyone = shop.call("GET", ACCOUNTS, key=shop.admin_key).json()
    assert (everyone["has_more"], everyone["next_cursor"]) == (False, None)
    page = shop.call("GET", f"{ACCOUNTS}?limit=1", key=shop.admin_key).json()
    assert len(page["accounts"]) == 1
    for query in (
        "limit=0",
        "limit=x",
        "limit=201",
        "limit=",
        "color=red",
        "limit=²",
        "limit=0001999",
        "limit=0000000009",
    ):
        error(shop.call("GET", f"{ACCOUNTS}?{query}"), 400)


# --- sends ---


def test_a_send_is_accepted_stored_and_delivered(shop: Shop) -> None:
    answer = shop.send("good day", "first", metadata={"ticket": 7})
    assert answer.status_code == 202
    assert answer.json()["status"] == "pending"
    message_id = answer.json()["message_id"]
    wanted = ("message.sent", "message.delivered")
    events = shop.crm.wait(
        2, where=lambda entry: entry.event.get("message_id") == message_id and entry.event["event"] in wanted
    )
    assert [entry.event["event"] for entry in events] == list(wanted)
    assert all(entry.verified and entry.event["metadata"] == {"ticket": 7} for entry in events)
    assert events[0].headers["X-Correlation-Id"] == answer.headers["X-Correlation-Id"]
    status = shop.status(message_id)
    assert [step["status"] for step in status["status_history"]] == ["pending", "sent", "delivered"]
    assert (status["attempt_count"], status["retry_count"], status["error"]) == (1, 0, None)
    assert (status["attempts"][0]["outcome"], status["attempts"][0]["http_status"]) == ("done", 200)


def test_32_concurrent_sends_with_one_key_are_one_message(shop: Shop) -> None:
    shop.call("GET", ACCOUNTS)
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: shop.send("only once", "the-key"), range(32)))
    assert {answer.status_code for answer in answers} == {202}
    (message_id,) = {answer.json()["message_id"] for answer in answers}
    shop.crm.wait(1, where=lambda entry: entry.event.get("message_id") == message_id)
    assert [entry.text for entry in shop.meta.sent].count("only once") == 1
    assert shop.send("only once", "the-key").json()["status"] in ("sent", "delivered")
    assert error(shop.send("something else", "the-key"), 409)["error"] == "idempotency_conflict"


def test_an_idempotency_key_is_the_accounts_own_and_as_it_is_written(fresh_shop: Shop) -> None:
    shop = fresh_shop
    other = shop.connect(instagram_account_id=OTHER_ID, access_token=OTHER_TOKEN).json()["account_id"]

    def send(account_id: str, key: str, **changes: Any) -> Any:
        body = {"account_id": account_id, "recipient_id": CUSTOMER, "message": "hi", "idempotency_key": key, **changes}
        return shop.call("POST", SEND, body, key=shop.admin_key)

    keys = ["Order-7", "order-7", "ORDER-7", "Order-7 ", "ordér-7", "orde\u0301r-7"]
    accounts = [shop.account_id, other]
    made = [send(account, key) for key in keys for account in accounts]
    assert [answer.status_code for answer in made] == [202] * 12
    ids = [answer.json()["message_id"] for answer in made]
    assert len(set(ids)) == 12
    again = [send(account, key).json()["message_id"] for key in keys for account in accounts]
    assert again == ids
    shop.meta.wait_sent(12)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipient_id": "900000000000002"},
        {"message": "Hi"},
        {"message": "hi "},
        {"metadata": {"ticket": 8}},
        {"metadata": {"ticket": "7"}},
        {"metadata": None},
        {"author": {"type": "human"}},
        {"send_before": "2099-01-01T00:00:00Z"},
        {"quick_replies": [{"title": "Yes", "payload": "YES"}]},
    ],
)
def test_the_same_idempotency_key_for_anything_else_is_409(shop: Shop, changes: dict[str, Any]) -> None:
    first = shop.send("hi", "for-one-request", metadata={"ticket": 7})
    assert first.status_code == 202
    body = {"account_id": shop.account_id, "recipient_id": CUSTOMER, "message": "hi", "metadata": {"ticket": 7}}
    other = {**body, "idempotency_key": "for-one-request", **changes}
    assert error(shop.call("POST", SEND, other), 409)["error"] == "idempotency_conflict"
    turned = dict(reversed(list(body.items())))  # the order of its fields is no part of a request
    again = shop.call("POST", SEND, {"idempotency_key": "for-one-request", **turned})
    assert (again.status_code, again.json()["message_id"]) == (202, first.json()["message_id"])


def test_a_text_over_1000_bytes_is_refused_with_its_byte_count(shop: Shop) -> None:
    refused = error(shop.send("ü" * 600, "too-long"), 400)
    assert (refused["error"], refused["details"][0]["field"]) == ("message_too_long", "message")
    assert "1200" in refused["message"]
    assert shop.send("ü" * 500, "too-long").status_code == 202  # the refusal used no key up


def test_all_problems_of_a_request_are_named_at_once(shop: Shop) -> None:
    wanted = {"account_id", "recipient_id", "message", "idempotency_key"}
    assert fields(shop.call("POST", SEND, {})) == wanted
    nulls = dict.fromkeys(wanted)
    assert fields(shop.call("POST", SEND, {**nulls, "colour": 1})) == wanted | {"colour"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("message", ""),
        ("message", "x" * 1001),
        ("message", 5),
        ("message", ["x"]),
        ("recipient_id", ""),
        ("recipient_id", "a b"),
        ("recipient_id", "1'; DROP TABLE accounts; --"),
        ("recipient_id", "\u0000"),
        ("recipient_id", "9" * 5000),
        ("recipient_id", 900000000000001),
        ("idempotency_key", ""),
        ("idempotency_key", "x" * 256),
        ("idempotency_key", "line\nbreak"),
        ("idempotency_key", "end\n"),
        ("metadata", "text"),
        ("metadata", []),
        ("account_id", {}),
    ],
)
def test_a_bad_field_is_named(shop: Shop, name: str, value: Any) -> None:
    assert fields(shop.send("x", "bad-field", **{name: value})) == {name}


@pytest.mark.parametrize(
    ("body", "content_type", "status", "slug"),
    [
        (b"", "application/json", 400, "malformed_json"),
        (b"{", "application/json", 400, "malformed_json"),
        (b"\xff\xfe{}", "application/json", 400, "malformed_json"),
        (b'{"message": "\\ud800"}', "application/json", 400, "malformed_json"),
        (b"[" * 100_000, "application/json", 400, "malformed_json"),
        (b"[]", "application/json", 400, "invalid_request"),
        (b"null", "application/json; charset=utf-8", 400, "invalid_request"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b" " * (256 * 1024 + 1), "application/json", 413, "body_too_large"),
        (b" " * (13 * 1024 * 1024), "application/json", 413, "body_too_large"),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    shop: Shop, body: bytes, content_type: str, status: int, slug: str
) -> None:
    headers = {"Content-Type": content_type, "Authorization": f"Bearer {shop.key}"}
    assert (
        error(requests.post(shop.url + SEND, data=body, headers=headers, timeout=PATIENCE_S), status)["error"] == slug
    )


def test_a_forgotten_body_is_called_empty(shop: Shop) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {shop.key}"}
    answer = requests.post(shop.url + SEND, data=b" \n", headers=headers, timeout=PATIENCE_S)
    assert error(answer, 400)["message"] == "The body is empty; send a JSON object."


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", SEND, 405),
        ("PATCH", ACCOUNTS, 405),
        ("FOO", SEND, 405),
        ("DELETE", "/health", 405),
        ("POST", "/docs", 405),
        ("GET", "/api/v1/nothing", 404),
        ("GET", "/api/v1/messages//status", 404),
        ("GET", "/api/v1/%ff", 404),
        ("GET", "/docs/../x", 404),
        ("GET", "/docs/swagger-ui.js", 404),
        ("OPTIONS", ACCOUNTS, 405),
    ],
)
def test_paths_and_methods_that_do_not_exist(shop: Shop, method: str, path: str, status: int) -> None:
    error(shop.call(method, path), status)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_metadata_is_json_and_json_has_no_infinity(shop: Shop, number: str) -> None:
    body = json.dumps(
        {"account_id": shop.account_id, "recipient_id": CUSTOMER, "message": "x", "idempotency_key": number}
    )
    headers = {"Authorization": f"Bearer {shop.key}", "Content-Type": "application/json"}
    odd = body[:-1] + ', "metadata": {"a": [' + number + "]}}"
    assert fields(requests.post(shop.url + SEND, data=odd, headers=headers, timeout=PATIENCE_S)) == {"metadata"}


def test_bytes_that_are_no_text_are_no_fault_of_ours(shop: Shop) -> None:
    for path in ("/health?%ff", "/webhooks/instagram?hub.mode=%ff", f"{ACCOUNTS}?cursor=%ff", "/health?a=%zz"):
        error(shop.call("GET", path), 400)
    odd = b"\xff".decode("latin-1")
    error(requests.get(shop.url + ACCOUNTS, headers={"Authorization": b"Bearer \xff"}, timeout=PATIENCE_S), 401)
    headers: dict[str, str | bytes | None] = {
        "Authorization": f"Bearer {shop.key}",
        "Content-Type": f"application/json{odd}".encode("latin-1"),
    }
    error(requests.post(shop.url + SEND, data=b"{}", headers=headers, timeout=PATIENCE_S), 415)
    forged: dict[str, str | bytes | None] = {"X-Hub-Signature-256": b"\xff"}
    error(requests.post(shop.url + "/webhooks/instagram", data=b"{}", headers=forged, timeout=PATIENCE_S), 401)


@pytest.mark.parametrize("odd", ["%00", "msg_%F0%9F%92%A1", "..%2f..%2fetc", "'%20OR%201=1", "x" * 4000])
def test_odd_ids_are_not_found(shop: Shop, odd: str) -> None:
    error(shop.call("GET", f"/api/v1/messages/{odd}/status"), 404)


@pytest.mark.parametrize(
    "request_text",
    [
        b"rubbish\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
        b"POST /webhooks/instagram HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_what_is_no_http_is_answered_in_json_too(shop: Shop, request_text: bytes) -> None:
    where = urlsplit(shop.url)
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE_S) as connection:
        connection.sendall(request_text)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.0 4", b"HTTP/1.1 4"))
    assert b"Content-Type: application/json\r\n" in head + b"\r\n"
    spec.hold_answer("", "", int(head.split()[1]), "application/json", body)


def test_a_request_id_is_kept_through_to_the_crm(shop: Shop) -> None:
    body = json.dumps(
        wire.envelope(
            SHOP_ID,
            1,
            {
                "sender": {"id": CUSTOMER},
                "recipient": {"id": SHOP_ID},
                "message": {"mid": "mid-trace", "text": "trace me"},
            },
        )
    ).encode()
    posted = shop.meta.post(body, headers={"X-Request-Id": "trace-42"})
    assert posted.status == 200
    (received,) = shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "trace me")
    assert received.headers["X-Correlation-Id"] == "trace-42"
    for name in (r"delivery\.attempted", "request"):
        shop.wait_log(rf" {name} .*correlation=trace-42")
    lines = [line for line in shop.log().splitlines() if "correlation=trace-42" in line]
    assert {line.split()[2] for line in lines} >= {"event.kept", "request", "delivery.attempted"}
    assert "trace me" not in shop.log()
    odd = shop.call("GET", "/health/live", headers={"X-Request-Id": "with space"})
    assert odd.headers["X-Correlation-Id"].startswith("req_")


def test_health_needs_no_key(shop: Shop) -> None:
    found = requests.get(shop.url + "/health", timeout=PATIENCE_S)
    assert (found.status_code, found.json()["status"]) == (200, "healthy")
    assert requests.get(shop.url + "/health/live", timeout=PATIENCE_S).json()["status"] == "alive"
    assert requests.head(shop.url + "/health", timeout=PATIENCE_S).status_code == 200


def test_start_logs_configuration_and_health(shop: Shop) -> None:
    log = shop.log()
    assert " config web.host=127.0.0.1" in log
    assert "instagram.app_secrets=(set)" in log
    assert " health schema=ok" in log


@pytest.mark.parametrize("signature", ["bad", "missing", "sha1_only"])
def test_a_webhook_without_a_right_signature_is_401(shop: Shop, signature: Any) -> None:
    posted = shop.meta.post({"object": "instagram", "entry": []}, signature=signature)
    assert posted.status == 401
    assert "webhook.refused" in shop.log()


def test_the_handshake_is_answered_as_plain_text(shop: Shop) -> None:
    assert shop.meta.verify_handshake(challenge="1158201444").body == "1158201444"
    assert shop.meta.verify_handshake(verify_token="wrong").status == 403
    error(requests.get(shop.url + "/webhooks/instagram", timeout=PATIENCE_S), 400)


def test_a_thousand_updates_in_one_post_and_a_body_over_the_limit(shop: Shop) -> None:
    items = [
        {
            "sender": {"id": f"77{number}"},
            "recipient": {"id": SHOP_ID},
            "timestamp": 1_770_000_000_000 + number,
            "message": {"mid": f"batch-{number}", "text": "💡" * 1000},
        }
        for number in range(300)
    ]
    body = wire.webhook_body(wire.envelope(SHOP_ID, 1, *items))
    assert 3_000_000 < len(body) < 8 * 1024 * 1024
    assert shop.meta.post(body).status == 200
    shop.crm.wait(
        300, timeout_s=BULK_S, where=lambda entry: str(entry.event.get("instagram_message_id")).startswith("batch-")
    )
    assert shop.meta.post(b" " * (8 * 1024 * 1024 + 1)).status == 413


def test_requests_beyond_what_can_be_answered_get_503_not_a_growing_queue(shop: Shop) -> None:
    begin = threading.Barrier(200)

    def ask(_: int) -> int:
        begin.wait()
        return int(requests.get(shop.url + "/health/live", timeout=PATIENCE_S).status_code)

    with ThreadPoolExecutor(200) as pool:
        assert set(pool.map(ask, range(200))) <= {200, 503}
    assert requests.get(shop.url + "/health", timeout=PATIENCE_S).status_code == 200
