"""What a far side's answer holds back: a CRM's 401 and 410, Instagram's refusal of an account; and how it goes on."""

import base64
import hmac
import re
from typing import Any

import pytest

from crmbridge.alerts.kinds import KINDS
from crmbridge.sandbox import wire
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from tests.rig import Rig
from tests.shop import CUSTOMER, OTHER_ID, OTHER_TOKEN, SHOP_ID, Shop

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
NEW_SECRET = "another secret that is long enough"


def customers(number: int) -> list[str]:
    return [f"80{one:02}" for one in range(number)]


def say_all(rig: Rig, number: int, head: str = "in") -> None:
    for place, contact in enumerate(customers(number)):
        rig.say(f"{head} {place}", f"mid-{head}-{place}", contact=contact)


def messages(rig: Rig) -> list[str]:
    """Return what the CRM took of what customers wrote, in order of arrival."""
    return [entry.event["message"] for entry in rig.taken() if entry.event["event"] == "message.received"]


def probes(rig: Rig) -> list[Any]:
    return [entry for entry in rig.crm.received if entry.event["event"] == "webhook.test"]


def ended_by_401(rig: Rig) -> int:
    return sum(row["last_code"] == "crm_unauthorized" for row in rig.dead())


def deploy(rig: Rig, secret: str) -> None:
    """Have the CRM verify with another secret."""
    rig.crm.secret = secret


# --- 401 ---


def test_a_crm_with_a_wrong_secret_burns_what_was_in_flight_and_no_more(rig: Rig) -> None:
    account = rig.account()
    deploy(rig, NEW_SECRET)
    say_all(rig, 60)
    rig.live_through(30)
    assert ended_by_401(rig) <= 3  # the slots of the endpoint
    assert rig.held(account)["deliveries"]["by"] == "unauthorized"
    rig.live_through(50 * MINUTE_S)
    assert ended_by_401(rig) <= 3
    assert [kind for kind, _ in rig.alerts if kind != "dead_letter"] == ["crm_unauthorized"]
    deploy(rig, WEBHOOK_SECRET)  # the CRM was wrong, and is mended
    rig.live_through(6 * MINUTE_S)
    assert len(messages(rig)) == 60 - ended_by_401(rig)
    assert rig.held(account)["deliveries"] is None
    assert "crm_unauthorized" in rig.cleared
    rig.resume(account, "deliveries")
    rig.drain()
    assert sorted(messages(rig)) == sorted(f"in {number}" for number in range(60))


def test_it_is_asked_by_a_signed_test_after_a_minute_and_then_every_five(rig: Rig) -> None:
    account = rig.account()
    deploy(rig, NEW_SECRET)
    began_s = rig.now_s
    say_all(rig, 1)
    rig.live_through(20 * MINUTE_S)
    asked = probes(rig)
    assert [round(entry.at - began_s) for entry in asked] == [60, 360, 660, 960]
    for entry in asked:
        assert entry.event["sequence"] is None
        assert (entry.event["test"], entry.event["account_id"]) == (True, account["id"])
        assert entry.headers["Webhook-Id"] == entry.event["event_id"]
    assert rig.db.value("SELECT COUNT(*) FROM deliveries") == 1  # a test is no row
    rig.call("POST", f"/api/v1/accounts/{account['id']}/pause", {"what": ["deliveries"]})
    assert rig.held(account)["deliveries"]["asked_again_at"] is None  # who is paused is not asked
    rig.resume(account, "deliveries")
    assert rig.held(account)["deliveries"]["asked_again_at"] is not None
    rig.live_through(8 * DAY_S)
    last_s = probes(rig)[-1].at - began_s
    assert 7 * DAY_S - 600 < last_s < 7 * DAY_S + 600
    assert rig.held(account)["deliveries"]["asked_again_at"] is None


def test_what_the_401_ended_comes_back_with_a_new_secret_in_its_order_and_once(rig: Rig) -> None:
    account = rig.account()
    deploy(rig, NEW_SECRET)
    for number in range(3):
        rig.say(f"{number}", f"mid-{number}", contact="801")
        rig.drain()
    assert ended_by_401(rig) == 1
    rig.change(account, webhook_secret=NEW_SECRET)
    rig.drain()
    assert messages(rig) == ["0", "1", "2"]
    assert [entry.event["sequence"] for entry in rig.taken()] == [1, 2, 3]
    assert rig.dead() == []


def test_an_event_comes_back_by_itself_no_more_than_once(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(401, times=100, containing='"poison"')
    rig.say("poison", "mid-1", contact="801")
    rig.drain()
    for secret in (f"{NEW_SECRET} {number}" for number in range(3)):
        deploy(rig, secret)
        rig.change(account, webhook_secret=secret)
        rig.drain()
    refused = [entry for entry in rig.crm.received if entry.event.get("message") == "poison"]
    assert len(refused) == 2  # and once more, as a person had mended something
    _, answer = rig.call("POST", f"/api/v1/admin/dlq/webhooks/{rig.dead()[0]['id']}/retry")
    assert answer["state"] == "pending"


def test_a_person_who_resumes_brings_back_what_the_401_ended(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(401)
    rig.say("one", "mid-1")
    rig.drain()
    rig.say("two", "mid-2")
    rig.resume(account, "deliveries")
    rig.drain()
    assert messages(rig) == ["one", "two"]


@pytest.mark.parametrize("change", ["webhook_secret", "crm_webhook_url"])
def test_a_401_that_comes_after_what_mended_it_ends_and_holds_nothing(rig: Rig, change: str) -> None:
    account = rig.account()
    answers = {"webhook_secret": NEW_SECRET, "crm_webhook_url": rig.sandbox.crm_webhook_url + "/new"}
    post = rig.engine._senders["crm"]

    def mended_meanwhile(claimed: Any) -> Any:
        rig.engine._senders["crm"] = post  # type: ignore[index]
        try:
            return post(claimed)
        finally:
            rig.now_s += 1
            deploy(rig, answers["webhook_secret"] if change == "webhook_secret" else WEBHOOK_SECRET)
            rig.change(account, **{change: answers[change]})

    deploy(rig, NEW_SECRET)
    rig.engine._senders = {**rig.engine._senders, "crm": mended_meanwhile}
    rig.say("one", "mid-1")
    rig.live_through(10)
    assert messages(rig) == ["one"]
    assert (rig.dead(), rig.held(account)["deliveries"]) == ([], None)
    assert "crm_unauthorized" not in [kind for kind, _ in rig.alerts]


def test_a_401_to_one_event_while_others_are_taken_is_that_events_own(fresh_shop: Shop) -> None:
    shop = fresh_shop
    shop.crm.answer(401, times=100, containing='"refused"', delay_s=0.5)
    shop.meta.customer_says(SHOP_ID, "801", "refused")
    shop.crm.answer(200, containing='"fine"', delay_s=0.2)  # its 2xx comes after the call of the other has begun
    shop.meta.customer_says(SHOP_ID, "802", "fine")
    shop.wait_rows("SELECT state FROM deliveries ORDER BY 1", [("dead",), ("done",)])
    shop.meta.customer_says(SHOP_ID, "803", "and so on")
    shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'done'", [(2,)])
    path = f"/api/v1/accounts/{shop.account_id}"
    assert shop.call("GET", path).json()["held"] == {"deliveries": None, "sends": None}


def test_a_401_that_follows_errors_is_the_events_own_when_others_passed_since(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(500, times=2, containing='"odd"')
    rig.crm.answer(401, times=100, containing='"odd"')
    rig.say("odd", "mid-1", contact="801")
    rig.drain()
    rig.now_s += 0.5
    rig.say("fine", "mid-2", contact="802")
    rig.live_through(10)
    assert (ended_by_401(rig), rig.held(account)["deliveries"]) == (1, None)


def test_a_401_is_not_the_events_own_because_of_what_passed_before(rig: Rig) -> None:
    account = rig.account()
    rig.say("fine", "mid-1", contact="802")
    rig.drain()
    rig.now_s += 1
    deploy(rig, NEW_SECRET)
    rig.say("refused", "mid-2", contact="801")
    rig.drain()
    assert rig.held(account)["deliveries"]["by"] == "unauthorized"


def test_a_crm_that_takes_tests_without_verifying_burns_two_more_events_at_most(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(200, times=10_000, event="webhook.test")
    rig.crm.answer_always(401)
    say_all(rig, 20)
    rig.live_through(2 * DAY_S)
    assert ended_by_401(rig) <= 3 + 2
    held = rig.held(account)["deliveries"]
    assert (held["by"], held["asked_again_at"]) == ("unauthorized", None)
    rig.crm.clear_answers()
    rig.live_through(DAY_S)
    assert messages(rig) == []  # only a person, a secret or a URL
    rig.resume(account, "deliveries")
    rig.live_through(10)
    assert len(messages(rig)) == 20


def test_a_taken_event_between_two_releases_counts_them_anew(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(200, times=10_000, event="webhook.test")
    for number in range(4):
        rig.crm.answer(401, containing=f'"no {number}"')
        rig.say(f"no {number}", f"mid-no-{number}", contact="801")
        rig.live_through(2 * MINUTE_S)
        rig.say(f"yes {number}", f"mid-yes-{number}", contact="802")
        rig.live_through(MINUTE_S)
    assert messages(rig) == [f"yes {number}" for number in range(4)]
    assert rig.held(account)["deliveries"] is None


def test_a_pause_stays_when_the_far_side_is_well_and_a_hold_stays_when_a_pause_ends(rig: Rig) -> None:
    account = rig.account()
    deploy(rig, NEW_SECRET)
    rig.say("one", "mid-1")
    rig.drain()
    rig.say("two", "mid-2")
    path = f"/api/v1/accounts/{account['id']}"
    rig.call("POST", f"{path}/pause", {"what": ["deliveries"]})
    deploy(rig, WEBHOOK_SECRET)
    rig.live_through(HOUR_S)
    assert probes(rig) == []  # a pause means: no calls
    assert rig.held(account)["deliveries"]["by"] == "unauthorized"
    rig.resume(account, "deliveries")
    assert rig.call("GET", path)[1]["paused"]["deliveries"] is None
    assert rig.held(account)["deliveries"]["by"] == "unauthorized"
    rig.live_through(6 * MINUTE_S)
    assert messages(rig) == ["two"]
    rig.call("POST", f"{path}/pause", {"what": ["deliveries"]})
    rig.change(account, webhook_secret=NEW_SECRET)  # mends, and brings back; the pause still stands
    deploy(rig, NEW_SECRET)
    rig.live_through(HOUR_S)
    assert messages(rig) == ["two"]
    rig.resume(account, "deliveries")
    rig.drain()
    assert messages(rig) == ["two", "one"]


def test_a_resume_ends_both_when_it_is_asked_to(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(401)
    rig.say("one", "mid-1")
    rig.drain()
    rig.call("POST", f"/api/v1/accounts/{account['id']}/pause", {"what": ["deliveries"]})
    rig.resume(account, "deliveries", held=True)
    rig.drain()
    assert messages(rig) == ["one"]


def test_what_waits_behind_a_401_does_not_age(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer_always(401)
    rig.say("one", "mid-1")
    rig.drain()
    rig.say("two", "mid-2")
    rig.live_through(60 * HOUR_S)
    rig.crm.clear_answers()
    rig.resume(account, "deliveries")
    rig.drain()
    assert messages(rig) == ["one", "two"]


def test_a_restart_keeps_a_hold_and_a_trial(rig: Rig) -> None:
    account = rig.account()
    deploy(rig, NEW_SECRET)
    say_all(rig, 6)
    rig.drain()
    burnt = ended_by_401(rig)
    rig.engine.stop(0)
    rig.engine = rig.make_engine()
    rig.live_through(30)
    assert ended_by_401(rig) == burnt
    rig.change(account, webhook_secret="still not the CRM's own secret")
    rig.engine.stop(0)
    rig.engine = rig.make_engine()
    rig.drain()
    assert ended_by_401(rig) == 1  # what came back went alone


def test_a_410_holds_until_a_person_acts_and_is_not_asked(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(410)
    rig.say("one", "mid-1")
    rig.live_through(2 * DAY_S)
    assert (rig.held(account)["deliveries"]["by"], probes(rig), messages(rig)) == ("gone", [], [])
    rig.change(account, webhook_secret=NEW_SECRET)
    deploy(rig, NEW_SECRET)
    rig.drain()
    assert messages(rig) == ["one"]


def test_a_410_counts_for_more_than_a_401(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(401, containing='"one"', delay_s=0.3)
    rig.crm.answer(410, containing='"two"', delay_s=0.6)
    rig.say("one", "mid-1", contact="801")
    rig.say("two", "mid-2", contact="802")
    rig.drain()
    assert rig.held(account)["deliveries"]["by"] == "gone"
    rig.live_through(HOUR_S)
    assert probes(rig) == []


# --- secrets ---


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ("", "at least 8 characters"),
        ("a", "at least 8 characters"),
        ("1234567", "at least 8 characters"),
        ("whsec_abc", "24 to 64 bytes"),
        ("whsec_", "at least 8 characters"),
        ("whsec_" + "A" * 31, "24 to 64 bytes"),  # 23 bytes and unpadded
        ("whsec_" + "_-" * 20 + "AA==", "24 to 64 bytes"),  # the URL's alphabet
        ("whsec_ZXhhbXBsZS1zZWNyZXQtb25seS1mb3ItZG9jcy4", "24 to 64 bytes"),  # without its padding
        ("whsec_" + "A" * 88, "24 to 64 bytes"),  # 66 bytes
        ("whsec_ZXhhbXBsZS1zZWNyZXQtb25seS1mb3ItZG9jcy4=\n", "must be without control characters"),
        (" a long secret that begins with a blank", "begin or end with a blank"),
    ],
)
def test_a_secret_that_is_none_is_refused_when_it_is_set(rig: Rig, secret: str, said: str) -> None:
    account = rig.account()
    status, answer = rig.call("PUT", f"/api/v1/accounts/{account['id']}", {"webhook_secret": secret})
    assert status == 400
    assert {detail["field"] for detail in answer["details"]} == {"webhook_secret"}
    assert said in str(answer)
    assert len(secret) < 8 or secret not in str(answer)


@pytest.mark.parametrize(
    ("secret", "is_weak"),
    [
        ("password", True),
        ("fifteen chars..", True),
        ("aaaaaaaaaaaaaaaaaaaaaaaa", True),
        ("sixteen charact.", False),
        ("whsec_" + "Q" * 32, False),  # 24 bytes
        ("whsec_" + "Q" * 86 + "==", False),  # 64 bytes
        ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", False),
    ],
)
def test_a_weak_secret_is_taken_with_a_warning(rig: Rig, secret: str, is_weak: bool) -> None:
    account = rig.account()
    answer = rig.change(account, webhook_secret=secret)
    assert answer["warnings"] == (["webhook_secret_weak"] if is_weak else [])
    assert "webhook_secret" not in answer


def test_a_secret_that_is_left_out_is_made_and_shown_once(fresh_shop: Shop) -> None:
    shop = fresh_shop
    shop.crm.secrets["/webhook/made"] = "?"
    url = shop.sandbox.crm_webhook_url + "/made"
    body = {"instagram_account_id": OTHER_ID, "access_token": OTHER_TOKEN, "crm_webhook_url": url}
    answer = shop.call("POST", "/api/v1/accounts", body, key=shop.admin_key)
    assert answer.status_code == 201
    secret = answer.json()["webhook_secret"]
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", secret)
    path = f"/api/v1/accounts/{answer.json()['account_id']}"
    for shown in (shop.call("GET", path, key=shop.admin_key), shop.call("GET", "/api/v1/accounts", key=shop.admin_key)):
        assert "whsec_" not in shown.text
    assert "whsec_" not in shop.log()
    shop.crm.secrets["/webhook/made"] = secret
    shop.meta.customer_says(OTHER_ID, CUSTOMER, "hello")
    (came,) = shop.crm.wait(1, where=lambda entry: entry.path == "/webhook/made")
    assert (came.verified, came.headers["Webhook-Signature"][:3]) == (True, "v1,")


def signatures(secret: str, entry: Any) -> list[bool]:
    """Tell of each signature in webhook-signature whether it is made with a secret, as Standard Webhooks says."""
    signed = f"{entry.headers['Webhook-Id']}.{entry.headers['Webhook-Timestamp']}.".encode() + entry.body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    wanted = "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    return [given == wanted for given in entry.headers["Webhook-Signature"].split(" ")]


def test_for_a_day_after_a_change_the_old_secret_signs_beside_the_new_one(fresh_shop: Shop) -> None:
    shop, path = fresh_shop, f"/api/v1/accounts/{fresh_shop.account_id}"
    old, new, newest = ("whsec_" + base64.b64encode(bytes([byte]) * 32).decode() for byte in (1, 2, 3))

    def told(secret: str, text: str) -> Any:
        shop.crm.secret = secret
        shop.meta.customer_says(SHOP_ID, CUSTOMER, text)
        (entry,) = shop.crm.wait(1, where=lambda one: one.event.get("message") == text)
        assert entry.verified  # X-Hub-Signature-256 is made with the new one alone
        return entry

    assert shop.call("PUT", path, {"webhook_secret": old}).status_code == 200
    assert signatures(old, told(old, "before")) == [True]
    assert shop.call("PUT", path, {"webhook_secret": new}).status_code == 200
    entry = told(new, "after")
    assert (signatures(new, entry), signatures(old, entry)) == ([True, False], [False, True])
    assert shop.call("PUT", path, {"webhook_secret": new}).status_code == 200  # the same again is no change
    assert signatures(old, told(new, "again")) == [False, True]
    assert shop.call("PUT", path, {"webhook_secret": newest}).status_code == 200
    entry = told(newest, "once more")
    assert (signatures(new, entry), signatures(old, entry)) == ([False, True], [False, False])
    shop.change("UPDATE endpoints SET old_secret_until = '2020-01-01T00:00:00.000Z'")
    assert signatures(newest, told(newest, "a day later")) == [True]
    assert shop.call("PUT", path, {"webhook_secret": "no longer a standard secret"}).status_code == 200
    assert signatures(newest, told("no longer a standard secret", "plain")) == [True]


def test_a_url_that_meets_no_secret_gets_one_and_a_null_is_refused(rig: Rig) -> None:
    account = rig.account(url=None, secret=None)
    answer = rig.change(account, crm_webhook_url=rig.sandbox.crm_webhook_url)
    assert answer["webhook_secret"].startswith("whsec_")
    path = f"/api/v1/accounts/{account['id']}"
    assert rig.call("PUT", path, {"webhook_secret": None})[0] == 400
    assert rig.call("PUT", path, {"webhook_secret": None, "crm_webhook_url": None})[0] == 200


# --- Instagram refuses an account ---

PASSING = [(10, None), (100, 33), (190, 460), (200, None), (3, None)]


def refuse(rig: Rig, code: int, subcode: int | None = None, message: str = "x") -> None:
    """Have Instagram refuse whatever it is asked, and whoever asks; but who the token belongs to it tells."""
    error = wire.error_body(code, message, subcode=subcode)
    for path in ("messages", "conversations"):
        rig.meta.fault(path, times=1_000_000, status=400, body=error)


def asked(rig: Rig, began_s: float) -> list[int]:
    """Return after how many minutes Instagram was asked whether it is well."""
    return [round((call.at - began_s) / 60) for call in rig.meta.calls if call.path.endswith("/conversations")]


@pytest.mark.parametrize(("code", "subcode"), PASSING)
def test_an_account_that_instagram_refused_in_passing_goes_on_by_itself(
    rig: Rig, code: int, subcode: int | None
) -> None:
    account = rig.account()
    refuse(rig, code, subcode)
    sends = [rig.send(account, f"{number}", contact=contact) for number, contact in enumerate(customers(5))]
    began_s = rig.now_s
    rig.live_through(40 * MINUTE_S)
    held = rig.held(account)["sends"]
    assert (held["by"], asked(rig, began_s)) == ("error", [15])
    assert held["asked_again_at"] is not None
    rig.meta.clear_faults()
    rig.live_through(10 * MINUTE_S)
    assert {rig.status(message_id)["status"] for message_id in sends} == {"sent"}
    assert (rig.held(account)["sends"], rig.cleared) == (None, ["token_dead" if code == 190 else "account_error"])


def test_a_send_that_was_under_way_when_its_account_was_stopped_ends_no_alert(rig: Rig) -> None:
    account = rig.account()
    one, other = customers(2)
    rig.send(account, "refused", contact=one)
    rig.send(account, "taken", contact=other)
    rig.meta.fault("messages", status=400, body=wire.error_body(190, "expired", subcode=460))
    rig.meta.fault("messages", status=200, after_effect=True, delay_s=0.5)
    rig.drain()
    assert [entry.text for entry in rig.meta.sent] in (["taken"], ["refused"])
    assert rig.held(account)["sends"]["by"] == "error"
    assert account["id"] in rig.alarm.opened("token_dead")
    rig.live_through(20 * MINUTE_S)
    assert (rig.held(account)["sends"], rig.cleared) == (None, ["token_dead"])


def test_an_app_that_is_not_authorised_for_a_moment_goes_on_by_itself(rig: Rig) -> None:
    account = rig.account()
    refuse(rig, 100, message="Unsupported request - method type: post")
    rig.send(account)
    rig.live_through(MINUTE_S)
    assert rig.held(account)["sends"]["by"] == "error"
    rig.meta.clear_faults()
    rig.live_through(15 * MINUTE_S)
    assert len(rig.meta.sent) == 1


def test_it_is_asked_at_doubled_distances_up_to_six_hours(rig: Rig) -> None:
    account = rig.account()
    refuse(rig, 10)
    rig.send(account)
    began_s = rig.now_s
    rig.live_through(30 * HOUR_S)
    assert asked(rig, began_s) == [15, 45, 105, 225, 465, 825, 1185, 1545]
    rig.meta.clear_faults()
    rig.live_through(6 * HOUR_S)
    assert len(rig.meta.sent) == 1


@pytest.mark.parametrize(("code", "subcode"), [(368, None), (10, 1893063), (2022, None), (100, 2534029)])
def test_a_restriction_is_not_asked_about_for_a_day(rig: Rig, code: int, subcode: int | None) -> None:
    account = rig.account()
    refuse(rig, code, subcode)
    rig.send(account)
    began_s = rig.now_s
    rig.live_through(2.5 * DAY_S)
    assert asked(rig, began_s) == [24 * 60, 48 * 60]


def test_one_send_goes_alone_and_a_second_refusal_is_asked_about_later(rig: Rig) -> None:
    account, contacts = rig.account(), customers(10)
    error = wire.error_body(10)
    rig.meta.fault("messages", times=1_000_000, status=400, body=error)  # the question is answered well all the same
    for contact in contacts:
        rig.send(account, contact=contact)
    began_s = rig.now_s
    rig.drain()
    first = len([call for call in rig.meta.calls if call.method == "POST"])
    rig.live_through(16 * MINUTE_S)
    assert len([call for call in rig.meta.calls if call.method == "POST"]) == first + 1
    assert rig.held(account)["sends"]["by"] == "error"
    rig.live_through(2 * HOUR_S)
    assert asked(rig, began_s)[:3] == [15, 45, 105]
    rig.meta.clear_faults()
    rig.change(account, status="active")
    rig.drain()
    assert len(rig.meta.sent) == 10


def test_a_reply_to_what_is_gone_fails_alone(rig: Rig) -> None:
    account = rig.account()
    rig.say("hello", "mid-1")
    (event,) = rig.db.rows("SELECT id FROM events")
    body = {
        "account_id": account["id"], "recipient_id": CUSTOMER, "message": "yes", "idempotency_key": "k",
        "reply_to": event["id"],
    }  # fmt: skip
    rig.meta.fault("messages", status=400, body=wire.error_body(100, subcode=33))
    _, answer = rig.call("POST", "/api/v1/messages/send", body)
    rig.drain()
    found = rig.status(answer["message_id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "object_missing")
    assert rig.held(account)["sends"] is None


def test_an_account_whose_owner_removed_the_app_is_not_asked(rig: Rig) -> None:
    account = rig.account(app_scoped_id="24000000000000001")
    rig.send(account)
    held = "held_by = 'error', held_at = '2027-01-15T08:00:00.000Z'"
    rig.by_hand(f"UPDATE endpoints SET secret_sealed = NULL, {held} WHERE kind = 'instagram'")
    rig.live_through(DAY_S)
    assert rig.meta.calls == []
    rig.resume(account, "sends")
    assert rig.held(account)["sends"]["by"] == "error"


@pytest.mark.parametrize("apart_s", [0, 100])
def test_several_accounts_that_are_stopped_within_minutes_are_one_trouble(rig: Rig, apart_s: float) -> None:
    ids = [f"1784140000000010{number}" for number in range(4)]
    held = []
    for user_id in ids:
        rig.meta.add_account(user_id, token=f"IGAA{user_id}", app_scoped_id=f"9{user_id}", username=f"shop_{user_id}")
        held.append(rig.account(user_id, token=f"IGAA{user_id}"))
    refuse(rig, 10)
    told: list[tuple[str, str]] = []
    rig.alarm.tell = lambda channel, news: told.append((news.state, news.kind))  # type: ignore[method-assign]
    rig.alarm._command = "true"
    for account in held:
        rig.send(account)
        rig.live_through(apart_s)
        rig.drain()
        rig.alarm.pass_on()
    rig.live_through(10 * MINUTE_S)
    rig.alarm.pass_on()
    assert told == [("raised", "meta_trouble")]
    rig.meta.clear_faults()
    rig.live_through(40 * MINUTE_S)
    rig.watch().look()
    rig.alarm.pass_on()
    assert told == [("raised", "meta_trouble"), ("cleared", "meta_trouble")]
    assert len(rig.meta.sent) == 4


def test_one_account_that_stays_stopped_gets_an_alert_of_its_own(rig: Rig) -> None:
    held = []
    for user_id in (SHOP_ID, OTHER_ID):
        rig.meta.add_account(user_id, token=f"IGAA{user_id}", app_scoped_id=f"9{user_id}", username=f"shop_{user_id}")
        held.append(rig.account(user_id, token=f"IGAA{user_id}"))
    refuse(rig, 10)
    for account in held:
        rig.send(account)
    rig.drain()
    rig.watch().look()
    assert list(rig.alarm.opened("meta_trouble")) == [""]
    rig.meta.clear_faults()
    rig.change(held[0], status="active")
    rig.drain()
    rig.watch().look()
    assert list(rig.alarm.opened("account_error")) == [held[1]["id"]]
    assert list(rig.alarm.opened("meta_trouble")) == []


def test_accounts_that_were_stopped_long_before_are_no_part_of_a_trouble(rig: Rig) -> None:
    ids = [f"1784140000000010{number}" for number in range(4)]
    held = []
    for user_id in ids:
        rig.meta.add_account(user_id, token=f"IGAA{user_id}", app_scoped_id=f"9{user_id}", username=f"shop_{user_id}")
        held.append(rig.account(user_id, token=f"IGAA{user_id}"))
    refuse(rig, 190, 463)
    for account in held[:2]:
        rig.send(account)
        rig.drain()
        rig.now_s += DAY_S
    assert not rig.alarm.opened("meta_trouble")
    for account in held[2:]:
        rig.send(account)
    rig.drain()
    assert rig.alarm.opened("meta_trouble")
    rig.meta.clear_faults()
    for account in held[2:]:
        rig.change(account, status="active")
    rig.drain()
    rig.watch().look()
    assert not rig.alarm.opened("meta_trouble")


def test_the_alert_says_that_it_is_being_asked(rig: Rig) -> None:
    for kind in ("account_error", "token_dead", "meta_trouble"):
        assert "the bridge asks Instagram by itself after 15 minutes" in KINDS[kind].todo
