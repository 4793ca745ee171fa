"""One message, one id: in whatever forms and whatever order Instagram tells it, the CRM hears it once."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from crmbridge.events import instant
from crmbridge.instagram import reading
from crmbridge.store import accounts, inbound, privacy
from tests.rig import Rig
from tests.shop import CUSTOMER

MID = "mid-1"
TEXT = "is the lamp still there?"


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


def test_an_echo_that_comes_after_its_unsend_proves_the_send(rig: Rig) -> None:
    message_id = rig.send(rig.account(), "ours")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    mid = str(rig.meta.sent[0].mid)
    rig.hear(rig.item({"message": {"mid": mid, "is_echo": True, "is_deleted": True}}, echo=True))
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
