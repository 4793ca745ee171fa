"""How late things are, and what the log says of each request."""

import logging

import pytest

from crmbridge.sandbox import wire
from crmbridge.web.app import Timings
from tests.rig import Rig
from tests.shop import Shop


def warned(caplog: pytest.LogCaptureFixture, name: str) -> list[dict]:
    return [record.facts for record in caplog.records if record.getMessage() == name]  # type: ignore[attr-defined]


def test_a_late_delivery_has_its_latency_and_one_warning(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.account()
    rig.crm.answer(500, times=3)
    rig.say("hello", "mid-1")
    rig.live_through(60)  # tried after 0, 1, 3 and 7 s
    rig.say("again", "mid-2")
    rig.drain()
    assert rig.db.rows("SELECT latency_ms FROM deliveries ORDER BY position") == [
        {"latency_ms": 7000},
        {"latency_ms": 0},
    ]
    (warning,) = warned(caplog, "performance.delivery_slow")
    assert warning["latency_ms"] == 7000


def test_the_late_ones_of_an_outage_are_one_warning_and_one_sum(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig.account()
    rig.crm.answer_always(503)
    for number in range(30):
        rig.say(f"{number}", f"mid-{number}", contact=f"80{number}")
    rig.live_through(600)
    rig.crm.answer_always(None)
    rig.live_through(120)
    assert len(rig.taken()) == 30
    assert len(warned(caplog, "performance.delivery_slow")) == 1
    rig.say("in time", "mid-last")
    rig.drain()
    (sum_,) = warned(caplog, "performance.deliveries_slow")
    assert sum_["deliveries"] == 30
    late = [one for one in warned(caplog, "delivery.attempted") if one["state"] == "done" and one["latency_ms"] > 5000]
    assert len(late) == 30


def told(rig: Rig, subject: str) -> list[tuple[str, str | None]]:
    """Return what history has of a subject, in its order: kinds and codes."""
    rows = rig.db.rows("SELECT kind, code FROM history WHERE subject = ? ORDER BY position", (subject,))
    return [(row["kind"], row["code"]) for row in rows]


def test_what_was_done_without_a_call_has_no_latency(rig: Rig) -> None:
    rig.account(url=None)
    rig.say("hello", "mid-1")
    rig.pass_s(10)
    assert rig.db.value("SELECT latency_ms FROM deliveries") is None


def test_an_echo_that_proves_a_doubtful_send_ends_its_latency(rig: Rig) -> None:
    rig.send(rig.account(), "hello")
    rig.meta.fault("messages", after_effect=True, drop=True)
    rig.drain()
    rig.now_s += 4
    rig.echo("hello", str(rig.meta.sent[0].mid))
    row = rig.db.row("SELECT id, latency_ms FROM deliveries WHERE target = 'instagram'")
    assert row is not None
    assert row["latency_ms"] == 4000
    assert told(rig, row["id"])[-1] == ("done", "echo")


def test_what_happened_between_the_calls_is_noted(rig: Rig) -> None:
    account = rig.account()
    rig.crm.answer(500, times=100, containing="poison")
    rig.say("poison", "mid-1")
    rig.say("well", "mid-2")
    rig.live_through(25 * 3600)
    row = rig.db.row("SELECT * FROM deliveries ORDER BY position")
    assert row is not None
    assert row["state"] == "dead"
    rig.revive(row["id"])
    rig.say("still there?", "mid-3")  # opens the window for the answer
    rig.send(account)
    rig.meta.fault("messages", status=403, body=wire.error_body(10, "outside of allowed window.", subcode=2534022))
    rig.drain()
    ids = [one["id"] for one in rig.db.rows("SELECT id FROM deliveries ORDER BY position")]
    between = [(kind, code) for kind, code in told(rig, ids[0]) if kind != "call"]
    assert between == [("stepped_aside", None), ("dead", "crm_error"), ("revived", None)]
    assert told(rig, ids[1]) == []  # it was done at once
    assert told(rig, ids[3])[-1] == ("dead", "window_closed")


def test_what_meta_repeats_is_counted(rig: Rig) -> None:
    rig.account()
    for _ in range(3):
        rig.say("hello", "mid-1", at_s=1_799_999_999)
        rig.now_s += 5
    repeats = rig.db.rows("SELECT at FROM history WHERE kind = 'repeat' ORDER BY position")
    assert [row["at"] for row in repeats] == ["2027-01-15T08:00:05.000Z", "2027-01-15T08:00:10.000Z"]


def test_percentiles_are_of_the_last_thousand_requests() -> None:
    timings = Timings()
    assert timings.summary() == {"count": 0, "slow": 0, "p50_ms": None, "p95_ms": None, "p99_ms": None}
    for ms in [5000.0] * 3 + [float(ms) for ms in range(1, 1001)]:
        timings.note(ms)
    assert timings.summary() == {"count": 1003, "slow": 3, "p50_ms": 500.0, "p95_ms": 950.0, "p99_ms": 990.0}


def test_a_request_is_one_line_and_a_probe_that_succeeds_is_none(shop: Shop) -> None:
    assert shop.call("GET", "/health", headers={"X-Request-Id": "probe-1"}).status_code == 200
    shop.call("GET", "/api/v1/accounts?limit=x", headers={"X-Request-Id": "refused-1"})
    shop.call("POST", "/webhooks/instagram", {}, headers={"X-Request-Id": "refused-2"})
    shop.wait_log("refused-2")
    shop.call("GET", "/api/v1/accounts", headers={"X-Request-Id": "last"})
    shop.wait_log("request method=.*last$")
    log = shop.log().splitlines()
    assert not [line for line in log if "probe-1" in line]
    (line,) = [line for line in log if "refused-1" in line and " request " in line]
    assert "info request method=GET path=/api/v1/accounts status=400" in line
    assert "code=invalid_request fields=limit" in line
    names = [line.split()[2] for line in log if "refused-2" in line and "performance." not in line]
    assert names == ["webhook.refused", "request"]


def test_a_slow_request_is_warned_about_once(shop: Shop) -> None:
    """Really slow: creating an account waits for Instagram's answer."""
    shop.meta.fault("/me", status=400, body=wire.error_body(190, "bad"), delay_s=1.1)
    answer = shop.connect(instagram_account_id="17841400000000009")
    assert answer.status_code == 400, answer.text
    shop.wait_log("performance.request_slow .*path=/api/v1/accounts ")
    shop.call("GET", "/health/live")
    correlation = answer.headers["X-Correlation-Id"]
    slow = [line for line in shop.log().splitlines() if "performance.request_slow" in line and correlation in line]
    assert len(slow) == 1
