"""What users see stays word for word: the CRM's bodies of every payload, and twelve stories with status and explain.

``GOLDEN=write ./install.sh test tests/test_golden.py`` writes the files anew; their diff shows what changed for users.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crmbridge.sandbox import wire
from tests.rig import Rig
from tests.shop import OTHER_ID
from tests.test_channel import PAYLOADS
from tests.test_explain import stories

GOLDEN = Path(__file__).parent / "golden"
HOUR_S = 3600.0
_IDS = re.compile(r"\b(acc|evt|msg|dlv|key|req|cnv)_[0-9a-hjkmnp-tv-z]{26}\b|\b(aWdfZAG1)[A-Za-z0-9_-]+")
_CHANGING = (
    (re.compile(r"sha256=[0-9a-f]{64}"), "sha256=…"),
    (re.compile(r"\b[0-9]+ ms\b"), "… ms"),
    (re.compile(r"\btrace [A-Za-z0-9_-]+"), "trace …"),
    (re.compile(r"127\.0\.0\.1:[0-9]+"), "127.0.0.1:…"),
    (re.compile(r"\b20(?!27-0)[0-9]{2}-[0-9T:.-]+Z"), "now"),  # a test event bears the real time
)


def settled(text: str) -> str:
    """Return a text with its ids numbered in their order, and without what differs from run to run."""
    numbers: dict[str, str] = {}
    for pattern, put in _CHANGING:
        text = pattern.sub(put, text)
    return _IDS.sub(lambda found: numbers.setdefault(found[0], f"{found[1] or 'mid'}_{len(numbers) + 1}"), text)


def hold_to(name: str, text: str) -> None:
    """Compare with the golden file, or write it."""
    path, text = GOLDEN / name, settled(text)
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in PAYLOADS.glob("*.json")))
def test_the_bodies_of_a_payload(rig: Rig, name: str) -> None:
    rig.account()
    rig.account(OTHER_ID)
    rig.hear_body((PAYLOADS / f"{name}.json").read_bytes())
    rig.drain()
    bodies = sorted(
        (entry.event for entry in rig.taken()),
        key=lambda event: (event["timestamp"], event["recipient_id"] or "", event["sequence"] or 0),
    )
    hold_to(f"payloads/{name}.json", json.dumps(bodies, indent=1, ensure_ascii=False) + "\n")


# --- stories: each returns what explain is to be asked for ---


def plain_text(rig: Rig) -> list[str]:
    rig.account()
    rig.say("hello", "mid-1")
    rig.live_through(1)
    return ["mid-1"]


def crm_that_is_down_for_a_while(rig: Rig) -> list[str]:
    rig.account()
    rig.crm.answer(503, times=3)
    rig.say("one", "mid-1")
    rig.say("two", "mid-2")
    rig.live_through(60)
    return ["mid-1", "mid-2"]


def crm_that_is_down_for_a_day(rig: Rig) -> list[str]:
    rig.account()
    rig.crm.answer_always(500)
    rig.say("nobody takes this", "mid-1")
    rig.live_through(25 * HOUR_S)
    return ["mid-1"]


def crm_with_another_secret(rig: Rig) -> list[str]:
    account = rig.account()
    rig.crm.answer_always(401)
    rig.say("one", "mid-1")
    rig.drain()
    rig.say("two", "mid-2")
    rig.live_through(90)
    rig.crm.answer_always(None)
    rig.live_through(10 * 60)
    rig.resume(account, "deliveries")
    rig.live_through(10)
    return ["mid-1", "mid-2", account["id"]]


def crm_that_is_gone(rig: Rig) -> list[str]:
    account = rig.account()
    rig.crm.answer_always(410)
    rig.say("one", "mid-1")
    rig.live_through(HOUR_S)
    rig.crm.answer_always(None)
    rig.resume(account, "deliveries")
    rig.live_through(10)
    return ["mid-1", account["id"]]


def reply_that_is_read(rig: Rig) -> list[str]:
    account = rig.account()
    rig.meet()
    message_id = rig.send(account, "a reply")
    rig.drain()
    rig.now_s += 2
    mid = str(rig.meta.sent[0].mid)
    rig.echo("a reply", mid)
    rig.drain()
    rig.now_s += 60
    rig.hear(rig.item({"read": {"mid": mid}}))
    rig.drain()
    return [message_id]


def reply_whose_answer_was_lost(rig: Rig) -> list[str]:
    account = rig.account()
    rig.meet()
    rig.meta.fault("messages", after_effect=True, status=504, body="")
    message_id = rig.send(account, "delivered all the same")
    rig.live_through(600)
    return [message_id]


def reply_that_was_lost(rig: Rig) -> list[str]:
    account = rig.account()
    rig.meet()
    rig.meta.fault("messages", status=504, body="")
    message_id = rig.send(account, "not delivered at first")
    rig.live_through(600)
    return [message_id]


def reply_that_nobody_can_find(rig: Rig) -> list[str]:
    account = rig.account()
    rig.meta.fault("messages", status=504, body="")
    message_id = rig.send(account, "nobody knows")
    rig.live_through(600)
    return [message_id]


def reply_to_a_closed_window(rig: Rig) -> list[str]:
    account = rig.account()
    rig.meet()
    rig.meta.fault("messages", status=400, body=wire.error_body(10, "outside of allowed window", subcode=2534022))
    message_id = rig.send(account, "too late")
    rig.live_through(10)
    return [message_id]


def account_that_instagram_stops(rig: Rig) -> list[str]:
    account = rig.account()
    rig.meet()
    error = wire.error_body(190, "Session has expired", subcode=463)
    for path in ("messages", "conversations"):
        rig.meta.fault(path, times=99, status=400, body=error)
    message_id = rig.send(account, "waits")
    rig.live_through(600)
    rig.meta.clear_faults()
    rig.live_through(600)
    return [message_id, account["id"]]


def message_that_changes(rig: Rig) -> list[str]:
    rig.account()
    rig.say("helo", "mid-1")
    rig.drain()
    for change in (
        {"message_edit": {"mid": "mid-1", "text": "hello", "num_edit": 1}},
        {"reaction": {"mid": "mid-1", "action": "react", "reaction": "love", "emoji": "❤"}},
        {"message": {"mid": "mid-1", "is_deleted": True}},
    ):
        rig.now_s += 5
        rig.hear(rig.item(change))
        rig.drain()
    return ["mid-1"]


STORIES: tuple[Callable[[Rig], list[str]], ...] = (
    plain_text, crm_that_is_down_for_a_while, crm_that_is_down_for_a_day, crm_with_another_secret, crm_that_is_gone,
    reply_that_is_read, reply_whose_answer_was_lost, reply_that_was_lost, reply_that_nobody_can_find,
    reply_to_a_closed_window, account_that_instagram_stops, message_that_changes,
)  # fmt: skip


@pytest.mark.parametrize("happens", STORIES, ids=lambda happens: happens.__name__)
def test_the_words_of_a_story(rig: Rig, happens: Callable[[Rig], list[str]]) -> None:
    asked = happens(rig)
    lines = [json.dumps(entry.event, ensure_ascii=False) + f"  # {entry.answered}" for entry in rig.crm.received]
    parts = ["# what the CRM got, and answered", *lines]
    for given in asked:
        if given.startswith("msg_"):
            status: Any = rig.status(given)
            parts += ["", f"# GET /api/v1/messages/{given}/status", json.dumps(status, indent=1, ensure_ascii=False)]
        for one in stories(rig, given):
            parts += ["", f"# crmbridge explain {given}", json.dumps(one, indent=1, ensure_ascii=False)]
    hold_to(f"stories/{happens.__name__}.txt", "\n".join(parts) + "\n")
