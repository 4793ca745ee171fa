"""Dead letters: listed, counted, asked for by the hundred, and delivered in order behind live traffic."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from crmbridge.errors import Conflict
from crmbridge.ops import explain
from crmbridge.sandbox import wire
from crmbridge.store import dead, turn
from crmbridge.store.dead import Filter, Revived
from tests.rig import Rig
from tests.shop import OTHER_ID, Shop
from tests.typed import typed

NOBODY = {"account_deleted": 0, "content_gone": 0, "not_pushed": 0, "endpoint_held": 0, "in_doubt": 0}


def die(rig: Rig, lanes: dict[str, int]) -> dict[str, Any]:
    """Have a CRM be dead for 25 hours while customers write; return its account. The CRM is well again afterwards."""
    account = rig.account()
    rig.crm.answer_always(503)
    for number in range(max(lanes.values())):
        for contact, messages in lanes.items():
            if number < messages:
                rig.say(f"{contact} {number}", f"mid-{contact}-{number}", contact=contact)
    rig.live_through(25 * 3600)
    rig.expire()
    assert {row["state"] for row in rig.db.rows("SELECT state FROM deliveries")} == {"dead"}
    rig.crm.answer_always(None)
    rig.crm.reset()
    return account


def restart(rig: Rig) -> None:
    """Go on with an engine that has not seen the CRM dead."""
    rig.engine.stop(0)
    rig.engine = rig.make_engine()


def revive(rig: Rig, *, preview: bool = False, target: Any = "crm", **wanted: Any) -> Revived:
    return dead.revive_all(rig.db, Filter(target, **wanted), rig.now_s, preview=preview)


def sequences(rig: Rig) -> dict[str, list[int]]:
    """Return the numbers that the CRM took, by customer, as they came."""
    found: dict[str, list[int]] = defaultdict(list)
    for entry in rig.taken():
        found[entry.event["sender_id"]].append(entry.event["sequence"])
    return found


def test_what_died_is_asked_for_and_comes_in_order_with_the_same_id_and_bytes(rig: Rig) -> None:
    die(rig, {"801": 45, "802": 3, "803": 1})
    bodies = {row["id"]: row["body"] for row in rig.db.rows("SELECT id, body FROM events")}
    assert revive(rig, preview=True) == Revived(49, 49, NOBODY)
    assert rig.drain() is None  # a preview changes nothing
    assert revive(rig) == Revived(49, 49, NOBODY)
    assert revive(rig) == Revived(0, 0, NOBODY)
    rig.live_through(60)
    assert sequences(rig) == {"801": [*range(1, 46)], "802": [1, 2, 3], "803": [1]}
    taken = {entry.event["event_id"]: entry.body.decode() for entry in rig.taken()}
    assert set(taken) == set(bodies)
    assert all(taken[event_id] == body for event_id, body in bodies.items() if body)  # of those that had been tried
    assert {row["state"] for row in rig.db.rows("SELECT state FROM deliveries")} == {"done"}


def test_what_comes_new_does_not_wait_for_hundreds_that_were_dead(rig: Rig) -> None:
    die(rig, {f"8{number:02}": 4 for number in range(40)})
    restart(rig)
    revive(rig)
    for number in range(5):
        rig.say(f"new {number}", f"mid-new-{number}", contact=f"90{number}")
    rig.drain()
    heard = [entry.event["message"] for entry in rig.taken()]
    assert sorted(heard[:6])[-5:] == [f"new {number}" for number in range(5)]  # with one that was dead at most
    assert len(heard) == 165
    assert all(numbers == [1, 2, 3, 4] for contact, numbers in sequences(rig).items() if contact.startswith("8"))


def test_what_comes_new_in_a_lane_that_is_revived_waits_its_turn(rig: Rig) -> None:
    die(rig, {"801": 30})
    restart(rig)
    revive(rig)
    rig.say("new", "mid-new", contact="801")
    rig.drain()
    assert sequences(rig) == {"801": [*range(1, 32)]}


def test_something_new_has_its_conversation_go_before_all_that_was_dead(rig: Rig) -> None:
    die(rig, {f"8{number:02}": 2 for number in range(20)})
    restart(rig)
    revive(rig)
    rig.say("new", "mid-new", contact="819")
    rig.drain()
    heard = [entry.event["sender_id"] for entry in rig.taken()]
    assert [number for number, contact in enumerate(heard) if contact == "819"][-1] < 12
    assert sequences(rig)["819"] == [1, 2, 3]
    assert len(heard) == 41


def test_an_endpoint_that_is_down_is_tried_by_one_of_those_that_were_dead_at_a_time(rig: Rig) -> None:
    die(rig, {"801": 2, "802": 2, "803": 2})
    rig.crm.answer_always(503)
    revive(rig)
    rig.live_through(120)
    assert 1 <= len(rig.crm.received) <= 10
    rig.crm.answer_always(None)
    rig.crm.reset()
    rig.live_through(120)
    assert sequences(rig) == {"801": [1, 2], "802": [1, 2], "803": [1, 2]}


def test_a_worker_that_dies_amid_a_replay_loses_nothing(rig: Rig) -> None:
    account = die(rig, {"801": 25, "802": 2})
    restart(rig)
    revive(rig)
    row = rig.db.row("SELECT * FROM deliveries WHERE place = 'head'")
    assert row is not None
    rig.claim(row, account)
    restart(rig)
    assert rig.engine.recover() == 1
    rig.live_through(60)
    assert sequences(rig) == {"801": [*range(1, 26)], "802": [1, 2]}


def test_what_dies_again_is_dead_again_and_may_be_asked_for_again(rig: Rig) -> None:
    die(rig, {"801": 1, "802": 1})
    rig.crm.answer_always(503)
    revive(rig)
    rig.live_through(52 * 3600)
    rig.expire()
    assert [row["last_code"] for row in rig.dead()] == ["crm_error"] * 2
    rig.crm.clear_answers()
    assert revive(rig, code="crm_error").revived == 2
    rig.live_through(120)
    assert rig.dead() == []


def test_a_message_that_the_crm_cannot_take_holds_no_other_replay_up_for_long(rig: Rig) -> None:
    die(rig, {"801": 3, "802": 1})
    rig.crm.answer(500, times=1000, containing="801 0")
    revive(rig)
    rig.live_through(900)
    assert sequences(rig) == {"801": [2, 3], "802": [1]}


def test_a_filter_chooses_and_its_count_is_what_is_asked_for(rig: Rig) -> None:
    account = die(rig, {"801": 3, "802": 1})
    died = [row["finished_at"] for row in rig.dead()]
    for wanted in (
        {"account_id": account["id"]},
        {"account_id": "acc_other"},
        {"event": "message.received", "code": "expired"},
        {"event": "message.echo"},
        {"dead_after": died[-1]},
        {"dead_before": died[0]},
    ):
        listed = dead.page(rig.db, Filter("crm", **wanted), after=None, limit=200)
        found = revive(rig, preview=True, **wanted)
        assert (found.matching, found.revived) == (len(listed), len(listed))
        assert revive(rig, **wanted) == found
        rig.by_hand("UPDATE deliveries SET place = 'dead', finished_at = ? WHERE finished_at IS NULL", (died[0],))
        for row, at in zip(dead.page(rig.db, Filter("crm"), after=None, limit=9), died, strict=True):
            rig.by_hand("UPDATE deliveries SET finished_at = ? WHERE id = ?", (at, row["id"]))
    assert revive(rig, target="instagram").matching == 0


def test_what_is_held_back_is_left_out_with_what_ends_that(rig: Rig) -> None:
    account = die(rig, {"801": 3})
    rig.pause(account, "deliveries")
    assert revive(rig) == Revived(3, 0, NOBODY | {"endpoint_held": 3})
    with pytest.raises(Conflict, match=f"crmbridge account resume {account['id']} --deliveries") as refused:
        rig.revive(rig.dead()[0]["id"])
    assert refused.value.code == "endpoint_held"
    rig.unpause(account, "deliveries")
    assert revive(rig).revived == 3
    rig.live_through(120)
    assert sequences(rig) == {"801": [1, 2, 3]}


def test_what_cannot_be_tried_again_is_left_out_with_its_reason(rig: Rig) -> None:
    account = die(rig, {"801": 2})
    first = rig.dead()[0]["id"]
    rig.by_hand("UPDATE events SET payload = NULL")
    rig.by_hand("UPDATE events SET body = NULL WHERE id = (SELECT event_id FROM deliveries WHERE id = ?)", (first,))
    assert dead.page(rig.db, Filter("crm"), after=None, limit=9)[0]["because"] == "content_gone"
    assert revive(rig, preview=True).left_out == NOBODY | {"content_gone": 1}
    rig.change_account(account, url=None)
    turn.end_leftovers(rig.db)
    assert revive(rig) == Revived(2, 0, NOBODY | {"content_gone": 1, "not_pushed": 1})
    turn.delete_account(rig.db, account["id"])
    assert revive(rig) == Revived(2, 0, NOBODY | {"account_deleted": 2})
    with pytest.raises(Conflict) as refused:
        rig.revive(first, force=True)
    assert refused.value.code == "account_deleted"


def test_what_nobody_wants_is_dead_no_more_and_stays_to_be_explained(rig: Rig) -> None:
    account = die(rig, {"801": 3, "802": 1})
    first = rig.dead()[0]
    dead.discard(rig.db, first["id"], by="cli", preview=True)
    assert len(rig.dead()) == 4
    dead.discard(rig.db, first["id"], by="cli")
    with pytest.raises(Conflict) as refused:
        dead.discard(rig.db, first["id"], by="cli")
    assert refused.value.code == "not_dead"
    wanted = Filter("crm", account_id=account["id"])
    assert dead.discard_all(rig.db, wanted, rig.now_s, by="cli", preview=True) == 3
    assert len(rig.dead()) == 3
    assert dead.discard_all(rig.db, wanted, rig.now_s, by="cli") == 3
    rig.live_through(3600)
    assert rig.taken() == []
    ended = rig.db.rows("SELECT state, last_code, latency_ms FROM deliveries")
    assert ended == [{"state": "done", "last_code": "discarded", "latency_ms": None}] * 4
    (told,) = explain.explain(rig.db, first["id"], rig.now_s, rig.patience)["stories"]
    assert "a person wants it no more (dlq discard, by cli)" in [
        step["text"].partition(": ")[2] for step in told["steps"]
    ]


def test_dead_sends_go_out_again_and_those_in_doubt_only_by_force(rig: Rig) -> None:
    account = rig.account()
    for number in range(3):
        rig.meta.fault("messages", status=403, body=wire.error_body(10, "outside of allowed window.", subcode=2534022))
        rig.send(account, f"refused {number}")
        rig.drain()
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.meta.fault("conversations", times=10_000, status=503, body="")
    doubtful = rig.send(account, "doubtful")
    rig.live_through(25 * 3600)
    rig.meta.clear_faults()
    arrived = len(rig.meta.sent)
    assert revive(rig, target="instagram", preview=True) == Revived(4, 3, NOBODY | {"in_doubt": 1})
    revive(rig, target="instagram")
    rig.live_through(60)
    assert [entry.text for entry in rig.meta.sent][arrived:] == [f"refused {number}" for number in range(3)]
    assert rig.status(doubtful)["status"] == "failed"
    rig.revive(
        str(rig.db.value("SELECT id FROM deliveries WHERE message_id = ? AND target = 'instagram'", (doubtful,))),
        force=True,
    )
    rig.live_through(60)
    assert rig.status(doubtful)["status"] == "sent"


def test_a_list_is_a_sum_by_account_target_and_code(rig: Rig, tmp_path: Path) -> None:
    first, second = rig.account(), rig.account(OTHER_ID)
    rig.meet()
    for number in range(3):
        rig.lose(f"lost {number}", f"mid-{number}")
        rig.now_s += 60
    for account, subcode in ((first, 2534022), (second, 2534022), (second, 2018108)):
        rig.meta.fault("messages", status=403, body=wire.error_body(10, "no", subcode=subcode))
        rig.send(account, contact="9001")
        rig.drain()
    deaths = [row["finished_at"] for row in rig.dead()]
    header, *rows, total = typed(tmp_path, "dlq", "list")[1].splitlines()
    assert header.split() == ["ACCOUNT", "TARGET", "CODE", "NUMBER", "OLDEST", "NEWEST"]
    assert [row.split() for row in rows] == [
        [first["id"], "crm", "crm_error", "3", deaths[0], deaths[2]],
        [first["id"], "instagram", "window_closed", "1", deaths[3], deaths[3]],
        [second["id"], "instagram", "recipient_unavailable", "1", deaths[5], deaths[5]],
        [second["id"], "instagram", "window_closed", "1", deaths[4], deaths[4]],
    ]
    assert total == "6 dead letters; --all shows each, with its ID"
    assert typed(tmp_path, "dlq", "list", "--webhooks", "--account", second["id"])[1] == "no dead letters\n"
    every = typed(tmp_path, "dlq", "list", "--all", "--sends")[1].splitlines()
    assert (len(every), every[-1]) == (5, "3 dead letters")


def test_an_operator_lists_previews_and_retries_by_http(shop: Shop) -> None:
    def call(method: str, path: str, body: Any = None) -> Any:
        return shop.call(method, f"/api/v1/admin/dlq/{path}", body, key=shop.admin_key)

    for number in range(3):
        shop.lose(f"dead {number}")
    assert shop.call("GET", "/api/v1/admin/dlq/webhooks").status_code == 403
    first = call("GET", "webhooks?limit=2&code=crm_error").json()
    assert first["has_more"]
    one, two = first["deliveries"]
    assert (one["http_status"], one["retryable"]) == (500, True)
    assert call("POST", f"webhooks/{one['delivery_id']}/retry").json()["state"] == "pending"
    (again,) = shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "dead 0" and entry.answered == 200)
    assert again.event["event_id"] == one["event_id"]
    rest = call("GET", f"webhooks?limit=2&cursor={first['next_cursor']}").json()  # though the first has left the list
    assert [row["sequence"] for row in rest["deliveries"]] == [two["sequence"] + 1]
    assert (rest["next_cursor"], rest["has_more"]) == (None, False)

    preview = call("POST", "webhooks/retry", {"account_id": shop.account_id, "preview": True})
    assert (preview.status_code, preview.json()["revived"]) == (200, 2)
    asked = call("POST", "webhooks/retry")
    assert (asked.status_code, asked.json()) == (202, preview.json() | {"preview": False})
    shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "dead 2" and entry.answered == 200)
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead'", [(0,)])

    key_id = "key_" + shop.admin_key.split("_")[1]
    assert re.search(rf"dlq\.retried delivery={one['delivery_id']} .*by={key_id}", shop.log())
    assert re.search(rf"dlq\.retried target=crm matching=2 revived=2 by={key_id}", shop.log())
    for path, status, slug in (
        (f"webhooks/{one['delivery_id']}/retry", 409, "not_dead"),
        (f"messages/{one['delivery_id']}/retry", 404, "delivery_not_found"),
        ("webhooks/dlv_none/retry", 404, "delivery_not_found"),
    ):
        answer = call("POST", path)
        assert (answer.status_code, answer.json()["error"]) == (status, slug)
    for query, slug in (
        ("cursor=x", "invalid_cursor"),
        ("dead_after=now", "invalid_request"),
        ("limit=0", "invalid_request"),
        ("account_id=acc_none", "account_not_found"),
        ("event=message.recieved", "invalid_request"),
        ("dead_after=2027-01-15T08:00:00Z&dead_before=2027-01-15T07:00:00Z", "invalid_request"),
    ):
        assert call("GET", f"webhooks?{query}").json()["error"] == slug
        if "=" in query and query.partition("=")[0] not in ("cursor", "limit"):
            body = dict(pair.split("=") for pair in query.split("&"))
            assert call("POST", "webhooks/retry", body).json()["error"] == slug


def test_a_dead_send_is_retried_by_its_message_id(shop: Shop) -> None:
    refusal = wire.error_body(10, "outside of allowed window.", subcode=2534022)
    shop.meta.fault("messages", status=403, body=refusal)
    message_id = shop.send("late", "dlq-send").json()["message_id"]
    shop.wait_rows(f"SELECT status FROM outbound_messages WHERE id = '{message_id}'", [("failed",)])
    (row,) = shop.call("GET", "/api/v1/admin/dlq/messages", key=shop.admin_key).json()["deliveries"]
    assert (row["message_id"], row["code"], row["in_doubt"]) == (message_id, "window_closed", False)
    answer = shop.call("POST", f"/api/v1/admin/dlq/messages/{message_id}/retry", {"force": False}, key=shop.admin_key)
    assert (answer.status_code, answer.json()["message_id"]) == (202, message_id)
    shop.meta.wait_sent(1)


def test_an_operator_lists_previews_and_retries_by_command(shop: Shop) -> None:
    for number in range(2):
        shop.lose(f"typed {number}")
    of_late = ("dlq", "list", "--all", "--account", shop.account_id, "--newer-than", "1h")
    header, first, _, total = shop.bridge.command(*of_late).splitlines()
    assert total == "2 dead letters"
    assert header.split()[:3] == ["ID", "DIED", "AGE"]
    assert "crm_error" in first
    assert shop.bridge.command("dlq", "list", "--older-than", "1h") == "no dead letters"
    delivery_id = first.split()[0]
    for options in (("--preview", delivery_id), (delivery_id, "--preview", "--force")):
        assert shop.bridge.command("dlq", "retry", *options) == f"would be revived {delivery_id}"
    assert shop.rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead'") == [(2,)]
    assert shop.bridge.command("dlq", "retry", delivery_id) == f"revived  {delivery_id}"
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead'", [(1,)])
    assert "a person had it tried again (dlq retry, by cli)" in shop.bridge.command("explain", delivery_id)
    words = ("dlq", "retry", "--all", "--webhooks", "--code", "crm_error")
    assert shop.bridge.command(*words, "--preview") == "webhooks: 1 match, 1 to be revived"
    assert shop.bridge.command(*words) == "webhooks: 1 match, 1 revived"
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead'", [(0,)])
