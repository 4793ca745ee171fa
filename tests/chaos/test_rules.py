"""The checker itself: a small history that keeps the promise, and what it says when one fact of it is changed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos import rules
from tests.chaos.history import CrmCall, Fact, History, Item, Kill, Order, SendCall, Webhook

Facts = dict[str, Any]
BUYER = "79"


def crm(at: float, event: str, number: int, subject: str, *, fault: str = "ok") -> CrmCall:
    good = fault == "ok"
    return CrmCall(
        at, at + 0.01, event, f"evt_{event}_{subject}", number, BUYER, subject, subject, True, fault, good, good
    )


def webhook(at: float, *items: Item) -> Webhook:
    return Webhook(at, at + 0.01, items, 200, repr(items).encode())


def good() -> Facts:
    """Two messages of a customer, and two sends of the same text; all acknowledged, delivered, told."""
    return {
        "first": webhook(1, Item("message", "m1", BUYER, 1)),
        "second": webhook(2, Item("message", "m2", BUYER, 2)),
        "crm first": crm(3, "message.received", 1, "m1"),
        "crm second": crm(4, "message.received", 2, "m2"),
        "order one": Order(5, 5.1, "k1", BUYER, "hi", 202, "msg_1"),
        "order two": Order(6, 6.1, "k2", BUYER, "hi", 202, "msg_2"),
        "send one": SendCall(7, 7.01, BUYER, "hi", "ok", "x1", 1),
        "send two": SendCall(8, 8.01, BUYER, "hi", "ok", "x2", 2),
        "echo": webhook(9, Item("echo", "x1", BUYER, 9)),
        "sent one": crm(10, "message.sent", 3, "msg_1"),
        "sent two": crm(11, "message.sent", 4, "msg_2"),
        "delivered": crm(12, "message.delivered", 5, "msg_1"),
    }


def status(state: str, mid: str | None, *steps: str, code: str | None = None) -> dict[str, Any]:
    history = [{"status": step} for step in ("pending", *steps)]
    return {"status": state, "instagram_message_id": mid, "status_history": history, "error": code and {"code": code}}


STATUSES = {"msg_1": status("delivered", "x1", "sent", "delivered"), "msg_2": status("sent", "x2", "sent")}


def broken(facts: Facts, statuses: dict[str, Any] | None = None) -> set[str]:
    history = History(sorted((fact for fact in facts.values() if fact), key=lambda fact: fact.at))
    seen = rules.Seen(history, {**STATUSES, **(statuses or {})}, [], quick_tries=6)
    return {violation.rule for violation in rules.check(seen)}


def test_a_history_that_keeps_the_promise_passes() -> None:
    assert broken(good()) == set()


def changed(name: str, **fields: Any) -> Callable[[Facts], Facts]:
    return lambda facts: {**facts, name: replace(facts[name], **fields)}


def added(*more: Fact) -> Callable[[Facts], Facts]:
    return lambda facts: {**facts, **{f"more {number}": fact for number, fact in enumerate(more)}}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda facts: {**facts, "crm second": None}, "acknowledged is delivered"),
        (changed("crm first", heard=False), "acknowledged is delivered"),
        (changed("crm first", genuine=False), "signature"),
        (changed("crm second", sequence=1), "sequence"),
        (added(replace(crm(20, "message.received", 1, "m1"), event_id="evt_other")), "one event"),
        (added(replace(crm(2.5, "message.received", 1, "m1", fault="500"), digest="other")), "stable events"),
        (added(crm(20, "message.received", 1, "m1")), "no needless repetition"),
        (added(crm(20, "message.received", 1, "m1"), Kill(19, 19.1)), "no needless repetition"),
        (added(crm(3.005, "message.received", 1, "m1", fault="500")), "one call at a time"),
        (changed("crm first", at=4.5, until=4.51), "order at the CRM"),
        (lambda facts: {**facts, "first": webhook(2.5, *facts["first"].items)}, "order of acceptance"),
        (
            changed("first", items=(Item("message", "m1", BUYER, 3), Item("message", "m2", BUYER, 2))),
            "order of a batch",
        ),
        (changed("order two", key="k1"), "idempotency"),
        (added(SendCall(8.5, 8.51, BUYER, "hi", "ok", "x3", 3)), "one effect"),
        (changed("send two", text="ho"), "true status"),
        (changed("send one", position=3), "order at Instagram"),
        (changed("send two", at=7.005, until=7.02), "one send at a time"),
        (lambda facts: {**facts, "sent two": None}, "told statuses"),
        (lambda facts: {**facts, "echo": None}, "true status"),
        (added(webhook(9.5, Item("read", "x2", BUYER, 9))), "true status"),
        (added(webhook(9.5, Item("echo", "x2", BUYER, 9))), "true status"),
        (added(crm(30, "message.echo", 6, "x1")), "own echo"),
        (changed("echo", status=500), "answers"),
    ],
)
def test_a_broken_promise_is_named(change: Callable[[Facts], Facts], rule: str) -> None:
    assert rule in broken(change(good()))


def test_what_a_kill_or_a_lost_answer_explains_is_no_violation() -> None:
    again = crm(20, "message.received", 1, "m1")
    assert broken({**good(), "kill": Kill(3.005, 3.01), "again": again}) == set()
    lost = replace(good()["crm first"], heard=False, fault="reset_after")
    assert broken({**good(), "crm first": lost, "again": again}) == set()


def test_an_event_steps_aside_only_when_worn_out() -> None:
    tries = {f"try {number}": crm(2.1 + number / 10, "message.received", 1, "m1", fault="500") for number in range(6)}
    late = {"crm first": crm(14, "message.received", 1, "m1")}
    assert broken({**good(), **late, **tries}) == set()
    assert broken({**good(), **late, "try 0": tries["try 0"]}) == {"order at the CRM"}


def test_a_failed_send_has_no_effect_unless_it_says_that_nobody_could_tell() -> None:
    facts = {**good(), "sent two": crm(11, "message.failed", 4, "msg_2")}
    assert broken(facts, {"msg_2": status("failed", None, "failed", code="in_doubt")}) == set()
    assert broken(facts, {"msg_2": status("failed", None, "failed", code="window_closed")}) == {"one effect"}
    assert "final status" in broken(facts, {"msg_2": status("pending", None)})
