"""Dead letters: listed, counted, asked for by the hundred, and delivered in order behind live traffic."""

import re
from collections import defaultdict
from typing import Any

import pytest

from crmbridge.errors import Conflict
from crmbridge.events import instant
from crmbridge.ops import explain
from crmbridge.sandbox import wire
from crmbridge.store import accounts, dead, deliveries, inbound, pauses, turn
from crmbridge.store.dead import Asked, Filter
from tests.rig import Rig
from tests.shop import Shop

NOBODY = {"account_deleted": 0, "content_gone": 0, "not_pushed": 0, "in_doubt": 0}


def die(rig: Rig, lanes: dict[str, int]) -> dict[str, Any]:
    """Have a CRM be dead for 25 hours while customers write; return its account. The CRM is well again afterwards."""
    account = rig.account()
    rig.crm.answer_always(503)
    for number in range(max(lanes.values())):
        for contact, messages in lanes.items():
            if number < messages:
                rig.say(f"{contact} {number}", f"mid-{contact}-{number}", contact=contact)
    rig.live_through(25 * 3600)
    turn.expire(rig.db, rig.now_s, rig.patience)
    assert {row["state"] for row in rig.db.rows("SELECT state FROM deliveries")} == {"dead"}
    rig.crm.answer_always(None)
    rig.crm.reset()
    return account


def restart(rig: Rig) -> None:
    """Go on with an engine that has not seen the CRM dead."""
    rig.engine.stop(0)
    rig.engine = rig.make_engine()


def ask(rig: Rig, *, preview: bool = False, force: bool = False, target: Any = "crm", **wanted: Any) -> Asked:
    return dead.ask(rig.db, Filter(target, **wanted), rig.now_s, force=force, preview=preview)


def sequences(rig: Rig) -> dict[str, list[int]]:
    """Return the numbers that the CRM took, by customer, as they came."""
    found: dict[str, list[int]] = defaultdict(list)
    for entry in rig.taken():
        found[entry.event["sender_id"]].append(entry.event["sequence"])
    return found


def test_what_died_is_asked_for_and_comes_in_order_with_the_same_id_and_bytes(rig: Rig) -> None:
    die(rig, {"801": 45, "802": 3, "803": 1})
    bodies = {row["event_id"]: row["body"] for row in rig.dead()}
    assert ask(rig, preview=True) == Asked(49, 49, 0, NOBODY)
    assert rig.drain() is None  # a preview changes nothing
    assert ask(rig) == Asked(49, 49, 0, NOBODY)
    assert ask(rig) == Asked(49, 0, 49, NOBODY)
    rig.live_through(60)
    assert sequences(rig) == {"801": [*range(1, 46)], "802": [1, 2, 3], "803": [1]}
    taken = {entry.event["event_id"]: entry.body.decode() for entry in rig.taken()}
    assert set(taken) == set(bodies)
    assert all(taken[event_id] == body for event_id, body in bodies.items() if body)  # of those that had been tried
    assert rig.db.value("SELECT COUNT(*) FROM deliveries WHERE retry_asked_at IS NOT NULL") == 0
    assert {row["state"] for row in rig.db.rows("SELECT state FROM deliveries")} == {"done"}


def test_replays_keep_to_their_rate_and_live_messages_do_not_wait_for_it(rig: Rig) -> None:
    die(rig, {f"8{number:02}": 2 for number in range(40)})
    restart(rig)
    ask(rig)
    rig.drain()
    assert len(rig.taken()) == 20  # a burst
    for number in range(8):
        rig.now_s += 0.125
        rig.say("new", f"mid-new-{number}", contact="900")
        before = len(rig.taken())
        rig.drain()
        assert "new" in [entry.event["message"] for entry in rig.taken()[before : before + 3]]  # the first three calls
    assert len(rig.taken()) == 20 + 8 + 20
    rig.live_through(2.1)
    assert len(rig.taken()) == 80 + 8


def test_what_comes_new_in_a_lane_that_is_replayed_waits_its_turn(rig: Rig) -> None:
    die(rig, {"801": 30})
    restart(rig)
    ask(rig)
    rig.drain()
    assert len(rig.taken()) == 20
    rig.say("new", "mid-new", contact="801")
    rig.drain()  # at once: what is new makes its conversation go ahead of the rate
    assert sequences(rig) == {"801": [*range(1, 32)]}


def test_replays_wait_for_an_endpoint_that_is_down_and_try_it_by_a_single_lane(rig: Rig) -> None:
    die(rig, {"801": 2, "802": 2, "803": 2})
    rig.crm.answer_always(503)
    ask(rig)
    rig.live_through(120)
    assert {entry.event["sender_id"] for entry in rig.crm.received} == {"801"}
    rig.crm.answer_always(None)
    rig.crm.reset()
    rig.live_through(120)
    assert sequences(rig) == {"801": [1, 2], "802": [1, 2], "803": [1, 2]}


def test_a_worker_that_dies_amid_a_replay_loses_nothing(rig: Rig) -> None:
    account = die(rig, {"801": 25, "802": 2})
    restart(rig)
    ask(rig)
    rig.drain()
    assert len(rig.taken()) == 20
    row = rig.db.row("SELECT * FROM deliveries WHERE state = 'pending' AND ready = 1")
    assert row is not None
    times = {"now": instant(rig.now_s), "lease_until": instant(rig.now_s + 90)}
    body = inbound.crm_body(rig.db, account, row)
    rig.db.write(lambda: deliveries.claim(rig.db, row, account, body, **times))
    restart(rig)
    assert rig.engine.recover() == 1
    rig.live_through(60)
    assert sequences(rig) == {"801": [*range(1, 26)], "802": [1, 2]}


def test_what_dies_again_is_dead_again_and_may_be_asked_for_again(rig: Rig) -> None:
    die(rig, {"801": 1, "802": 1})
    rig.crm.answer_always(503)
    ask(rig)
    rig.live_through(52 * 3600)
    turn.expire(rig.db, rig.now_s, rig.patience)
    assert [(row["last_code"], row["retry_asked_at"]) for row in rig.dead()] == [("crm_error", None)] * 2
    rig.crm.clear_answers()
    assert ask(rig, code="crm_error").asked == 2
    rig.live_through(120)
    assert rig.dead() == []


def test_a_message_that_the_crm_cannot_take_holds_no_other_replay_up_for_long(rig: Rig) -> None:
    die(rig, {"801": 3, "802": 1})
    rig.crm.answer(500, times=1000, containing="801 0")
    ask(rig)
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
        before = ask(rig, preview=True, **wanted)
        found = ask(rig, **wanted)
        assert found == before
        assert found.matching == len(dead.page(rig.db, Filter("crm", **wanted), after=None, limit=200))
        assert found.asked == rig.db.run("UPDATE deliveries SET retry_asked_at = NULL WHERE retry_asked_at IS NOT NULL")
    assert ask(rig, target="instagram").matching == 0


def test_a_paused_endpoint_gets_no_replay_until_it_is_resumed(rig: Rig) -> None:
    account, now = die(rig, {"801": 3}), instant(rig.now_s)
    rig.db.write(lambda: pauses.pause(rig.db, account["id"], "crm", reason=None, until=None, now=now))
    ask(rig)
    rig.live_through(3600)
    assert rig.crm.received == []
    pauses.resume(rig.db, account["id"], "crm", now=instant(rig.now_s), patience=rig.patience)
    rig.live_through(120)
    assert sequences(rig) == {"801": [1, 2, 3]}


def test_what_cannot_be_tried_again_is_left_out_with_its_reason(rig: Rig) -> None:
    account = die(rig, {"801": 2})
    first, second = [row["id"] for row in rig.dead()]
    rig.db.run("UPDATE inbound_events SET payload = NULL")
    rig.db.run("UPDATE deliveries SET body = NULL WHERE id = ?", (first,))
    assert dead.page(rig.db, Filter("crm"), after=None, limit=9)[0]["because"] == "content_gone"
    rig.db.run("UPDATE deliveries SET body = '{}' WHERE id = ?", (second,))
    assert ask(rig).left_out == NOBODY | {"content_gone": 1}
    accounts.update(rig.db, account["id"], {"crm_webhook_url": None}, instant(rig.now_s), rig.patience)
    turn.end_leftovers(rig.db, rig.now_s)
    assert ask(rig) == Asked(2, 0, 0, NOBODY | {"content_gone": 1, "not_pushed": 1})
    turn.delete_account(rig.db, account["id"], rig.now_s)
    assert ask(rig) == Asked(2, 0, 0, NOBODY | {"account_deleted": 2})
    with pytest.raises(Conflict) as refused:
        dead.revive(rig.db, first, rig.now_s, rig.patience, force=True)
    assert refused.value.code == "account_deleted"


def test_content_that_goes_while_its_row_waits_stops_no_other(rig: Rig) -> None:
    die(rig, {"801": 2})
    ask(rig)
    gone, _ = [row["id"] for row in rig.dead()]
    rig.db.run(
        "UPDATE inbound_events SET payload = NULL WHERE id = (SELECT event_id FROM deliveries WHERE id = ?)", (gone,)
    )
    rig.db.run("UPDATE deliveries SET body = NULL WHERE id = ?", (gone,))
    rig.live_through(120)
    assert [(row["id"], row["retry_asked_at"]) for row in rig.dead()] == [(gone, None)]
    assert len(rig.taken()) == 1


def test_what_nobody_wants_is_dead_no_more_and_stays_to_be_explained(rig: Rig) -> None:
    account = die(rig, {"801": 3, "802": 1})
    first = rig.dead()[0]
    ask(rig)
    dead.discard(rig.db, first["id"], rig.now_s, by="cli", preview=True)
    assert len(rig.dead()) == 4
    dead.discard(rig.db, first["id"], rig.now_s, by="cli")
    with pytest.raises(Conflict) as refused:
        dead.discard(rig.db, first["id"], rig.now_s, by="cli")
    assert refused.value.code == "not_dead"
    wanted = Filter("crm", account_id=account["id"])
    assert dead.discard_all(rig.db, wanted, rig.now_s, by="cli", preview=True) == 3
    assert len(rig.dead()) == 3
    assert dead.discard_all(rig.db, wanted, rig.now_s, by="cli") == 3
    rig.live_through(3600)
    assert rig.taken() == []
    ended = rig.db.rows("SELECT state, last_code, latency_ms, retry_asked_at FROM deliveries")
    assert ended == [{"state": "done", "last_code": "discarded", "latency_ms": None, "retry_asked_at": None}] * 4
    (told,) = explain.explain(rig.db, first["id"], rig.now_s)["stories"]
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
    assert ask(rig, target="instagram", preview=True) == Asked(4, 3, 0, NOBODY | {"in_doubt": 1})
    ask(rig, target="instagram")
    rig.live_through(60)
    assert [entry.text for entry in rig.meta.sent][arrived:] == [f"refused {number}" for number in range(3)]
    assert rig.status(doubtful)["status"] == "failed"
    assert ask(rig, target="instagram", force=True).asked == 1
    rig.live_through(60)
    assert rig.status(doubtful)["status"] == "sent"


def test_an_operator_lists_previews_and_retries_by_http(shop: Shop) -> None:
    def call(method: str, path: str, body: Any = None) -> Any:
        return shop.call(method, f"/api/v1/admin/dlq/{path}", body, key=shop.admin_key)

    for number in range(3):
        shop.lose(f"dead {number}")
    assert shop.call("GET", "/api/v1/admin/dlq/webhooks").status_code == 403
    first = call("GET", "webhooks?limit=2&code=crm_error").json()
    assert first["has_more"]
    one, two = first["deliveries"]
    assert (one["http_status"], one["retryable"], one["retry_asked_at"]) == (500, True, None)
    assert call("POST", f"webhooks/{one['delivery_id']}/retry").json()["state"] == "pending"
    (again,) = shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "dead 0" and entry.answered == 200)
    assert again.event["event_id"] == one["event_id"]
    rest = call("GET", f"webhooks?limit=2&cursor={first['next_cursor']}").json()  # though the first has left the list
    assert [row["sequence"] for row in rest["deliveries"]] == [two["sequence"] + 1]
    assert (rest["next_cursor"], rest["has_more"]) == (None, False)

    preview = call("POST", "webhooks/retry", {"account_id": shop.account_id, "preview": True})
    assert (preview.status_code, preview.json()["asked"]) == (200, 2)
    asked = call("POST", "webhooks/retry")
    assert (asked.status_code, asked.json()) == (202, preview.json() | {"preview": False})
    shop.crm.wait(1, where=lambda entry: entry.event.get("message") == "dead 2" and entry.answered == 200)
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead'", [(0,)])

    key_id = "key_" + shop.admin_key.split("_")[1]
    assert re.search(rf"dlq\.retried delivery={one['delivery_id']} .*by={key_id}", shop.log())
    assert re.search(rf"dlq\.retry_asked target=crm matching=2 asked=2 by={key_id}", shop.log())
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
    words = ("dlq", "list", "--account", shop.account_id, "--newer-than", "1h")
    header, first, _, total = shop.bridge.command(*words).splitlines()
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
    assert shop.bridge.command(*words, "--preview") == "webhooks: 1 match, 1 to be asked for, 0 before"
    assert shop.bridge.command(*words) == "webhooks: 1 match, 1 asked for, 0 before"
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead'", [(0,)])
