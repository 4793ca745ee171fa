"""Sends of every form, on a set clock against the sandbox: their bytes, their limits, their windows, and doubt."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crmbridge.events import instant
from crmbridge.instagram import outgoing
from crmbridge.sandbox import wire
from crmbridge.store import privacy
from tests import rig as rigs
from tests.rig import Rig
from tests.shop import CUSTOMER, SHOP_ID

DAY_S = 86_400
OTHER = "900000000000002"
COMMENT = "17900000000000001"
PICTURE: dict[str, Any] = {"type": "image", "url": "https://cdn.example/lamp.jpg"}
CARD: dict[str, Any] = {
    "title": "Lamp",
    "subtitle": "Oak",
    "image_url": "https://cdn.example/lamp.png",
    "buttons": [
        {"type": "web_url", "url": "https://shop.example/lamp", "title": "See it"},
        {"type": "postback", "title": "Keep one", "payload": "keep:lamp"},
    ],
}
TEMPLATE: dict[str, Any] = {"template_type": "generic", "elements": [CARD]}
CHOICE: dict[str, Any] = {"template_type": "button", "text": "Which one?", "buttons": CARD["buttons"]}


class Desk:
    """An account with a customer who just wrote, and sends through the API."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.account = rig.account()
        self.number = 0
        rig.say("Hello?", "mid-of-the-customer")
        rig.drain()

    def ask(self, **body: Any) -> tuple[int, dict[str, Any]]:
        self.number += 1
        known = {"account_id": self.account["id"], "idempotency_key": f"key-{self.number}"}
        if not body.get("comment_id"):
            known["recipient_id"] = CUSTOMER
        return self.rig.call("POST", "/api/v1/messages/send", {**known, **body})

    def send(self, **body: Any) -> str:
        status, answer = self.ask(**body)
        assert status == 202, answer
        return str(answer["message_id"])

    def status(self, message_id: str) -> tuple[str, str | None]:
        found = self.rig.status(message_id)
        return found["status"], found["error"]["code"] if found["error"] else None

    def comment(self, *, at_s: float | None = None, author: str = CUSTOMER, text: str = "How much?") -> None:
        value = {"id": COMMENT, "text": text, "from": {"id": author, "username": "ada"}}
        value["timestamp"] = int(self.rig.now_s if at_s is None else at_s)  # type: ignore[assignment]
        entry = {"id": SHOP_ID, "time": int(self.rig.now_s), "changes": [{"field": "comments", "value": value}]}
        self.rig.hear_body(wire.webhook_body({"object": "instagram", "entry": [entry]}))


@pytest.fixture
def desk(rig: Rig) -> Desk:
    return Desk(rig)


# --- what reaches Instagram ---

TO = {"id": CUSTOMER}
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"message": "Grüße 👋"}, {"recipient": TO, "message": {"text": "Grüße 👋"}}),
    (
        {"attachments": [PICTURE]},
        {"recipient": TO, "message": {"attachment": {"type": "image", "payload": {"url": PICTURE["url"]}}}},
    ),
    (
        {"attachments": [PICTURE, PICTURE]},
        {"recipient": TO, "message": {"attachments": [{"type": "image", "payload": {"url": PICTURE["url"]}}] * 2}},
    ),
    *(
        (
            {"attachments": [{"type": kind, "url": f"https://cdn.example/{name}"}]},
            {
                "recipient": TO,
                "message": {"attachment": {"type": kind, "payload": {"url": f"https://cdn.example/{name}"}}},
            },
        )
        for kind, name in (("audio", "voice.m4a"), ("video", "lamp.mp4"), ("file", "bill.pdf"), ("image", "show?id=1"))
    ),
    (
        {"attachments": [{"type": "like_heart"}]},
        {"recipient": TO, "message": {"attachment": {"type": "like_heart"}}},
    ),
    (
        {"message": "?", "quick_replies": [{"title": "A", "payload": "p"}]},
        {
            "recipient": TO,
            "message": {"text": "?", "quick_replies": [{"content_type": "text", "title": "A", "payload": "p"}]},
        },
    ),
    *(
        (
            {"template": template},
            {"recipient": TO, "message": {"attachment": {"type": "template", "payload": template}}},
        )
        for template in (TEMPLATE, CHOICE)
    ),
    *(
        ({"action": name}, {"recipient": TO, "sender_action": name})
        for name in ("typing_on", "typing_off", "mark_seen")
    ),
    (
        {"comment_id": COMMENT, "message": "By private message"},
        {"recipient": {"comment_id": COMMENT}, "message": {"text": "By private message"}},
    ),
    ({"message": "hello", "author": {"type": "human"}}, {"recipient": TO, "message": {"text": "hello"}}),
]


@pytest.mark.parametrize(("form", "body"), FORMS, ids=[str(number) for number in range(len(FORMS))])
def test_each_form_reaches_instagram_byte_for_byte(desk: Desk, form: dict[str, Any], body: dict[str, Any]) -> None:
    message_id = desk.send(**form)
    desk.rig.drain()
    (sent,) = desk.rig.meta.sent
    assert sent.body == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    assert desk.status(message_id) == ("sent", None)
    has_id = desk.rig.status(message_id)["instagram_message_id"] is not None
    assert has_id == ("message" in body)
    assert desk.rig.events()[-1] == "message.sent"


def test_reactions_and_replies_name_messages_by_our_ids(desk: Desk) -> None:
    rig = desk.rig
    event = rig.taken()[0].event
    ours = desk.send(message="Good day")
    rig.drain()
    mid = rig.status(ours)["instagram_message_id"]
    sent_event = rig.taken()[-1].event["event_id"]
    for named, meant in [
        (event["message_id"], "mid-of-the-customer"),
        (event["event_id"], "mid-of-the-customer"),
        (ours, mid),
        (sent_event, mid),
    ]:
        desk.send(message="As you said", reply_to=named)
        desk.send(reaction={"message_id": named, "action": "react", "emoji": "❤"})
        desk.send(reaction={"message_id": named, "action": "unreact"})
        rig.drain()
        quote, react, unreact = [json.loads(one.body) for one in rig.meta.sent[-3:]]
        assert quote == {"recipient": TO, "message": {"text": "As you said"}, "reply_to": {"mid": meant}}
        assert react == {
            "recipient": TO, "sender_action": "react", "payload": {"message_id": meant, "reaction": "❤"},
        }  # fmt: skip
        assert unreact == {"recipient": TO, "sender_action": "unreact", "payload": {"message_id": meant}}


def test_a_message_named_must_be_there_be_of_this_customer_and_be_sent(desk: Desk) -> None:
    rig = desk.rig
    waiting = desk.send(message="Good day")
    elsewhere = desk.send(message="Good day", recipient_id=OTHER)
    assert desk.ask(message="x", reply_to=waiting)[1]["error"] == "message_not_sent_yet"
    rig.drain()
    for named in (elsewhere, "msg_" + "0" * 26, "evt_" + "0" * 26):
        for form in ({"message": "x", "reply_to": named}, {"reaction": {"message_id": named, "emoji": "x"}}):
            status, answer = desk.ask(**form)
            assert (status, answer["error"]) == (400, "message_unknown")
            assert answer["details"][0]["field"] in ("reply_to", "reaction.message_id")


# --- what is refused here ---

ENDING = "https://cdn.example/x."
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"message": "ä" * 501}, "message_too_long", "message"),
    ({"attachments": [PICTURE] * 11}, "too_many_attachments", "attachments"),
    ({"attachments": [PICTURE, {"type": "like_heart"}]}, "too_many_attachments", "attachments"),
    *(
        ({"attachments": [{"type": kind, "url": ENDING + ending}]}, "media_type_unsupported", "attachments.0.url")
        for kind, ending in (
            ("image", "webp"), ("image", "PDF?x=1"), ("audio", "mp3"), ("audio", "webm"), ("audio", "ogg"),
            ("video", "mkv"), ("video", "jpg"), ("file", "docx"), ("file", "txt"),
        )
    ),
    ({"attachments": [{"type": "image"}]}, "invalid_request", "attachments.0.url"),
    ({"attachments": [{"type": "like_heart", "url": PICTURE["url"]}]}, "invalid_request", "attachments.0.url"),
    ({"attachments": [{"type": "image", "url": "https://[::1/x.png"}]}, "invalid_request", "attachments.0.url"),
    ({"attachments": [{"type": "sticker", "url": PICTURE["url"]}]}, "invalid_request", "attachments.0.type"),
    ({"attachments": [{"type": "image", "url": "ftp://x/y.png"}]}, "invalid_request", "attachments.0.url"),
    (
        {"message": "?", "quick_replies": [{"title": "A", "payload": "p"}] * 14},
        "too_many_quick_replies", "quick_replies",
    ),
    ({"attachments": [PICTURE], "quick_replies": [{"title": "A", "payload": "p"}]}, "invalid_request", "quick_replies"),
    ({"template": {**TEMPLATE, "elements": [CARD] * 11}}, "too_many_elements", "template.elements"),
    (
        {"template": {**TEMPLATE, "elements": [{**CARD, "title": "x" * 81}]}},
        "template_text_too_long", "template.elements.0.title",
    ),
    (
        {"template": {**TEMPLATE, "elements": [{**CARD, "subtitle": "x" * 81}]}},
        "template_text_too_long", "template.elements.0.subtitle",
    ),
    (
        {"template": {**TEMPLATE, "elements": [{**CARD, "buttons": CARD["buttons"] * 2}]}},
        "too_many_buttons", "template.elements.0.buttons",
    ),
    (
        {"template": {**TEMPLATE, "elements": [{**CARD, "image_url": ENDING + "webp"}]}},
        "media_type_unsupported", "template.elements.0.image_url",
    ),
    ({"template": {"template_type": "generic"}}, "invalid_request", "template.elements"),
    ({"template": {**TEMPLATE, "text": "x"}}, "invalid_request", "template.text"),
    ({"template": {**CHOICE, "text": "x" * 641}}, "template_text_too_long", "template.text"),
    ({"template": {"template_type": "button", "text": "x"}}, "invalid_request", "template.buttons"),
    (
        {"template": {**CHOICE, "buttons": [{"type": "web_url", "title": "x"}]}},
        "invalid_request", "template.buttons.0.url",
    ),
    ({"reaction": {"message_id": "msg_" + "0" * 26}}, "invalid_request", "reaction.emoji"),
    ({"message": "x", "attachments": [PICTURE]}, "invalid_request", "attachments"),
    ({}, "invalid_request", "message"),
    ({"message": "x", "recipient_id": None}, "invalid_request", "recipient_id"),
    ({"message": "x", "comment_id": COMMENT, "recipient_id": CUSTOMER}, "invalid_request", "comment_id"),
    ({"action": "typing_on", "comment_id": COMMENT}, "invalid_request", "comment_id"),
    ({"action": "mark_seen", "reply_to": "msg_" + "0" * 26}, "invalid_request", "reply_to"),
    ({"message": "x", "comment_id": COMMENT, "reply_to": "msg_" + "0" * 26}, "invalid_request", "reply_to"),
    ({"message": "x", "send_before": "soon"}, "invalid_request", "send_before"),
    ({"message": "x", "send_before": "2027-01-15T07:59:59Z"}, "send_before_passed", "send_before"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "slug", "field"), REFUSED, ids=[f"{n}-{r[1]}" for n, r in enumerate(REFUSED)])
def test_what_instagram_would_refuse_is_refused_here(desk: Desk, form: dict[str, Any], slug: str, field: str) -> None:
    for more in ({}, {"dry_run": True}):
        status, answer = desk.ask(**form, **more)
        assert (status, answer["error"]) == (400, slug)
        assert field in [entry["field"] for entry in answer["details"]]
    desk.rig.drain()
    assert desk.rig.meta.calls == []
    assert desk.rig.db.value("SELECT COUNT(*) FROM outbound_messages") == 0


def test_null_is_as_good_as_left_out(desk: Desk) -> None:
    unused = ("comment_id", "attachments", "reaction", "action", "template", "quick_replies", "reply_to", "author")
    nothing = dict.fromkeys((*unused, "send_before", "dry_run", "metadata"))
    first = desk.ask(message="hello", idempotency_key="the-same")[1]
    again = desk.ask(message="hello", idempotency_key="the-same", **nothing)
    assert again[0] == 202, again
    assert again[1]["message_id"] == first["message_id"]
    forms: list[dict[str, Any]] = [
        {"attachments": [{"type": "like_heart", "url": None}]},
        {"template": {**CHOICE, "elements": None}},
        {"template": {"template_type": "generic", "elements": [{"title": "Lamp", "buttons": None, "subtitle": None}]}},
        {"reaction": {"message_id": first["message_id"], "action": "unreact", "emoji": None}},
        {"reaction": {"message_id": first["message_id"], "action": None, "emoji": "love"}},
    ]
    desk.rig.drain()
    for form in forms:
        status, answer = desk.ask(**{**nothing, "message": None, "comment_id": None, **form}, recipient_id=CUSTOMER)
        assert status == 202, answer
    status, answer = desk.ask(**nothing, message=None)
    assert (status, answer["details"][0]["field"]) == (400, "message")


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"message": " \n"}, "message"),
        ({"template": {**CHOICE, "text": "\t"}}, "template.text"),
        ({"template": {"template_type": "generic", "elements": [{"title": " "}]}}, "template.elements.0.title"),
        ({"message": "?", "quick_replies": [{"title": " ", "payload": "x"}]}, "quick_replies.0.title"),
    ],
    ids=["message", "template", "card", "choice"],
)
def test_a_blank_text_is_refused(desk: Desk, form: dict[str, Any], field: str) -> None:
    status, answer = desk.ask(**form)
    assert (status, answer["details"]) == (400, [{"field": field, "problem": "must not be blank"}])


def test_what_meta_does_of_itself_is_a_warning(desk: Desk) -> None:
    status, answer = desk.ask(message="?", quick_replies=[{"title": "x" * 21, "payload": "p"}])
    assert (status, answer["warnings"]) == (202, ["quick_reply_title_cut"])


def test_a_dry_run_checks_all_and_stores_nothing(desk: Desk) -> None:
    status, answer = desk.ask(message="hello", dry_run=True, idempotency_key="the-same")
    ends = instant(desk.rig.now_s + DAY_S)
    assert (status, answer) == (200, {"dry_run": True, "window_expires_at": ends, "warnings": []})
    assert desk.rig.db.value("SELECT COUNT(*) FROM outbound_messages") == 0
    assert desk.ask(message="another", idempotency_key="the-same")[0] == 202
    desk.rig.now_s += DAY_S
    assert desk.ask(message="hello", dry_run=True)[1]["error"] == "window_closed"


def test_a_repetition_is_answered_as_before_whatever_has_closed_since(desk: Desk) -> None:
    said = {"message": "hello", "send_before": instant(desk.rig.now_s + 60), "idempotency_key": "one"}
    first = desk.ask(**said)
    desk.rig.now_s += 2 * DAY_S
    again = desk.ask(**said)
    assert (first[0], again[0]) == (202, 202)
    assert first[1]["message_id"] == again[1]["message_id"]
    assert desk.ask(**{**said, "send_before": instant(desk.rig.now_s)})[1]["error"] == "idempotency_conflict"


# --- windows ---


def test_a_window_closes_a_day_after_the_customer_wrote(desk: Desk) -> None:
    rig, wrote_s = desk.rig, desk.rig.now_s
    rig.meta.window = True
    rig.meta._heard[SHOP_ID, CUSTOMER] = wrote_s
    rig.now_s = wrote_s + DAY_S - 1
    status, answer = desk.ask(message="just in time")
    assert (status, answer["window_expires_at"], answer["warnings"]) == (202, instant(wrote_s + DAY_S), [])
    assert rig.taken()[0].event["window_expires_at"] == answer["window_expires_at"]
    rig.drain()
    assert rig.meta.sent[-1].text == "just in time"
    rig.now_s = wrote_s + DAY_S
    for form in ({"message": "late"}, {"attachments": [PICTURE]}, {"action": "typing_on"}, {"template": TEMPLATE}):
        status, answer = desk.ask(**form)
        assert (status, answer["error"]) == (409, "window_closed")
    assert desk.ask(message="late", author={"type": "bot"})[0] == 409
    assert desk.ask(action="typing_on", author={"type": "human"})[0] == 409  # an action travels alone, without a tag


def test_a_person_may_answer_for_seven_days_and_says_so_only_outside_the_first(desk: Desk) -> None:
    rig, wrote_s = desk.rig, desk.rig.now_s
    rig.meta.window = True
    rig.meta._heard[SHOP_ID, CUSTOMER] = wrote_s
    tags = []
    for at_s in (0, DAY_S - 1, DAY_S, 7 * DAY_S - 1):
        rig.now_s = wrote_s + at_s
        status, answer = desk.ask(message="from a person", author={"type": "human"})
        assert (status, answer["window_expires_at"]) == (202, instant(wrote_s + 7 * DAY_S))
        rig.drain()
        tags.append(rig.meta.sent[-1].payload.get("tag"))
    assert tags == [None, None, "HUMAN_AGENT", "HUMAN_AGENT"]
    rig.now_s = wrote_s + 7 * DAY_S
    assert desk.ask(message="from a person", author={"type": "human"})[1]["error"] == "window_closed"


def test_a_tag_that_is_not_approved_is_told(desk: Desk) -> None:
    rig = desk.rig
    rig.meta.human_agent = False
    rig.now_s += 2 * DAY_S
    message_id = desk.send(message="from a person", author={"type": "human"})
    rig.drain()
    assert rig.meta.sent == []
    assert rig.status(message_id)["attempts"][0]["http_status"] == 403


def test_whether_the_window_is_open_is_decided_again_when_it_is_sent(desk: Desk) -> None:
    rig = desk.rig
    rig.pause(desk.account, "sends", reason="stock")
    status, answer = desk.ask(message="waits")
    assert (status, answer["warnings"]) == (202, ["sends_paused"])
    sends = [desk.send(message=f"waits {number}") for number in range(40)]
    person = desk.send(message="from a person", author={"type": "human"})
    rig.live_through(30 * 3600)
    rig.say("Are you there?", "mid-other", contact=OTHER)
    alive = desk.send(message="to another", recipient_id=OTHER)
    assert rig.unpause(desk.account, "sends") == [True]
    rig.live_through(60)
    assert {desk.status(one) for one in (answer["message_id"], *sends)} == {("failed", "window_closed")}
    told = {(one.text, one.payload.get("tag")) for one in rig.meta.sent}
    assert told == {("to another", None), ("from a person", "HUMAN_AGENT")}
    assert desk.status(person) == desk.status(alive) == ("sent", None)
    assert rig.status(sends[0])["attempts"] == []
    assert rig.events().count("message.failed") == 41


def test_a_customer_who_writes_again_reopens_the_window(desk: Desk) -> None:
    rig = desk.rig
    rig.now_s += 2 * DAY_S
    assert desk.ask(message="late")[0] == 409
    rig.say("Hello again", "mid-2")
    assert desk.ask(message="in time")[0] == 202


def test_a_recipient_never_seen_is_a_warning_and_oneself_is_exempt(desk: Desk) -> None:
    status, answer = desk.ask(message="hello", recipient_id=OTHER)
    assert (status, answer["window_expires_at"], answer["warnings"]) == (202, None, ["recipient_unknown"])
    assert desk.ask(message="hello", recipient_id=OTHER)[1]["warnings"] == ["recipient_unknown"]
    status, answer = desk.ask(message="note", recipient_id=SHOP_ID)
    assert (status, answer["window_expires_at"], answer["warnings"]) == (202, None, [])


def test_a_message_that_became_stale_is_dropped(desk: Desk) -> None:
    rig = desk.rig
    message_id = desk.send(message="We close in ten minutes", send_before=instant(rig.now_s + 600))
    rig.meta.fault("messages", times=100, status=429, body="")
    rig.live_through(1200)
    rig.meta.clear_faults()
    rig.live_through(3600)
    assert desk.status(message_id) == ("failed", "expired")
    assert rig.meta.sent == []


def test_someone_who_types_is_shown_at_once_or_never(desk: Desk) -> None:
    rig = desk.rig
    message_id = desk.send(action="typing_on")
    rig.meta.fault("messages", times=100, status=503, body="")
    rig.live_through(29)
    rig.meta.clear_faults()
    rig.live_through(3600)
    assert desk.status(message_id) == ("failed", "expired")
    assert rig.meta.sent == []


# --- exactly once ---

MEDIA: list[dict[str, Any]] = [
    {"attachments": [PICTURE]},
    {"attachments": [PICTURE] * 3},
    {"attachments": [{"type": "audio", "url": "https://cdn.example/voice.m4a"}]},
    {"attachments": [{"type": "video", "url": "https://cdn.example/x.mp4"}]},
    {"template": TEMPLATE},
    {"template": CHOICE},
]


def echo_of(desk: Desk, number: int) -> str:
    """Have Meta show what was sent; return what became of it."""
    sent = desk.rig.meta.sent[number]
    message = wire.echo_message(str(sent.mid), sent.message)
    (kept,) = desk.rig.hear(desk.rig.item({"message": message}, contact=sent.recipient_id, echo=True))
    return kept.state


@pytest.mark.parametrize("form", [*MEDIA, {"attachments": [{"type": "like_heart"}]}], ids=str)
def test_the_echo_settles_a_send_in_doubt(desk: Desk, form: dict[str, Any]) -> None:
    rig = desk.rig
    rig.meta.fault("messages", after_effect=True, drop=True)
    message_id = desk.send(**form)
    rig.drain()
    assert rig.echo("typed meanwhile", "mid-typed")[0].state == "held"
    assert echo_of(desk, 0) == "noted"
    rig.live_through(120)
    assert desk.status(message_id) == ("delivered", None)
    assert len(rig.meta.sent) == 1
    assert rig.events()[-3:] == ["message.sent", "message.delivered", "message.echo"]


@pytest.mark.parametrize("form", MEDIA, ids=str)
def test_the_conversation_settles_a_send_in_doubt(desk: Desk, form: dict[str, Any]) -> None:
    rig = desk.rig
    rig.meta.fault("messages", after_effect=True, drop=True)
    message_id = desk.send(**form)
    rig.live_through(120)
    assert desk.status(message_id) == ("sent", None)
    assert rig.status(message_id)["instagram_message_id"] == rig.meta.sent[0].mid
    assert len(rig.meta.sent) == 1


@pytest.mark.parametrize("form", MEDIA, ids=str)
def test_what_is_absent_twice_is_sent_again(desk: Desk, form: dict[str, Any]) -> None:
    rig = desk.rig
    desk.send(message="a text before")
    rig.drain()
    rig.meta.fault("messages", drop=True)
    message_id = desk.send(**form)
    rig.live_through(120)
    assert desk.status(message_id) == ("sent", None)
    assert len(rig.meta.sent) == 2


def test_media_that_cannot_be_told_apart_are_left_to_a_person(desk: Desk) -> None:
    rig = desk.rig
    rig.meta.fault("messages", after_effect=True, drop=True)
    message_id = desk.send(attachments=[PICTURE])
    rig.drain()
    rig.rooms.client.send("IGAAtokenofthefirstshop", SHOP_ID, CUSTOMER, {"attachments": [PICTURE]})  # in the app
    rig.live_through(120)
    assert desk.status(message_id) == ("failed", "in_doubt")
    assert len(rig.meta.sent) == 2


def test_what_the_conversation_shows_without_content_is_left_to_a_person(desk: Desk) -> None:
    rig = desk.rig
    rig.meta.fault("messages", after_effect=True, drop=True)
    message_id = desk.send(attachments=[{"type": "like_heart"}])
    rig.live_through(120)
    assert desk.status(message_id) == ("failed", "in_doubt")
    assert echo_of(desk, 0) == "noted"
    assert desk.status(message_id) == ("delivered", None)
    assert len(rig.meta.sent) == 1


def test_a_stale_message_in_doubt_is_still_looked_for(desk: Desk) -> None:
    rig = desk.rig
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.meta.fault("conversations", times=3, status=503, body="")
    message_id = desk.send(message="We close in ten seconds", send_before=instant(rig.now_s + 10))
    rig.live_through(120)
    assert desk.status(message_id) == ("sent", None)
    assert len(rig.meta.sent) == 1


@pytest.mark.parametrize(
    ("sent", "shown", "sends"),
    [
        ({"attachments": [PICTURE]}, {"attachments": [{**PICTURE, "type": "video"}]}, 2),
        ({"attachments": [PICTURE]}, {"text": "look"}, 2),
        ({"template": TEMPLATE}, {"text": "look"}, 2),
        # An album may be shown in parts, and a card by its picture.
        ({"attachments": [PICTURE] * 3}, {"attachments": [PICTURE]}, 1),
        ({"template": TEMPLATE}, {"attachments": [PICTURE]}, 1),
        ({"attachments": [{"type": "like_heart"}]}, {"attachments": [PICTURE]}, 1),
    ],
)
def test_only_what_is_surely_something_else_makes_a_send_absent(
    desk: Desk, sent: dict[str, Any], shown: dict[str, Any], sends: int
) -> None:
    rig = desk.rig
    rig.meta.fault("messages", drop=True)
    message_id = desk.send(**sent)
    rig.drain()
    rig.rooms.client.send("IGAAtokenofthefirstshop", SHOP_ID, CUSTOMER, shown)  # typed in the app
    rig.live_through(120)
    assert len(rig.meta.sent) == sends
    assert desk.status(message_id) == (("sent", None) if sends == 2 else ("failed", "in_doubt"))


def test_media_typed_elsewhere_do_not_prove_a_text_nor_other_media(desk: Desk) -> None:
    rig = desk.rig
    rig.meta.fault("messages", drop=True)
    message_id = desk.send(attachments=[PICTURE])
    rig.drain()
    voice = {"type": "audio", "payload": {"url": "https://cdn.example/voice"}}
    typed: list[dict[str, Any]] = [{"text": "?"}, {"attachments": [voice]}, {"attachments": [voice, voice]}]
    for number, message in enumerate(typed):
        echo = {"message": {"mid": f"mid-{number}", **message, "is_echo": True}}
        assert rig.hear(rig.item(echo, echo=True))[0].state == "held"
    assert rig.status(message_id)["status"] == "pending"
    rig.live_through(120)
    assert len(rig.meta.sent) == 1
    assert rig.events().count("message.echo") == 3


@pytest.mark.parametrize("form", [{"action": "mark_seen"}, {"reaction": {"emoji": "❤"}}], ids=str)
@pytest.mark.parametrize("fault", [{"drop": True}, {"status": 200, "body": "{}"}], ids=str)
def test_what_leaves_no_message_is_simply_repeated(desk: Desk, form: dict[str, Any], fault: dict[str, Any]) -> None:
    rig = desk.rig
    if "reaction" in form:
        form = {"reaction": {**form["reaction"], "message_id": rig.taken()[0].event["message_id"]}}
    rig.meta.fault("messages", after_effect=True, **fault)
    message_id = desk.send(**form)
    rig.live_through(3)
    assert len(rig.meta.sent) == 2
    found = rig.status(message_id)
    assert [one["outcome"] for one in found["attempts"]] == ["retry", "done"]
    assert (found["status"], found["instagram_message_id"]) == ("sent", None)
    rig.send(desk.account, "a text")
    rig.drain()
    rig.hear(rig.item({"read": {"mid": rig.meta.sent[-1].mid}}))
    assert rig.status(message_id)["status"] == "sent"  # nobody reads an action


def test_an_action_whose_worker_died_is_repeated_and_no_echo_is_taken_for_it(desk: Desk) -> None:
    rig = desk.rig
    message_id = desk.send(action="mark_seen")
    (row,) = rig.due("instagram", desk.account)
    rig.claim(row, desk.account)
    picture = {"type": "image", "payload": {"url": "https://cdn.example/x"}}
    echo = {"message": {"mid": "mid-typed", "attachments": [picture], "is_echo": True}}
    assert rig.hear(rig.item(echo, echo=True))[0].state == "forwarded"
    rig.engine.recover()
    rig.drain()
    assert desk.status(message_id) == ("sent", None)


# --- private replies ---


def test_a_private_reply_learns_whom_it_reached(desk: Desk) -> None:
    rig = desk.rig
    status, answer = desk.ask(comment_id=COMMENT, message="By private message")
    assert (status, answer["window_expires_at"], answer["warnings"]) == (202, None, ["comment_unknown"])
    message_id = answer["message_id"]
    assert rig.status(message_id)["recipient_id"] == f"comment:{COMMENT}"
    rig.drain()
    reached = rig.meta.sent[0].recipient_id
    assert rig.status(message_id)["recipient_id"] == reached
    assert echo_of(desk, 0) == "noted"
    assert desk.status(message_id) == ("delivered", None)
    assert desk.ask(comment_id=COMMENT, message="once more")[1]["error"] == "comment_already_answered"


def test_a_private_reply_is_judged_by_its_comment(desk: Desk) -> None:
    rig = desk.rig
    desk.comment(author=OTHER)
    at_s = rig.now_s
    rig.now_s += 7 * DAY_S - 1
    status, answer = desk.ask(comment_id=COMMENT, message="yes", dry_run=True)
    assert (status, answer["window_expires_at"], answer["warnings"]) == (200, instant(at_s + 7 * DAY_S), [])
    rig.now_s += 1
    assert desk.ask(comment_id=COMMENT, message="yes")[1]["error"] == "window_closed"


@pytest.mark.parametrize("known", [True, False])
def test_a_private_reply_in_doubt_is_never_sent_twice(desk: Desk, known: bool) -> None:
    rig = desk.rig
    reached = wire.digits_of(COMMENT, 16)
    if known:
        desk.comment(author=reached)
    rig.meta.fault("messages", after_effect=True, drop=True)
    message_id = desk.send(comment_id=COMMENT, message="By private message")
    rig.live_through(3600)
    assert len(rig.meta.sent) == 1
    assert desk.status(message_id) == (("sent", None) if known else ("failed", "in_doubt"))
    assert echo_of(desk, 0) == "noted"
    assert desk.status(message_id) == ("delivered", None)
    assert rig.status(message_id)["recipient_id"] == reached


def test_the_echo_of_a_private_reply_may_come_before_its_answer(desk: Desk) -> None:
    rig = desk.rig
    message_id = desk.send(comment_id=COMMENT, message="By private message")
    (row,) = rig.due("instagram", desk.account)
    rig.claim(row, desk.account)
    assert rig.echo("By private message", "mid-of-ours", contact=OTHER)[0].state == "held"
    assert rig.echo("Something else", "mid-typed", contact=OTHER)[0].state == "forwarded"
    rig.engine.recover()
    assert desk.status(message_id) == ("delivered", None)
    assert rig.status(message_id)["recipient_id"] == OTHER


def test_who_is_erased_gets_no_private_reply_either(desk: Desk) -> None:
    rig = desk.rig
    desk.comment(author=OTHER)
    message_id = desk.send(comment_id=COMMENT, message="By private message")
    privacy.erase_contact(rig.db, desk.account["id"], OTHER)
    rig.live_through(600)
    assert desk.status(message_id) == ("failed", "erased")
    assert rig.meta.sent == []
    assert rig.alerts == []


# --- taking back ---


def test_what_still_waits_can_be_cancelled(desk: Desk) -> None:
    rig = desk.rig
    first, second = desk.send(message="one"), desk.send(message="two")
    for _ in range(2):
        status, answer = rig.call("DELETE", f"/api/v1/messages/{first}")
        assert (status, answer["status"], answer["error"]["code"]) == (200, "failed", "cancelled")
    rig.drain()
    assert [one.text for one in rig.meta.sent] == ["two"]
    assert rig.call("DELETE", f"/api/v1/messages/{second}")[1]["error"] == "message_gone_out"
    assert rig.call("DELETE", "/api/v1/messages/msg_" + "0" * 26)[0] == 404
    assert rig.dead() == []  # what was cancelled cannot be revived
    assert rig.events()[1:] == ["message.failed", "message.sent"]


def test_what_may_have_gone_out_cannot_be_cancelled(desk: Desk) -> None:
    rig = desk.rig
    rig.meta.fault("messages", drop=True)
    message_id = desk.send(message="one")
    (row,) = rig.due("instagram", desk.account)
    rig.claim(row, desk.account)
    assert rig.call("DELETE", f"/api/v1/messages/{message_id}")[0] == 409  # in flight
    rig.engine.recover()
    assert rig.call("DELETE", f"/api/v1/messages/{message_id}")[0] == 409  # in doubt


@pytest.mark.parametrize(
    ("media", "code", "calls"),
    [("rejected", "media_rejected", 1), ("too_large", "media_too_large", 1), ("unreachable", "media_unreachable", 2)],
)
def test_media_that_instagram_cannot_take_fail_with_its_reason(desk: Desk, media: str, code: str, calls: int) -> None:
    desk.rig.meta.media = media
    message_id = desk.send(attachments=[PICTURE])
    desk.rig.live_through(300)
    assert desk.status(message_id) == ("failed", code)
    assert len(desk.rig.meta.calls) == calls


# --- nothing a client sends is a fault of ours ---

words = st.text(max_size=12) | st.sampled_from(["image", "generic", "button", "web_url", "react", "human", "typing_on"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)
pieces: dict[str, st.SearchStrategy[Any]] = {
    "recipient_id": st.sampled_from([CUSTOMER, SHOP_ID, OTHER, f"comment:{COMMENT}"]),
    "comment_id": st.just(COMMENT),
    "message": st.text(max_size=1100),
    "attachments": st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["image", "audio", "video", "file", "like_heart"])},
            optional={
                "url": st.sampled_from([PICTURE["url"], "https://[x", "http://a:b/c", "https://x/.", "https://?."])
            },
        ),
        max_size=12,
    ),
    "reaction": st.fixed_dictionaries(
        {"message_id": st.sampled_from(["msg_" + "0" * 26, "evt_" + "z" * 26, "msg_"])}, optional={"emoji": words}
    ),
    "action": st.sampled_from(["typing_on", "typing_off", "mark_seen", "dance"]),
    "template": st.sampled_from([TEMPLATE, CHOICE, {"template_type": "button"}, {**TEMPLATE, "elements": [{}]}]),
    "quick_replies": st.lists(st.fixed_dictionaries({"title": words, "payload": words}), max_size=14),
    "reply_to": st.sampled_from(["msg_" + "0" * 26, "evt_" + "0" * 26]),
    "author": st.fixed_dictionaries({"type": words}),
    "send_before": st.datetimes().map(lambda when: when.isoformat() + "Z") | words,
    "dry_run": st.booleans(),
    "metadata": anything,
}
bodies = st.fixed_dictionaries({}, optional={name: found | anything for name, found in pieces.items()}) | anything


@pytest.fixture(scope="module")
def lasting_desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with rigs.opened(tmp_path_factory.mktemp("forms")) as opened:
        yield Desk(opened)


@settings(max_examples=300)
@given(bodies)
def test_nothing_a_client_sends_is_a_fault(lasting_desk: Desk, body: Any) -> None:
    desk = lasting_desk
    if isinstance(body, dict):
        desk.number += 1
        body = {"account_id": desk.account["id"], "idempotency_key": f"any-{desk.number}", **body}
    status, answer = desk.rig.call("POST", "/api/v1/messages/send", body)
    assert status in (200, 202, 400, 409), answer
    if status == 202:
        (content,) = desk.rig.db.rows("SELECT content FROM outbound_messages WHERE id = ?", (answer["message_id"],))
        assert outgoing.body(json.loads(content["content"]), CUSTOMER)["recipient"]
