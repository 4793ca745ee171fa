"""A send whose answer leaves open whether it was taken: looked for, sent again when it is not there, never twice."""

import itertools
from email.utils import formatdate
from typing import Any

import pytest

from crmbridge.events import instant
from crmbridge.sandbox import wire
from tests.rig import Rig
from tests.shop import CUSTOMER, SHOP_ID

THREAD = f"aWdfZAG06{CUSTOMER}"

OPEN: dict[str, dict[str, Any]] = {
    "a reset": {"drop": True},
    "500 with code 2": {"status": 500, "body": wire.error_body(2)},
    "500 with code 2 that says it is not transient": {"status": 500, "body": wire.error_body(2, is_transient=False)},
    "500 with code 1": {"status": 500, "body": wire.error_body(1)},
    "500 with a code nobody knows": {"status": 500, "body": wire.error_body(77_777)},
    "503 is_transient": {"status": 503, "body": wire.error_body(2, is_transient=True)},
    "504 with a page": {"status": 504, "body": "<html>Gateway Timeout</html>"},
    "an empty 502": {"status": 502, "body": ""},
    "400 with code 1": {"status": 400, "body": wire.error_body(1)},
    "400 with code 2": {"status": 400, "body": wire.error_body(2)},
    "400 with an unknown code that is transient": {"status": 400, "body": wire.error_body(77_777, is_transient=True)},
    "1/1357046": {"status": 400, "body": wire.error_body(1, subcode=1357046)},
    "1200": {"status": 400, "body": wire.error_body(1200)},
    "200 that is no JSON": {"status": 200, "body": "<html>OK</html>"},
    "200 without an id": {"status": 200, "body": {"recipient_id": CUSTOMER}},
    "200 with a code nobody knows": {"status": 200, "body": {"error": {"code": 77_777, "message": "x"}}},
    "201 with an error without a code": {"status": 201, "body": {"error": {}}},
    "200 with code 2": {"status": 200, "body": {"error": {"code": 2, "message": "x"}}},
    "an empty 204": {"status": 204, "body": ""},
    "408 of a proxy": {"status": 408, "body": ""},
}  # fmt: skip
# The same nearly, and yet no doubt: what becomes of the send, and with how many calls.
CLEAR: dict[str, tuple[Any, int, tuple[str, int]]] = {
    "400 with code 2 that says it is not transient": (wire.error_body(2, is_transient=False), 400, ("sent", 2)),
    "500 with a window that is closed": (wire.error_body(10, subcode=2534022), 500, ("failed", 1)),
    "400 with a person who cannot be had, though transient": (
        wire.error_body(551, is_transient=True), 400, ("failed", 1),
    ),
    "503 with a rate limit": (wire.error_body(4, is_transient=True), 503, ("sent", 2)),
    "429 with code 2": (wire.error_body(2), 429, ("sent", 2)),
    "400 of another app's thread": (wire.error_body(10, subcode=2018300), 400, ("sent", 2)),
    "200 with a window that is closed": ({"error": {"code": 10, "error_subcode": 2534022}}, 200, ("failed", 1)),
    "400 without an error object": ("Bad Request", 400, ("failed", 1)),
    "400 with a code nobody knows": (wire.error_body(77_777), 400, ("failed", 1)),
}  # fmt: skip


def sends(rig: Rig) -> list[Any]:
    return [call for call in rig.meta.calls if call.method == "POST"]


def let_pauses_pass(rig: Rig) -> None:
    """Have the time go on while a call waits for its turn; else it stands still."""

    def pause(seconds: float) -> None:
        rig.now_s += seconds

    rig.rooms.client.pause = pause


def looks(rig: Rig) -> list[float]:
    """Return when the Conversations API was called."""
    return [call.at for call in rig.meta.calls if call.method == "GET"]


@pytest.fixture
def known(rig: Rig) -> dict[str, Any]:
    """Return an account whose customer has written."""
    account = rig.account()
    rig.meet()
    return account


@pytest.mark.parametrize("echo_s", [4, None], ids=["echo", "no echo"])
@pytest.mark.parametrize("answer", OPEN)
def test_what_arrived_in_spite_of_its_answer_is_not_sent_again(
    rig: Rig, known: dict[str, Any], answer: str, echo_s: int | None
) -> None:
    message_id = rig.send(known, "your parcel is on its way")
    rig.meta.fault("messages", after_effect=True, **OPEN[answer])
    rig.drain()
    if echo_s:
        rig.live_through(echo_s)
        rig.echo("your parcel is on its way", str(rig.meta.sent[0].mid))
    rig.live_through(600)
    assert [entry.text for entry in rig.meta.sent] == ["your parcel is on its way"]
    found = rig.status(message_id)
    assert (found["status"], found["attempt_count"]) == ("delivered" if echo_s else "sent", 1)
    assert found["instagram_message_id"] == rig.meta.sent[0].mid


@pytest.mark.parametrize("answer", OPEN)
def test_what_did_not_arrive_is_sent_once_after_two_looks(rig: Rig, known: dict[str, Any], answer: str) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", **OPEN[answer])
    rig.live_through(600)
    assert len(rig.meta.sent) == 1
    found = rig.status(message_id)
    assert [entry["outcome"] for entry in found["attempts"]] == ["in_doubt", "absent", "absent", "done"]
    assert (found["status"], found["retry_count"]) == ("sent", 1)


@pytest.mark.parametrize("answer", CLEAR)
def test_an_answer_that_decides_is_believed(rig: Rig, known: dict[str, Any], answer: str) -> None:
    body, status, wanted = CLEAR[answer]
    message_id = rig.send(known)
    rig.meta.fault("messages", status=status, body=body)
    rig.live_through(600)
    found = rig.status(message_id)
    assert (found["status"], found["attempt_count"]) == wanted
    assert "in_doubt" not in [entry["outcome"] for entry in found["attempts"]]


def test_an_id_in_a_2xx_is_taken_whatever_stands_beside_it(rig: Rig, known: dict[str, Any]) -> None:
    message_id = rig.send(known)
    odd = {"message_id": "mid-of-ours", "error": {"code": 190, "message": "x"}}
    rig.meta.fault("messages", status=200, body=odd)
    rig.drain()
    assert rig.status(message_id)["instagram_message_id"] == "mid-of-ours"


@pytest.mark.parametrize("answer", ["a reset", "503 is_transient"])
def test_after_the_third_resend_it_is_looked_for_once_more(rig: Rig, known: dict[str, Any], answer: str) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", times=100, **OPEN[answer])
    rig.live_through(3600)
    found = rig.status(message_id)
    assert [entry["outcome"] for entry in found["attempts"]] == ["in_doubt", "absent", "absent"] * 4
    assert (found["status"], found["attempt_count"], found["retry_count"]) == ("failed", 4, 3)
    assert found["error"]["code"] == ("connection_lost" if answer == "a reset" else "instagram_unavailable")
    assert rig.events() == ["message.failed"]


def test_the_last_try_that_arrived_is_found(rig: Rig, known: dict[str, Any]) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", times=3, status=502, body="")
    rig.meta.fault("messages", status=502, body="", after_effect=True)
    rig.live_through(3600)
    assert (rig.status(message_id)["status"], len(sends(rig)), len(rig.meta.sent)) == ("sent", 4, 1)


def test_resends_keep_the_distance_of_retries(rig: Rig, known: dict[str, Any]) -> None:
    rig.send(known)
    rig.meta.fault("messages", times=100, status=502, body="")
    rig.live_through(3600)
    between = [later.at - sooner.at for sooner, later in itertools.pairwise(sends(rig))]
    assert between == pytest.approx([35, 35, 60], abs=1)


# --- what a look may conclude ---


def empty(rig: Rig) -> None:
    rig.meta.messages.clear()


def only_strangers(rig: Rig) -> None:
    for entry in rig.meta.messages:
        entry["mid"] = "mid-that-nobody-knows"


def without_answer(rig: Rig) -> None:
    rig.meta.fault("conversations", times=10_000, status=500, body="")


@pytest.mark.parametrize("view", [empty, only_strangers])
def test_a_conversation_that_shows_nothing_known_tells_nothing(rig: Rig, known: dict[str, Any], view: Any) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", drop=True)
    view(rig)
    rig.live_through(600)
    found = rig.status(message_id)
    assert [entry["outcome"] for entry in found["attempts"]] == ["in_doubt", "unclear", "unclear"]
    assert (found["status"], found["error"]["code"], rig.meta.sent) == ("failed", "in_doubt", [])


def test_a_look_that_is_not_answered_counts_for_nothing(rig: Rig, known: dict[str, Any]) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", drop=True)
    rig.meta.fault("conversations", times=4, status=500, body="")
    rig.live_through(3600)
    outcomes = [entry["outcome"] for entry in rig.status(message_id)["attempts"]]
    assert outcomes == ["in_doubt", *["retry"] * 4, "absent", "absent", "done"]
    assert len(rig.meta.sent) == 1


def test_absent_counts_only_twice_running(rig: Rig, known: dict[str, Any]) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", drop=True)
    rig.live_through(6)  # absent
    kept = list(rig.meta.messages)
    empty(rig)
    rig.live_through(30)  # unclear
    rig.meta.messages += kept
    rig.live_through(31)  # absent
    assert rig.meta.sent == []
    rig.live_through(31)  # absent again
    outcomes = [entry["outcome"] for entry in rig.status(message_id)["attempts"]]
    assert outcomes == ["in_doubt", "absent", "unclear", "absent", "absent", "done"]


def test_nobody_can_tell_for_a_day_is_in_doubt(rig: Rig, known: dict[str, Any]) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", after_effect=True, drop=True)
    without_answer(rig)
    rig.live_through(25 * 3600)
    found = rig.status(message_id)
    assert (found["status"], found["error"]["code"], len(rig.meta.sent)) == ("failed", "in_doubt", 1)


@pytest.mark.parametrize("off_s", [-400.0, -6.0, 6.0, 400.0])
def test_a_clock_that_is_wrong_sends_nothing_twice(rig: Rig, known: dict[str, Any], off_s: float) -> None:
    rig.meta.clock = lambda: rig.now_s + off_s
    message_id = rig.send(known)
    rig.meta.fault("messages", after_effect=True, status=504, body="")
    rig.live_through(600)
    assert (rig.status(message_id)["status"], len(rig.meta.sent)) == ("sent", 1)


@pytest.mark.parametrize("off_s", [10.0, 600.0, 86_400.0])
def test_a_date_that_runs_ahead_of_what_is_shown_sends_nothing_twice(
    rig: Rig, known: dict[str, Any], off_s: float
) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", after_effect=True, status=504, body="")
    shown = {"id": "m-sent", "message": "hello", "from": {"id": SHOP_ID}, "created_time": wire.iso_time(rig.now_s)}
    before = {
        "id": f"met-{CUSTOMER}",
        "message": "good day",
        "from": {"id": CUSTOMER},
        "created_time": wire.iso_time(rig.now_s),
    }
    body = {"id": "x", "messages": {"data": [shown, before]}}
    early = {"Date": formatdate(rig.now_s + off_s, usegmt=True)}
    rig.meta.fault(THREAD, times=99, status=200, body=body, headers=early)
    rig.live_through(600)
    assert rig.status(message_id)["status"] in ("sent", "failed")
    assert len(rig.meta.sent) == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"id": "deleted"},
        {"id": "older", "from": {"id": "17841400000000001"}},
        {"id": "odd", "created_time": "yesterday", "message": "hello"},
        {"created_time": "2027-01-15T08:00:00+0000", "message": "hello"},
        "nothing at all",
    ],
)
def test_an_entry_without_its_details_hides_no_other(rig: Rig, known: dict[str, Any], odd: Any) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", after_effect=True, status=502, body="")
    shown = {"id": "m-sent", "message": "hello", "from": {"id": SHOP_ID}, "created_time": wire.iso_time(rig.now_s)}
    rig.meta.fault(THREAD, times=9, status=200, body={"id": "x", "messages": {"data": [odd, shown]}})
    rig.live_through(600)
    assert (rig.status(message_id)["status"], len(rig.meta.sent)) == ("sent", 1)


@pytest.mark.parametrize("place", ["conversations", "thread"])
@pytest.mark.parametrize(
    ("status", "body"),
    [(200, "<html>maintenance</html>"), (200, ""), (200, '{"data": [{"id": "aW'), (200, {}), (204, ""), (200, [])],
)
def test_a_look_up_that_cannot_be_read_settles_nothing(
    rig: Rig, known: dict[str, Any], place: str, status: int, body: Any
) -> None:
    message_id = rig.send(known)
    rig.meta.fault("messages", after_effect=True, status=502, body="")
    rig.meta.fault(THREAD if place == "thread" else "conversations", times=99, status=status, body=body)
    rig.live_through(600)
    assert rig.status(message_id)["status"] == "pending"
    rig.meta.clear_faults()
    rig.live_through(2 * 3600)
    assert (rig.status(message_id)["status"], len(rig.meta.sent)) == ("sent", 1)


# --- the same words ---

SENT = (
    "Hello Zoë!\r\nYour order 4711 ships today, see you soon \N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}"
)
SHOWN_ALIKE = {
    "line ends": SENT.replace("\r\n", "\n"),
    "line ends of old": SENT.replace("\r\n", "\r"),
    "a blank for a line end": SENT.replace("\r\n", " "),
    "two blanks": SENT.replace("order 4711", "order  4711"),
    "a no-break space": SENT.replace("order 4711", "order\u00a04711"),
    "a narrow no-break space": SENT.replace("order 4711", "order\u202f4711"),
    "a tab": SENT.replace("order 4711", "order\t4711"),
    "decomposed letters": SENT.replace("ë", "e\u0308"),
    "a zero width space": SENT.replace("order", "or\u200bder"),
    "a variation selector": SENT + "\ufe0f",
    "a byte order mark": "\ufeff" + SENT,
    "direction marks": f"\u2066{SENT}\u2069",
    "a soft hyphen": SENT.replace("order", "or\u00adder"),
    "blanks around it": f"  {SENT}\n\n",
}
SHOWN_NEARLY = {
    "no punctuation": "Hello Zoë Your order 4711 ships today, see you soon 👋🏽",
    "another skin": SENT[:-1] + "\N{EMOJI MODIFIER FITZPATRICK TYPE-6}",
    "curly marks": SENT.replace("!", "\uff01"),
    "upper case": SENT.upper(),
    "cut short": SENT[:40] + "…",
    "cut in the middle of a word": SENT[:27],
    "with a trailer": SENT + " (sent by Instagram)",
    "nothing": "",
}
SHOWN_OTHERWISE = {
    "another letter": SENT.replace("Zoë", "Zoe"),
    "another number": SENT.replace("4711", "4712"),
    "another word": SENT.replace("today", "later"),
    "a short beginning": SENT[:12],
    "another emoji": SENT[:-2] + "👍",
    "a word more in between": SENT.replace("ships", "probably ships"),
}


def doubtful(rig: Rig, account: dict[str, Any], shown: str) -> dict[str, Any]:
    """Have a send be taken though its answer is lost, and be shown as given; return its status in the end."""
    message_id = rig.send(account, SENT)
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    rig.meta.messages[-1]["text"] = shown
    rig.live_through(600)
    return rig.status(message_id)


@pytest.mark.parametrize("how", SHOWN_ALIKE)
def test_a_text_is_found_whatever_became_of_its_blanks_and_marks(rig: Rig, known: dict[str, Any], how: str) -> None:
    found = doubtful(rig, known, SHOWN_ALIKE[how])
    assert (found["status"], found["instagram_message_id"], len(rig.meta.sent)) == ("sent", rig.meta.sent[0].mid, 1)


@pytest.mark.parametrize("how", SHOWN_NEARLY)
def test_a_text_that_is_nearly_it_is_neither_found_nor_sent_again(rig: Rig, known: dict[str, Any], how: str) -> None:
    found = doubtful(rig, known, SHOWN_NEARLY[how])
    assert (found["status"], found["error"]["code"], len(rig.meta.sent)) == ("failed", "in_doubt", 1)


@pytest.mark.parametrize("how", SHOWN_OTHERWISE)
def test_another_text_is_not_taken_for_it(rig: Rig, known: dict[str, Any], how: str) -> None:
    assert (doubtful(rig, known, SHOWN_OTHERWISE[how])["status"], len(rig.meta.sent)) == ("sent", 2)


@pytest.mark.parametrize("text", ["\u200b", "\ufe0f\ufe0f", "\u2800"])
def test_a_text_that_nobody_sees_is_never_sent_again(rig: Rig, known: dict[str, Any], text: str) -> None:
    message_id = rig.send(known, text)
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.live_through(600)
    assert (rig.status(message_id)["error"]["code"], len(rig.meta.sent)) == ("in_doubt", 1)


@pytest.mark.parametrize("how", SHOWN_ALIKE)
def test_an_echo_settles_it_whatever_became_of_its_blanks_and_marks(rig: Rig, known: dict[str, Any], how: str) -> None:
    message_id = rig.send(known, SENT)
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    assert rig.echo(SHOWN_ALIKE[how], str(rig.meta.sent[0].mid))[0].state == "noted"
    assert rig.status(message_id)["status"] == "delivered"


def test_an_echo_of_what_a_person_typed_before_is_not_taken_for_it(rig: Rig, known: dict[str, Any]) -> None:
    """The echo of an app's message that was told before is something else, though its words are the same."""
    typed = rig.meta.shop_says(SHOP_ID, CUSTOMER, "ok", told=False)
    assert rig.echo("ok", typed.mid)[0].state == "forwarded"
    message_id = rig.send(known, "ok")
    rig.meta.fault("messages", drop=True)
    rig.live_through(600)
    assert (rig.status(message_id)["status"], len(rig.meta.sent)) == ("sent", 1)


# --- pace and recovery ---


def test_looks_keep_to_two_calls_a_second_and_remember_the_conversation(rig: Rig) -> None:
    let_pauses_pass(rig)
    account, contacts = rig.account(), [f"80{number}" for number in range(8)]
    rig.meet(*contacts)
    for contact in contacts:
        rig.send(account, "hello", contact=contact)
    rig.meta.fault("messages", times=8, after_effect=False, drop=True)
    rig.live_through(600)
    times = looks(rig)
    assert len(rig.meta.sent) == 8
    assert all(sum(begin <= at < begin + 1 for at in times) <= 2 for begin in times)
    found = [call for call in rig.meta.calls if call.path.endswith("/conversations")]
    assert len(found) == 8  # once for each contact; the second look goes to the conversation itself


def test_a_backfill_shares_the_pace_and_lets_looks_go_first(rig: Rig) -> None:
    pace = rig.rooms.client.conversations
    for _ in range(2):
        pace.take("acc")
    pace.want(frozenset(("acc",)))
    waited: list[float] = []

    def pause(seconds: float) -> None:
        rig.now_s += seconds
        waited.append(seconds)
        if len(waited) == 5:
            pace.want(frozenset())

    pace.wait_last("acc", pause)
    assert len(waited) == 5


def down(rig: Rig, *, everything: bool) -> None:
    rig.meta.fault("*" if everything else "messages", times=1_000_000, status=503, body="")


def test_a_broken_instagram_is_asked_before_it_is_sent_anything(rig: Rig) -> None:
    account, contacts = rig.account(), [f"80{number:02}" for number in range(30)]
    rig.meet(*contacts)
    down(rig, everything=True)
    for contact in contacts:
        rig.send(account, "hello", contact=contact)
    rig.live_through(1800)
    tried = len(sends(rig))
    assert tried <= 10 + 3  # until it was believed, and what was in flight then
    assert len(looks(rig)) > 20
    rig.meta.clear_faults()
    rig.live_through(180)
    assert sorted(entry.recipient_id for entry in rig.meta.sent) == contacts
    assert {row["status"] for row in rig.db.rows("SELECT status FROM outbound_messages")} == {"sent"}


def test_while_only_sends_fail_one_goes_at_a_time_and_none_is_used_up(rig: Rig) -> None:
    account, contacts = rig.account(), [f"80{number:02}" for number in range(12)]
    rig.meet(*contacts)
    down(rig, everything=False)
    for contact in contacts:
        rig.send(account, "hello", contact=contact)
    rig.live_through(3600)
    assert len(sends(rig)) < 90  # a probe a minute
    rig.meta.clear_faults()
    rig.live_through(180)
    assert sorted(entry.recipient_id for entry in rig.meta.sent) == contacts


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("everything", [True, False], ids=["all of Instagram", "only sends"])
@pytest.mark.parametrize("arrives", [True, False], ids=["taken all the same", "not taken"])
def test_an_hour_of_5xx_with_500_sends_waiting(rig: Rig, everything: bool, arrives: bool) -> None:
    let_pauses_pass(rig)
    account, contacts = rig.account(), [f"8{number:03}" for number in range(500)]
    rig.meet(*contacts)
    if arrives:
        rig.meta.fault("messages", times=1_000_000, status=503, body="", after_effect=True)
    down(rig, everything=everything)
    for contact in contacts:
        rig.send(account, "hello", contact=contact)
    rig.live_through(3600)
    rig.meta.clear_faults()
    well_s = rig.now_s
    rig.live_through(240)
    texts = [entry.recipient_id for entry in rig.meta.sent]
    assert sorted(texts) == contacts  # once each
    states = rig.db.rows("SELECT status, COUNT(*) AS number FROM outbound_messages GROUP BY status")
    assert states == [{"status": "sent", "number": 500}]
    assert rig.db.value("SELECT MAX(sent_at) FROM outbound_messages") < instant(well_s + 180)
    times = sorted(looks(rig))
    assert all(later - sooner >= 0.999 for sooner, later in zip(times, times[2:], strict=False))
