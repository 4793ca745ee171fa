"""Where secrets could come in they are struck out by place, and nowhere else: our own words never tell one."""

import contextlib
import json
import os
import re
import socket
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pytest

from crmbridge import vault
from crmbridge.alerts import telling
from crmbridge.sandbox import wire
from crmbridge.store import accounts
from tests.shop import CUSTOMER, SHOP_ID, SHOP_SCOPED_ID, Shop
from tests.test_cli import made, run
from tests.typed import typed

__all__ = ["made"]  # a fixture

HIDDEN = "hush-hush"


# --- the alert command ---


def test_the_alert_command_sees_a_short_list_of_variables(made: Path) -> None:
    wanted = {"PATH": os.environ["PATH"], "HOME": "/tmp", "LC_TIME": "C", "TZ": "UTC", "MAILRC": "/x", "TMPDIR": "/tmp"}
    withheld = {
        "CRMBRIDGE_INSTAGRAM_APP_SECRETS": HIDDEN, "CRMBRIDGE_INSTAGRAM_VERIFY_TOKEN": HIDDEN,
        "CRMBRIDGE_ALERTS_REPEAT_AFTER_S": "60", "AWS_SECRET_ACCESS_KEY": HIDDEN, "ALERTX": HIDDEN, "LC": HIDDEN,
        "crmbridge_secret": HIDDEN, "PATHS": HIDDEN, "BASH_ENV": "/x", "ALERT_KIND": "forged",
    }  # fmt: skip
    command = f"env -0 > {made}/seen; cat > {made}/letter"
    done = run(made, "alert", "test", **wanted, **withheld, CRMBRIDGE_ALERTS_COMMAND=command)
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "command  took it"), done.stdout
    seen = dict(entry.split("=", 1) for entry in (made / "seen").read_text().split("\0") if entry)
    assert {name: seen.get(name) for name in wanted} == wanted
    told = {"ALERT_KIND": "test", "ALERT_STATE": "test", "ALERT_ACCOUNT": ""}
    assert {name: value for name, value in seen.items() if name.startswith("ALERT")} == told
    of_the_shell = {"PWD", "OLDPWD", "SHLVL", "_"}
    assert not {name for name in seen if not name.startswith("LC_")} - {*telling.INHERITED, *told, *of_the_shell}
    assert HIDDEN not in (made / "seen").read_text() + (made / "letter").read_text()
    assert "crmbridge on " in (made / "letter").read_text()


# --- URLs ---

URLS = ("ALERTS_URL", "INSTAGRAM_GRAPH_URL", "WEB_PUBLIC_URL")


@pytest.mark.parametrize("variable", URLS)
@pytest.mark.parametrize(
    "url",
    [
        f"https://hooks.example.com:99999/{HIDDEN}",
        f"https://hooks.example.com:0/{HIDDEN}",
        f"https://hooks.example.com:{HIDDEN}/x",
        f"https://{HIDDEN}@/x",
        f"https://hooks..example.com/{HIDDEN}",
        f"https://[v1.x]/{HIDDEN}",
        f"https://[::1/{HIDDEN}",
        f"https://hooks.example.com%00/{HIDDEN}",
        f"https://hooks.example.com/a b?{HIDDEN}",
        f"https://hooks.exa\tmple.com/{HIDDEN}",
        f"https://good\\@evil.example/{HIDDEN}",
        f"ftp://hooks.example.com/{HIDDEN}",
        f"hooks.example.com/{HIDDEN}",
        HIDDEN,
    ],
)
def test_a_url_that_cannot_be_called_is_refused_at_the_start_and_not_shown(made: Path, variable: str, url: str) -> None:
    status, said = typed(made, "check", **{f"CRMBRIDGE_{variable}": url})
    assert status == 1
    assert said.startswith(f"crmbridge: environment variable CRMBRIDGE_{variable}: bad value: ")
    assert HIDDEN not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://hooks.example.com/{HIDDEN}?key={HIDDEN}#{HIDDEN}", "https://hooks.example.com"),
        (f"http://{HIDDEN}:{HIDDEN}@hooks.example.com:8080/x", "http://hooks.example.com:8080"),
        (f"https://[::1]:65535/{HIDDEN}", "https://[::1]:65535"),
        (f"https://HOOKS.example.com./{HIDDEN}", "https://hooks.example.com."),
        (f"https://under_score.example/{HIDDEN}", "https://under_score.example"),
        (f"https://127.0.0.1:1/{HIDDEN}", "https://127.0.0.1:1"),
        (f"https://bücher.example/{HIDDEN}", "https://bücher.example"),
        (f"https://graph.example.com/{HIDDEN}/v27.0", "https://graph.example.com/v27.0"),
    ],
)
def test_of_a_url_that_can_be_called_its_origin_is_shown(made: Path, url: str, shown: str) -> None:
    given = {f"CRMBRIDGE_{variable}": url for variable in URLS}
    status, said = typed(made, "check", "--verbose", **given)
    assert status == 0
    assert HIDDEN not in said
    for key, told in {"alerts.url": "(set)", "instagram.graph_url": shown, "web.public_url": shown}.items():
        assert f"  {key} = {told}" in said.splitlines()


def test_no_url_is_printed_or_logged_whole(made: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for host in (f"127.0.0.1:{port}", "nowhere.invalid", "xn--a.invalid"):
        url = f"http://user-{HIDDEN}:{HIDDEN}@{host}/{HIDDEN}?key={HIDDEN}"
        given = {"CRMBRIDGE_ALERTS_URL": url, "CRMBRIDGE_ALERTS_COMMAND": f"false {HIDDEN}"}
        done = run(made, "alert", "test", **given)
        assert done.returncode == 1
        assert re.search("^url      failed: ", done.stdout, re.MULTILINE)
        assert HIDDEN not in done.stdout + done.stderr
    _, said = typed(made, "check", **given)
    assert "  alerts.command = (set)" in said.splitlines()
    assert HIDDEN not in said


@pytest.fixture
def hushed(fresh_shop: Shop) -> Shop:
    """Return a running shop whose every URL holds a secret."""
    shop = fresh_shop
    shop.bridge.stop()
    ini = shop.bridge.folder / "crmbridge.ini"
    text = ini.read_text().replace("port = 0", f"port = 0\npublic_url = https://{HIDDEN}@bridge.invalid/{HIDDEN}")
    url, call = f"http://127.0.0.1:9/{HIDDEN}?{HIDDEN}", f"curl -d @- http://127.0.0.1:9/{HIDDEN}"
    ini.write_text(f"{text}\n[alerts]\nurl = {url}\ncommand = {call}\n")
    shop.start()
    return shop


def test_the_log_and_the_operators_lists_hold_the_origin_of_a_crm_alone(hushed: Shop) -> None:
    shop = hushed
    url = f"{shop.sandbox.crm_webhook_url}/{HIDDEN}?key={HIDDEN}"
    put = f"/api/v1/accounts/{shop.account_id}"
    assert shop.call("PUT", put, {"crm_webhook_url": url}, key=shop.admin_key).status_code == 200
    shop.crm.answer(500)
    shop.meta.customer_says(SHOP_ID, CUSTOMER, "hello")
    shop.crm.wait(2)
    # What no call can be made to, as an older version may have stored it: a library would quote it whole.
    for number, port in enumerate(("99999", HIDDEN)):
        shop.change(f"UPDATE endpoints SET url = 'http://127.0.0.1:{port}/{HIDDEN}' WHERE kind = 'crm'")
        shop.meta.customer_says(SHOP_ID, f"90000000000077{number}", "hello")
        tried = "SELECT COUNT(DISTINCT subject) FROM history WHERE outcome = 'retry' AND code <> 'crm_error'"
        shop.wait_rows(tried, [(number + 1,)])
    shop.bridge.stop()
    told = shop.log()
    lists: tuple[tuple[str, ...], ...] = (("account", "list"), ("explain", shop.account_id))
    for words in (*lists, ("check",), ("dlq", "list"), ("doctor", "--verbose"), ("doctor", "--json")):
        told += typed(shop.bridge.folder, *words)[1]
    story = json.dumps(shop.rows("SELECT text FROM history"))
    assert HIDDEN not in told + story
    assert "public_url=https://bridge.invalid" in told
    shop.change(f"UPDATE endpoints SET url = 'https://crm.example.com:444/{HIDDEN}' WHERE kind = 'crm'")
    for words in lists:
        _, said = typed(shop.bridge.folder, *words)
        assert "https://crm.example.com:444" in said
        assert HIDDEN not in said


# --- the ini ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"[instagram]\napp_secrets {HIDDEN}\n", "line 2 is neither"),
        (f"[instagram]\nverify_token = x\n{HIDDEN}\n\n{HIDDEN}\n", "line 3, 5 is neither"),
        (f"app_secrets = {HIDDEN}\n", "no section headers: line 1"),
        (f"[alerts]\nurl = {HIDDEN}\n", "[alerts] url: bad value: must be"),
        (f"[instagram]\napp_secrets = {HIDDEN}\napp_secrets = {HIDDEN}\n", "already exists"),
        (f"[instagram]\napp_secret = {HIDDEN}\n", "there is no such key"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_by_its_number(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "crmbridge.ini").write_text(text)
    status, told = typed(tmp_path, "check")
    assert (status, said in told, HIDDEN in told) == (1, True, False), told
    status, told = typed(tmp_path, "doctor", "--no-calls", "--json")
    assert (status, said in told, HIDDEN in told) == (2, True, False), told


# --- doctor and the bundle ---


def seal(shop: Shop, **columns: str) -> None:
    """Seal secrets into the account, as an older version may have taken them."""
    sealer, ends = (
        vault.load(shop.bridge.folder / "var" / "crmbridge.key"),
        dict(shop.rows("SELECT kind, id FROM endpoints")),
    )
    for column, secret in columns.items():
        end = ends["crm" if column == "webhook_secret" else "instagram"]
        shop.change(f"UPDATE endpoints SET secret_sealed = '{accounts.seal(sealer, end, secret)}' WHERE id = '{end}'")


def look(shop: Shop, secret: str) -> list[tuple[str, ...]]:
    """Make everything this one secret, have `doctor` look, and return what it said, without what changes each time."""
    shop.meta.add_account(SHOP_ID, token=secret, app_scoped_id=SHOP_SCOPED_ID, username="your_shop")
    shop.meta.subscribe(SHOP_ID, ["messages"])
    shop.crm.secret = secret
    seal(shop, access_token=secret, webhook_secret=secret)
    _, said = typed(shop.bridge.folder, "doctor", "--json", CRMBRIDGE_INSTAGRAM_VERIFY_TOKEN=secret)
    found = json.loads(said)["findings"]
    assert {"token", "crm"} <= {one["slug"] for one in found}
    return sorted(
        tuple(re.sub(r"\d+(\.\d+)?", "N", str(one[name])) for name in ("level", "slug", "what", "why", "todo"))
        for one in found
        if one["slug"] != "verify_token_odd"
    )


def test_doctors_own_words_are_the_same_whatever_the_secrets_are(fresh_shop: Shop) -> None:
    shop = fresh_shop
    wanted = look(shop, "a-secret-that-is-in-no-word-of-ours")
    for secret in ("a", "al", "test", "CRM", "Instagram takes the token", "warning"):
        assert look(shop, secret) == wanted, secret


def words_of_meta(shop: Shop, token: str) -> tuple[str, str]:
    """Have Meta quote the token when it is asked; return what doctor says of it, and what the API does."""
    refusal = wire.error_body(190, f"Malformed access token {token} of al", subcode=463)
    shop.meta.fault("/me", times=2, status=400, body=refusal)
    seal(shop, access_token=token)
    shop.change("UPDATE endpoints SET held_by = NULL")
    found = json.loads(typed(shop.bridge.folder, "doctor", "--json")[1])["findings"]
    (said,) = [one["what"] for one in found if one["slug"] == "token_refused"]
    answer = shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"access_token": token}, key=shop.admin_key)
    assert answer.status_code == 400
    return said, answer.json()["message"]


def test_where_meta_quotes_the_token_it_is_struck_in_the_quotation_alone(fresh_shop: Shop) -> None:
    for said in words_of_meta(fresh_shop, "IGAA-token-of-the-shop"):
        assert re.search(r"code 190/463, token_expired \(trace \S+\): Malformed access token \[…\] of al", said), said
    for token in ("a", "al", "access"):  # the gaps would tell it
        for said in words_of_meta(fresh_shop, token):
            assert re.search(r"code 190/463, token_expired \(trace \S+\): \[…\]\.", said), said
    for said in words_of_meta(fresh_shop, "x" * 39):
        assert "Malformed access token […] of al" in said


def bundle(shop: Shop, name: str) -> dict[str, str]:
    target = shop.bridge.folder / name
    shop.bridge.command("support-bundle", str(target))
    with tarfile.open(target) as made:
        files: dict[str, Any] = {entry.name.split("/")[1]: made.extractfile(entry) for entry in made}
        return {name: file.read().decode() for name, file in files.items()}


def test_names_and_reasons_are_left_out_of_the_bundle_by_place_however_short_they_are(fresh_shop: Shop) -> None:
    shop, one = fresh_shop, fresh_shop.account_id
    shop.bridge.stop()
    said = "an error of Meta's"
    with contextlib.closing(sqlite3.connect(shop.database)) as db, db:
        db.execute("UPDATE accounts SET username = 'al', subscription_ok = 0, subscription_error = ?", (said,))
        values = (one, "2027-01-15T08:00:00.000Z", "2027-01-15T08:00:00.000Z")
        db.execute("INSERT INTO alerts VALUES ('crm_down', ?, ?, ?, 1, 'al fails', 1, '', 1, 0, NULL)", values)
        paused = "UPDATE endpoints SET paused_at = ?, paused_reason = 'al' WHERE kind = 'instagram'"
        db.execute(paused, values[1:2])
    seal(shop, webhook_secret="al", access_token="s")
    shop.meta.fault("/me", times=9, status=400, body=wire.error_body(190, "Session of Lena", subcode=463))
    files = bundle(shop, "one.tar.gz")
    for name in ("doctor.txt", "check.txt"):
        text = " ".join(files[name].split())
        for words in (
            f"{one} ([…]) is not subscribed to Instagram's webhooks: […]",
            f"{one} ([…]) sends are paused since 2027-01-15T08:00:00.000Z: […]",
            f"alert crm_down {one} since 2027-01-15T08:00:00.000Z: […]",
            "every six hours",
        ):
            assert words in text, (name, words, text)
        assert "(al)" not in text
    told = files["doctor.json"] + " ".join(files["doctor.txt"].split())
    assert re.search(r"refuses the access token: code 190/463, token_expired \(trace \S+\): \[…\]\.", told)
    for word in ("Lena", said, "al fails"):
        assert word not in told + files["alerts.json"]
    assert json.loads(files["alerts.json"])[0]["kind"] == "crm_down"
    shown = {item["slug"]: item for item in json.loads(files["doctor.json"])["findings"]}
    assert shown["alert_crm_down"]["todo"].startswith("look at the CRM's server; what waits goes out by itself")
    # the operator is told all of it
    _, mine = typed(shop.bridge.folder, "doctor", "--no-calls")
    assert f"{one} (al) is not subscribed to Instagram's webhooks: {said}" in " ".join(mine.split())
