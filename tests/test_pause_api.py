"""Pauses by API and command line, over the real server."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from crmbridge.events import instant
from crmbridge.sandbox import wire
from crmbridge.sandbox.demo import HopFailed
from tests.shop import CUSTOMER, SHOP_ID, TOKEN, Shop
from tests.waiting import assert_rung

NOTHING = {"deliveries": None, "sends": None}


def post(shop: Shop, verb: str, body: Any, **options: Any) -> Any:
    return shop.call("POST", f"/api/v1/accounts/{shop.account_id}/{verb}", body, **options)


def test_what_is_paused_waits_and_a_resume_lets_it_go(fresh_shop: Shop) -> None:
    shop = fresh_shop
    until = datetime.now(UTC) + timedelta(hours=2)
    paused = post(shop, "pause", {"until": until.isoformat(), "reason": "stocktaking"}).json()["paused"]
    for what in ("deliveries", "sends"):
        assert paused[what] == {
            "since": paused[what]["since"],
            "until": instant(until.timestamp()),
            "reason": "stocktaking",
        }
    shop.meta.customer_says(SHOP_ID, CUSTOMER, "are you there?")
    answer = shop.send("soon", "paused-1")
    assert answer.status_code == 202
    shop.wait_rows("SELECT target FROM deliveries WHERE state = 'pending' ORDER BY 1", [("crm",), ("instagram",)])
    status = shop.status(answer.json()["message_id"])
    assert (status["status"], status["next_attempt_at"]) == ("pending", None)
    assert status["held"] == {name: paused["sends"][name] for name in ("since", "until", "reason")}
    again = post(shop, "pause", {"what": ["sends"]}).json()["paused"]
    assert again == {"deliveries": paused["deliveries"], "sends": {**paused["sends"], "until": None}}
    assert post(shop, "resume", {"what": ["sends"]}).json()["paused"] == {**paused, "sends": None}
    shop.meta.wait_sent(1)
    assert shop.crm.received == []
    assert post(shop, "resume", {}).json()["paused"] == NOTHING
    assert shop.crm.wait(2)[0].event["event"] == "message.received"
    assert post(shop, "resume", {}).status_code == 200
    assert shop.status(answer.json()["message_id"])["held"] is None
    listed = shop.call("GET", "/api/v1/accounts").json()["accounts"][0]
    assert listed["paused"] == NOTHING
    key_id = "key_" + shop.key.split("_")[1]
    assert re.search(
        rf"info account.paused account=\S+ what=deliveries,sends .*reason=stocktaking by={key_id}", shop.log()
    )
    assert re.search(rf"info account.resumed account=\S+ what=sends by={key_id}", shop.log())


@pytest.mark.slow
def test_an_end_that_comes_lets_it_go_by_itself(fresh_shop: Shop) -> None:
    until = datetime.now(UTC) + timedelta(seconds=5)  # to come still when it is asked for
    assert post(fresh_shop, "pause", {"until": until.isoformat()}).status_code == 200
    fresh_shop.meta.customer_says(SHOP_ID, CUSTOMER, "are you there?")
    fresh_shop.crm.wait(1)
    assert datetime.now(UTC) > until


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"until": "2020-01-01T00:00:00Z"}, "until"),
        ({"until": "tomorrow"}, "until"),
        ({"until": "2099-01-01T00:00:00Z"}, "until"),
        ({"until": "2099-01-01T00:00:00"}, "until"),
        ({"what": []}, "what"),
        ({"what": ["everything"]}, "what.0"),
        ({"reason": ""}, "reason"),
        ({"targets": ["sends"]}, "targets"),
    ],
)
def test_a_pause_that_makes_no_sense_is_refused(shop: Shop, body: Any, field: str) -> None:
    answer = post(shop, "pause", body)
    assert answer.status_code == 400
    assert [entry["field"] for entry in answer.json()["details"]] == [field]
    shown = shop.call("GET", f"/api/v1/accounts/{shop.account_id}").json()
    assert shown["paused"] == NOTHING


def test_a_pause_needs_the_right_to_change_the_account(shop: Shop) -> None:
    reader = shop.bridge.command(
        "key", "create", "--name", "r", "--account", shop.account_id, "--permission", "accounts:read"
    )
    for verb in ("pause", "resume"):
        assert post(shop, verb, {}, key=reader).json()["error"] == "permission_missing"


def test_the_command_line_pauses_shows_and_resumes(fresh_shop: Shop) -> None:
    shop = fresh_shop
    for words in (["--for", "soon"], ["--for", "400d"], ["--until", "2020-01-01T00:00:00Z"], ["--reason", "\n"]):
        with pytest.raises(HopFailed):
            shop.bridge.command("account", "pause", shop.account_id, *words)
    with pytest.raises(HopFailed):
        shop.bridge.command("account", "pause", "acc_unknown")
    said = shop.bridge.command("account", "pause", shop.account_id, "--deliveries", "--for", "2h", "--reason", "tea")
    assert said.startswith(f"paused deliveries of {shop.account_id} until 2")
    listed = shop.bridge.command("account", "list").splitlines()
    assert len(listed) == 2
    assert listed[1].startswith("  deliveries held since 2")
    assert listed[1].endswith("Z: tea")
    shop.bridge.command("account", "pause", shop.account_id, "--deliveries")
    (since,) = shop.rows("SELECT paused_at FROM endpoints WHERE paused_reason = 'tea' AND paused_until IS NULL")
    warned = (
        f"warning: {shop.account_id} (your_shop) deliveries are paused since {since[0]}: tea; crmbridge account resume"
    )
    assert f"{warned} {shop.account_id} --deliveries" in shop.bridge.command("check").splitlines()
    shop.meta.customer_says(SHOP_ID, CUSTOMER, "are you there?")
    shop.wait_rows("SELECT state FROM deliveries", [("pending",)])
    assert shop.bridge.command("account", "resume", shop.account_id).splitlines() == [
        f"resumed deliveries of {shop.account_id}",
        f"sends of {shop.account_id} were not paused",
    ]
    shop.crm.wait(1)
    assert len(shop.bridge.command("account", "list").splitlines()) == 1

    def hold_and_resume(number: int) -> None:
        post(shop, "pause", {})
        shop.meta.customer_says(SHOP_ID, CUSTOMER, f"and now? {number}")
        shop.bridge.command("account", "resume", shop.account_id)

    assert_rung(hold_and_resume, lambda number: shop.crm.wait(number + 2))


def test_a_new_url_ends_the_pause_of_a_crm_that_was_gone_but_not_an_operators(fresh_shop: Shop) -> None:
    shop, path = fresh_shop, f"/api/v1/accounts/{fresh_shop.account_id}"
    shop.crm.answer(410)
    shop.meta.customer_says(SHOP_ID, CUSTOMER, "hello")
    shop.wait_log("alert.crm_gone")
    held = shop.call("GET", path).json()["held"]["deliveries"]
    assert (held["by"], "410" in held["reason"]) == ("gone", True)
    moved = {"crm_webhook_url": shop.sandbox.crm_webhook_url + "/new"}
    assert shop.call("PUT", path, moved).json()["held"] == NOTHING
    assert shop.crm.wait(2)[1].path == "/webhook/new"
    post(shop, "pause", {})
    assert shop.call("PUT", path, moved).json()["paused"]["deliveries"]["until"] is None


def test_a_new_token_heals_an_account_in_error_and_what_waited_goes_out(fresh_shop: Shop) -> None:
    shop, path = fresh_shop, f"/api/v1/accounts/{fresh_shop.account_id}"
    shop.meta.fault("messages", status=400, body=wire.error_body(190, "Session has expired", subcode=463))
    message_id = shop.send("hello", "held-1").json()["message_id"]
    shop.wait_log("alert.token_dead")
    shown = shop.call("GET", path).json()
    assert shown["status"] == "error"
    assert "token_expired" in shown["status_reason"]
    assert shop.status(message_id)["held"]["reason"] == shown["status_reason"]
    assert re.search(
        rf"warning: {shop.account_id} .* is error since \S+, its sends are held: Instagram answered "
        r"code 190/463, token_expired .*; "
        rf"crmbridge account set {shop.account_id} --token - \(a new access token\), or, if that is not at fault, ",
        shop.bridge.command("check"),
    )
    assert "token_expired: token_expired" not in shop.bridge.command("explain", message_id)
    assert shop.bridge.command("account", "list").splitlines()[1].endswith(f"Z: {shown['status_reason']}")
    healed = shop.call("PUT", path, {"access_token": TOKEN}).json()
    assert (healed["status"], healed["status_reason"]) == ("active", None)
    assert [entry.text for entry in shop.meta.wait_sent(1)] == ["hello"]


def test_a_server_that_is_killed_while_paused_keeps_the_pause_and_what_it_holds(fresh_shop: Shop) -> None:
    shop = fresh_shop
    post(shop, "pause", {"what": ["sends"]})
    message_ids = [shop.send(f"{number}", f"killed-{number}").json()["message_id"] for number in range(3)]
    shop.kill()
    shop.start()
    assert {shop.status(message_id)["status"] for message_id in message_ids} == {"pending"}
    assert shop.meta.sent == []
    post(shop, "resume", {})
    assert [entry.text for entry in shop.meta.wait_sent(3)] == ["0", "1", "2"]
