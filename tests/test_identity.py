"""One message, one id: in whatever forms and whatever order Instagram tells it, the CRM hears it once."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from crmbridge.events import instant
from crmbridge.instagram import reading
from crmbridge.store import accounts, inbound, privacy, retention, turn
from tests.rig import Rig
from tests.shop import CUSTOMER

MID = "mid-1"
TEXT, NEW = "is the lamp still there?", "is the big lamp still there?"
FOREIGN = "17841400000099999"  # what another login calls the account
DAY_S = 86_400


def whole(rig: Rig) -> None:
    rig.hear(rig.item({"message": {"mid": MID, "text": TEXT}}))


def unsupported(rig: Rig) -> None:
    rig.hear(rig.item({"message": {"mid": MID, "is_unsupported": True}}))


def announced(rig: Rig) -> None:
    rig.hear(rig.item({"message_edit": {"mid": MID, "text": "", "num_edit": 0}}))


def announced_with_words(rig: Rig) -> None:
    rig.hear(rig.item({"message_edit": {"mid": MID, "text": TEXT, "num_edit": 0}}))


def recovered(rig: Rig) -> None:
    """Found when the conversation was read again."""
    told = {"id": MID, "created_time": instant(rig.now_s), "from": {"id": CUSTOMER}, "message": TEXT}
    (account,) = accounts.everyone(rig.db)
    events = reading.events([told], account, instant(rig.now_s))
    inbound.keep(rig.db, events, correlation_id="test")


def unsent(rig: Rig) -> None:
    rig.hear(rig.item({"message": {"mid": MID, "is_deleted": True}}))


def edited(rig: Rig) -> None:
    rig.hear(rig.item({"message_edit": {"mid": MID, "text": NEW, "num_edit": 1}}))


FORMS: dict[str, Callable[[Rig], None]] = {
    form.__name__: form for form in (whole, unsupported, announced, announced_with_words, recovered)
}
PAIRS = list(itertools.permutations(FORMS, 2))


def heard(rig: Rig, *, of_message: bool = True) -> list[tuple[str, str | None]]:
    rig.live_through(20)  # a CRM waits a little for a name
    told = [(entry.event["event"], entry.event["message"]) for entry in rig.taken()]
    return [one for one in told if one[0] != "message.deleted"] if of_message else told


@pytest.mark.parametrize("forms", PAIRS, ids="-".join)
@pytest.mark.parametrize("is_seen", [False, True], ids=["unseen", "seen"])
def test_two_forms_of_a_message_are_one_message(rig: Rig, forms: tuple[str, str], *, is_seen: bool) -> None:
    rig.account()
    for name in forms:
        FORMS[name](rig)
        FORMS[name](rig)  # and each is told again
        if is_seen:
            heard(rig)
    found = heard(rig)
    bare = {"unsupported", "announced"}
    with_content = [] if bare.issuperset(forms) else [("message.received", TEXT)]
    # What had no content is followed by what has it, if it was seen before that came.
    without = [("message.unsupported", None)] if forms[0] in bare and (is_seen or not with_content) else []
    assert found == without + with_content
    assert [entry.event["sequence"] for entry in rig.taken()] == sorted(
        entry.event["sequence"] for entry in rig.taken()
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_was_taken_back_before_it_came_is_not_told(rig: Rig, form: str) -> None:
    rig.account()
    unsent(rig)
    FORMS[form](rig)
    FORMS[form](rig)
    assert heard(rig, of_message=False) == [("message.deleted", None)]
    assert TEXT not in str(rig.db.rows("SELECT * FROM events"))


@pytest.mark.parametrize("forms", PAIRS, ids="-".join)
def test_a_message_whose_sender_was_erased_does_not_come_back(rig: Rig, forms: tuple[str, str]) -> None:
    account = rig.account()
    FORMS[forms[0]](rig)
    before = heard(rig)
    if rig.db.value("SELECT contact FROM events") != CUSTOMER:
        pytest.skip("it names nobody, so that it is nobody's")
    privacy.erase_contact(rig.db, account["id"], CUSTOMER)
    FORMS[forms[1]](rig)
    assert heard(rig) == before
    assert TEXT not in str(rig.db.rows("SELECT * FROM events"))


@pytest.mark.parametrize(
    "forms",
    [(edited, whole), (edited, unsupported, whole), (edited, announced_with_words, whole), (announced, edited, whole),
     (unsupported, edited, whole)],
)  # fmt: skip
@pytest.mark.parametrize("is_seen", [False, True], ids=["unseen", "seen"])
def test_no_text_is_told_after_a_newer_one(
    rig: Rig, forms: tuple[Callable[[Rig], None], ...], *, is_seen: bool
) -> None:
    rig.account()
    for form in forms:
        form(rig)
        if is_seen:
            heard(rig)
    texts = [text for event, text in heard(rig) if event in ("message.received", "message.edited")]
    assert set(texts[texts.index(NEW) :]) == {NEW}
    assert {text for event, text in heard(rig) if event == "message.unsupported"} <= {None}


# --- before there is an account, and under another id of it ---


def adopt(rig: Rig) -> None:
    inbound.adopt(rig.db, rig.account())


def test_what_was_unsent_before_its_account_came_is_not_told(rig: Rig) -> None:
    unsent(rig)
    whole(rig)
    adopt(rig)
    assert heard(rig, of_message=False) == [("message.deleted", None)]
    assert TEXT not in str(rig.db.rows("SELECT * FROM events"))


@pytest.mark.parametrize(("first", "told"), [({"is_deleted": True}, []), ({"is_unsupported": True}, [TEXT])])
def test_another_id_of_the_account_makes_no_other_message(rig: Rig, first: dict[str, Any], told: list[str]) -> None:
    rig.hear(rig.item({"message": {"mid": MID, **first}}), account=FOREIGN)
    adopt(rig)
    rig.hear(rig.item({"message": {"mid": MID, "text": TEXT}}), account=FOREIGN)
    whole(rig)
    assert [text for event, text in heard(rig) if event == "message.received"] == told


def test_the_form_that_tells_most_is_told_of_what_waited_under_two_ids(rig: Rig) -> None:
    rig.hear(rig.item({"message": {"mid": MID, "text": TEXT}}), account=FOREIGN)
    rig.now_s += 1
    announced(rig)
    adopt(rig)
    assert heard(rig) == [("message.received", TEXT)]


# --- what is over ---


def sweep(rig: Rig, *, texts_s: float = DAY_S, unrouted_most: int = 1000) -> None:
    terms = retention.Terms(instant(rig.now_s - texts_s), "2000", "2000", "2000", "2000", unrouted_most, 0)
    retention.sweep(rig.db, terms, pause=lambda _: None)


def test_a_text_that_retention_took_does_not_come_back_for_good(rig: Rig) -> None:
    rig.account(url=None)
    recovered(rig)
    rig.call("GET", "/api/v1/events")
    rig.now_s += 2 * DAY_S
    sweep(rig)
    whole(rig)
    rig.now_s += 2 * DAY_S
    sweep(rig)
    assert TEXT not in str(rig.db.rows("SELECT * FROM events"))


def test_what_was_dropped_for_want_of_room_makes_way_for_the_whole(rig: Rig) -> None:
    announced_with_words(rig)
    sweep(rig, unrouted_most=0)
    whole(rig)
    adopt(rig)
    assert heard(rig) == [("message.received", TEXT)]


def test_what_died_untried_keeps_its_event(rig: Rig) -> None:
    account = rig.account()
    rig.pause(account, "deliveries")
    unsupported(rig)
    long_ago = "2020-01-01T00:00:00.000Z"
    rig.by_hand("UPDATE endpoints SET paused_at = NULL, aged_from = ? WHERE kind = 'crm'", (long_ago,))
    rig.by_hand("UPDATE deliveries SET aged_from = ?", (long_ago,))
    rig.expire()
    whole(rig)
    assert heard(rig) == [("message.received", TEXT)]
    (dead,) = rig.dead()
    rig.revive(dead["id"])
    assert heard(rig) == [("message.received", TEXT), ("message.unsupported", None)]


def test_nothing_is_left_of_what_was_taken_back(rig: Rig) -> None:
    account = rig.account()
    rig.pause(account, "deliveries")
    unsupported(rig)
    rig.change_account(account, url=None)
    turn.end_leftovers(rig.db, pause=lambda _: None)
    whole(rig)
    assert (
        rig.db.rows("SELECT * FROM history WHERE subject LIKE 'dlv%' AND subject NOT IN (SELECT id FROM deliveries)")
        == []
    )


# --- sends ---


@pytest.mark.parametrize("first", ["unsend", "edit"])
def test_what_overtakes_the_echo_of_a_send_hides_it_not(rig: Rig, first: str) -> None:
    message_id = rig.send(rig.account(), "ours")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    mid = str(rig.meta.sent[0].mid)
    told = {
        "unsend": {"message": {"mid": mid, "is_echo": True, "is_deleted": True}},
        "edit": {"message_edit": {"mid": mid, "text": "something else", "num_edit": 1}},
    }
    rig.hear(rig.item(told[first], echo=True))
    rig.echo("ours", mid)
    assert rig.status(message_id)["status"] == "delivered"
    rig.live_through(3600)
    assert len(rig.meta.sent) == 1
    assert "message.echo" not in rig.events()


def test_the_whole_message_opens_the_window_that_its_announcement_did_not(rig: Rig) -> None:
    account = rig.account()
    announced_with_words(rig)
    ad: dict[str, Any] = {"ref": "lamp", "source": "ADS", "type": "OPEN_THREAD", "ad_id": "1"}
    rig.hear(rig.item({"message": {"mid": MID, "text": TEXT, "referral": ad}}))
    row = rig.db.row("SELECT window_until FROM contacts WHERE account_id = ?", (account["id"],)) or {}
    assert row["window_until"] == instant(rig.now_s + 7 * 86_400)
