"""The secrets of the configuration: an empty one opens nothing, each of several counts, and a weak one is told of."""

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from crmbridge import signing
from crmbridge.errors import Misconfigured
from crmbridge.sandbox import Sandbox, wire
from tests.shop import CUSTOMER, SHOP_ID, SHOP_SCOPED_ID, Shop
from tests.test_cli import made, run
from tests.typed import typed

__all__ = ["made"]  # a fixture

FIRST, SECOND, THIRD = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210", "another-app's-secret"
INI = "app_secrets = sandbox-app-secret\n"
VARIABLE = "CRMBRIDGE_INSTAGRAM_APP_SECRETS"
# What the ini or the environment ($) says, and the secrets that it holds.
FORMS = [
    pytest.param(f"{FIRST},", [FIRST], id="comma at the end"),
    pytest.param(f",{FIRST}", [FIRST], id="comma at the begin"),
    pytest.param(f"$,{FIRST} , ,{SECOND},,", [FIRST, SECOND], id="commas everywhere, environment"),
    pytest.param(f"{FIRST}\t,\t{SECOND} {THIRD}", [FIRST, SECOND, THIRD], id="tabs, commas and blanks"),
    pytest.param(f"\n  {FIRST},\n  # the old one\n  {SECOND}", [FIRST, SECOND], id="continued lines"),
    pytest.param(f"$\n{FIRST}\n\n{SECOND}\n", [FIRST, SECOND], id="lines, environment"),
    pytest.param(", ,", [], id="commas alone"),
    pytest.param("$", [], id="empty, environment"),
    pytest.param("$,", [], id="a comma between two unset variables, environment"),
    pytest.param("$ \t\n", [], id="blanks, environment"),
]


def write(shop: Shop, text: str) -> None:
    """Put what app_secrets is to be into the ini, or into the environment."""
    if text.startswith("$"):
        shop.bridge.environ[VARIABLE] = text[1:]
        return
    ini = shop.bridge.folder / "crmbridge.ini"
    assert INI in ini.read_text()
    ini.write_text(ini.read_text().replace(INI, f"app_secrets = {text}\n"))


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Shop]:
    """Yield a shop that is not started yet."""
    with Sandbox() as sandbox:
        shop = Shop(tmp_path, sandbox)
        try:
            yield shop
        finally:
            shop.close()


def hook(shop: Shop, secret: bytes, mid: str) -> int:
    """Post a customer's message, signed with a secret; return the status."""
    item = {
        "sender": {"id": CUSTOMER}, "recipient": {"id": SHOP_ID}, "timestamp": 1_800_000_000_000,
        "message": {"mid": mid, "text": "hello"},
    }  # fmt: skip
    body = wire.webhook_body(wire.envelope(SHOP_ID, 1_800_000_000_000, item))
    signature = hmac.new(secret, body, hashlib.sha256).hexdigest()
    headers = {"Content-Type": "application/json", "X-Hub-Signature-256": f"sha256={signature}"}
    return requests.post(f"{shop.url}/webhooks/instagram", data=body, headers=headers, timeout=10).status_code


def ask(shop: Shop, what: str, secret: bytes) -> int:
    """Ask for a deletion as Meta does for an owner, signed with a secret; return the status."""
    told = json.dumps({"algorithm": "HMAC-SHA256", "user_id": SHOP_SCOPED_ID}).encode()
    payload = base64.urlsafe_b64encode(told).decode().rstrip("=")
    signature = hmac.new(secret, payload.encode(), hashlib.sha256).digest()
    signed = base64.urlsafe_b64encode(signature).decode().rstrip("=") + f".{payload}"
    form = {"signed_request": signed}
    return requests.post(f"{shop.url}/privacy/{what}", data=form, timeout=10).status_code


@pytest.mark.parametrize(("text", "secrets"), FORMS)
def test_however_the_list_is_written_each_secret_in_it_counts_and_an_empty_one_never(
    closed: Shop, text: str, secrets: list[str]
) -> None:
    write(closed, text)
    closed.start()
    closed.open()
    assert requests.get(f"{closed.url}/docs", timeout=10).status_code == 200
    for forged in (b"", b"\0", b"\0" * 32, b",", b"None", b"guess"):
        assert hook(closed, forged, "forged") == 401
        for what in ("deauthorize", "deletion"):
            assert ask(closed, what, forged) == 401
    for secret in secrets:
        assert hook(closed, secret.encode(), f"mid-{secret}") == 200
    assert closed.call("GET", f"/api/v1/accounts/{closed.account_id}").json()["status"] == "active"
    closed.crm.wait(len(secrets), where=lambda entry: entry.event["event"] == "message.received")
    assert len(closed.crm.received) == len(secrets)
    for secret in secrets:
        assert ask(closed, "deauthorize", secret.encode()) == 200
    if secrets:
        assert closed.call("GET", f"/api/v1/accounts/{closed.account_id}").json()["status"] == "error"
        assert ask(closed, "deletion", secrets[0].encode()) == 200
        assert closed.call("GET", f"/api/v1/accounts/{closed.account_id}", key=closed.admin_key).status_code == 404


def test_a_signature_is_over_the_bytes_as_they_are(closed: Shop) -> None:
    closed.start()
    for body in (b"{}\n", b" {}", b"{}\r\n\r\n"):
        for signed, status in ((body, 200), (body.strip(), 401)):
            signature = hmac.new(b"sandbox-app-secret", signed, hashlib.sha256).hexdigest()
            headers = {"Content-Type": "application/json", "X-Hub-Signature-256": f"sha256={signature}"}
            url = f"{closed.url}/webhooks/instagram"
            assert requests.post(url, data=body, headers=headers, timeout=10).status_code == status


def looked(folder: Path, **environ: str) -> tuple[str, dict[str, Any], str]:
    """Return what `check` printed, what `doctor` found by slug, and what it printed."""
    status, checked = typed(folder, "check", **environ)
    assert status == 0, checked
    found = json.loads(typed(folder, "doctor", "--no-calls", "--json", **environ)[1])["findings"]
    _, told = typed(folder, "doctor", "--no-calls", **environ)
    return checked, {one["slug"]: one for one in found}, told


@pytest.mark.parametrize("text", ["", "\t,\n"])
def test_without_an_app_secret_check_and_doctor_call_it_broken_and_it_starts(made: Path, text: str) -> None:
    checked, found, told = looked(made, **{VARIABLE: text})
    said = "[instagram] app_secrets is empty: every webhook from Meta will be refused"
    assert f"error: {said}" in checked.splitlines()
    assert checked.splitlines()[-1] == f"it starts, but is broken: {said}"
    assert (found["app_secrets_empty"]["level"], found["app_secrets_empty"]["what"]) == ("error", said)
    assert f"BROKEN  {said}" in " ".join(told.split("\n"))


@pytest.mark.parametrize(
    "text", [f"{FIRST};{FIRST}", f"'{FIRST}'", f"{FIRST}|{FIRST}", f"{FIRST}、{FIRST}", FIRST + "\u200b"]
)
def test_a_secret_that_can_be_none_of_metas_is_a_warning(made: Path, text: str) -> None:
    checked, found, _ = looked(made, **{VARIABLE: text})
    assert "warning: [instagram] app_secrets holds quotes or unseen characters" in checked
    assert found["app_secret_odd"]["level"] == "warning"
    assert FIRST not in checked + json.dumps(found, ensure_ascii=False)


@pytest.mark.parametrize(("secret", "is_short"), [("12345678", True), ("é" * 15, True), ("0" * 16, False)])
def test_a_secret_that_can_be_guessed_is_a_warning(made: Path, secret: str, is_short: bool) -> None:
    checked, found, _ = looked(made, **{VARIABLE: f"{FIRST},{secret}"})
    assert ("warning: 1 of [instagram] app_secrets has fewer than 16 characters" in checked) == is_short
    assert ("app_secret_short" in found) == is_short
    assert not is_short or found["app_secret_short"]["level"] == "warning"
    assert "app_secrets_empty" not in found
    assert secret not in checked + json.dumps(found, ensure_ascii=False)


@pytest.mark.parametrize(
    ("place", "text", "said"),
    [
        pytest.param("ini", "1234567", "number 1 of 1 is shorter than 8 characters", id="seven"),
        pytest.param(
            "environment", f"{FIRST} s3cr3t", "number 2 of 2 is shorter than 8 characters", id="the second one"
        ),
        pytest.param("ini", f"{FIRST} # ours", "a comment needs a line of its own", id="a comment behind it"),
        pytest.param(
            "environment", f"{FIRST} ;our-old-secret", "a comment needs a line of its own", id="another comment"
        ),
        pytest.param("ini", '""', "number 1 of 1 is shorter than 8 characters", id="quotes"),
    ],
)
def test_what_is_no_secret_stops_the_start_and_is_not_shown(made: Path, place: str, text: str, said: str) -> None:
    environ = {}
    if place == "ini":
        ini = made / "crmbridge.ini"
        ini.write_text(ini.read_text().replace("app_secrets =\n", f"app_secrets = {text}\n"))
        named = f"{ini.name} [instagram] app_secrets"
    else:
        environ, named = {VARIABLE: text}, f"environment variable {VARIABLE}"
    done = run(made, "serve", **environ)
    assert (done.returncode, done.stderr) == (1, f"crmbridge: {named}: bad value: {said}\n")
    status, told = typed(made, "check", **environ)
    assert (status, told.endswith(f"{named}: bad value: {said}\n")) == (1, True)
    status, told = typed(made, "doctor", "--no-calls", **environ)
    assert (status, said in " ".join(told.split())) == (2, True)
    for word in text.split():
        assert len(word) < 3 or word not in told


@pytest.mark.parametrize("name", ["INSTAGRAM_APP_SECRETS", "INSTAGRAM_VERIFY_TOKEN", "ALERTS_URL"])
def test_a_secret_that_is_no_text_stops_the_start(made: Path, name: str) -> None:
    given = {f"CRMBRIDGE_{name}": b"https://a/secret-\xff-secret".decode(errors="surrogateescape")}
    said = f"crmbridge: environment variable CRMBRIDGE_{name}: bad value: is not UTF-8 text\n"
    assert typed(made, "check", **given) == (1, said)


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("DELIVERY_CRM_QUICK_S", ",1,,2 ,3,", "delivery.crm_quick_s = 1 2 3"),
        ("DELIVERY_PROBE_S", "\t5\n10,", "delivery.probe_s = 5 10"),
        ("CRM_ALLOW_NETWORKS", ",10.0.0.0/8,, 192.168.0.0/16 ,", "crm.allow_networks = 10.0.0.0/8 192.168.0.0/16"),
        ("CRM_ALLOW_NETWORKS", " , ", "crm.allow_networks = "),
    ],
)
def test_every_other_list_is_split_in_the_same_way(made: Path, variable: str, value: str, shown: str) -> None:
    status, said = typed(made, "check", "--verbose", **{f"CRMBRIDGE_{variable}": value})
    assert status == 0, said
    assert f"  {shown}" in said.splitlines()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DELIVERY_CRM_QUICK_S", ",", "must be one or more delays"),
        ("VAULT_KEY_FILE", "", "must name a file"),
        ("STORE_PATH", " ", "must name a file"),
        ("STORE_QUEUE_PATH", "", "must name a file"),
        ("WEB_HOST", "", "must be an address or a name"),
    ],
)
def test_an_empty_value_is_none(made: Path, variable: str, value: str, said: str) -> None:
    status, told = typed(made, "check", **{f"CRMBRIDGE_{variable}": value})
    assert status == 1
    assert re.fullmatch(rf"crmbridge: environment variable CRMBRIDGE_{variable}: bad value.*: {said}.*\n", told)


@pytest.mark.parametrize("secret", ["", "\0" * 8])
def test_an_empty_key_signs_nothing_and_matches_nothing(secret: str) -> None:
    for sign in (
        lambda: signing.hub_signature(secret, b"{}"),
        lambda: signing.standard_signature([secret.encode()], "evt_1", 1, b"{}"),
    ):
        with pytest.raises(Misconfigured):
            sign()
    forged = "sha256=" + hmac.new(b"", b"{}", hashlib.sha256).hexdigest()
    assert not signing.hub_signature_matches([secret], forged, b"{}")
    assert not signing.hub_signature_matches([], forged, b"{}")
    assert signing.standard_key("whsec_" + base64.b64encode(b"\0" * 24).decode()) is None


def test_a_key_file_that_others_may_read_stops_the_start(made: Path) -> None:
    key_file = made / "var" / "crmbridge.key"
    for mode in (0o640, 0o604, 0o620, 0o602, 0o610):
        key_file.chmod(mode)
        status, said = typed(made, "check")
        assert (status, f"error: the key file {key_file} is open to other users" in said) == (1, True), oct(mode)
    done = run(made, "serve")
    assert (done.returncode, "is open to other users" in done.stderr) == (1, True)
    key_file.chmod(0o400)
    assert typed(made, "check")[0] == 0


def test_secrets_are_sealed_with_the_first_key(closed: Shop) -> None:
    key_file = closed.bridge.folder / "var" / "crmbridge.key"
    old = key_file.read_text()
    key_file.unlink()
    closed.bridge.command("init")
    new = key_file.read_text()
    key_file.write_text(new + old)
    closed.start()
    closed.open()
    closed.bridge.stop()
    key_file.write_text(new)  # the old one is not needed for what was sealed since
    closed.start()
    assert closed.call("PUT", f"/api/v1/accounts/{closed.account_id}", {"status": "active"}).status_code == 200
    closed.meta.customer_says(SHOP_ID, CUSTOMER, "hello")
    assert closed.crm.wait(1)[0].verified
