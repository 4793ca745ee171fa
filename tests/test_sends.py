"""Sends on a set clock, against the sandbox: errors, limits, order, and what is done when nobody says what became."""

from dataclasses import replace
from typing import Any

import pytest

from crmbridge.delivery import Schedule, decide
from crmbridge.errors import Conflict
from crmbridge.sandbox import wire
from crmbridge.store import endpoints, turn
from crmbridge.store.deliveries import Outcome, Patience
from tests.rig import LIMITS, SCHEDULE, Rig
from tests.shop import CUSTOMER, OTHER_ID, OTHER_SCOPED_ID, OTHER_TOKEN, SHOP_ID, TOKEN

DAY_S = 86_400
OTHER_CUSTOMER = "900000000000002"
TRANSIENT = wire.error_body(2, "An unexpected error has occurred. Please retry your request later.")
REFUSED_FOR_NOW = wire.error_body(
    2, "An unexpected error has occurred. Please retry your request later.", is_transient=False
)
schedule = Schedule(**SCHEDULE, patience=Patience(DAY_S, DAY_S))  # type: ignore[arg-type]


def test_a_send_goes_out_and_the_crm_hears_of_it(rig: Rig) -> None:
    message_id = rig.send(rig.account(), "good day")
    rig.drain()
    (sent,) = rig.meta.sent
    assert (sent.recipient_id, sent.text) == (CUSTOMER, "good day")
    status = rig.status(message_id)
    assert (status["status"], status["instagram_message_id"]) == ("sent", sent.mid)
    assert [step["status"] for step in status["status_history"]] == ["pending", "sent"]
    assert rig.events() == ["message.sent"]


def test_three_retries_then_failed_and_the_crm_is_told(rig: Rig) -> None:
    message_id = rig.send(rig.account())
    rig.meta.fault("messages", times=10, status=400, body=REFUSED_FOR_NOW)
    rig.live_through(300)
    status = rig.status(message_id)
    assert status["status"] == "failed"
    assert status["error"]["code"] == "instagram_unavailable"
    assert (status["attempt_count"], status["retry_count"]) == (4, 3)
    assert [entry["outcome"] for entry in status["attempts"]] == ["retry"] * 4
    assert rig.events() == ["message.failed"]
    assert rig.taken()[0].event["error"]["code"] == "instagram_unavailable"


def test_a_permanent_error_fails_at_once(rig: Rig) -> None:
    message_id = rig.send(rig.account())
    window = wire.error_body(10, "This message is sent outside of allowed window.", subcode=2534022)
    rig.meta.fault("messages", status=403, body=window)
    rig.drain()
    status = rig.status(message_id)
    assert (status["status"], status["error"]["code"], status["error"]["retryable"]) == (
        "failed",
        "window_closed",
        False,
    )
    assert len(rig.meta.calls) == 1


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (429, "", {"Retry-After": "7"}),
        (429, TRANSIENT, None),
        (400, wire.error_body(4, "Application request limit reached"), None),
        (400, wire.error_body(613, "The request volume is inconsistent", subcode=1996), None),
    ],
)
def test_an_unavailable_instagram_uses_up_no_retry(
    rig: Rig, status: int, body: dict | str, headers: dict | None
) -> None:
    message_id = rig.send(rig.account())
    rig.meta.fault("messages", times=8, status=status, body=body, headers=headers)
    rig.live_through(2 * 3600)
    found = rig.status(message_id)
    assert found["status"] == "sent"
    assert len(rig.meta.sent) == 1
    assert rig.db.value("SELECT retries FROM deliveries WHERE target = 'instagram'") == 0


@pytest.mark.parametrize(
    ("headers", "rests_s"),
    [
        ({"X-App-Usage": '{"call_count":28,"total_time":25,"total_cputime":25}'}, 0),
        ({"X-App-Usage": '{"call_count":93}'}, 5),
        ({"X-Business-Use-Case-Usage": '{"17":[{"type":"instagram","call_count":100}]}'}, 60),
        ({"X-Business-Use-Case-Usage": '{"17":[{"total_time":101,"estimated_time_to_regain_access":19}]}'}, 1140),
        ({"X-Business-Use-Case-Usage": '{"17":[{"call_count":100,"estimated_time_to_regain_access":1e999}]}'}, 60),
        ({"X-App-Usage": "[1]", "X-Business-Use-Case-Usage": '{"a":{"b":true},"call_count":"100"}'}, 0),
    ],
)
def test_an_account_near_its_limit_is_left_alone(rig: Rig, headers: dict, rests_s: float) -> None:
    account = rig.account()
    accepted = {"recipient_id": CUSTOMER, "message_id": "mid-of-ours"}
    rig.meta.fault("messages", status=200, body=accepted, headers=headers)
    rig.send(account, "one")
    rig.drain()
    second = rig.send(account, "two", contact=OTHER_CUSTOMER)
    if rests_s:
        rig.pass_s(rests_s - 1)
        assert rig.status(second)["attempt_count"] == 0
        rig.pass_s(1.1)
    else:
        rig.drain()
    assert rig.status(second)["status"] == "sent"


def test_sends_of_one_account_are_paced(rig: Rig) -> None:
    account = rig.account()
    rig.engine = rig.make_engine(limits=replace(LIMITS, per_s={"instagram": 2}))
    for number in range(6):
        rig.send(account, f"{number}", contact=f"80{number}")
    rig.drain()
    assert len(rig.meta.sent) <= 1
    for _ in range(6):
        rig.pass_s(0.5)
    assert 4 <= len(rig.meta.sent) <= 6


def test_audio_and_video_of_an_account_begin_at_most_ten_times_a_second_and_hold_up_no_text(rig: Rig) -> None:
    account = rig.account()
    rig.meta.add_account(OTHER_ID, token=OTHER_TOKEN, app_scoped_id=OTHER_SCOPED_ID, username="other_shop")
    other = rig.account(OTHER_ID, token=OTHER_TOKEN)
    waits_s: list[float] = []
    rig.rooms.client.pause = waits_s.append
    for number in range(24):
        kind = "audio" if number % 2 else "video"
        body = {
            "account_id": other["id"] if number == 23 else account["id"],
            "recipient_id": f"80{number}",
            "idempotency_key": f"media-{number}",
            "attachments": [{"type": kind, "url": f"https://media.example.com/{number}"}],
        }
        assert rig.call("POST", "/api/v1/messages/send", body)[0] == 202
        rig.send(account, f"{number}", contact=f"90{number}")
    rig.drain()
    assert len(rig.meta.sent) == 48
    assert sorted(round(wait_s, 3) for wait_s in waits_s) == [0.0, *(number / 10 for number in range(23))]


def test_instagram_unavailable_for_longer_than_a_day_ends_as_failed(rig: Rig) -> None:
    message_id = rig.send(rig.account())
    rig.meta.fault("messages", times=10_000, status=503, body="")
    rig.live_through(25 * 3600)
    assert rig.status(message_id)["status"] == "failed"


def test_sends_to_one_customer_keep_their_order(rig: Rig) -> None:
    account = rig.account()
    rig.meta.fault("messages", status=400, body=REFUSED_FOR_NOW)
    rig.send(account, "one")
    rig.drain()
    rig.send(account, "two")
    rig.send(account, "three")
    rig.send(account, "elsewhere", contact=OTHER_CUSTOMER)
    rig.live_through(30)
    assert [entry.text for entry in rig.meta.sent if entry.recipient_id == CUSTOMER] == ["one", "two", "three"]
    assert rig.meta.sent[0].text == "elsewhere"


def test_a_send_in_doubt_is_not_repeated_and_its_echo_settles_it(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "cafe\u0301 ")  # the echo comes back composed and trimmed
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    assert rig.status(message_id)["status"] == "pending"
    rig.send(account, "the next one")
    rig.pass_s(3)
    assert len(rig.meta.sent) == 1  # the lane waits
    mid = str(rig.meta.sent[0].mid)
    rig.echo("café", mid)
    rig.drain()
    status = rig.status(message_id)
    assert (status["status"], status["instagram_message_id"]) == ("delivered", mid)
    assert [entry.text for entry in rig.meta.sent] == ["cafe\u0301 ", "the next one"]


def test_a_send_in_doubt_without_an_echo_is_found_in_the_conversation(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.live_through(60)
    status = rig.status(message_id)
    assert (status["status"], status["instagram_message_id"]) == ("sent", rig.meta.sent[0].mid)
    assert len(rig.meta.sent) == 1
    assert [entry["outcome"] for entry in status["attempts"]] == ["in_doubt", "done"]
    assert status["attempt_count"] == 1


def test_a_send_in_doubt_that_never_arrived_is_sent_again_after_two_look_ups(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    message_id = rig.send(account, "hello")
    rig.meta.fault("messages", drop=True)
    rig.live_through(34)
    assert rig.meta.sent == []
    rig.live_through(10)
    assert [entry.text for entry in rig.meta.sent] == ["hello"]
    status = rig.status(message_id)
    assert status["status"] == "sent"
    assert [entry["outcome"] for entry in status["attempts"]] == ["in_doubt", "absent", "absent", "done"]


def test_sends_that_never_arrive_end_as_failed_after_their_retries(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    message_id = rig.send(account, "hello")
    rig.meta.fault("messages", times=100, drop=True)
    rig.live_through(3600)
    status = rig.status(message_id)
    assert (status["status"], status["error"]["code"], status["attempt_count"]) == ("failed", "connection_lost", 4)
    assert rig.meta.sent == []


def test_an_earlier_message_with_the_same_text_is_not_taken_for_the_one_in_doubt(rig: Rig) -> None:
    account = rig.account()
    rig.send(account, "ok")
    rig.drain()
    rig.now_s += 1
    second = rig.send(account, "ok")
    rig.meta.fault("messages", drop=True)
    rig.live_through(60)
    assert len(rig.meta.sent) == 2
    assert rig.status(second)["instagram_message_id"] == rig.meta.sent[1].mid


@pytest.mark.parametrize(("later", "status"), [(18, "sent"), (25, "failed")])
def test_a_send_that_moved_out_of_sight_is_not_taken_for_absent(rig: Rig, later: int, status: str) -> None:
    message_id = rig.send(rig.account(), "hello")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    rig.meta.callback_url = "http://127.0.0.1:1/"
    for number in range(later):
        rig.now_s += 1
        rig.meta.customer_says(SHOP_ID, CUSTOMER, f"impatient {number}")
    rig.live_through(120)
    assert [entry.text for entry in rig.meta.sent] == ["hello"]
    assert rig.status(message_id)["status"] == status


@pytest.mark.parametrize(
    ("http", "body", "state"),
    [
        (400, REFUSED_FOR_NOW, "forwarded"),
        (500, TRANSIENT, "held"),
        (500, wire.error_body(1, "x"), "held"),
        (502, "<html>", "held"),
    ],
)
def test_an_echo_proves_a_send_that_got_an_error_and_is_not_settled(rig: Rig, http: int, body: Any, state: str) -> None:
    message_id = rig.send(rig.account(), "hello")
    rig.meta.fault("messages", status=http, body=body, after_effect=True)
    rig.drain()
    assert rig.echo("something else", "mid-other")[0].state == state
    assert rig.echo("hello", str(rig.meta.sent[0].mid))[0].state == "noted"
    rig.live_through(300)
    assert len(rig.meta.sent) == 1
    assert rig.status(message_id)["status"] == "delivered"


def test_a_worker_that_dies_in_every_call_does_not_send_forever(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    for _ in range(10):
        for row in rig.due("instagram", account):
            rig.claim(row, account)
        rig.engine.recover()
        rig.now_s += 40
    rig.live_through(300)
    assert rig.status(message_id)["attempt_count"] <= 5


def test_a_look_up_that_comes_too_late_changes_nothing(rig: Rig) -> None:
    account = rig.account()
    first = rig.send(account, "ok")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    (row,) = rig.db.rows("SELECT * FROM deliveries WHERE target = 'instagram'")
    late = rig.claim(row, account)
    assert late.kind == "look_up"
    mid = str(rig.meta.sent[0].mid)
    rig.echo("ok", mid)
    assert rig.status(first)["attempts"][-1]["outcome"] == "abandoned"
    outcome = Outcome("done", external_id="the id of another message")
    finished = turn.Finished(late, outcome, decide(late, outcome, schedule, rig.now_s, lambda: 1.0))
    found = rig.settle(finished)
    assert found.fenced == [late]
    assert rig.status(first)["instagram_message_id"] == mid


def test_a_look_up_that_fails_by_our_own_fault_ends_in_doubt_too(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    rig.break_seal("instagram")
    rig.live_through(25 * 3600)
    assert rig.status(message_id)["error"]["code"] == "in_doubt"
    (row,) = [row for row in rig.dead() if row["target"] == "instagram"]
    with pytest.raises(Conflict, match="twice"):
        rig.revive(row["id"])


def test_two_that_it_may_be_are_left_to_a_person(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "ok")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    rig.rooms.client.send(TOKEN, SHOP_ID, CUSTOMER, {"text": "ok"})  # the shop typed the same in the app
    rig.live_through(120)
    status = rig.status(message_id)
    assert (status["status"], status["error"]["code"]) == ("failed", "in_doubt")
    assert [kind for kind, _ in rig.alerts] == ["in_doubt"]
    assert len(rig.meta.sent) == 2


def test_a_send_that_stays_in_doubt_fails_as_such_and_a_late_echo_still_proves_it(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.meta.fault("conversations", times=10_000, status=503, body="")
    rig.live_through(25 * 3600)
    status = rig.status(message_id)
    assert (status["status"], status["error"]["code"]) == ("failed", "in_doubt")
    assert [kind for kind, _ in rig.alerts if kind != "instagram_down"] == ["in_doubt"]
    rig.echo("hello", str(rig.meta.sent[0].mid))
    rig.drain()
    assert rig.status(message_id)["status"] == "delivered"
    assert rig.events() == ["message.failed", "message.delivered"]
    assert len(rig.meta.sent) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 200, "body": {"error": {"message": "x", "type": "OAuthException", "code": 2}}},
        {"status": 500, "body": wire.error_body(1, "x", subcode=1357046)},
        {"status": 200, "body": "{}"},
    ],
)
def test_answers_that_may_follow_a_delivery_are_in_doubt(rig: Rig, fault: dict) -> None:
    rig.send(rig.account())
    rig.meta.fault("messages", after_effect=True, **fault)
    rig.pass_s(3)
    assert rig.db.value("SELECT in_doubt FROM deliveries WHERE target = 'instagram'") == 1
    rig.live_through(60)
    assert len(rig.meta.sent) == 1


def test_an_echo_before_the_answer_waits_and_then_confirms(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    (row,) = rig.due("instagram", account)
    held = rig.claim(row, account)
    assert rig.echo("hello", "mid-of-ours")[0].state == "held"
    assert rig.echo("typed in the app", "mid-of-the-app")[0].state == "held"
    outcome = Outcome("done", external_id="mid-of-ours")
    verdict = decide(held, outcome, schedule, rig.now_s, lambda: 1.0)
    rig.settle(turn.Finished(held, outcome, verdict))
    assert rig.status(message_id)["status"] == "delivered"
    rig.drain()
    assert rig.events() == ["message.sent", "message.delivered", "message.echo"]
    assert rig.taken()[-1].event["message"] == "typed in the app"


def test_a_worker_that_died_in_a_call_repeats_crm_events_but_not_sends(rig: Rig) -> None:
    account = rig.account()
    rig.meet()
    rig.say("hello", "mid-1")
    message_id = rig.send(account, "reply")
    for target in endpoints.KINDS:
        (row,) = rig.due(target, account)
        rig.claim(row, account)
    assert rig.drain() == pytest.approx(90)  # leased: nobody else takes them
    assert rig.engine.recover() == 2
    rig.drain()
    assert rig.events() == ["message.received"]
    assert rig.meta.sent == []
    rig.live_through(30)
    assert rig.meta.sent == []
    rig.live_through(30)
    assert len(rig.meta.sent) == 1
    assert rig.status(message_id)["status"] == "sent"


def test_an_echo_that_came_before_the_worker_died_settles_the_send_at_once(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "reply")
    (row,) = rig.due("instagram", account)
    rig.claim(row, account)
    assert rig.echo("reply", "mid-of-ours")[0].state == "held"
    rig.engine.recover()
    rig.drain()
    assert rig.status(message_id)["status"] == "delivered"
    assert rig.events() == ["message.sent", "message.delivered"]


def test_a_send_in_doubt_is_revived_only_by_force(rig: Rig) -> None:
    message_id = rig.send(rig.account(), "hello")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.meta.fault("conversations", times=10_000, status=503, body="")
    rig.live_through(25 * 3600)
    (row,) = [row for row in rig.dead() if row["message_id"] == message_id and row["target"] == "instagram"]
    with pytest.raises(Conflict, match="twice"):
        rig.revive(row["id"])
    rig.revive(row["id"], force=True)
    rig.drain()
    assert rig.status(message_id)["status"] == "sent"
    assert len(rig.meta.sent) == 2
