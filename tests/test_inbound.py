"""What Meta posts, and what becomes of it: reading, routing, duplicates, receipts."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crmbridge.errors import Forbidden, Invalid, Unauthorized
from crmbridge.events import ChannelEvent
from crmbridge.instagram import webhook
from crmbridge.sandbox import wire
from crmbridge.store import accounts, bodies, inbound
from tests.rig import START_S, Rig
from tests.shop import CUSTOMER, OTHER_ID, SHOP_ID

NOW = "2027-01-15T08:00:00.000Z"
MS = 1_770_000_000_000
PARTIES = {"sender": {"id": CUSTOMER}, "recipient": {"id": SHOP_ID}, "timestamp": MS}
ECHO = {"sender": {"id": SHOP_ID}, "recipient": {"id": CUSTOMER}, "timestamp": MS}


def read(*items: Any, **entry: Any) -> list[ChannelEvent]:
    body = {"object": "instagram", "entry": [{"time": MS, "id": SHOP_ID, "messaging": list(items), **entry}]}
    return webhook.read(json.dumps(body).encode(), NOW)


def message(**fields: Any) -> dict[str, Any]:
    return {**PARTIES, "message": {"mid": "m1", **fields}}


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        (message(text="hi"), {"kind": "message.received", "text": "hi", "message_type": "text", "contact": CUSTOMER}),
        (message(text="hi", attachments=[]), {"kind": "message.received", "message_type": "text"}),
        (
            message(attachments=[{"type": "image", "payload": {"url": "https://cdn.example/1"}}]),
            {"kind": "message.received", "text": None, "message_type": "image"},
        ),
        (message(attachments=[{"type": "like_heart"}]), {"kind": "message.received", "message_type": "like_heart"}),
        (message(attachments=[{"type": "newest_thing", "payload": None}]), {"message_type": "newest_thing"}),
        (message(text="re", reply_to={"mid": "m0", "is_self_reply": False}), {"kind": "message.received"}),
        (message(text="re", reply_to={"story": {"url": "https://s.example", "id": "178"}}), {"text": "re"}),
        (
            {**ECHO, "message": {"mid": "m1", "text": "yo", "is_echo": True}},
            {"kind": "message.echo", "contact": CUSTOMER},
        ),
        ({**PARTIES, "read": {"mid": "m1"}}, {"kind": "message.read", "external_id": "m1", "contact": CUSTOMER}),
        (message(is_deleted=True), {"kind": "message.deleted", "external_id": "m1", "contact": CUSTOMER}),
        (message(is_unsupported=True), {"kind": "message.unsupported", "external_id": "m1"}),
        (message(), {"kind": "message.unsupported"}),
        ({**PARTIES, "reaction": {"mid": "m1", "action": "react"}}, {"kind": "message.reaction"}),
        ({**PARTIES, "reaction": {"action": "react"}}, {"kind": "message.unsupported"}),
        ({"message_edit": {"mid": "m1", "num_edit": 0}}, {"kind": "message.unsupported", "contact": ""}),
        ({**PARTIES, "sender": {"id": int(CUSTOMER)}, "message": {"mid": "m", "text": "n"}}, {"contact": CUSTOMER}),
        ("not an object", {"kind": "message.unsupported", "raw": "not an object"}),
        (None, {"kind": "message.unsupported"}),
    ],
)
def test_one_item_becomes_one_event(item: Any, wanted: dict[str, Any]) -> None:
    (event,) = read(item)
    assert event.external_account_id == SHOP_ID
    assert {name: getattr(event, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("given_time", "wanted"),
    [
        (MS, "2026-02-02T02:40:00.000Z"),
        (MS + 7, "2026-02-02T02:40:00.007Z"),
        (MS // 1000, "2026-02-02T02:40:00.000Z"),
        (str(MS // 1000), "2026-02-02T02:40:00.000Z"),
        ("2026-02-02T02:40:00+0000", "2026-02-02T02:40:00.000Z"),
        (None, "2026-02-02T02:40:00.000Z"),
        ("soon", "2026-02-02T02:40:00.000Z"),
        (True, "2026-02-02T02:40:00.000Z"),
        (10**400, "2026-02-02T02:40:00.000Z"),
        (-5, "2026-02-02T02:40:00.000Z"),
    ],
)
def test_times_come_in_many_forms(given_time: Any, wanted: str) -> None:
    (event,) = read({**message(text="hi"), "timestamp": given_time})
    assert event.occurred_at == wanted


def test_batches_hold_several_accounts_and_one_bad_item_sinks_no_other() -> None:
    entries = [
        {"time": MS, "id": SHOP_ID, "messaging": [message(text="a"), 17, {**message(text="b"), "timestamp": MS + 1}]},
        None,
        {"time": MS, "id": OTHER_ID, "standby": [message(text="c")]},
        {"time": MS // 1000, "id": OTHER_ID, "changes": [{"field": "comments", "value": {"id": "1"}}]},
    ]
    events = webhook.read(json.dumps({"object": "instagram", "entry": entries}).encode(), NOW)
    assert [event.text for event in events if event.kind == "message.received"] == ["a", "b", "c"]
    assert [event.external_account_id for event in events] == [SHOP_ID, SHOP_ID, SHOP_ID, "", OTHER_ID, OTHER_ID]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"5",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b'{"entry":null}',
        b'{"entry":{}}',
        b'{"entry":[]}',
        b'{"entry":[[]]}',
        b'{"entry":[{"id":5,"messaging":{}}]}',
        b"[" * 100_000,
        b'{"entry":' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"entry":[{"id":"1","messaging":[{"message":' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}]}]}",
        b"1" * 5000,
        b'{"entry":[{"id":"1","time":1e999,"messaging":[{"timestamp":NaN}]}]}',
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_signed_rubbish_is_kept_and_raises_nothing(rig: Rig, body: bytes) -> None:
    kept = rig.hear_body(body)
    assert kept
    assert rig.db.value("SELECT COUNT(*) FROM events") == len({entry.event_id for entry in kept})


@pytest.mark.parametrize("bad", ["1" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, '"\\ud83d"'])
def test_one_item_that_cannot_be_read_sinks_no_other(rig: Rig, bad: str) -> None:
    rig.account()
    good = [json.dumps({**PARTIES, "message": {"mid": f"good-{number}", "text": 'good [{"'}}) for number in (1, 2)]
    items = f'{good[0]},{{"sender":{{"id":"1"}},"strange":{bad}}},{good[1]}'
    body = f'{{"object":"instagram","entry":[{{"id":"{SHOP_ID}","time":{MS},"messaging":[{items}]}}]}}'
    rig.hear_body(body.encode())
    rig.drain()
    assert rig.events().count("message.received") == 2
    assert rig.events().count("message.unsupported") == 1


def test_bytes_that_are_no_text_are_kept(rig: Rig) -> None:
    rig.account()
    item = (
        b'{"sender":{"id":"5"},"recipient":{"id":"%s"},"message":{"mid":"m","text":"x\xed\xa0\x80y"}}'
        % SHOP_ID.encode()
    )
    rig.hear_body(b'{"entry":[{"id":"%s","messaging":[%s]}]}' % (SHOP_ID.encode(), item))
    rig.drain()
    assert rig.events() == ["message.received"]


def test_far_more_items_than_meta_sends_cost_no_more_than_a_batch(rig: Rig) -> None:
    kept = rig.hear_body(b'{"entry":[{"id":"1","messaging":[' + b",".join(b"%d" % n for n in range(50_000)) + b"]}]}")
    assert len(kept) == 2001


def test_an_entry_without_items_is_the_same_whenever_it_was_sent(rig: Rig) -> None:
    for time in (MS, MS + 1000):
        body = {
            "object": "instagram",
            "entry": [{"id": SHOP_ID, "time": time, "field": "comments", "value": {"id": "1"}}],
        }
        kept = rig.hear_body(json.dumps(body).encode())
    assert kept[0].state == "duplicate"


def test_rubbish_in_an_accounts_own_entry_reaches_its_crm_as_unsupported(rig: Rig) -> None:
    rig.account()
    deep: Any = 1
    for _ in range(80):
        deep = [deep]
    rig.hear({"strange": deep}, "text", {**PARTIES, "message": {"mid": "m\x00", "text": "\ud83d lone \x00"}})
    rig.drain()
    assert sorted(rig.events()) == ["message.received", "message.unsupported", "message.unsupported"]
    (received,) = [entry.event for entry in rig.taken() if entry.event["event"] == "message.received"]
    assert received["message"] == "? lone \x00"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_known = st.sampled_from(
    [
        "message",
        "read",
        "reaction",
        "postback",
        "sender",
        "recipient",
        "timestamp",
        "mid",
        "text",
        "id",
        "attachments",
        "payload",
        "url",
        "reply_to",
        "story",
        "is_echo",
        "entry",
        "messaging",
        "changes",
        "standby",
        "field",
        "value",
        "from",
        "message_edit",
        "num_edit",
        "is_deleted",
        "postback",
        "referral",
        "watermark",
    ]
)
_shaped = st.recursive(
    _json, lambda inner: st.dictionaries(_known, inner, max_size=5) | st.lists(inner, max_size=3), max_leaves=15
)


_KINDS = ("message", "message_edit", "reaction", "postback", "read", "referral")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    item=_shaped,
    field=_shaped | st.sampled_from(["messages", "comments", "mentions"]),
    account=st.sampled_from([SHOP_ID, "17", None, 5]),
)
def test_any_signed_json_is_kept(rig: Rig, item: Any, field: Any, account: Any) -> None:
    if rig.db.value("SELECT COUNT(*) FROM accounts") == 0:
        rig.account()
    body = {
        "object": "instagram",
        "entry": [
            {"id": account, "time": MS, "messaging": [item, *({**PARTIES, kind: item} for kind in _KINDS)]},
            {"id": account, "time": MS, "changes": [item, {"field": field, "value": item}]},
            item,
        ],
    }
    assert len(rig.hear_body(json.dumps(body).encode())) >= 1 + len(_KINDS) + 3
    assert rig.hear_body(json.dumps(item).encode())
    for row in rig.db.rows("SELECT * FROM events WHERE body IS NULL AND state = 'forwarded'"):
        bodies.of(rig.db, accounts.everyone(rig.db)[0], bodies.found(rig.db, row["id"]))
        rig.by_hand("UPDATE deliveries SET place = 'done', finished_at = due WHERE event_id = ?", (row["id"],))
        rig.by_hand("UPDATE events SET body = '' WHERE id = ?", (row["id"],))


def test_the_same_fact_twice_is_forwarded_once_whatever_the_envelope_says(rig: Rig) -> None:
    rig.account()
    for later_ms in (0, 18_700):
        rig.hear_body(wire.webhook_body(wire.envelope(SHOP_ID, MS + later_ms, message(text="hi"))))
    assert rig.hear(message(text="hi"))[0].state == "duplicate"
    rig.drain()
    assert rig.events() == ["message.received"]


def test_the_crm_gets_every_fact_of_a_message(rig: Rig) -> None:
    account = rig.account()
    rig.say("the first", "mid-0")
    rig.hear(
        rig.item(
            {
                "message": {
                    "mid": "mid-1",
                    "text": "look",
                    "attachments": [
                        {
                            "type": "ig_reel",
                            "payload": {"reel_video_id": 42, "title": "A reel", "url": "https://r.example"},
                        }
                    ],
                    "reply_to": {"mid": "mid-0"},
                }
            },
            at_s=START_S - 3,
        )
    )
    rig.drain()
    first, second = (entry.event for entry in rig.taken())
    assert second == {
        "event": "message.received",
        "event_id": second["event_id"],
        "sequence": 2,
        "account_id": account["id"],
        "timestamp": "2027-01-15T07:59:57.000Z",
        "message_id": "msg_" + second["event_id"][4:],
        "sender_id": CUSTOMER,
        "sender_username": None,
        "recipient_id": SHOP_ID,
        "message": "look",
        "message_type": "ig_reel",
        "instagram_message_id": "mid-1",
        "conversation_id": first["conversation_id"],
        "attachments": [
            {"type": "ig_reel", "url": "https://r.example", "title": "A reel", "instagram_id": "42", "payload": None}
        ],
        "reply_to": {"message_id": first["message_id"], "instagram_message_id": "mid-0", "story": None, "other": None},
        "quick_reply": None,
        "referral": None,
        "is_self": False,
        "window_expires_at": "2027-01-16T08:00:00.000Z",
        "sender_name": None,
        "recovered": False,
        "other": None,
    }


def test_events_of_an_unknown_account_wait_for_it(rig: Rig) -> None:
    rig.say("second", "mid-2", at_s=START_S - 5)
    rig.say("first", "mid-1", at_s=START_S - 9)
    assert rig.drain() is None
    account = rig.account()
    assert inbound.adopt(rig.db, account) == 2
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()] == ["first", "second"]
    assert inbound.adopt(rig.db, account) == 0


def test_what_came_before_the_account_goes_before_what_comes_after(rig: Rig) -> None:
    rig.say("old", "mid-1")
    rig.account()
    rig.say("new", "mid-2")
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()] == ["old", "new"]


def test_an_echo_of_our_send_confirms_it_and_another_is_forwarded(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "hello")
    rig.drain()
    assert rig.echo("hello", str(rig.meta.sent[0].mid))[0].state == "noted"
    assert rig.echo("typed elsewhere", "mid-x")[0].state == "forwarded"
    rig.drain()
    assert rig.status(message_id)["status"] == "delivered"
    assert rig.events() == ["message.sent", "message.delivered", "message.echo"]
    echo = rig.taken()[-1].event
    assert (echo["sender_id"], echo["sender_username"], echo["recipient_id"]) == (SHOP_ID, "your_shop", CUSTOMER)


def test_a_read_of_a_later_message_marks_the_earlier_ones(rig: Rig) -> None:
    account = rig.account()
    ids = []
    for text in ("one", "two", "three"):
        ids.append(rig.send(account, text))
        rig.pass_s(1)
    elsewhere = rig.send(account, "other", contact="900000000000002")
    rig.drain()
    second = next(str(entry.mid) for entry in rig.meta.sent if entry.text == "two")
    # Meta's receipts may carry a time before the message's own.
    rig.hear(rig.item({"read": {"mid": second}}, at_s=START_S - 11))
    assert [rig.status(message_id)["status"] for message_id in ids] == ["read", "read", "sent"]
    assert rig.status(elsewhere)["status"] == "sent"
    status = rig.status(ids[0])
    assert status["read_at"] >= status["sent_at"]
    rig.hear(rig.item({"read": {"mid": second}}, at_s=START_S + 11))
    rig.drain()
    assert rig.events().count("message.read") == 2


def test_a_read_of_a_reply_typed_elsewhere_marks_what_was_sent_before_it(rig: Rig) -> None:
    message_id = rig.send(rig.account(), "hello")
    rig.drain()
    rig.now_s += 5
    rig.echo("typed elsewhere", "mid-x")
    rig.hear(rig.item({"read": {"mid": "mid-unknown"}}))
    assert rig.status(message_id)["status"] == "sent"
    rig.hear(rig.item({"read": {"mid": "mid-x"}}))
    assert rig.status(message_id)["status"] == "read"


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({}, Invalid),
        ({"hub.mode": "subscribe", "hub.challenge": "1"}, Invalid),
        ({"hub.mode": "subscribe", "hub.challenge": "1", "hub.verify_token": "wrong"}, Forbidden),
        ({"hub.mode": "subscribe", "hub.challenge": "1", "hub.verify_token": "ünïcode"}, Forbidden),
        ({"hub.mode": "subscribe", "hub.challenge": "<b>1</b>", "hub.verify_token": "right"}, Invalid),
        ({"hub.mode": "unsubscribe", "hub.challenge": "1", "hub.verify_token": "right"}, Invalid),
    ],
)
def test_a_handshake_that_is_not_metas_is_refused(query: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error):
        webhook.challenge(query, "right")


@pytest.mark.parametrize("separator", [".", "_"])
def test_the_handshake_answers_the_challenge_as_it_came(separator: str) -> None:
    query = {
        f"hub{separator}mode": "subscribe",
        f"hub{separator}challenge": "0042",
        f"hub{separator}verify_token": "right",
    }
    assert webhook.challenge(query, "right") == "0042"


def test_an_empty_verify_token_verifies_nothing() -> None:
    with pytest.raises(Invalid):
        webhook.challenge({"hub.mode": "subscribe", "hub.challenge": "1", "hub.verify_token": ""}, "")


@pytest.mark.parametrize("signature", [None, "", "sha256=", "sha256=00", "sha1=00", "ünïcode"])
def test_only_a_right_signature_over_the_raw_bytes_passes(signature: str | None) -> None:
    body = wire.webhook_body({"text": "é/💡"})
    good = wire.signature_headers("second-secret", body)["X-Hub-Signature-256"]
    webhook.verify(body, good, ["first-secret", "second-secret"])
    for wrong_body, given_signature in ((body, signature), (json.dumps(json.loads(body)).encode(), good)):
        with pytest.raises(Unauthorized):
            webhook.verify(wrong_body, given_signature, ["first-secret", "second-secret"])
    with pytest.raises(Unauthorized):
        webhook.verify(body, good, [])
