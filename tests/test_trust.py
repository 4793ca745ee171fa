"""`[crm] ca_file`: a shop's own CA is trusted for calls to CRMs, beside the public ones and by nothing else."""

import json
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from crmbridge import crm, net
from crmbridge.sandbox import Sandbox
from tests import shop as shops
from tests.far import OK, OK_ONCE, Far
from tests.shop import SHOP_ID, Shop
from tests.test_cli import made, run
from tests.test_reach import LOOPBACK
from tests.tls import Authority

__all__ = ["made"]  # a fixture
UNTRUSTED = "tls_failed: TLS failed: [SSL: CERTIFICATE_VERIFY_FAILED]"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def called(far: Far, ca_file: Path | None, host: str = "127.0.0.1") -> str:
    """Call a CRM; return "reached" or why it was not."""
    session = crm.open_session(replace(LOOPBACK, ca_file=ca_file), connections=1)
    try:
        session.call("POST", f"https://{host}:{far.port}/hook", headers={}, body=b"{}")
    except net.CallFailed as failure:
        return f"{failure.code}: {failure.message}"
    return "reached"


def test_a_crm_with_a_certificate_of_the_shops_own_ca_is_reached(authority: Authority) -> None:
    with Far(lambda _: [OK], tls=authority.server("127.0.0.1", "localhost")) as far:
        assert UNTRUSTED in called(far, None)
        assert far.requests == []
        assert called(far, authority.ca_file) == "reached"
        assert called(far, authority.ca_file, "localhost") == "reached"


def test_so_is_one_at_an_ipv6_address(authority: Authority) -> None:
    with Far(lambda _: [OK], host="::1", tls=authority.server("::1")) as far:
        assert UNTRUSTED in called(far, None, "[::1]")
        assert called(far, authority.ca_file, "[::1]") == "reached"


def test_the_name_and_the_dates_must_be_right_all_the_same(authority: Authority, tmp_path: Path) -> None:
    with Far(lambda _: [OK], tls=authority.server("127.0.0.2", "elsewhere.example")) as far:
        assert UNTRUSTED in called(far, authority.ca_file)
        assert UNTRUSTED in called(far, authority.ca_file, "localhost")
    with Far(lambda _: [OK], tls=authority.server("127.0.0.1", days=-1)) as far:
        assert "expired" in called(far, authority.ca_file)
    with Far(lambda _: [OK], tls=Authority(tmp_path, "other").server("127.0.0.1")) as far:
        assert UNTRUSTED in called(far, authority.ca_file)


def test_the_file_may_name_several_an_intermediate_one_or_the_servers_own(authority: Authority, tmp_path: Path) -> None:
    below = Authority(tmp_path, "below", authority)
    tls = below.server("127.0.0.1")
    several, own = tmp_path / "several.pem", tmp_path / "own.pem"
    text = "# Müllers CA\n" + Authority(tmp_path, "other").ca_file.read_text() + authority.ca_file.read_text()
    several.write_text(text, encoding="utf-8")
    own.write_bytes(below.shown.public_bytes(serialization.Encoding.PEM))
    with Far(lambda _: [OK], tls=tls) as far:
        for ca_file in (authority.ca_file, several, below.ca_file, own):
            assert called(far, ca_file) == "reached"


def test_the_public_cas_stay_trusted(authority: Authority) -> None:
    with_own, without = (net.trust(path).cert_store_stats()["x509_ca"] for path in (authority.ca_file, None))
    assert with_own == without + 1 > 100


def test_cas_are_not_read_again_for_each_connection(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    with Far(lambda _: [OK_ONCE], tls=authority.server("127.0.0.1")) as far:
        session = crm.open_session(replace(LOOPBACK, ca_file=authority.ca_file), connections=1)
        read: list[object] = []
        monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *words, **_: read.append(words))
        monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda *words, **_: read.append(words))
        for _ in range(3):
            session.call("POST", far.url, headers={}, body=b"{}")
        assert {one.connection for one in far.requests} == {0, 1, 2}
        assert read == []


# --- as a program ---


@pytest.fixture
def secured(tmp_path: Path, authority: Authority) -> Iterator[tuple[Shop, Far]]:
    """A shop whose configuration names the CA, with a relative path, and a CRM, an Instagram and an alert URL of it."""
    with Sandbox() as sandbox, Far(lambda _: [OK], tls=authority.server("127.0.0.1")) as far:
        shop = Shop(tmp_path, sandbox, shops.QUICK)
        shop.bridge.environ |= {"CRMBRIDGE_CRM_CA_FILE": "ca.pem", "CRMBRIDGE_ALERTS_URL": far.url}
        try:
            shop.start()
            yield shop, far
        finally:
            shop.close()


def test_events_arrive_over_tls_and_only_crms_are_trusted_for_it(secured: tuple[Shop, Far]) -> None:
    shop, far = secured
    shop.open()
    answer = shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"crm_webhook_url": far.url})
    assert answer.status_code == 200
    shop.meta.customer_says(SHOP_ID, "706", "sealed")
    assert far.wait(1)[0].event["message"] == "sealed"
    ini = str(shop.bridge.folder / "crmbridge.ini")
    environ = {name: value for name, value in shop.bridge.environ.items() if name.startswith("CRMBRIDGE_")}
    told = run(shop.bridge.folder, "alert", "test", "--config", ini, **environ)
    assert told.returncode == 1
    assert "certificate verify failed" in told.stdout + told.stderr
    asked = run(shop.bridge.folder, "doctor", "--json", "--config", ini, **environ)
    assert f"the CRM at https://127.0.0.1:{far.port} took a signed test event" in asked.stdout
    assert [request.event.get("event") for request in far.requests] == ["message.received", "webhook.test"]
    environ["CRMBRIDGE_CRM_CA_FILE"] = ""
    without = run(shop.bridge.folder, "doctor", "--json", "--config", ini, **environ)
    assert "crm_tls_failed" in without.stdout
    assert "ca_file" in without.stdout
    environ["CRMBRIDGE_INSTAGRAM_GRAPH_URL"] = far.url
    environ["CRMBRIDGE_CRM_CA_FILE"] = "ca.pem"
    elsewhere = run(shop.bridge.folder, "doctor", "--json", "--config", ini, **environ)
    assert "instagram_unreached" in elsewhere.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.pem", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("empty.pem", "holds no certificate in PEM form"),
        ("text.pem", "holds no certificate in PEM form"),
        ("key.pem", "holds no certificate in PEM form"),
        ("der.pem", "holds no certificate in PEM form"),
        ("cut.pem", "holds no certificate in PEM form"),
        ("half.pem", "holds no certificate in PEM form"),
    ],
)
def test_a_file_that_is_no_use_stops_the_start_and_check_says_so(
    made: Path, authority: Authority, name: str, said: str
) -> None:
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (made / "empty.pem").touch()
    (made / "text.pem").write_text("the CA is at the door\n")
    (made / "key.pem").write_bytes(authority.key.private_bytes(pem, kind, serialization.NoEncryption()))
    (made / "der.pem").write_bytes(authority.certificate.public_bytes(serialization.Encoding.DER))
    (made / "cut.pem").write_bytes(authority.ca_file.read_bytes()[:300])
    (made / "half.pem").write_bytes(authority.ca_file.read_bytes() + b"-----BEGIN CERTIFICATE-----\nMII\n")
    place = (made / name).resolve()
    sentence = f"[crm] ca_file: {place} {said}"
    environ = {"CRMBRIDGE_CRM_CA_FILE": name, "CRMBRIDGE_WEB_PORT": "0"}
    started = run(made, "serve", **environ)
    assert (started.returncode, sentence in started.stderr) == (1, True), started.stderr
    checked = run(made, "check", **environ)
    assert checked.returncode == 1
    assert f"error: {sentence}" in checked.stdout.splitlines()
    assert checked.stdout.splitlines()[-1] == "not fit to run"
    assert run(made, "key", "list", **environ).returncode == 0  # what calls no CRM goes on


def test_doctor_tells_of_it_and_looks_at_the_rest_all_the_same(made: Path) -> None:
    asked = run(made, "doctor", "--json", CRMBRIDGE_CRM_CA_FILE="absent.pem")
    found = {one["slug"]: one for one in json.loads(asked.stdout)["findings"]}
    assert (found["ca_file"]["level"], found["ca_file"]["why"]) == ("error", "the service does not start")
    assert "key_file" in found


def test_check_shows_a_good_one(made: Path, authority: Authority) -> None:
    checked = run(made, "check", CRMBRIDGE_CRM_CA_FILE="ca.pem")
    assert checked.returncode == 0
    assert f"  crm.ca_file = {made / 'ca.pem'}" in checked.stdout.splitlines()
    assert f"ok: [crm] ca_file {made / 'ca.pem'}: 1 certificate(s)" in checked.stdout.splitlines()
    assert "  crm.ca_file = " in run(made, "check", "--verbose").stdout.splitlines()
