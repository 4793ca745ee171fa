"""``crmbridge support-bundle``: what is planted everywhere, secrets, texts, names and ids, is nowhere in it."""

import json
import stat
import tarfile
from pathlib import Path

import pytest

from crmbridge.ops import support
from crmbridge.sandbox import wire
from tests.shop import CUSTOMER, SHOP_ID, SHOP_SCOPED_ID, TOKEN, Shop
from tests.test_cli import run

OTHER_CUSTOMER = "900000000000077"
# Every one of these is planted below; none may be found.
PLANTED = {
    "text": "planted-question-text",
    "reply": "planted-answer-text",
    "name": "Plantina Muster",
    "username": "plantina.muster",
    "shop": "planted_shop_name",
    "metadata": "planted-metadata",
    "idempotency": "planted-key-of-the-crm",
    "correlation": "planted-correlation",
    "app_secret": "planted0app0secret",
    "verify_token": "planted-verify-token",
    "comment": "planted-ini-comment",
    "alert_user": "planteduser",
    "alert_password": "plantedpassword",
    "alert_query": "planted-alert-query",
    "alert_path": "planted-alert-path",
    "command": "planted-command-token",
    "mail": "plantina@example.com",
    "public_user": "plantedpublic",
    "graph_query": "planted-graph-query",
    "crm_path": "planted-crm-path",
    "crm_query": "planted-crm-query",
    "crm_user": "plantedcrmuser",
    "crm_answer": "planted-crm-answer",
    "webhook_secret": "planted-webhook-secret",
    "token": TOKEN,
    "reason": "planted pause reason",
    "request_path": "planted-request-path",
    "traceback": "planted-traceback-words",
    "customer": CUSTOMER,
    "other_customer": OTHER_CUSTOMER,
    "account": SHOP_ID,
    "scoped": SHOP_SCOPED_ID,
    "api_key": "",
}


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as bundle:
        assert {member.mode for member in bundle} == {0o600}
        files = {member.name.removeprefix("crmbridge-support/"): bundle.extractfile(member) for member in bundle}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


@pytest.fixture
def planted(fresh_shop: Shop) -> Shop:
    shop, plant = fresh_shop, PLANTED
    shop.meta.add_account(SHOP_ID, token=TOKEN, app_scoped_id=SHOP_SCOPED_ID, username=plant["shop"])
    shop.meta.add_customer(CUSTOMER, username=plant["username"], name=plant["name"])
    put = f"/api/v1/accounts/{shop.account_id}"
    url = f"{shop.sandbox.crm_webhook_url}/{plant['crm_path']}?key={plant['crm_query']}"
    changes = {"access_token": TOKEN, "crm_webhook_url": url, "webhook_secret": plant["webhook_secret"]}
    assert shop.call("PUT", put, changes, key=shop.admin_key).status_code == 200
    shop.crm.secret = plant["webhook_secret"]
    shop.crm.answer(500, times=2, body=plant["crm_answer"], headers={"X-Planted": plant["crm_answer"]})
    shop.meta.customer_says(SHOP_ID, CUSTOMER, plant["text"])
    stranger = wire.envelope("17841499999999999", 1, {
        "sender": {"id": OTHER_CUSTOMER}, "recipient": {"id": "17841499999999999"}, "timestamp": 1,
        "message": {"mid": "m", "text": plant["text"]},
    })  # fmt: skip
    assert shop.meta.post(stranger).status == 200
    sent = shop.send(plant["reply"], plant["idempotency"], metadata={"x": plant["metadata"]})
    assert sent.status_code == 202
    shop.call("GET", f"/api/v1/messages/{plant['request_path']}", headers={"X-Request-Id": plant["correlation"]})
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)])
    reason = f"{plant['reason']} {plant['mail']}"
    shop.bridge.command("account", "pause", shop.account_id, "--deliveries", "--reason", reason)
    shop.change(
        f"UPDATE endpoints SET url = 'https://{plant['crm_user']}:x@crm.invalid/{plant['crm_path']}' WHERE kind = 'crm'"
    )
    shop.change(f"UPDATE contacts SET name = '{plant['name']}', username = '{plant['username']}'")
    alert = f"'crm_down', '{shop.account_id}', '2027-01-15T08:00:00.000Z', '', 1, '{reason} of {CUSTOMER}'"
    shop.change(f"INSERT INTO alerts VALUES ({alert}, 1, '', 1, 0, NULL)")
    ini = shop.database.parent.parent / "crmbridge.ini"
    public = f"public_url = https://{plant['public_user']}:x@bridge.invalid/"
    text = ini.read_text().replace("port = 0", f"port = 9\n{public}")
    text = text.replace("app_secrets = sandbox-app-secret", f"app_secrets = {plant['app_secret']}")
    text = text.replace(
        "verify_token = sandbox-verify-token", f"# {plant['comment']}\nverify_token = {plant['verify_token']}"
    )
    text = text.replace("/v27.0", f"/v27.0?access_token={plant['graph_query']}")
    text += (
        f"\n[alerts]\nurl = https://{plant['alert_user']}:{plant['alert_password']}@hooks.invalid/{plant['alert_path']}"
        f"?t={plant['alert_query']}\ncommand = curl -H 'Authorization: {plant['command']}' {plant['mail']}\n"
    )
    assert all(plant[name] in text for name in ("app_secret", "verify_token", "comment", "graph_query", "public_user"))
    ini.write_text(text)
    with shop.bridge.log_path.open("a") as log:
        now = "2027-01-15T08:00:00.412Z"
        log.write(f'{now} info config alerts.command="curl {plant["command"]}" web.{public.replace(" = ", "=")}\n')
        log.write(f'{now} warning backfill.incomplete contact={CUSTOMER} name="{plant["name"]}" ')
        log.write(f"code={plant['alert_path']}\n")
        log.write(f"{now} warning thing contact={CUSTOMER} url=https://a/{plant['crm_path']} text={plant['text']}\n")
        log.write('Traceback (most recent call last):\n  File "/x.py", line 3, in call\n')
        log.write(f"KeyError: {plant['traceback']!r}\n")
        log.write(f"{plant['api_key'] or shop.admin_key} {shop.key}\n")
    return shop


def test_nothing_of_what_is_planted_everywhere_is_in_the_bundle(planted: Shop, tmp_path: Path) -> None:
    folder, target = planted.database.parent.parent, tmp_path / "bundle.tar.gz"
    words = ["support-bundle", str(target), "--log", str(planted.bridge.log_path)]
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    files = unpacked(target)
    assert set(files) == {
        "README.txt", "doctor.json", "doctor.txt", "versions.txt", "log.txt", "configuration.json", "check.txt",
        "machine.txt", "alerts.json", "calls.json", "schema.json", "tables.json",
    }  # fmt: skip
    for name, text in files.items():
        assert "could not be made" not in text, (name, text)
        for what, word in {**PLANTED, "api_key": planted.admin_key, "key": planted.key}.items():
            assert word.lower() not in text.lower(), (name, what)
        for number in ("17841499999999999",):
            assert number not in text, name
    # And yet it tells what happened.
    assert json.loads(files["tables.json"])["deliveries"] >= 3
    outcomes = [(one["target"], one["http"], one["outcome"]) for one in json.loads(files["calls.json"])]
    assert ("crm", 500, "retry") in outcomes
    assert json.loads(files["configuration.json"])["alerts.command"] == "(set)"
    assert json.loads(files["configuration.json"])["web.public_url"] == "https://bridge.invalid"
    assert "delivery.attempted delivery=dlv_" in files["log.txt"]
    assert "outcome=retry code=crm_error http=500" in files["log.txt"]
    assert '  File "/x.py", line 3, in call' in files["log.txt"]
    assert "crm_unasked" in files["doctor.json"]
    hashed = [line for line in files["log.txt"].splitlines() if line.startswith("2027-01-15T08:00:00.412Z warning")]
    customer = next(word for word in hashed[0].split() if word.startswith("contact=id-"))
    assert customer in hashed[1]
    again = tmp_path / "again.tar.gz"
    assert run(folder, "support-bundle", str(again), *words[2:], "--no-calls").returncode == 0
    assert customer in unpacked(again)["log.txt"]
    assert run(folder, *words).returncode == 1  # it overwrites nothing


def test_a_bundle_is_made_of_what_there_is(tmp_path: Path) -> None:
    assert run(tmp_path, "support-bundle", "one.tar.gz").returncode == 0
    assert "ini_unseen" in unpacked(tmp_path / "one.tar.gz")["doctor.json"]
    (tmp_path / "crmbridge.ini").write_text("[web]\nnonsense = planted\n")
    assert run(tmp_path, "support-bundle", "two.tar.gz").returncode == 0
    assert "ini_broken" in unpacked(tmp_path / "two.tar.gz")["doctor.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://user:word@host:8/path?q=1#f now", "see https://host:8/… now"),
        ("https://host", "https://host"),
        ("redis://:word@host/0", "redis://host/…"),
        ("to admin@example.com.", "to [address]."),
        ("2027-01-15T08:00:00.412Z 123456789", "2027-01-15T08:00:00.412Z 123456789"),
        ("Bearer abc IGAAabcdefghijk", "Bearer [secret] [secret]"),
    ],
)
def test_what_is_struck_out_of_a_text(text: str, expected: str) -> None:
    assert support.Redaction(b"key").text(text) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2027-01-15T08:00:00.000Z info a.b ms=12 next_s=4.1 ok=true", None),
        ("2027-01-15T08:00:00.000Z info a.b contact=x who=\"a \\\"b\" code=crm_error",
         "contact=[…] who=[…] code=crm_error"),
        ("2027-01-15T08:00:00.000Z info request path=/api/v1/messages/ann/status", "path=/api/v1/messages/…/status"),
        ("2027-01-15T08:00:00.000Z error x exception=KeyError trace=\"f@a.py:12 < g@b.py:3\"", None),
        ("something else", "[14 characters]"),
    ],
)  # fmt: skip
def test_what_is_left_of_a_line_of_the_log(line: str, expected: str | None) -> None:
    found = support.Redaction(b"key").line(line)
    assert found == line if expected is None else found.endswith(expected)
