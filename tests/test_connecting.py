"""An account is connected and mended from the command line, with the API's checks; no secret is an argument."""

import contextlib
import json
import os
import pty
import re
from pathlib import Path

import pytest

from crmbridge import bridge
from crmbridge.errors import Invalid
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.store import accounts
from tests.rig import Rig
from tests.shop import CUSTOMER, OTHER_ID, OTHER_SCOPED_ID, OTHER_TOKEN, SHOP_ID, SHOP_SCOPED_ID, TOKEN, Shop
from tests.test_cli import started
from tests.typed import typed
from tests.waiting import PATIENCE_S

NEW = "IGAAanewtokenofthefirstshop"
SECRET = "a-secret-of-the-crm-0123456789"


def shown(rig: Rig, account_id: str) -> dict[str, object]:
    status, answer = rig.call("GET", f"/api/v1/accounts/{account_id}")
    assert status == 200
    return answer


def add(rig: Rig, folder: Path, *words: str, lines: str = TOKEN) -> str:
    status, said = typed(folder, "account", "add", "--token", "-", *words, stdin=f"{lines}\n")
    assert status == 0, said
    assert said.startswith(f"connected {rig.account_id}  {SHOP_ID}  your_shop\n")
    assert TOKEN not in said
    return said


def test_an_account_is_connected_with_both_secrets_from_standard_input(rig: Rig, tmp_path: Path) -> None:
    rig.hear(rig.item({"message": {"mid": "early", "text": "hello"}}))  # before the account is here
    url = rig.sandbox.crm_webhook_url
    said = add(rig, tmp_path, "--secret", "-", "--url", url, lines=f"{TOKEN}\r\n{WEBHOOK_SECRET}")
    assert said.splitlines()[1:] == ["1 event(s) that came for it before go to the CRM now"]
    answer = shown(rig, rig.account_id)
    assert (answer["status"], answer["crm_webhook_url"]) == ("active", url)
    assert answer["subscription"] == {"ok": True, "error": None}
    assert answer["token_checked_at"] is not None
    rig.drain()
    assert rig.events() == ["message.received"]  # signed with the secret that the CRM has
    sent = rig.send({"id": rig.account_id})
    rig.drain()
    assert rig.status(sent)["status"] == "sent"


def test_a_secret_that_is_left_out_is_made_and_shown_once(rig: Rig, tmp_path: Path) -> None:
    said = add(rig, tmp_path, "--url", rig.sandbox.crm_webhook_url)
    found = re.search(r"^webhook_secret (whsec_\S{40,})$", said, re.MULTILINE)
    assert found
    account = accounts.found(rig.db, rig.account_id)
    assert accounts.webhook_secret(rig.rooms.vault, account) == found[1]
    assert "whsec_" not in typed(tmp_path, "account", "set", rig.account_id, "--url", "http://127.0.0.1:9/new")[1]


def test_a_change_that_saw_an_older_account_leaves_no_url_without_a_secret(rig: Rig) -> None:
    account = rig.account()
    connector = bridge.make_connector(rig.rooms, lambda _: None)
    connector.change(account, {"crm_webhook_url": None, "webhook_secret": None}, rig.now_s)
    done = connector.change(account, {"crm_webhook_url": rig.sandbox.crm_webhook_url}, rig.now_s)
    assert done.made is not None
    assert accounts.webhook_secret(rig.rooms.vault, done.account) == done.made
    with pytest.raises(Invalid, match="webhook_secret is required"):
        connector.change({**account, "crm_webhook_url": None}, {"webhook_secret": None}, rig.now_s)


def test_what_is_no_option_is_not_repeated(rig: Rig, tmp_path: Path) -> None:
    status, said = typed(tmp_path, "account", "add", TOKEN, "--sekret=hush")
    assert (status, TOKEN in said, "hush" in said) == (2, False, False)
    assert "unrecognized arguments: … --sekret" in said


def test_without_a_url_the_crm_pulls_and_no_secret_is_made(rig: Rig, tmp_path: Path) -> None:
    assert "webhook_secret" not in add(rig, tmp_path)
    assert shown(rig, rig.account_id)["crm_webhook_url"] is None
    status, said = typed(tmp_path, "account", "set", rig.account_id, "--url", rig.sandbox.crm_webhook_url)
    assert (status, "webhook_secret whsec_" in said) == (0, True)
    assert typed(tmp_path, "account", "set", rig.account_id, "--pull")[0] == 0
    assert shown(rig, rig.account_id)["crm_webhook_url"] is None


def test_a_new_token_and_secret_mend_what_is_held(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    rig.meet()
    rig.fail_account(account)
    rig.crm.answer(401)
    rig.say("hello", "m1")
    message_id = rig.send(account)
    rig.drain()
    rig.crm.clear_answers()
    held = rig.held(account)
    assert (held["deliveries"]["by"], held["sends"]["by"]) == ("unauthorized", "error")
    rig.meta.add_account(SHOP_ID, token=NEW, app_scoped_id=SHOP_SCOPED_ID, username="renamed_shop")
    lines = f"{NEW}\n{WEBHOOK_SECRET}\n"
    status, said = typed(tmp_path, "account", "set", account["id"], "--secret", "-", "--token", "-", stdin=lines)
    assert status == 0
    assert said.splitlines() == [
        f"set access_token, webhook_secret of {account['id']}, which is active",
        f"released deliveries of {account['id']}",
        f"1 event(s) of {account['id']} that a 401 ended are sent again",
    ]
    assert shown(rig, account["id"])["username"] == "renamed_shop"
    assert rig.held(account) == {"deliveries": None, "sends": None}
    rig.pass_s(120)
    assert rig.status(message_id)["status"] == "sent"
    assert "message.received" in rig.events()


def test_an_account_is_taken_out_of_use_and_back(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    for word in ("inactive", "active"):
        status, said = typed(tmp_path, "account", "set", account["id"], f"--{word}")
        assert (status, said) == (0, f"set status of {account['id']}, which is {word}\n")
        assert shown(rig, account["id"])["status"] == word


@pytest.mark.parametrize(
    ("words", "lines", "said"),
    [
        (["--token", "-"], "IGAAnobodysatall", "Instagram refuses the access token: "),
        (["--token", "-"], OTHER_TOKEN, f"{SHOP_ID} is not the token's account: the token belongs to user_id"),
        (["--token", "-"], "two words", "access_token must hold visible ASCII characters alone"),
        (["--token", "-"], "", "standard input has 0 line(s), and is to have 1: access_token"),
        (["--token", "-"], f"{NEW}\n{SECRET}", "standard input has 2 line(s), and is to have 1: access_token"),
        (["--token", "-", "--secret", "-"], NEW, "is to have 2: access_token, then webhook_secret"),
        (["--token", "-"], "\udcff", "standard input is not UTF-8 text"),
        (["--secret", "-"], "short", "webhook_secret must have at least 8 characters"),
        (["--secret", "-"], "whsec_tooshort", "webhook_secret begins with whsec_ and must go on with"),
        (["--url", "https://10.0.0.1/hook"], "", "crm_webhook_url leads to 10.0.0.1, which [crm] allow_networks does"),
        (["--url", "ftp://crm.example/"], "", "crm_webhook_url must begin with http:// or https://"),
        ([], "", "say what to set: --token, --secret, --url, --pull, --active or --inactive"),
    ],
)
def test_what_the_api_refuses_is_refused(rig: Rig, tmp_path: Path, words: list[str], lines: str, said: str) -> None:
    account = rig.account()
    rig.meta.add_account(OTHER_ID, token=OTHER_TOKEN, app_scoped_id=OTHER_SCOPED_ID, username="other_shop")
    before = rig.db.rows("SELECT * FROM endpoints")
    status, answer = typed(tmp_path, "account", "set", account["id"], *words, stdin=lines)
    assert (status, answer.startswith("crmbridge: ")) == (1, True)
    assert said in answer
    assert not [line for line in lines.split("\n") if line and line in answer]
    assert rig.db.rows("SELECT * FROM endpoints") == before


def test_what_contradicts_the_store_is_refused(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    status, said = typed(tmp_path, "account", "add", "--token", "-", stdin=TOKEN)
    assert (status, said) == (1, f"crmbridge: The Instagram account {SHOP_ID} is already here, as {account['id']}.\n")
    accounts.lose(rig.db, account["id"], "gone")
    status, said = typed(tmp_path, "account", "set", account["id"], "--active")
    assert (status, said) == (1, "crmbridge: The account has no access token: send a new one.\n")
    status, said = typed(tmp_path, "account", "set", "acc_none", "--active")
    assert (status, "there is no account acc_none" in said) == (1, True)


def test_a_secret_on_the_command_line_is_wrong_usage_and_is_not_repeated(rig: Rig, tmp_path: Path) -> None:
    for words in (("add", "--token", TOKEN), ("set", "acc_x", f"--secret={SECRET}")):
        status, said = typed(tmp_path, "account", *words)
        assert status == 2
        assert "must be -: a secret in a command can be read by all on this machine" in said
        assert TOKEN not in said
        assert SECRET not in said


@pytest.mark.parametrize(("typing", "status"), [(TOKEN.encode() + b"\n", 0), (b"\x04", 1), (b"\n", 1)])
def test_a_person_at_a_terminal_is_asked_and_sees_no_secret(
    rig: Rig, tmp_path: Path, typing: bytes, status: int
) -> None:
    here, there = pty.openpty()
    with started(tmp_path, "account", "add", "--token", "-", stdin=there) as process:
        assert process.stderr is not None
        assert process.stderr.read(len("Access token: ")) == "Access token: "
        os.write(here, typing)
        said, complained = process.communicate(timeout=PATIENCE_S)
    os.set_blocking(here, False)
    with contextlib.suppress(BlockingIOError):
        assert TOKEN.encode() not in os.read(here, 1000)
    os.close(here)
    os.close(there)
    assert process.returncode == status
    assert TOKEN not in said + complained
    assert "Traceback" not in complained
    assert said.startswith("connected acc_") == (status == 0)


def test_a_weak_secret_and_a_failed_subscription_are_warned_of(rig: Rig, tmp_path: Path) -> None:
    rig.meta.fault("subscribed_apps", status=400, body={"error": {"code": 100, "message": "no such app"}})
    said = add(rig, tmp_path, "--secret", "-", "--url", rig.sandbox.crm_webhook_url, lines=f"{TOKEN}\nabcabcabc")
    assert "warning: the webhook secret is easy to guess" in said
    assert "warning: not subscribed to its webhooks, which is tried again every six hours: " in said


def test_it_works_beside_a_running_service(fresh_shop: Shop) -> None:
    shop, folder = fresh_shop, fresh_shop.bridge.folder
    shop.crm.answer(401)
    shop.hears(CUSTOMER, "hello")
    shop.wait_rows("SELECT held_by FROM endpoints WHERE kind = 'crm'", [("unauthorized",)])
    shop.crm.clear_answers()
    status, said = typed(folder, "account", "set", shop.account_id, "--secret", "-", stdin=WEBHOOK_SECRET)
    assert (status, "1 event(s)" in said) == (0, True)
    shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "hello" and entry.answered == 200)
    lines, url = f"{OTHER_TOKEN}\n{WEBHOOK_SECRET}", shop.sandbox.crm_webhook_url
    assert typed(folder, "account", "add", "--token", "-", "--secret", "-", "--url", url, stdin=lines)[0] == 0
    listed = json.loads(shop.call("GET", "/api/v1/accounts", key=shop.admin_key).text)["accounts"]
    assert [one["instagram_account_id"] for one in listed] == [SHOP_ID, OTHER_ID]
