"""What is stored about one customer is written out: all that an erasure takes, and nothing of anybody else."""

import json
from pathlib import Path
from typing import Any

from crmbridge.store import privacy
from tests.rig import Rig
from tests.shop import CUSTOMER, OTHER_ID, SHOP_ID
from tests.test_privacy import OTHER, WORDS, fill
from tests.typed import run

CONTENTS = ("content", "metadata", "payload", "body", "recipient_id", "contact", "username", "name")


def export(folder: Path, *words: str, contact: str = CUSTOMER) -> Any:
    done = run(folder, "export", "--contact", contact, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    return json.loads(done.stdout)


def traces(rig: Rig) -> dict[str, str]:
    """Return the content of every row by its id."""
    tables = ("events", "outbound_messages", "deliveries")
    rows = [row for table in tables for row in rig.db.rows(f"SELECT * FROM {table}")]
    return {row["id"]: str([row.get(name) for name in CONTENTS]) for row in rows}


def odd(rig: Rig, name: str, whom: str) -> None:
    """Have Meta tell something that nobody understands, which names somebody."""
    rig.hear({"timestamp": int(rig.now_s * 1000), "recipient": {"id": SHOP_ID}, "odd": {"name": name, "of": whom}})


def test_an_export_holds_what_an_erasure_takes_and_nothing_of_others(rig: Rig, tmp_path: Path) -> None:
    account = fill(rig)
    rig.name_customers()
    odd(rig, "theirs", CUSTOMER)
    odd(rig, "of somebody whose id has theirs within", f"1{CUSTOMER}")
    stray = rig.item({"message": {"mid": "stray", "text": "astray"}}) | {"recipient": {"id": OTHER_ID}}
    rig.hear(stray, account=OTHER_ID)  # which is not here
    before = traces(rig)
    found = export(tmp_path)
    assert (found["schema"], found["contact"]) == (1, CUSTOMER)
    (place,) = found["accounts"]
    assert (place["account_id"], place["profile"]["name"]) == (account["id"], "Their Name")
    texts = [event["content"].get("text") for event in place["events"] if event["event"] == "message.received"]
    assert texts == [f"{WORDS} 1", None, f"{WORDS} 3"]
    assert [message["content"]["text"] for message in place["messages"]] == [
        f"{WORDS} {number}" for number in (2, 4, 5)
    ]
    assert place["events"][0]["body"]["message"] == f"{WORDS} 1"
    sent = place["messages"][0]
    assert (sent["status"], [one["code"] for one in sent["history"]]) == ("sent", ["sent"])
    assert [(one["target"], one["state"]) for one in sent["deliveries"]] == [("instagram", "done")]
    assert [event["content"]["text"] for event in found["unrouted_events"]] == ["astray"]
    told = json.dumps(found)
    (nameless,) = [one for one in place["events"] if one["event"] == "message.unsupported"]  # it may name others, too
    assert (nameless["content"], nameless["body"], "theirs" in told) == (None, None, False)
    assert OTHER not in told
    assert f"1{CUSTOMER}" not in told
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    privacy.erase_unrouted(rig.db, CUSTOMER)
    after = traces(rig)
    taken = {one for one, content in before.items() if after[one] != content}
    assert {one for one in taken if one not in told} == set()
    assert {one.partition("_")[0] for one in taken} == {"evt", "msg", "dlv"}


def test_a_number_that_json_does_not_know_stops_neither_an_export_nor_an_erasure(rig: Rig, tmp_path: Path) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    for whom in ("name", CUSTOMER):
        rig.hear({"timestamp": int(rig.now_s * 1000), "odd": {"price": float("inf"), "of": whom}})
    assert [event["event"] for event in export(tmp_path)["accounts"][0]["events"]] == [
        "message.received", "message.unsupported"
    ]  # fmt: skip
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    assert CUSTOMER not in json.dumps(rig.db.rows("SELECT * FROM events"))


def test_of_an_erased_customer_and_of_a_stranger_there_is_nothing(rig: Rig, tmp_path: Path) -> None:
    account = fill(rig)
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    alias = str(rig.db.value("SELECT contact FROM events WHERE contact LIKE 'erased%'"))
    for contact in (CUSTOMER, alias, "900000000000009"):
        done = run(tmp_path, "export", "--contact", contact)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "nothing is stored about this contact\n")
    assert len(export(tmp_path, contact=OTHER)["accounts"][0]["messages"]) == 3


def test_an_export_is_of_one_account_where_that_is_named(rig: Rig, tmp_path: Path) -> None:
    first, second = rig.account(), rig.account(OTHER_ID)
    for account in (first, second):
        rig.send(account, f"for {account['id']}")
    assert [one["account_id"] for one in export(tmp_path)["accounts"]] == [first["id"], second["id"]]
    (place,) = export(tmp_path, "--account", second["id"])["accounts"]
    assert [one["content"]["text"] for one in place["messages"]] == [f"for {second['id']}"]
    for words, said in ((("--account", "acc_none"), "there is no account acc_none"), ((), "--contact needs")):
        done = run(tmp_path, "export", "--contact", CUSTOMER if words else " ", *words)
        assert (done.returncode, done.stdout, said in done.stderr) == (1, "", True)


def test_a_private_reply_is_exported_with_what_became_of_it(rig: Rig, tmp_path: Path) -> None:
    account, comment = rig.account(), "17900000000000004"
    body = {"account_id": account["id"], "comment_id": comment, "message": "privately", "idempotency_key": "k"}
    assert rig.call("POST", "/api/v1/messages/send", body)[0] == 202
    rig.meta.fault("messages", after_effect=True, drop=True, times=9)
    rig.live_through(3600)
    rig.echo("privately", "mid-private")
    rig.drain()
    (place,) = export(tmp_path)["accounts"]
    assert [one["comment_id"] for one in place["messages"]] == [comment]
    told = rig.db.rows("SELECT id FROM events WHERE message_id IS NOT NULL ORDER BY position")
    assert {row["id"] for row in told} <= {one["event_id"] for one in place["events"]}
