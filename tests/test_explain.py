"""``explain``: the story of a message that met every trouble, asked by any of its ids; on a set clock."""

import json
import re
from typing import Any

from crmbridge import config
from crmbridge.events import instant
from crmbridge.ops import explain
from crmbridge.sandbox import wire
from tests import spec
from tests.rig import START_S, Rig
from tests.shop import CUSTOMER, OTHER_ID, SHOP_ID, Shop
from tests.test_cli import run
from tests.test_retention import prune

DOCUMENT = (config.ROOT / "docs" / "operate.md").read_text()
OTHER_CUSTOMER = "900000000000002"
REFUSED_FOR_NOW = wire.error_body(2, "An unexpected error has occurred.", is_transient=False)


def stories(rig: Rig, given: str) -> list[dict[str, Any]]:
    found: dict[str, Any] = explain.explain(rig.db, given, rig.now_s, rig.patience)
    if found["stories"]:
        spec.hold_found(f"/api/v1/admin/explain/{given}", found)
    stories: list[dict[str, Any]] = found["stories"]
    return stories


def story(rig: Rig, given: str) -> dict[str, Any]:
    (found,) = stories(rig, given)
    return found


def told(rig: Rig, given: str) -> str:
    return explain._lines(story(rig, given))


def troubled(rig: Rig) -> str:
    """Have a send meet every trouble: doubt, errors, death, a person, a CRM that is down or refuses it, a reader."""
    account = rig.account()
    rig.meet()
    message_id = rig.send(account, "a secret offer")
    rig.meta.fault("messages", drop=True)
    rig.meta.fault("messages", times=3, status=400, body=REFUSED_FOR_NOW)
    rig.live_through(100)
    rig.crm.answer_always(503)  # down when it is to hear of the failure
    rig.live_through(7)
    rig.crm.answer_always(None)
    rig.live_through(3600)
    rig.revive(dead_id(rig))
    rig.crm.answer(500, times=7, event="message.sent")
    rig.live_through(1)
    (sent,) = rig.meta.sent
    rig.echo("a secret offer", str(sent.mid))
    rig.echo("a secret offer", str(sent.mid))
    for number in range(6):  # the CRM takes what others write
        rig.say("hello", f"mid-{number}", contact=OTHER_CUSTOMER)
        rig.live_through(10)
    rig.hear(rig.item({"read": {"mid": sent.mid}}))
    rig.live_through(600)
    return message_id


def dead_id(rig: Rig) -> str:
    (row,) = rig.db.rows("SELECT id FROM deliveries WHERE state = 'dead'")
    return str(row["id"])


def normal(text: str) -> str:
    """Leave out what differs from run to run: ids, durations, and where lines break."""
    text = re.sub(r"\b(msg|evt|dlv|acc|cnv)_[0-9a-z]{26}\b", r"\1_ID", text)
    text = re.sub(r"\baWdf\w+…?", "MID", text)
    text = re.sub(r"\(trace [\w-]+\)", "(trace)", text)
    return re.sub(r"\s+", " ", re.sub(r"\b\d+ ms\b", "N ms", text)).strip()


def test_a_message_that_met_every_trouble_has_the_story_that_the_document_shows(rig: Rig) -> None:
    found = told(rig, troubled(rig))
    shown = re.search(r"```\n\$ crmbridge explain [^\n]+\n(.*?)```", DOCUMENT, re.DOTALL)
    assert shown is not None
    assert normal(found) == normal(shown[1])
    assert max(len(line) for line in found.splitlines() if "aWdf" not in line) <= 110
    for step in ("stepped_aside", "dead", "revived", "look_up"):
        assert step in {entry["step"] for entry in story(rig, "key-0")["steps"]}


def test_every_id_of_a_message_leads_to_its_story(rig: Rig) -> None:
    message_id = troubled(rig)
    ids = {message_id, "key-0", str(rig.meta.sent[0].mid)}
    for row in rig.db.rows("SELECT id, event_id FROM deliveries WHERE message_id = ?", (message_id,)):
        ids |= {row["id"], row["event_id"] or message_id}
    assert len(ids) == 12
    assert {story(rig, given)["id"] for given in ids} == {message_id}


def test_every_id_of_what_a_customer_wrote_leads_to_its_story(rig: Rig) -> None:
    rig.account()
    (kept,) = rig.say("a secret question", "mid-1")
    rig.drain()
    row = rig.db.row("SELECT * FROM deliveries")
    assert row is not None
    assert kept.event_id is not None
    ids = {kept.event_id, "msg_" + kept.event_id.removeprefix("evt_"), row["id"], "mid-1", "test"}
    assert {story(rig, given)["id"] for given in ids} == {kept.event_id}
    assert [step["step"] for step in story(rig, "mid-1")["steps"]] == ["occurred", "received", "owed", "call"]


def test_a_message_tells_what_came_about_it_later(rig: Rig) -> None:
    rig.account()
    rig.say("hello", "mid-1")
    rig.now_s += 60
    rig.hear(rig.item({"reaction": {"mid": "mid-1", "action": "react", "emoji": "❤"}}))
    rig.hear(rig.item({"message": {"mid": "mid-1", "is_deleted": True}}))
    rig.drain()
    lines = told(rig, rig.taken()[0].event["message_id"])
    assert "Instagram told message.reaction about it: evt_" in lines
    assert "Instagram told message.deleted about it: evt_" in lines


def test_what_was_held_while_a_letter_was_dead_did_not_hold_it(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    message_id = rig.send(account)
    rig.meta.fault("messages", status=400, body=wire.error_body(100, "No matching user found", subcode=2534014))
    rig.drain()
    rig.now_s += 60
    rig.pause(account, "sends", reason="lunch")
    rig.now_s += 60
    rig.unpause(account, "sends")
    rig.now_s += 60
    rig.revive(dead_id(rig))
    assert "lunch" not in told(rig, message_id)
    rig.pause(account, "sends", reason="supper")
    rig.now_s += 60
    rig.unpause(account, "sends")
    rig.drain()
    assert "supper" in told(rig, message_id)


def test_an_account_and_a_conversation_have_stories(rig: Rig) -> None:
    message_id = troubled(rig)
    (conversation,) = stories(rig, CUSTOMER)
    assert conversation == story(rig, conversation["id"])
    assert len(conversation["steps"]) == 6
    assert all(message_id in step["text"] for step in conversation["steps"][1:])
    account = story(rig, SHOP_ID)
    assert account == story(rig, account["id"])
    assert account["facts"]["dead_sends"] == 0
    assert "secret" not in str(rig.db.rows("SELECT url, id FROM endpoints")) + str(account)


def test_a_customer_of_whom_the_crm_has_not_heard_yet_leads_to_what_waits_for_them(rig: Rig) -> None:
    account = rig.account()
    rig.pause(account, "sends")
    waiting = {rig.send(account, "one", contact="7001"), rig.send(account, "two", contact="7001")}
    assert {one["id"] for one in stories(rig, "7001")} == waiting


def test_a_long_conversation_says_that_its_newest_deliveries_are_shown(rig: Rig) -> None:
    rig.account()
    for number in range(21):
        rig.say("hello", f"mid-{number}")
        if number == 18:
            assert "shown" not in stories(rig, CUSTOMER)[0]["facts"]
    (conversation,) = stories(rig, CUSTOMER)
    assert conversation["facts"]["shown"] == "the newest 20 deliveries"
    assert len(conversation["steps"]) == 20


def test_no_story_tells_what_a_message_says(rig: Rig) -> None:
    troubled(rig)
    rig.say("a secret question", "mid-secret")
    asked = [row["id"] for row in rig.db.rows("SELECT id FROM events UNION SELECT id FROM outbound_messages")]
    asked += [row["conversation_id"] for row in rig.db.rows("SELECT conversation_id FROM contacts")]
    everything = json.dumps([explain.explain(rig.db, given, rig.now_s, rig.patience) for given in [*asked, SHOP_ID]])
    assert "offer" not in everything
    assert "question" not in everything
    assert "sealed" not in everything


def test_what_waits_says_for_whom_and_until_when(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(503)
    rig.say("one", "mid-1")
    rig.say("two", "mid-2")
    rig.live_through(2)
    head = rig.db.value("SELECT id FROM deliveries ORDER BY position")
    assert story(rig, "mid-1")["next"] == [
        f"message.received: attempt 3 at {instant(rig.now_s + 1)}, given up after {instant(START_S + 86_400)}"
    ]
    (waits,) = story(rig, "mid-2")["next"]
    assert f"waits behind {head} (evt_" in waits
    assert story(rig, "mid-2")["to_type"] == [f"crmbridge explain {head}"]
    rig.now_s += 3600
    assert "no worker runs" in story(rig, "mid-1")["next"][0]
    now = instant(rig.now_s)
    rig.pause(account, "deliveries", reason="moving")
    assert story(rig, "mid-1")["next"] == [f"message.received is held since {now}, without ageing: moving"]
    assert story(rig, account["id"])["to_type"][0] == f"crmbridge account resume {account['id']} --deliveries"


def test_what_was_held_says_so_ever_after(rig: Rig) -> None:
    account = rig.account()
    rig.say("one", "mid-1")
    rig.now_s += 5
    rig.pause(account, "deliveries", reason="moving")
    message_id = rig.send(account, "two")
    rig.meta.fault("messages", status=400, body=wire.error_body(190, "expired", subcode=463))
    rig.drain()
    rig.now_s += 3600
    rig.unpause(account, "deliveries")
    rig.now_s += 3600
    rig.change_account(account, status="active")
    rig.drain()
    rig.say("later", "mid-2")
    rig.drain()
    assert "held" not in [step["step"] for step in story(rig, "mid-2")["steps"]]
    (held,) = [step for step in story(rig, "mid-1")["steps"] if step["step"] == "held"]
    assert held["at"] == instant(START_S + 5)
    assert held["text"] == f"message.received to the CRM held until {instant(START_S + 3605)}: moving"
    (held,) = [step for step in story(rig, message_id)["steps"] if step["step"] == "held"]
    assert held["text"].startswith(
        f"send to Instagram held until {instant(START_S + 7205)}: Instagram answered code 190/463, "
    )
    told = [step["text"] for step in story(rig, account["id"])["steps"] if step["step"] == "held"]
    assert sorted(text.partition(" held")[0] for text in told) == ["deliveries", "sends"]
    prune(rig, days=91)
    assert rig.db.rows("SELECT * FROM history WHERE kind LIKE '%_held'") == []


def test_a_call_in_flight_a_doubt_and_a_death_in_doubt_are_told(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    (row,) = rig.due("instagram", account)
    rig.claim(row, account)
    assert "a call is in flight since" in story(rig, message_id)["next"][0]
    rig.engine.recover()
    assert "broken off" in told(rig, message_id)
    assert story(rig, message_id)["next"][0].startswith("send: look-up 1 in Instagram's conversation at ")
    rig.meta.fault("conversations", times=10_000, status=503, body="")
    rig.live_through(25 * 3600)
    found = story(rig, message_id)
    assert "it may have arrived: look into Instagram before it is sent again" in found["next"]
    assert found["to_type"] == [f"crmbridge dlq retry {row['id']} --force"]


def died(rig: Rig, account: dict[str, Any], code: int, **words: Any) -> tuple[str, str]:
    """Have Instagram refuse a send for good; return its message's and its delivery's id."""
    rig.meta.fault("messages", status=403, body=wire.error_body(10, "no", subcode=code))
    message_id = rig.send(account, **words)
    rig.drain()
    return message_id, str(rig.db.value("SELECT id FROM deliveries WHERE message_id = ?", (message_id,)))


def test_a_send_whose_window_closed_is_not_to_be_tried_again_before_the_customer_writes(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    message_id, delivery_id = died(rig, account, 2534022)
    for now_s in (rig.now_s, START_S + 2 * 86_400):  # closed by Instagram's word alone, then by the time, too
        rig.now_s = now_s
        found = story(rig, message_id)
        assert found["to_type"] == []
        assert found["next"][1:] == [
            "Instagram takes it only once the customer has written again; another try before that fails like this one; "
            f"after it: crmbridge dlq retry {delivery_id}",
            f"a person's answer is taken until {instant(START_S + 7 * 86_400)}: the CRM sends it anew, with author: "
            "human and another idempotency_key, if Meta has approved the app's Human Agent feature",
        ]
    rig.now_s = START_S + 8 * 86_400
    assert len(story(rig, message_id)["next"]) == 2
    rig.say("again", "mid-again")
    found = story(rig, message_id)
    assert (len(found["next"]), found["to_type"]) == (1, [f"crmbridge dlq retry {delivery_id}"])
    rig.revive(delivery_id)
    rig.drain()
    assert rig.status(message_id)["status"] == "sent"


def test_what_another_try_does_not_help_says_so(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    message_id, delivery_id = died(rig, account, 2018108)
    assert story(rig, message_id)["to_type"] == [f"crmbridge dlq retry {delivery_id}"]
    rig.pause(account, "sends")
    resume = f"crmbridge account resume {account['id']} --sends"
    assert story(rig, message_id)["to_type"] == [resume, f"crmbridge dlq retry {delivery_id}"]
    rig.unpause(account, "sends")
    rig.by_hand("UPDATE outbound_messages SET send_before = ?", (instant(rig.now_s - 1),))
    found = story(rig, message_id)
    assert (found["to_type"], found["next"][1][:58]) == (
        [],
        "it cannot be tried again: its send_before has passed; the ",
    )
    rig.lose("hello", "mid-1")
    rig.change_account(account, url=None)
    found = story(rig, "mid-1")
    assert (found["to_type"], "no crm_webhook_url" in found["next"][1]) == ([], True)
    rig.call("DELETE", f"/api/v1/accounts/{account['id']}")
    assert story(rig, message_id)["next"][1] == "it cannot be tried again: its account was deleted"


def test_a_private_reply_that_came_too_late_is_over(rig: Rig) -> None:
    account = rig.account()
    rig.meta.fault("messages", status=400, body=wire.error_body(10, "outside of allowed window", subcode=2534022))
    body = {"account_id": account["id"], "comment_id": "17900000000000001", "message": "hi", "idempotency_key": "k"}
    message_id = rig.call("POST", "/api/v1/messages/send", body)[1]["message_id"]
    rig.drain()
    found = story(rig, message_id)
    assert (found["to_type"], found["next"][1].startswith("nothing can be done: ")) == ([], True)


def test_an_account_names_the_command_that_lists_its_dead(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    died(rig, account, 2018108)
    found = story(rig, account["id"])
    assert found["to_type"] == [f"crmbridge dlq list --sends --account {account['id']}"]
    assert not [text for text in found["next"] if "GET " in text]


def test_what_came_for_nobody_or_changed_something_else_is_told(rig: Rig) -> None:
    account = rig.account()
    item = rig.item({"message": {"mid": "stray"}}) | {"recipient": {"id": OTHER_ID}}
    (stray,) = rig.hear(item, account=OTHER_ID)
    assert stray.event_id is not None
    assert "no account here has the Instagram account id" in story(rig, stray.event_id)["next"][0]
    message_id = rig.send(account, "hello")
    rig.drain()
    (echo,) = rig.echo("hello", str(rig.meta.sent[0].mid))
    assert echo.event_id is not None
    assert story(rig, echo.event_id)["next"][0].startswith("nothing: it changed the status")
    assert "Instagram's echo showed it" in told(rig, message_id)


def test_what_retention_took_is_told(rig: Rig) -> None:
    account = rig.account()
    rig.meta.fault("messages", status=400, body=wire.error_body(100, "Invalid parameter"))
    rig.crm.answer(401, event="message.failed")
    message_id = rig.send(account)
    rig.say("hello", "mid-1")
    rig.drain()
    assert len(story(rig, message_id)["to_type"]) == 2
    prune(rig, days=8)
    assert story(rig, "mid-1")["next"] == ["its text is gone by retention"]
    assert story(rig, message_id)["to_type"] == []
    assert "it cannot be tried again: its content is gone by retention" in story(rig, message_id)["next"]


def test_an_id_of_many_things_lists_them(rig: Rig) -> None:
    rig.account()
    for number in range(60):
        rig.say("hello", f"mid-{number}", contact=f"80{number}")
    found = explain.explain(rig.db, "test", rig.now_s, rig.patience)
    assert (found["stories"], len(found["others"])) == ([], 51)
    assert found["others"][0]["to_type"].startswith("crmbridge explain evt_")
    assert explain.explain(rig.db, "nothing", rig.now_s, rig.patience) == {"id": "nothing", "stories": [], "others": []}


def test_the_command_and_the_api_tell_the_same(shop: Shop) -> None:
    message_id = shop.send("hello", "explained-1").json()["message_id"]
    shop.meta.wait_sent(1)
    shop.crm.wait(2, where=lambda entry: entry.event.get("message_id") == message_id)
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'", [(0,)])
    answer = shop.call("GET", f"/api/v1/admin/explain/{message_id}", key=shop.admin_key)
    assert answer.status_code == 200
    (found,) = answer.json()["stories"]
    assert shop.bridge.command("explain", "explained-1") == explain._lines(found)
    assert shop.call("GET", f"/api/v1/admin/explain/{message_id}").status_code == 403
    sloping = shop.send("hello", "ticket/4711/reply").json()["message_id"]
    for written in ("ticket/4711/reply", "ticket%2F4711%2Freply"):
        (found,) = shop.call("GET", f"/api/v1/admin/explain/{written}", key=shop.admin_key).json()["stories"]
        assert found["id"] == sloping
    unknown = shop.call("GET", "/api/v1/admin/explain/msg_nothing", key=shop.admin_key)
    assert (unknown.status_code, unknown.json()["error"]) == (404, "id_not_found")
    done = run(shop.database.parent.parent, "explain", "msg_nothing")
    assert (done.returncode, "nothing here has the id" in done.stdout) == (1, True)
    refused = shop.call("POST", "/api/v1/messages/send", {}).headers["X-Correlation-Id"]
    done = run(shop.database.parent.parent, "explain", refused)
    assert (done.returncode, f"grep {refused} LOG" in done.stdout) == (1, True)
    assert "code=invalid_request" in shop.wait_log(refused)
    answer = shop.call("GET", f"/api/v1/admin/explain/{refused}", key=shop.admin_key).json()
    assert "is in the log alone" in answer["message"]
