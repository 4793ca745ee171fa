"""The channel's specification: every shape that Instagram posts (tests/payloads), and what the CRM gets of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from crmbridge.events import RECOVERED, ChannelEvent, instant, message_key
from crmbridge.store import bodies, inbound, messages
from crmbridge.store.deliveries import Outcome, Verdict
from crmbridge.store.turn import Finished
from tests import shop as shops
from tests.rig import Rig
from tests.shop import CUSTOMER, OTHER_ID, SHOP_ID

PAYLOADS = Path(__file__).parent / "payloads"
_IMAGE = json.loads((PAYLOADS / "image.json").read_text())["entry"][0]["messaging"][0]["message"]
MID, URL = _IMAGE["mid"], _IMAGE["attachments"][0]["payload"]["url"]
# What nearly every payload here has; `told` names what is different.
USUAL = {
    "sender_id": CUSTOMER,
    "recipient_id": SHOP_ID,
    "timestamp": "2027-01-15T08:00:00.123Z",
    "instagram_message_id": MID,
    "message": None,
    "attachments": [],
}


TOMORROW = {"depth": 3, "marks": ["a", None, 1.5]}  # what this version knows nothing of


def told(event: str, **facts: Any) -> dict[str, Any]:
    return {"event": event, **USUAL, "message_type": "unsupported" if "unsup" in event else "text", **facts}


def sticker(**more: Any) -> dict[str, Any]:
    return {"type": "sticker", "url": URL, "payload": {"sticker_id": 369239263222822, **more}}


# payload → the events that the CRM gets; an empty list: kept, and nobody is told
TABLE: dict[str, list[dict[str, Any]]] = {
    "ad_opened_without_words": [
        told(
            "message.referral",
            message_type="referral",
            referral={"source": "ADS", "type": "OPEN_THREAD", "ad_id": "6112345678901"},
        )
    ],
    "album": [
        told(
            "message.received",
            message_type="image",
            attachments=[
                {"type": "image", "url": URL},
                {"type": "image", "url": URL + "2"},
                {"type": "video", "url": URL + "3"},
            ],
        )
    ],
    "attachment_of_tomorrow": [
        told(
            "message.received",
            message_type="hologram",
            attachments=[{"type": "hologram", "url": URL, "instagram_id": "77", "payload": {"depth": 3}}],
        )
    ],
    "batch_of_two_accounts": [
        told("message.received", message="one", instagram_message_id="mid-1"),
        told("message.received", recipient_id="17841400000000002", message="three", instagram_message_id="mid-3"),
        told("message.received", timestamp="2027-01-15T08:00:00.124Z", message="two", instagram_message_id="mid-2"),
    ],
    "change_with_message": [told("message.received", message="hello")],
    "change_with_reaction": [
        told("message.reaction", message_type="reaction", reaction={"action": "react", "name": "love", "emoji": "❤"})
    ],
    "comment": [
        told(
            "comment.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id="900000000000002",
            message="What does it cost?",
            message_type="comment",
            instagram_message_id="17900000000000001",
            comment={
                "id": "17900000000000001",
                "username": "passer_by",
                "media_id": "18000000000000011",
                "media_type": "FEED",
            },
        )
    ],
    "comment_as_facebook_login_shows_it": [
        told(
            "comment.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id=None,
            message="What does it cost?",
            message_type="comment",
            instagram_message_id="17900000000000001",
            comment={
                "id": "17900000000000001",
                "parent_id": "17900000000000000",
                "media_id": "18000000000000011",
                "media_type": "AD",
                "ad_id": "6112345678901",
                "other": {"media": {"ad_title": "Lamps"}},
            },
        )
    ],
    "comment_flat": [
        told(
            "comment.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id="900000000000002",
            message="What does it cost?",
            message_type="comment",
            instagram_message_id="17900000000000001",
            comment={
                "id": "17900000000000001",
                "username": "passer_by",
                "media_id": "18000000000000011",
                "media_type": "REELS",
            },
        )
    ],
    "comment_from_ad": [
        told(
            "comment.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id="900000000000002",
            message="more please",
            message_type="comment",
            instagram_message_id="17900000000000005",
            comment={"id": "17900000000000005", "username": "passer_by", "media_id": "18000000000000011"},
            referral={"source": "ADS", "type": "OPEN_GRAPH", "ad_id": "6112345678901"},
        )
    ],
    "comment_with_keys_of_tomorrow": [
        told(
            "comment.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id="900000000000002",
            message="What does it cost?",
            message_type="comment",
            instagram_message_id="17900000000000001",
            comment={
                "id": "17900000000000001",
                "username": "passer_by",
                "media_id": "18000000000000011",
                "media_type": "FEED",
                "other": {
                    "like_count": 3,
                    "from": {"self_ig_scoped_id": "1", "badge": "blue"},
                    "media": {"original_media_id": "18"},
                },
            },
        )
    ],
    "delivery_receipt": [],
    "echo_flag_on_a_customers_message": [
        told("message.received", message_type="story_mention", attachments=[{"type": "story_mention", "url": URL}])
    ],
    "echo_from_the_app": [told("message.echo", sender_id=SHOP_ID, recipient_id=CUSTOMER, message="Yes, two are left.")],
    "echo_of_a_template": [
        told(
            "message.echo",
            sender_id=SHOP_ID,
            recipient_id=CUSTOMER,
            message_type="template",
            attachments=[{"type": "template"}],
        )
    ],
    "echo_unsent": [
        told("message.echo", sender_id=SHOP_ID, recipient_id=CUSTOMER, message_type="deleted"),
        told(
            "message.deleted",
            timestamp="2027-01-15T08:00:01.123Z",
            sender_id=SHOP_ID,
            recipient_id=CUSTOMER,
            message_type="deleted",
        ),
    ],
    "echo_without_flag": [told("message.echo", sender_id=SHOP_ID, recipient_id=CUSTOMER, message="Yes, two are left.")],
    "edit": [
        told("message.received", message="Is the lamp in stok?"),
        told(
            "message.edited",
            timestamp="2027-01-15T08:00:01.123Z",
            message="Is the lamp in stock?",
            message_type="edited",
            edit={"number": 1},
        ),
    ],
    "edit_with_keys_of_tomorrow": [
        told(
            "message.edited",
            message="in stock?",
            message_type="edited",
            edit={"number": 1, "other": {"edited_by": "app"}},
        )
    ],
    "edit_with_number_as_text": [
        told("message.edited", message="in stock?", message_type="edited", edit={"number": 2})
    ],
    "edit_without_parties": [
        told("message.received", message="Is the lamp in stok?"),
        told(
            "message.edited",
            timestamp="2027-01-15T08:00:01.123Z",
            message="Is the lamp in stock?",
            message_type="edited",
            edit={"number": 1},
        ),
    ],
    "edit_zero": [told("message.unsupported", sender_id=None)],
    "edit_zero_of_a_known_message": [told("message.received", message="hello")],
    "edit_zero_with_words": [told("message.received", message="hello")],
    "empty_message": [told("message.unsupported")],
    "entry_of_another_id": [told("message.received", timestamp="2027-01-15T08:00:00.000Z", message="hello")],
    "entry_of_id_zero": [told("message.received", message="hello")],
    "entry_without_content": [],
    "entry_without_id": [told("message.received", message="hello")],
    "ephemeral": [told("message.received", message_type="ephemeral", attachments=[{"type": "ephemeral"}])],
    "fallback": [
        told(
            "message.received",
            message="https://shop.example",
            message_type="fallback",
            attachments=[{"type": "fallback", "url": "https://shop.example", "title": "Our shop"}],
        )
    ],
    "file": [told("message.received", message_type="file", attachments=[{"type": "file", "url": URL}])],
    "flat_message": [told("message.received", message="hello")],
    "handover": [told("message.unsupported", instagram_message_id=None)],
    "handover_without_parties": [told("message.unsupported", instagram_message_id=None)],
    "ig_post": [
        told(
            "message.received",
            message_type="ig_post",
            attachments=[{"type": "ig_post", "url": URL, "title": "Blue lamp", "instagram_id": "18000000000000007"}],
        )
    ],
    "ig_reel": [
        told(
            "message.received",
            message_type="ig_reel",
            attachments=[
                {"type": "ig_reel", "url": URL, "title": "How to hang it\n💡", "instagram_id": "18000000000000008"}
            ],
        )
    ],
    "ig_story": [
        told(
            "message.received",
            message_type="ig_story",
            attachments=[{"type": "ig_story", "url": URL, "instagram_id": "18000000000000009"}],
        )
    ],
    "image": [told("message.received", message_type="image", attachments=[{"type": "image", "url": URL}])],
    "item_of_tomorrow": [told("message.unsupported", instagram_message_id=None)],
    "item_without_content": [],
    "known_keys_of_another_kind": [
        told(
            "message.received",
            message="hello",
            referral={
                "ref": '{"flyer": 7}',
                "other": {"source": 7, "ad_id": ["6"], "product": "4711", "ads_context_data": "lamps"},
            },
            other={"reply_to": "mid-1", "quick_reply": "YES", "is_echo": {"app": 1}, "attachments": "none"},
        )
    ],
    "like_heart": [told("message.received", message_type="like_heart", attachments=[{"type": "like_heart"}])],
    "live_comment": [
        told(
            "comment.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id="900000000000002",
            message="hi!",
            message_type="live_comment",
            instagram_message_id="17900000000000002",
            comment={
                "id": "17900000000000002",
                "username": "passer_by",
                "media_id": "18000000000000012",
                "media_type": "STORY",
            },
        )
    ],
    "location": [
        told(
            "message.received",
            message_type="location",
            attachments=[{"type": "location", "payload": {"coordinates": {"lat": 52.5, "long": 13.4}}}],
        )
    ],
    "mention": [
        told(
            "mention.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id=None,
            message_type="mention",
            instagram_message_id="17900000000000004",
            mention={"media_id": "18000000000000013", "comment_id": "17900000000000004"},
        )
    ],
    "mention_with_keys_of_tomorrow": [
        told(
            "mention.received",
            timestamp="2027-01-15T08:00:01.000Z",
            sender_id=None,
            message_type="mention",
            instagram_message_id="18000000000000013",
            mention={"media_id": "18000000000000013", "other": {"caption": TOMORROW}},
        )
    ],
    "message_as_whatsapp_words_it": [
        told("message.received", timestamp="2027-01-15T08:00:00.000Z", message="hello", other={"type": "text"})
    ],
    "message_from_ad": [
        told(
            "message.received",
            message="Tell me more",
            referral={
                "ref": "autumn",
                "source": "ADS",
                "type": "OPEN_THREAD",
                "ad_id": "6112345678901",
                "ad": {"ad_title": "Lamps", "photo_url": URL, "post_id": "18000000000000010"},
            },
        )
    ],
    "message_from_ad_with_keys_of_tomorrow": [
        told(
            "message.received",
            message="Tell me more",
            referral={
                "ref": "autumn",
                "source": "ADS",
                "type": "OPEN_THREAD",
                "ad_id": "6112345678901",
                "product_id": "4711",
                "ad": {"ad_title": "Lamps", "campaign": TOMORROW},
                "other": {
                    "media_id": "18000000000000010",
                    "referer_uri": "https://www.instagram.com/p/lamps",
                    "campaign_id": 23840000000000001,
                    "product": {"retailer_id": "lamp-blue"},
                },
            },
        )
    ],
    "message_from_shop": [told("message.received", message="Is this one available?", referral={"product_id": "4711"})],
    "message_to_oneself": [
        told("message.echo", sender_id=SHOP_ID, recipient_id="900000000000099", message="a test", is_self=True)
    ],
    "message_with_keys_of_tomorrow": [
        told(
            "message.received",
            message="hello",
            other={
                "metadata": "ticket 7",
                "is_forwarded": True,
                "hologram": TOMORROW,
                "priority": 1,
                "sender": {"badge": "blue"},
            },
        )
    ],
    "message_without_mid": [told("message.received", message="hello", instagram_message_id=None)],
    "message_without_recipient": [told("message.received", message="hello")],
    "messages_inside_a_change": [told("message.received", message="hello")],
    "messaging_beside_standby": [
        told("message.received", message="one", instagram_message_id="mid-1"),
        told("message.received", timestamp="2027-01-15T08:00:01.123Z", message="two", instagram_message_id="mid-2"),
    ],
    "optin": [told("message.unsupported", instagram_message_id=None)],
    "own_comment": [],
    "policy_enforcement": [told("message.unsupported", sender_id=None, instagram_message_id=None)],
    "postback": [
        told(
            "message.postback",
            message="Opening hours",
            message_type="postback",
            postback={"title": "Opening hours", "payload": "HOURS"},
        )
    ],
    "postback_from_link": [
        told(
            "message.postback",
            message="Start",
            message_type="postback",
            postback={"title": "Start", "payload": "START"},
            referral={"ref": "flyer", "source": "IGME-SOURCE-LINK", "type": "OPEN_THREAD"},
        )
    ],
    "postback_to_oneself": [
        told(
            "message.postback",
            sender_id=SHOP_ID,
            recipient_id="900000000000099",
            message="Start",
            message_type="postback",
            postback={"title": "Start", "payload": "START"},
            is_self=True,
        )
    ],
    "postback_with_keys_of_tomorrow": [
        told(
            "message.postback",
            message="Opening hours",
            message_type="postback",
            postback={"title": "Opening hours", "payload": "HOURS", "other": {"menu": TOMORROW}},
            referral={"ref": "flyer", "other": {"campaign_id": "c1"}},
        )
    ],
    "postback_without_mid": [
        told(
            "message.postback",
            message="Opening hours",
            message_type="postback",
            instagram_message_id=None,
            postback={"title": "Opening hours", "payload": "HOURS"},
        )
    ],
    "product": [
        told(
            "message.received",
            message_type="template",
            attachments=[
                {
                    "type": "template",
                    "payload": {
                        "product": {
                            "elements": [
                                {
                                    "id": "4711",
                                    "retailer_id": "lamp-blue",
                                    "title": "Blue lamp",
                                    "subtitle": "39 EUR",
                                    "image_url": URL,
                                }
                            ]
                        }
                    },
                }
            ],
        )
    ],
    "quick_reply": [told("message.received", message="Yes", quick_reply={"payload": "CONFIRM_YES"})],
    "quick_reply_with_keys_of_tomorrow": [
        told("message.received", message="Yes", quick_reply={"payload": "CONFIRM_YES", "other": {"index": 2}})
    ],
    "reaction": [
        told("message.reaction", message_type="reaction", reaction={"action": "react", "name": "love", "emoji": "❤️"})
    ],
    "reaction_taken_back": [told("message.reaction", message_type="reaction", reaction={"action": "unreact"})],
    "reaction_to_a_known_message": [
        told("message.received", message="hello"),
        told(
            "message.reaction",
            timestamp="2027-01-15T08:00:01.123Z",
            message_type="reaction",
            reaction={"action": "react", "name": "other", "emoji": "👍"},
        ),
    ],
    "reaction_with_keys_of_tomorrow": [
        told(
            "message.reaction",
            message_type="reaction",
            reaction={"action": "react", "name": "love", "emoji": "❤", "other": {"skin_tone": "dark"}},
        )
    ],
    "reaction_without_message": [told("message.unsupported", instagram_message_id=None)],
    "read": [],
    "read_until": [],
    "reel_without_title": [
        told(
            "message.received",
            message_type="reel",
            attachments=[{"type": "reel", "url": URL, "instagram_id": "18000000000000008"}],
        )
    ],
    "referral": [
        told(
            "message.referral",
            message_type="referral",
            instagram_message_id=None,
            referral={"ref": "flyer", "source": "IGME-SOURCE-LINK", "type": "OPEN_THREAD"},
        )
    ],
    "referral_with_keys_of_tomorrow": [
        told(
            "message.referral",
            message_type="referral",
            instagram_message_id=None,
            referral={
                "ref": "flyer",
                "source": "IGME-SOURCE-LINK",
                "type": "OPEN_THREAD",
                "other": {"referer_uri": "https://shop.example", "is_guest_user": False},
            },
        )
    ],
    "reply_to_message": [
        told("message.received", message="Is the lamp in stock?", instagram_message_id="mid-of-the-first"),
        told(
            "message.received",
            timestamp="2027-01-15T08:00:01.123Z",
            message="the blue one",
            reply_to={
                "message_id": "known",
                "instagram_message_id": "mid-of-the-first",
                "other": {"is_self_reply": False},
            },
        ),
    ],
    "reply_to_story": [
        told("message.received", message="love it", reply_to={"story": {"id": "18000000000000009", "url": URL}})
    ],
    "reply_with_keys_of_tomorrow": [
        told(
            "message.received",
            message="love it",
            reply_to={
                "story": {"id": "18000000000000009", "url": URL, "other": {"kind": "video"}},
                "other": {"is_self_reply": False},
            },
        )
    ],
    "seen_without_message": [],
    "sender_as_text": [told("message.received", message="hello")],
    "sender_with_username": [told("message.received", message="hello")],
    "shared_post": [told("message.received", message_type="share", attachments=[{"type": "share", "url": URL}])],
    "shared_post_in_both_forms": [
        told(
            "message.received",
            message_type="ig_post",
            attachments=[{"type": "ig_post", "url": URL, "title": "Blue lamp", "instagram_id": "18000000000000007"}],
        )
    ],
    "standby": [told("message.received", message="hello")],
    "standby_postback": [
        told("message.postback", message="Opening hours", message_type="postback", postback={"title": "Opening hours"})
    ],
    "sticker": [told("message.received", message_type="sticker", attachments=[sticker()])],
    "sticker_beside_another_image": [
        told(
            "message.received",
            message_type="image",
            attachments=[{"type": "image", "url": URL + "2", "payload": {"sticker_id": 1}}, sticker()],
        )
    ],
    "sticker_beside_its_image": [
        told("message.received", message_type="sticker", attachments=[sticker(width=240, pack="cats")])
    ],
    "stickers_of_an_echo": [
        told(
            "message.echo",
            sender_id=SHOP_ID,
            recipient_id=CUSTOMER,
            message_type="sticker",
            attachments=[
                {"type": "sticker", "url": URL, "payload": {"sticker_id": 1}},
                {"type": "sticker", "url": URL + "2", "payload": {"sticker_id": 2}},
            ],
        )
    ],
    "story_insights": [
        told("message.unsupported", timestamp="2027-01-15T08:00:01.000Z", sender_id=None, instagram_message_id=None)
    ],
    "story_mention": [
        told("message.received", message_type="story_mention", attachments=[{"type": "story_mention", "url": URL}])
    ],
    "template": [
        told(
            "message.received",
            message_type="template",
            attachments=[
                {
                    "type": "template",
                    "payload": {"generic": {"elements": [{"title": "Blue lamp", "subtitle": "39 EUR"}]}},
                }
            ],
        )
    ],
    "test_as_facebook_login_sends_it": [],
    "test_as_instagram_login_sends_it": [],
    "test_of_comments": [],
    "test_of_reactions": [],
    "test_with_a_real_id": [],
    "text": [told("message.received", message="Is the lamp in stock? 💡")],
    "text_in_a_list": [told("message.received", message="hello")],
    "text_with_empty_neighbours": [told("message.received", message="hello")],
    "text_with_image": [
        told("message.received", message="this one", message_type="image", attachments=[{"type": "image", "url": URL}])
    ],
    "text_with_iso_time": [told("message.received", timestamp="2027-01-15T08:00:00.000Z", message="hello")],
    "text_with_numeric_ids": [told("message.received", message="hello")],
    "text_with_time_as_text": [told("message.received", message="hello")],
    "text_with_time_in_seconds": [told("message.received", timestamp="2027-01-15T08:00:00.000Z", message="hello")],
    "unsend": [
        told("message.received", message_type="deleted"),
        told("message.deleted", timestamp="2027-01-15T08:00:01.123Z", message_type="deleted"),
    ],
    "unsend_of_an_unknown_message": [told("message.deleted", message_type="deleted")],
    "unsend_that_came_first": [told("message.deleted", message_type="deleted")],
    "unsupported": [told("message.unsupported")],
    "unsupported_type": [
        told(
            "message.received", message_type="unsupported_type", attachments=[{"type": "unsupported_type", "url": URL}]
        )
    ],
    "video": [told("message.received", message_type="video", attachments=[{"type": "video", "url": URL}])],
    "voice": [told("message.received", message_type="audio", attachments=[{"type": "audio", "url": URL}])],
}


def test_the_table_knows_every_payload() -> None:
    assert {path.stem for path in PAYLOADS.glob("*.json")} == set(TABLE)
    assert {entry["event"] for events in TABLE.values() for entry in events} == set(bodies.TOLD)


@pytest.mark.parametrize("name", TABLE)
def test_a_payload_reaches_the_crm_as(rig: Rig, name: str) -> None:
    rig.account()
    rig.account(OTHER_ID)
    body = (PAYLOADS / f"{name}.json").read_bytes()
    rig.hear_body(body)
    rig.hear_body(later(body))
    rig.drain()
    events = sorted(
        (entry.event for entry in rig.taken()),
        key=lambda event: (event["timestamp"], event["instagram_message_id"] or ""),
    )
    assert [seen(event, wanted) for event, wanted in zip(events, TABLE[name], strict=True)] == TABLE[name]
    assert rig.alerts == []


def later(body: bytes) -> bytes:
    """Return the body as Meta's next try brings it: another time of sending, the same facts."""
    whole = json.loads(body)
    for entry in (whole if isinstance(whole, dict) else whole[0])["entry"]:
        if isinstance(entry.get("time"), int) and ("messaging" in entry or "standby" in entry):
            entry["time"] += 18_700
    return json.dumps(whole).encode()


def seen(event: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what the table tells of an event, with nulls and our own ids left out where it names none."""
    found = {name: event[name] for name in wanted}
    for name, value in event.items():
        others = {"event_id", "sequence", "account_id", "message_id", "sender_username", "conversation_id", "raw"}
        if name not in others | {"window_expires_at"} and name not in found and value not in (None, [], False):
            found[name] = value
    return {name: plain(value) for name, value in found.items()}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: plain(inner) for name, inner in value.items() if inner is not None}
        return {**kept, "message_id": "known"} if "message_id" in kept and "instagram_message_id" in kept else kept
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def test_the_document_names_every_event_once() -> None:
    document = (Path(__file__).parent.parent / "docs" / "crm.md").read_text()
    rows = re.findall(r"^\| `((?:message|comment|mention)\.[a-z]+)` \|", document, re.MULTILINE)
    assert sorted(rows) == sorted([*bodies.TOLD, *messages.TOLD])


def test_what_was_taken_back_is_erased_everywhere(rig: Rig) -> None:
    account = rig.account()
    rig.say("my secret", "mid-1")
    rig.hear(rig.item({"message_edit": {"mid": "mid-1", "text": "my other secret", "num_edit": 1}}))
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()] == ["my secret", "my other secret"]
    message_id = rig.taken()[0].event["message_id"]
    rig.now_s += 1
    rig.hear(rig.item({"message": {"mid": "mid-1", "is_deleted": True}}))
    rig.drain()
    deleted = rig.taken()[-1].event
    assert (deleted["event"], deleted["message_id"]) == ("message.deleted", message_id)
    for table in ("events", "deliveries"):
        assert "secret" not in json.dumps(rig.db.rows(f"SELECT * FROM {table}")), table
    rig.echo("ours, typed elsewhere", "mid-2")
    sent = rig.send(account, "our secret")
    rig.drain()
    mid = rig.status(sent)["instagram_message_id"]
    rig.hear(rig.item({"message": {"mid": mid, "is_echo": True, "is_deleted": True}}, echo=True))
    assert "secret" not in json.dumps(rig.db.rows("SELECT * FROM outbound_messages"))


@pytest.mark.parametrize("was_told", [True, False])
def test_what_was_taken_back_keeps_all_but_what_was_said(rig: Rig, was_told: bool) -> None:
    """A CRM that reads again finds each event of the kind it was, and the window as it was told then."""
    rig.account()
    rig.crm.answer_always(None if was_told else 503)
    rig.say("my secret", "mid-1")
    rig.hear(rig.item({"reaction": {"mid": "mid-1", "action": "react", "emoji": "❤"}}))
    rig.hear(rig.item({"message_edit": {"mid": "mid-1", "text": "my other secret", "num_edit": 1}}))
    rig.drain()
    rig.now_s += 60
    rig.say("now the window is open for longer", "mid-2")
    rig.hear(rig.item({"message": {"mid": "mid-1", "is_deleted": True}}))
    rig.crm.answer_always(None)
    rig.live_through(3600)
    _, page = rig.call("GET", "/api/v1/events")
    read = {event["event"]: event for event in page["events"] if event["instagram_message_id"] == "mid-1"}
    assert {name: event["message_type"] for name, event in read.items()} == {
        "message.received": "deleted",
        "message.reaction": "reaction",
        "message.edited": "edited",
        "message.deleted": "deleted",
    }
    assert "secret" not in json.dumps(read)
    assert (read["message.reaction"]["reaction"]["emoji"], read["message.edited"]["message"]) == ("❤", None)
    if was_told:
        for entry in rig.taken():
            event = entry.event
            if event["event"] in ("message.received", "message.edited") and event["instagram_message_id"] == "mid-1":
                kind = "deleted" if event["event"] == "message.received" else "edited"
                assert {**event, "message": None, "message_type": kind} == read[event["event"]]


@pytest.mark.parametrize("first", ["the tap", "its withdrawal"])
def test_a_tap_that_was_taken_back_says_nothing_any_more(rig: Rig, first: str) -> None:
    rig.account()
    tap = rig.item({"postback": {"mid": "mid-1", "title": "my secret", "payload": "MY_SECRET"}})
    withdrawal = rig.item({"message": {"mid": "mid-1", "is_deleted": True}})
    for item in (tap, withdrawal) if first == "the tap" else (withdrawal, tap):
        rig.hear(item)
        rig.drain()
        rig.now_s += 1
    told = ["message.postback", "message.deleted"] if first == "the tap" else ["message.deleted"]
    assert rig.events() == told
    _, page = rig.call("GET", "/api/v1/events")
    assert [event["event"] for event in page["events"]] == told
    assert "secret" not in json.dumps([page, rig.db.rows("SELECT payload, body FROM events")]).lower()


def test_a_send_that_is_taken_back_before_its_answer_is_recorded_keeps_no_text(rig: Rig) -> None:
    account = rig.account()
    message_id = rig.send(account, "our secret")
    claimed = rig.claim(rig.due("instagram", account)[0], account)
    rig.hear(rig.item({"message": {"mid": "mid-1", "is_echo": True, "is_deleted": True}}, echo=True))
    done = Outcome("done", http_status=200, external_id="mid-1")
    rig.settle(Finished(claimed, done, Verdict("done", instant(rig.now_s))))
    assert rig.status(message_id)["instagram_message_id"] == "mid-1"
    assert "secret" not in json.dumps(rig.db.rows("SELECT * FROM outbound_messages"))


@pytest.mark.parametrize(("switch", "wanted"), [("false", ["text"]), ("true", ["comment", "mention", "text"])])
def test_comments_and_mentions_are_told_only_where_asked_for(tmp_path: Path, switch: str, wanted: list[str]) -> None:
    switches = f"comments = {switch}\nmentions = {switch}\n"
    with shops.opened(tmp_path, instagram=switches) as shop:
        for name in ("comment", "mention", "text"):
            assert shop.meta.post((PAYLOADS / f"{name}.json").read_bytes()).status == 200
        assert sorted(entry.event["message_type"] for entry in shop.crm.wait(len(wanted))) == wanted
        kinds = shop.rows("SELECT COUNT(*) FROM events WHERE kind = 'channel.noted'")
        assert kinds == [(3 - len(wanted),)]


@pytest.mark.parametrize("kind", ["message_edit", "reaction", "postback", "referral"])
def test_what_is_about_an_unsent_message_wedges_nothing(rig: Rig, kind: str) -> None:
    rig.account()
    rig.crm.answer_always(503)
    rig.say("my secret", "mid-1")
    about = {"mid": "mid-1", "text": "my other secret", "num_edit": 1, "title": "T", "payload": "P", "ref": "flyer"}
    rig.hear(rig.item({kind: {**about, "action": "react"}}))
    rig.hear(rig.item({"message": {"mid": "mid-1", "is_deleted": True}}, at_s=rig.now_s + 1))
    rig.say("still here", "mid-2")
    rig.live_through(60)
    rig.crm.answer_always(None)
    rig.live_through(600)
    assert rig.events().count("message.deleted") == 1
    assert rig.taken()[-1].event["message"] == "still here"
    assert rig.db.value("SELECT COUNT(*) FROM deliveries WHERE state = 'pending'") == 0
    assert "secret" not in json.dumps([entry.event for entry in rig.taken()])
    assert rig.alerts == []


@pytest.mark.parametrize("is_echo", [False, True])
def test_an_edit_that_overtakes_its_message_is_the_text_of_both(rig: Rig, is_echo: bool) -> None:
    rig.account()
    for number, text in ((2, "newest"), (1, "newer")):
        edit = {"message_edit": {"mid": "mid-1", "text": text, "num_edit": number}}
        rig.hear(rig.item(edit, at_s=rig.now_s + 5, echo=is_echo))
    message = {"mid": "mid-1", "text": "old", **({"is_echo": True} if is_echo else {})}
    rig.hear(rig.item({"message": message}, echo=is_echo))
    rig.drain()
    told = [(entry.event["event"], entry.event["message"]) for entry in rig.taken()]
    kind = "message.echo" if is_echo else "message.received"
    assert told == [("message.edited", "newest"), ("message.edited", "newer"), (kind, "newest")]


def test_an_edit_that_comes_after_its_unsend_is_not_told(rig: Rig) -> None:
    rig.account()
    rig.hear(rig.item({"message": {"mid": "mid-1", "is_deleted": True}}))
    rig.hear(rig.item({"message_edit": {"mid": "mid-1", "text": "a secret", "num_edit": 1}}))
    rig.drain()
    assert rig.events() == ["message.deleted"]
    assert "secret" not in json.dumps(rig.db.rows("SELECT * FROM events"))


@pytest.mark.parametrize("in_flight", [True, False])
def test_an_echo_proves_a_send_even_when_it_was_taken_back_since(rig: Rig, in_flight: bool) -> None:
    account = rig.account()
    sent = rig.send(account, "ours")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    mid = str(rig.meta.sent[0].mid)
    if in_flight:
        rig.echo("ours", mid)
    rig.hear(rig.item({"message": {"mid": mid, "is_echo": True, "is_deleted": True}}, echo=True))
    rig.echo("ours", mid)
    rig.live_through(3600)
    assert len(rig.meta.sent) == 1
    assert rig.status(sent)["instagram_message_id"] == mid


def test_a_whole_message_takes_the_place_of_its_announcement(rig: Rig) -> None:
    rig.account()
    rig.hear(rig.item({"message_edit": {"mid": "mid-1", "text": "yes", "num_edit": 0}}))
    rig.hear(rig.item({"message": {"mid": "mid-1", "text": "yes", "quick_reply": {"payload": "CONFIRM"}}}))
    rig.drain()
    (told,) = (entry.event for entry in rig.taken())
    assert (told["message"], told["quick_reply"]) == ("yes", {"payload": "CONFIRM", "other": None})


@pytest.mark.parametrize("message", [{"text": "hello"}, {"is_unsupported": True}])
def test_what_came_under_a_foreign_id_before_its_account_is_delivered_then_and_once(
    rig: Rig, message: dict[str, Any]
) -> None:
    item = rig.item({"message": {"mid": "mid-1", **message}})
    rig.hear(item, account="f6a1c7de")
    account = rig.account()
    inbound.adopt(rig.db, account)
    rig.hear(item, account="f6a1c7de")
    rig.hear(item)
    rig.drain()
    assert len(rig.taken()) == 1


def test_one_webhook_does_not_take_in_all_that_waited_for_its_account(rig: Rig) -> None:
    for number in range(inbound._ADOPT_AT_ONCE + 50):
        rig.say(f"early {number}", f"mid-{number}", at_s=rig.now_s + number)
    account = rig.account()
    rig.now_s += 1000
    (late,) = rig.say("late", "mid-late")
    assert late.state == "queued"
    assert rig.db.value("SELECT COUNT(*) FROM events WHERE state = 'unrouted'") == 51
    inbound.adopt(rig.db, account)
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()][-2:] == [f"early {inbound._ADOPT_AT_ONCE + 49}", "late"]


@pytest.mark.parametrize("field", [[], {}, 7, None, True])
def test_a_change_whose_field_is_no_text_sinks_no_message_beside_it(rig: Rig, field: Any) -> None:
    rig.account()
    entry = {"id": SHOP_ID, "time": 1_800_000_000_000, "changes": [{"field": field, "value": {"id": "1"}}]}
    message = {**entry, "messaging": [rig.item({"message": {"mid": "mid-1", "text": "hello"}})]}
    rig.hear_body(json.dumps({"object": "instagram", "entry": [message]}).encode())
    rig.drain()
    assert sorted(rig.events()) == ["message.received", "message.unsupported"]


def test_a_message_that_cannot_be_shown_opens_the_window_too(rig: Rig) -> None:
    account = rig.account()
    rig.say("long ago", "mid-1")
    rig.now_s += 48 * 3600
    rig.hear(rig.item({"message": {"mid": "mid-2", "is_unsupported": True}}))
    rig.drain()
    assert rig.taken()[-1].event["window_expires_at"] == instant(rig.now_s + 24 * 3600)
    rig.send(account, "we may answer")
    rig.drain()
    assert rig.meta.sent[-1].text == "we may answer"


def test_what_was_recovered_is_not_told_again_as_another_kind(rig: Rig) -> None:
    rig.account()
    found = ChannelEvent(
        "message.received", SHOP_ID, CUSTOMER, instant(rig.now_s), message_key("mid-1"), external_id="mid-1",
        rank=RECOVERED, text="Start", message_type="text", extra={"recovered": True},
    )  # fmt: skip
    tap = rig.item({"postback": {"mid": "mid-1", "title": "Start", "payload": "START"}})
    for pushed in (False, True):
        inbound.keep(rig.db, [found], correlation_id="t")
        if pushed:
            rig.drain()
        rig.hear(tap)
        rig.drain()
        assert rig.events() == (["message.received"] if pushed else ["message.postback"])
        for table in ("events", "deliveries"):
            rig.db.write(lambda tx, table=table: tx.run(f"DELETE FROM {table}"))  # type: ignore[misc]
        rig.crm.reset()
