"""What Instagram tells beyond what this version knows: it reaches the CRM as it came, once, and goes as texts go."""

import copy
import gc
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crmbridge.events import instant
from crmbridge.sandbox import wire
from crmbridge.store import privacy, questions
from crmbridge.tending.backfill import Backfill
from tests.rig import Rig
from tests.shop import CUSTOMER, SHOP_ID
from tests.test_retention import prune

MARK = "a-mark-of-tomorrow"
URL = "https://cdn.example/1"
NEWS: dict[str, Any] = {"said": [MARK, None, 1.5, True, {"deep": {}}], "empty": None}
AD = {"ref": "autumn", "ad_id": "61", "source": "ADS", "type": "OPEN_THREAD", "ads_context_data": {"ad_title": "Lamps"}}
STORY = {"id": "178", "url": URL}
ITEMS: dict[str, dict[str, Any]] = {
    "message": {
        "message": {
            "mid": "m1",
            "text": "hello",
            "attachments": [{"type": "image", "payload": {"url": URL}}],
            "quick_reply": {"payload": "YES"},
            "reply_to": {"mid": "m0", "story": STORY},
            "referral": {**AD, "product": {"id": "4711"}},
        }
    },
    "ad opened": {"message": {"mid": "m1", "referral": AD}},
    "announced": {"message_edit": {"mid": "m1", "text": "hello", "num_edit": 0}},
    "edit": {"message_edit": {"mid": "m1", "text": "hello", "num_edit": 1}},
    "reaction": {"reaction": {"mid": "m1", "action": "react", "reaction": "love", "emoji": "❤"}},
    "reaction taken back": {"reaction": {"mid": "m1", "action": "unreact"}},
    "postback": {"postback": {"mid": "m1", "title": "Start", "payload": "S", "referral": AD}},
    "referral": {"referral": AD},
    "comment": {
        "id": "179",
        "text": "How much?",
        "from": {"id": CUSTOMER, "username": "ada"},
        "media": {"id": "180", "media_product_type": "FEED", "ad_id": "61"},
        "referral": AD,
    },
    "mention": {"media_id": "180", "comment_id": "179"},
}
# item → where something new stands in it → where the CRM finds it
PLACES: dict[str, dict[str, str]] = {
    "message": {
        "": "other",
        "sender": "other.sender",
        "recipient": "other.recipient",
        "message": "other",
        "message.attachments.0": "attachments.0.payload",
        "message.attachments.0.payload": "attachments.0.payload",
        "message.quick_reply": "quick_reply.other",
        "message.reply_to": "reply_to.other",
        "message.reply_to.story": "reply_to.story.other",
        "message.referral": "referral.other",
        "message.referral.product": "referral.other.product",
        "message.referral.ads_context_data": "referral.ad",
    },
    "ad opened": {"message": "other", "message.referral": "referral.other"},
    "announced": {"message_edit": "other"},
    "edit": {"": "other", "message_edit": "edit.other"},
    "reaction": {"": "other", "reaction": "reaction.other"},
    "reaction taken back": {"reaction": "reaction.other"},
    "postback": {"": "other", "postback": "postback.other", "postback.referral": "referral.other"},
    "referral": {"": "other", "sender": "other.sender", "referral": "referral.other"},
    "comment": {
        "": "comment.other",
        "from": "comment.other.from",
        "media": "comment.other.media",
        "referral": "referral.other",
        "referral.ads_context_data": "referral.ad",
    },
    "mention": {"": "mention.other"},
}
FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "comment": lambda value: {"field": "comments", "value": value},
    "mention": lambda value: {"field": "mentions", "value": value},
}


def at(whole: Any, path: str) -> Any:
    for step in filter(None, path.split(".")):
        whole = whole[int(step)] if step.isdigit() else whole[step]
    return whole


def body(name: str, item: dict[str, Any]) -> bytes:
    entry = {"changes": [FORMS[name](item)]} if name in FORMS else {"messaging": [item]}
    return wire.webhook_body({"object": "instagram", "entry": [{"id": SHOP_ID, "time": 1_800_000_000, **entry}]})


def made(rig: Rig, name: str) -> Any:
    item = copy.deepcopy(ITEMS[name])
    return item if name in FORMS else rig.item(item)


def posted(rig: Rig, name: str, *news: Any) -> bytes:
    """Return a webhook of that item, with something new in each of its places."""
    item = made(rig, name)
    for number, place in enumerate(PLACES[name] if news else ()):
        at(item, place)[f"hologram{number}"] = news[0]
    return body(name, item)


def told(rig: Rig) -> dict[str, Any]:
    rig.drain()
    event: dict[str, Any] = rig.taken()[-1].event
    return event


def others(value: Any) -> list[Any]:
    """Return every `other` in an event."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    mine = [value["other"]] if isinstance(value, dict) and "other" in value else []
    return mine + [found for entry in inner for found in others(entry)]


@pytest.mark.parametrize("name", ITEMS)
def test_what_nobody_knows_reaches_the_crm_once_and_as_it_came(rig: Rig, name: str) -> None:
    rig.account()
    rig.hear_body(posted(rig, name, NEWS))
    event = told(rig)
    for number, found in enumerate(PLACES[name].values()):
        assert at(event, found)[f"hologram{number}"] == NEWS, found
    assert json.dumps(event).count(MARK) == len(PLACES[name])


@pytest.mark.parametrize("name", ITEMS)
def test_what_is_known_is_told_in_its_own_field_alone(rig: Rig, name: str) -> None:
    rig.account()
    rig.hear_body(posted(rig, name))
    assert set(others(told(rig))) == {None}


@pytest.mark.parametrize("name", ITEMS)
def test_a_fact_told_again_with_other_keys_is_the_same_fact(rig: Rig, name: str) -> None:
    rig.account()
    rig.hear_body(posted(rig, name, NEWS))
    again = [rig.hear_body(posted(rig, name, *news)) for news in (("another",), ({"is": "more"},), ())]
    assert [entry.state for kept in again for entry in kept] == ["duplicate"] * 3


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"message": {"text": "hello", "referral": AD}}, "message"),
        ({"message": {"text": "hello", "referral": AD}}, "message.referral.ads_context_data"),
        ({"message": {"attachments": [{"type": "image", "payload": {"url": URL}}]}}, "message.attachments.0.payload"),
        ({"message": {"text": "hello"}}, ""),
        ({"postback": {"title": "Start", "payload": "S"}}, "postback"),
        ({"message_edit": {"mid": "m1", "text": "hello"}}, "message_edit"),
    ],
)
def test_what_has_no_id_is_told_apart_by_its_known_keys(rig: Rig, item: dict[str, Any], place: str) -> None:
    rig.account()
    states = []
    for news, text in ((1, "hello"), (2, "hello"), (2, "something else")):
        again = rig.item(json.loads(json.dumps(item).replace("hello", text).replace("Start", text)))
        at(again, place)["hologram"] = news
        states.append(rig.hear(again)[0].state)
    # A picture has no words; edits without a number are told apart by their time.
    is_new = "attachments" not in place and place != "message_edit"
    assert states == ["forwarded", "duplicate", "forwarded" if is_new else "duplicate"]


@pytest.mark.parametrize(
    ("place", "key", "value", "found"),
    [
        ("message", "text", 7, "other.text"),
        ("message", "reply_to", "m0", "other.reply_to"),
        ("message", "quick_reply", ["YES"], "other.quick_reply"),
        ("message", "referral", "flyer", "other.referral"),
        ("message", "is_self", "perhaps", "other.is_self"),
        ("message", "is_deleted", {"by": "app"}, "other.is_deleted"),
        ("message", "is_unsupported", True, "other.is_unsupported"),
        ("message", "attachments", [{"type": "image"}, "torn", 7], "other.attachments"),
        ("message.attachments.0", "type", 7, "attachments.0.payload.type"),
        ("message.attachments.0.payload", "url", {"https": 1}, "attachments.0.payload.url"),
        ("message.attachments.0.payload", "title", 7, "attachments.0.payload.title"),
        ("message.quick_reply", "payload", 1.5, "quick_reply.other.payload"),
        ("message.reply_to", "mid", ["m0"], "reply_to.other.mid"),
        ("message.reply_to", "story", "178", "reply_to.other.story"),
        ("message.reply_to.story", "url", 7, "reply_to.story.other.url"),
        ("message.referral", "source", {"ads": 1}, "referral.other.source"),
        ("message.referral", "ad_id", 1.5, "referral.other.ad_id"),
        ("message.referral", "product", ["4711"], "referral.other.product"),
        ("message.referral.product", "id", {"shop": 1}, "referral.other.product.id"),
        ("message.referral", "ads_context_data", [1], "referral.other.ads_context_data"),
        ("", "timestamp", {"ms": 1}, "other.timestamp"),
        ("sender", "username", 7, "other.sender.username"),
        ("", "referral", {"ref": "another"}, "other.referral"),
    ],
)
def test_a_known_key_of_another_kind_does_not_vanish(rig: Rig, place: str, key: str, value: Any, found: str) -> None:
    rig.account()
    item = made(rig, "message")
    at(item, place)[key] = value
    rig.hear_body(body("message", item))
    shown = at(told(rig), found)
    assert shown == (["torn", 7] if key == "attachments" else value)


@pytest.mark.parametrize(
    ("name", "place", "key", "value", "field"),
    [
        ("message", "message.referral", "ref", {"flyer": 7}, "referral.ref"),
        ("message", "message.referral", "ref", 7, "referral.ref"),
        ("postback", "postback", "payload", ["a", 1], "postback.payload"),
        ("message", "message.quick_reply", "payload", 7, "quick_reply.payload"),
    ],
)
def test_a_mark_of_the_shop_is_text_whatever_it_came_as(
    rig: Rig, name: str, place: str, key: str, value: Any, field: str
) -> None:
    rig.account()
    item = made(rig, name)
    at(item, place)[key] = value
    rig.hear_body(body(name, item))
    event = told(rig)
    assert json.loads(at(event, field)) == value
    assert set(others(event)) == {None}


def test_keys_of_the_same_name_in_an_object_and_around_it_are_both_told(rig: Rig) -> None:
    rig.account()
    item = rig.item({**ITEMS["message"], "hologram": "around"})
    item["message"] = {**item["message"], "hologram": "inside"}
    rig.hear(item)
    assert told(rig)["other"] == {"hologram": "inside", "outer": {"hologram": "around"}}


def test_a_key_that_is_called_as_the_place_for_those_is_told_as_well(rig: Rig) -> None:
    rig.account()
    item = rig.item({**ITEMS["message"], "hologram": "around"})
    item["message"] = {**item["message"], "hologram": "inside", "outer": 1}
    rig.hear(item)
    assert told(rig)["other"] == {"hologram": "inside", "outer": 1, "outer_": {"hologram": "around"}}


def test_a_second_object_of_an_item_is_told_with_the_first(rig: Rig) -> None:
    rig.account()
    second = {"mid": "m1", "action": "react", "emoji": "❤"}
    rig.hear(rig.item({**ITEMS["message"], "reaction": second}))
    assert told(rig)["other"] == {"reaction": second}


def nested(depth: int) -> Any:
    value: Any = MARK
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What others left behind must not be finalized at the limit of recursion, where every finalizer fails."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", ITEMS)
def test_what_is_nested_too_deeply_is_told_as_text(rig: Rig, name: str) -> None:
    rig.account()
    rig.hear_body(posted(rig, name, nested(80)))
    rig.hear_body(posted(rig, name, "abyss").replace(b'"abyss"', b"[" * 10_000 + b"]" * 10_000))
    assert MARK in json.dumps(told(rig))
    assert len(rig.taken()) == 1
    assert rig.alerts == []


@pytest.mark.parametrize("news", [float("nan"), float("inf"), 10**30, "\ud83d", "\x00", {"\ud83d": 1}, "x" * 5_000])
def test_whatever_json_can_hold_breaks_nothing(rig: Rig, news: Any) -> None:
    rig.account()
    rig.hear_body(posted(rig, "message", news))
    assert "hologram" in json.dumps(told(rig))
    assert rig.alerts == []


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("name", [name for name in ITEMS if name not in (*FORMS, "referral")])
def test_what_was_taken_back_goes_with_its_message(rig: Rig, name: str, is_told: bool) -> None:
    rig.account()
    if not is_told:
        rig.crm.answer_always(503)
    rig.say("the first", "m0")
    rig.hear_body(posted(rig, name, NEWS))
    rig.drain()
    unsend = {"mid": "m1", "is_deleted": True, "hologram": MARK, "text": MARK}
    rig.hear(rig.item({"message": unsend}, at_s=rig.now_s + 1))
    rig.crm.answer_always(None)
    rig.live_through(600)
    for table in ("events", "deliveries"):
        assert MARK not in json.dumps(rig.db.rows(f"SELECT * FROM {table}")), table
    seen = [json.dumps(entry.event) for entry in rig.taken()]
    assert sum(MARK in event for event in seen) == int(is_told)
    assert MARK not in json.dumps(told(rig))


@pytest.mark.parametrize("name", ITEMS)
def test_it_goes_with_retention_and_erasure_and_is_never_logged(
    rig: Rig, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    account = rig.account()
    for erased in (True, False):
        rig.hear_body(posted(rig, name, NEWS))
        rig.drain()
        rig.drain()
        if erased and name != "mention":  # a mention names nobody
            privacy.erase_contact(rig.db, account["id"], CUSTOMER)
            rig.db.write(lambda tx: tx.run("DELETE FROM events"))  # it may be told once more
        else:
            prune(rig, 8)
        for table in ("events", "deliveries"):
            assert MARK not in json.dumps(rig.db.rows(f"SELECT * FROM {table}")), table
        rig.now_s += 60
    ours = [f"{record.getMessage()} {record.__dict__}" for record in caplog.records if record.name == "crmbridge"]
    assert ours
    assert MARK not in "".join(ours)


# --- the Conversations API ---


def recovered(rig: Rig, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Have messages found in a conversation, as Meta tells them there; return the events of the CRM."""
    account = rig.account()
    known = {"from": {"id": CUSTOMER}, "to": {"data": [{"id": SHOP_ID}]}, "created_time": wire.iso_time(rig.now_s)}
    rig.meta.customer_says(SHOP_ID, CUSTOMER, "x", mid="x", told="never")
    page = {"messages": {"data": [{**known, "id": f"m{number}", **one} for number, one in enumerate(messages)]}}
    rig.meta.fault(f"aWdfZAG06{CUSTOMER}", status=200, body=page)
    questions.ask_backfill(rig.db, account["id"], instant(rig.now_s - 60))
    rooms = rig.rooms

    def pause(seconds: float) -> None:
        rig.now_s += seconds

    Backfill(rig.db, rooms.client, rooms.vault, lambda _: None, clock=lambda: rig.now_s, pause=pause).fill()
    rig.drain()
    return [entry.event for entry in rig.taken()]


def test_what_nobody_knows_in_a_conversation_is_told_as_well(rig: Rig) -> None:
    reply = {"mid": "m0", "is_self_reply": False, "hologram": 1}
    mention = {"mention": {"link": URL, "id": "178", "hologram": 2}}
    image = {"id": "9", "name": "lamp.jpg", "image_data": {"url": URL, "width": 240}, "hologram": 3}
    (event,) = recovered(
        rig,
        {
            "message": "hello", "hologram": 0, "reply_to": reply, "story": mention,
            "attachments": {"data": [image]}, "shares": {"data": [{"link": URL + "2", "hologram": 4}]},
        },
    )  # fmt: skip
    assert event["other"] == {"hologram": 0}
    assert event["reply_to"]["other"] == {"is_self_reply": False, "hologram": 1}
    things = {thing["type"]: (thing["url"], thing["payload"]) for thing in event["attachments"]}
    assert things == {
        "image": (URL, {"name": "lamp.jpg", "width": 240, "hologram": 3}),
        "share": (URL + "2", {"hologram": 4}),
        "story_mention": (URL, {"hologram": 2}),
    }


STICKER = 369239263222822


@pytest.mark.parametrize(
    ("attachments", "shown"),
    [
        (
            [
                {"id": "1", "image_data": {"url": URL, "render_as_sticker": True}, "sticker_id": STICKER},
                {"id": "2", "type": "sticker", "image_data": {"url": URL}, "sticker_id": STICKER},
            ],
            [("sticker", URL)],
        ),
        (
            [{"id": "1", "image_data": {"url": URL}}, {"id": "2", "file_url": URL, "sticker_id": STICKER}],
            [("sticker", URL)],
        ),
        (
            [{"id": "1", "sticker_data": {"url": URL, "sticker_id": STICKER}}, {"id": "2", "image_data": {"url": URL}}],
            [("sticker", URL)],
        ),
        (
            [
                {"id": "1", "image_data": {"url": URL}, "sticker_id": 1},
                {"id": "2", "type": "sticker", "image_data": {"url": URL}, "sticker_id": 2},
            ],
            [("image", URL), ("sticker", URL)],
        ),
        (
            [{"id": "1", "image_data": {"url": URL + "2"}}, {"id": "2", "type": "sticker", "file_url": URL}],
            [("image", URL + "2"), ("sticker", URL)],
        ),
        ([{"id": "1", "image_data": {"url": URL}}, {"id": "2", "image_data": {"url": URL}}], [("image", URL)] * 2),
    ],
)
def test_a_sticker_in_a_conversation_is_shown_once(
    rig: Rig, attachments: list[dict[str, Any]], shown: list[tuple[str, str]]
) -> None:
    (event,) = recovered(rig, {"message": "", "attachments": {"data": attachments}})
    assert [(thing["type"], thing["url"]) for thing in event["attachments"]] == shown


def attachment(kind: str, url: str | None = None, **payload: Any) -> dict[str, Any]:
    return {"type": kind, "payload": {**({"url": url} if url else {}), **payload}}


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    ("attachments", "shown"),
    [
        ([attachment("sticker", URL, sticker_id=7), attachment("image", URL, sticker_id="7")], ["sticker"]),
        ([attachment("image", URL), attachment("sticker", URL)], ["sticker"]),
        ([attachment("image", URL), attachment("sticker", URL, sticker_id=7)], ["sticker"]),
        ([attachment("image", URL, id="9"), attachment("sticker", id="9")], ["sticker"]),
        ([attachment("image", URL, sticker_id=7), {"type": "sticker", "sticker_id": 7, "payload": None}], ["sticker"]),
        ([attachment("image", URL, sticker_id=7), attachment("sticker", URL + "2", sticker_id=7)], ["sticker"]),
        ([attachment("image", URL, sticker_id=7), attachment("sticker", URL, sticker_id=8)], ["image", "sticker"]),
        ([attachment("image", URL, id="8"), attachment("sticker", URL, id="9")], ["image", "sticker"]),
        ([attachment("image", URL), attachment("sticker", URL + "2")], ["image", "sticker"]),
        ([attachment("image"), attachment("sticker")], ["image", "sticker"]),
        ([attachment("video", URL), attachment("sticker", URL)], ["video", "sticker"]),
        ([attachment("image", URL), attachment("ig_post", URL)], ["image", "ig_post"]),
        ([attachment("share", URL), attachment("sticker", URL)], ["share", "sticker"]),
        ([attachment("sticker", URL, sticker_id=7)] * 2, ["sticker", "sticker"]),
        ([attachment("image", URL, sticker_id=7)] * 2, ["image", "image"]),
        (
            [*[attachment("image", URL, sticker_id=7)] * 2, *[attachment("sticker", URL, sticker_id=7)] * 2],
            ["sticker", "sticker"],
        ),
        (
            [attachment("image", URL + "3"), attachment("image", URL, sticker_id=7),
             attachment("sticker", URL, sticker_id=7)],
            ["image", "sticker"],
        ),
    ],
)  # fmt: skip
def test_a_sticker_is_shown_once_and_nothing_else_is_merged(
    rig: Rig, attachments: list[dict[str, Any]], shown: list[str], echo: bool
) -> None:
    rig.account()
    rig.hear(rig.item({"message": {"mid": "m1", "attachments": attachments, "is_echo": echo}}, echo=echo))
    event = told(rig)
    assert [thing["type"] for thing in event["attachments"]] == shown
    assert event["message_type"] == shown[0]
