"""Erasure: of a customer by the operator, of an account by Meta's callbacks."""

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from crmbridge.errors import Invalid, Unauthorized
from crmbridge.events import instant
from crmbridge.instagram import signed_request
from crmbridge.sandbox import wire
from crmbridge.sandbox.meta import APP_SECRET
from crmbridge.store import accounts, messages, privacy, turn
from crmbridge.store.deliveries import Outcome, Verdict
from crmbridge.store.turn import Finished
from crmbridge.upkeep import Upkeep
from tests.rig import Rig
from tests.shop import CUSTOMER, SHOP_ID, SHOP_SCOPED_ID, TOKEN, Shop
from tests.test_cli import run
from tests.waiting import PATIENCE_S

OTHER = "900000000000002"
WORDS = "red lamp"


def fill(rig: Rig) -> dict[str, Any]:
    """Store every kind of trace that two customers leave, pending ones too; return the account."""
    account = rig.account()
    for contact in (CUSTOMER, OTHER):
        rig.say(f"{WORDS} 1", f"mid-1-{contact}", contact=contact)
        attachment = {"type": "image", "payload": {"url": "https://cdn.example.com/red lamp"}}
        rig.hear(rig.item({"message": {"mid": f"mid-2-{contact}", "attachments": [attachment]}}, contact=contact))
        rig.hear(rig.item({"reaction": {"mid": f"mid-1-{contact}", "action": "react", "emoji": "❤"}}, contact=contact))
        rig.send(account, f"{WORDS} 2", contact=contact)
        rig.drain()
    rig.crm.answer_always(503)
    rig.meta.fault("messages", times=9, status=503)
    for contact in (CUSTOMER, OTHER):
        rig.say(f"{WORDS} 3", f"mid-3-{contact}", contact=contact)
        rig.send(account, f"{WORDS} 4", contact=contact)
        rig.send(account, f"{WORDS} 5", contact=contact)
    rig.drain()
    return account


def dump(path: Path) -> str:
    return subprocess.run(["sqlite3", str(path), ".dump"], capture_output=True, text=True, check=True).stdout


def test_a_send_that_is_answered_after_its_account_was_erased_stops_no_other(rig: Rig) -> None:
    account = rig.account()
    rig.send(account)
    claimed = rig.claim(rig.due("instagram", account)[0], account)
    privacy.request_deletion(rig.db, account, "code", rig.now_s)
    rig.now_s += 600
    assert privacy.erase_accounts(rig.db, rig.now_s)
    done = Outcome("done", http_status=200, external_id="mid-late")
    rig.settle(Finished(claimed, done, Verdict("done", instant(rig.now_s))))
    message_id = rig.send(rig.account())
    rig.drain()
    assert rig.status(message_id)["status"] == "sent"


def test_nothing_of_an_erased_customer_is_left_and_all_of_the_other(rig: Rig) -> None:
    account = fill(rig)
    before = dump(rig.db.path)
    assert before.count(CUSTOMER) == before.count(OTHER) > 20
    erased = privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    assert (erased.events, erased.messages) == (5, 3)
    after = dump(rig.db.path)
    assert f"'{CUSTOMER}'" not in after
    assert after.count(OTHER) == before.count(OTHER)
    assert after.count(WORDS) == before.count(WORDS) / 2
    # Only Instagram's ids of messages still have it, by which repetitions are known.
    assert not [line for line in after.splitlines() if CUSTOMER in line.replace(f"-{CUSTOMER}", "")]


def test_what_is_owed_about_an_erased_customer_goes_nowhere(rig: Rig) -> None:
    account = fill(rig)
    sent, heard = len(rig.meta.sent), len(rig.crm.received)
    pending = rig.db.rows(
        "SELECT id FROM outbound_messages WHERE status = 'pending' AND recipient_id = ? ORDER BY id", (CUSTOMER,)
    )
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    rig.crm.answer_always(None)
    rig.meta.clear_faults()
    rig.live_through(3600)
    assert {entry.recipient_id for entry in rig.meta.sent[sent:]} == {OTHER}
    told = [entry.event for entry in rig.crm.received[heard:]]
    failed = [event for event in told if event["event"] == "message.failed"]
    assert [event["message_id"] for event in failed] == [row["id"] for row in pending]
    assert {event["error"]["code"] for event in failed} == {"erased"}
    assert CUSTOMER not in json.dumps(told)
    assert rig.db.rows("SELECT DISTINCT state FROM deliveries") == [{"state": "done"}]
    assert rig.status(pending[0]["id"])["status"] == "failed"


def test_a_repetition_is_still_known_and_a_new_message_begins_a_new_conversation(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    rig.drain()
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    assert [kept.state for kept in rig.say("hello", "mid-1")] == ["duplicate"]
    rig.say("hello again", "mid-2")
    rig.drain()
    first, second = (entry.event for entry in rig.taken())
    assert (first["sequence"], second["sequence"]) == (1, 1)
    assert first["conversation_id"] != second["conversation_id"]


def test_what_became_of_a_private_reply_is_erased_with_whom_it_reached(rig: Rig) -> None:
    account, comment = rig.account(), "17900000000000004"
    content = {"text": "by private message", "comment_id": comment}
    request = messages.Request(
        account["id"], f"comment:{comment}", "key", "hash", content, {"name": "Jane Roe"}, "test"
    )
    messages.accept(rig.db, request)
    rig.meta.fault("messages", after_effect=True, drop=True, times=9)
    rig.live_through(3600)
    rig.echo("by private message", "mid-private")
    rig.drain()
    assert "Jane Roe" in dump(rig.db.path)
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    assert "Jane Roe" not in str(rig.db.rows("SELECT * FROM events"))


@pytest.mark.parametrize("ends", ["contact", "account"])
def test_a_call_in_flight_that_an_erasure_ends_is_still_told_of(rig: Rig, ends: str) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    (row,) = rig.due("instagram", account)
    rig.claim(row, account)
    if ends == "contact":
        privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    else:
        turn.delete_account(rig.db, account["id"])
    status = messages.status(rig.db, message_id) or {}
    assert [call["outcome"] for call in status["attempts"]] == ["abandoned"]
    assert status["attempt_count"] == 1


def test_a_call_in_flight_at_an_erasure_changes_nothing_after_it(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    rig.meta.fault("messages", status=200, after_effect=True, delay_s=600)

    def drain() -> None:
        rig.engine.drain()
        rig.db.close_thread()

    thread = threading.Thread(target=drain)
    thread.start()
    rig.meta.wait_sent(1)
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    rig.meta.close()  # it answers at last
    thread.join()
    rig.drain()
    status = rig.status(message_id)
    assert (status["status"], status["error"]["code"]) == ("failed", "erased")
    assert status["recipient_id"].startswith("erased_")
    assert rig.events() == ["message.failed"]


def test_an_erasure_of_many_holds_no_lock_for_long(rig: Rig) -> None:
    account = rig.account()
    for number in range(450):
        rig.say("hello", f"mid-{number}")
    erased = privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    assert erased == privacy.Erased(deliveries=450, messages=0, events=450)
    assert privacy.erase_contact(rig.db, account["id"], CUSTOMER) == privacy.Erased()


def test_erase_at_the_command_line(fresh_shop: Shop) -> None:
    shop, folder = fresh_shop, fresh_shop.database.parent.parent
    shop.meta.customer_says(SHOP_ID, CUSTOMER, WORDS)
    shop.meta.customer_says("17841400000000009", CUSTOMER, WORDS)  # unrouted
    shop.send(WORDS, "key-1", metadata={"name": "Robin"})
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)])
    assert run(folder, "erase", "--contact", CUSTOMER, "--account", "acc_nobody").returncode == 1
    done = run(folder, "erase", "--contact", CUSTOMER)
    assert done.returncode == 0, done.stderr
    assert f"{shop.account_id}: erased " in done.stdout
    assert "logged as era_" in done.stdout
    left = dump(shop.database)
    assert not [one for one in (f"'{CUSTOMER}'", WORDS, "Robin") if one in left]
    log = shop.rows("SELECT kind, account_id, events, messages FROM erasures")
    assert [row[0] for row in log] == ["contact"]
    again = run(folder, "erase", "--contact", CUSTOMER)
    assert (again.returncode, again.stdout) == (1, "nothing is stored about this contact\n")


# --- Meta's callbacks ---


def upkeep(rig: Rig) -> Upkeep:
    return Upkeep(rig.db, rig.settings.retention, rig.patience, rig.alarm, clock=rig.clock)


def test_a_signed_request_is_read_with_any_of_the_secrets() -> None:
    given = wire.signed_request("second", "24000000000000001", 1_800_000_000)
    request = signed_request.read(given, ("first", "second"))
    assert request.user_id == "24000000000000001"
    assert len(request.code) == 20
    assert signed_request.read(given, ("second",)).code == request.code
    assert signed_request.read(wire.signed_request("second", "2", 1), ("second",)).code != request.code


@pytest.mark.parametrize("given", ["", ".", "x", "é.é", "AAAA.e30", wire.signed_request("other", "1", 1), "=.="])
def test_what_no_secret_signed_is_unauthorized(given: str) -> None:
    with pytest.raises(Unauthorized):
        signed_request.read(given, ("first",))


@pytest.mark.parametrize("payload", ["", "AAAA", "e30", "W10", "eyJ1c2VyX2lkIjoiIn0", "eyJ1c2VyX2lkIjpbXX0"])
def test_what_is_signed_and_names_nobody_is_invalid(payload: str) -> None:
    import base64
    import hashlib
    import hmac

    signature = base64.urlsafe_b64encode(hmac.new(b"first", payload.encode(), hashlib.sha256).digest()).decode()
    with pytest.raises(Invalid):
        signed_request.read(f"{signature.rstrip('=')}.{payload}", ("first",))


def test_a_removed_app_ends_the_token_and_a_new_one_heals_the_account(fresh_shop: Shop) -> None:
    shop = fresh_shop
    now_s = shop.meta.clock()
    shop.meta.clock = lambda: now_s  # a repetition is of the same second
    for _ in range(2):
        assert shop.meta.owner_asks("deauthorize", SHOP_ID).status == 200
    shop.meta.clock = time.time
    (token, status), *_ = shop.rows("SELECT secret_sealed, held_by FROM endpoints WHERE kind = 'instagram'")
    assert (token, status) == (None, "error")
    assert shop.rows("SELECT kind, account_id FROM erasures") == [("deauthorized", shop.account_id)]
    shop.wait_log("alert.token_dead")
    waiting = shop.send("hello", "key-1").json()
    shop.meta.customer_says(SHOP_ID, CUSTOMER, "still here")
    shop.wait_rows("SELECT event FROM deliveries WHERE state = 'done'", [("message.received",)])
    assert run(shop.database.parent.parent, "check").returncode == 0
    path = f"/api/v1/accounts/{shop.account_id}"
    refused = shop.call("PUT", path, {"status": "active"})
    assert (refused.status_code, refused.json()["error"]) == (409, "token_missing")
    shop.meta.accounts[SHOP_ID].tokens[TOKEN] = shop.meta.clock()
    healed = shop.call("PUT", path, {"access_token": TOKEN}).json()
    assert (healed["status"], healed["subscription"]["ok"]) == ("active", True)
    assert shop.meta.wait_sent(1)[0].text == "hello"
    shop.wait_status(waiting["message_id"], "sent", "delivered")


def test_a_request_for_deletion_can_be_followed(fresh_shop: Shop) -> None:
    shop = fresh_shop
    shop.meta.owner_asks("deauthorize", SHOP_ID)
    shop.close()
    shop.start()  # without a token
    first = shop.meta.owner_asks("deletion", SHOP_ID)
    assert first.status == 200, shop.log()
    answer = json.loads(first.body)
    assert answer["url"].endswith(f"/privacy/deletion/{answer['confirmation_code']}")
    page = requests.get(shop.url + "/privacy/deletion/" + answer["confirmation_code"], timeout=PATIENCE_S)
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert "In progress" in page.text
    assert shop.call("GET", f"/api/v1/accounts/{shop.account_id}", key=shop.admin_key).status_code == 404
    shop.wait_log("alert.data_deletion")
    assert requests.get(shop.url + "/privacy/deletion/nobodysrequest", timeout=PATIENCE_S).status_code == 404


def test_an_owner_who_is_not_here_is_answered_all_the_same(shop: Shop) -> None:
    asked = wire.signed_request(APP_SECRET, "24000000000000077", 1_800_000_000)
    answers = [
        requests.post(shop.url + path, data={"signed_request": asked}, timeout=PATIENCE_S)
        for path in ("/privacy/deletion", "/privacy/deauthorize")
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    code = answers[0].json()["confirmation_code"]
    assert "Nothing was stored" in requests.get(f"{shop.url}/privacy/deletion/{code}", timeout=PATIENCE_S).text
    assert shop.rows("SELECT COUNT(*) FROM connected WHERE status = 'active'") == [(1,)]


@pytest.mark.parametrize("path", ["/privacy/deletion", "/privacy/deauthorize"])
def test_nobody_but_meta_can_ask(shop: Shop, path: str) -> None:
    wrong = wire.signed_request("guess", SHOP_SCOPED_ID, 1_800_000_000)
    for form in ({}, {"signed_request": wrong}, {"signed_request": ["", wrong]}):
        answer = requests.post(shop.url + path, data=form, timeout=PATIENCE_S)
        assert answer.status_code == 401, answer.text
    assert shop.rows("SELECT COUNT(*) FROM connected WHERE status = 'active'") == [(1,)]
    assert shop.rows("SELECT COUNT(*) FROM erasures WHERE account_id IS NOT NULL") == [(0,)]


def test_all_of_an_account_is_erased_after_its_request(rig: Rig) -> None:
    account = fill(rig)
    other = rig.account("17841400000000002")
    rig.hear(rig.item({"message": {"mid": "mid-9", "text": "blue lamp"}}), account="17841400000000002")
    rig.change_account(account, app_scoped_id=SHOP_SCOPED_ID)
    found = privacy.find_account(rig.db, SHOP_SCOPED_ID)
    assert found is not None
    assert privacy.request_deletion(rig.db, found, "code", rig.now_s)
    assert not privacy.request_deletion(rig.db, found, "code", rig.now_s)
    rig.drain()
    upkeep(rig).erase()
    assert WORDS in dump(rig.db.path)  # calls may be in flight
    rig.now_s += 300
    upkeep(rig).erase()
    left = dump(rig.db.path)
    gone = [WORDS, SHOP_ID, SHOP_SCOPED_ID, OTHER, "mid-1"]
    assert [one for one in gone if one in left] == []
    assert "blue lamp" in left
    counts = rig.db.row("SELECT done_at, events, messages FROM erasures")
    assert counts == {"done_at": instant(rig.now_s), "events": 10, "messages": 6}
    for table in ("deliveries", "events", "contacts"):
        assert rig.db.rows(f"SELECT DISTINCT account_id FROM {table}") == [{"account_id": other["id"]}]
    here = " UNION ALL ".join(f"SELECT id FROM {table}" for table in ("deliveries", "events", "outbound_messages"))
    assert rig.db.value(f"SELECT COUNT(*) FROM history WHERE subject NOT IN ({here})") == 0
    upkeep(rig).erase()
    rig.account()  # the same Instagram account may come again
    rig.live_through(60)


def test_a_request_that_was_broken_off_is_carried_out(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    privacy._note(rig.db, "account", account, "code", instant(rig.now_s), done_at=None)
    rig.now_s += 300
    upkeep(rig).erase()
    assert accounts.find(rig.db, account["id"]) is None
    upkeep(rig).erase()
    assert rig.db.value("SELECT events FROM erasures WHERE done_at IS NOT NULL") == 1


def test_what_was_erased_leaves_no_trace_in_the_file(rig: Rig) -> None:
    account, path = rig.account(), rig.db.path
    checkpoint = ["sqlite3", str(path), "PRAGMA wal_checkpoint(TRUNCATE)"]
    rig.say("a needle in the file", "mid-1")
    rig.drain()
    rig.db.close_thread()
    subprocess.run(checkpoint, check=True, capture_output=True)
    assert b"needle" in path.read_bytes()
    rig.db.value("PRAGMA secure_delete = OFF")  # not every SQLite has it on
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    rig.db.close_thread()
    subprocess.run(checkpoint, check=True, capture_output=True)
    assert b"needle" not in path.read_bytes()


def test_a_message_of_an_erased_customer_tells_its_end_only(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    rig.drain()
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    status = messages.status(rig.db, message_id)
    assert status is not None
    assert (status["status"], status["metadata"]) == ("sent", None)


def test_meta_repeating_what_was_erased_brings_nothing_back(rig: Rig) -> None:
    account = rig.account()
    items = [
        rig.item({"message": {"mid": "mid-1", "text": WORDS}}),
        rig.item({"reaction": {"mid": "mid-1", "action": "react", "reaction": "love"}}),
        rig.item({"postback": {"title": "Start", "payload": "START"}}),
        rig.item({"referral": {"ref": "flyer", "source": "IGME-SOURCE-LINK", "type": "OPEN_THREAD"}}),
        rig.item({"read": {"mid": "mid-1"}}),
    ]
    rig.hear(*items)
    rig.drain()
    told = len(rig.taken())
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    assert [kept.state for kept in rig.hear(*items)] == ["duplicate"] * len(items)
    rig.drain()
    assert len(rig.taken()) == told
    assert rig.db.rows("SELECT * FROM contacts") == []
