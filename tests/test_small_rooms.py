"""Ids, times, keys, the vault, signatures and the log."""

import base64
import hashlib
import hmac
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crmbridge import apikey, crm, events, log, signing, vault
from crmbridge.errors import Misconfigured
from crmbridge.web import callers
from tests.rig import START_S


def test_ids_rise_and_do_not_repeat() -> None:
    made = [events.new_id("evt") for _ in range(20_000)]
    assert made == sorted(set(made))
    assert all(len(one) == 30 for one in made)


@given(st.floats(0, 253_402_300_799))
def test_times_are_read_back_to_the_millisecond(epoch_s: float) -> None:
    assert abs(events.epoch_s(events.instant(epoch_s)) - epoch_s) < 0.00101


def test_a_time_that_rounds_up_does_not_break() -> None:
    assert events.instant(1.9999) == "1970-01-01T00:00:02.000Z"
    assert events.instant(-5) == "1970-01-01T00:00:00.000Z"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("2027-01-15T08:00:00Z", "2027-01-15T08:00:00.000Z"),
        ("2027-01-15t08:00:00.5z", "2027-01-15T08:00:00.500Z"),
        ("2027-01-15T08:00:00.123456789+05:30", "2027-01-15T02:30:00.123Z"),
        ("2027-01-15T00:00:00-08:00", "2027-01-15T08:00:00.000Z"),
        ("0001-01-01T00:00:00+23:59", "1970-01-01T00:00:00.000Z"),
    ],
)
def test_a_callers_time_is_read_with_its_offset(given: str, read: str) -> None:
    assert events.read_instant(given) == read


@pytest.mark.parametrize(
    "given",
    ["", "tomorrow", "2027-01-15", "2027-01-15T08:00:00", "2027-01-15 08:00:00Z", "2027-13-15T08:00:00Z",
     "2027-01-15T08:00:60Z", "2027-01-15T08:00:00+24:00", "2027-01-15T08:00:00Z\n", "20270115T080000Z",
     "\u0662027-01-15T08:00:00Z", "1800000000"],
)  # fmt: skip
def test_what_is_no_time_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="must be a time"):
        events.read_instant(given)


def test_a_duration_is_a_number_and_a_unit() -> None:
    assert [events.read_span(text) for text in ("90s", "30m", "2h", "3d")] == [90, 1800, 7200, 259_200]
    for text in ("", "h", "2", "2 h", "-2h", "2.5h", "2h30m", "2h\n", "1234567d"):
        with pytest.raises(ValueError, match="must be a duration"):
            events.read_span(text)


def test_an_api_key_is_recognised_by_its_form_before_its_secret_is_checked() -> None:
    key, key_id, secret_hash = apikey.make()
    parts = apikey.split(key)
    assert parts is not None
    assert parts.id == key_id
    assert bcrypt.checkpw(parts.secret.encode(), secret_hash.encode())
    assert apikey.split(key[:-1] + ("a" if key[-1] != "a" else "b")) is None
    assert apikey.split(key + "\n") is None


@pytest.mark.parametrize(
    ("address", "caller"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("unknown", "unknown"),
        ("", ""),
        ("x" * 1000, "x" * 64),
    ],
)
def test_a_caller_is_an_address_or_the_network_of_one(address: str, caller: str) -> None:
    assert callers.group(address) == caller


def test_what_is_remembered_of_callers_is_bounded(lines: io.StringIO) -> None:
    failures, refusals = callers.Failures(lambda: 0.0), callers.Refusals(lambda: 0.0)
    for number in range(20_000):
        for _ in range(10):
            failures.note(f"caller-{number}")
        assert failures.wait_s(f"caller-{number}") == 6
        assert refusals.is_first(f"caller-{number}")
        assert not refusals.is_first(f"caller-{number}")
    assert failures.wait_s("caller-0") == 0  # forgotten
    refusals.tell(every=True)
    assert len(lines.getvalue().splitlines()) == 20_000  # but what it was refused is told before


def test_a_sealed_secret_opens_with_any_of_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert vault.create(path)
    assert not vault.create(path)
    old = vault.load(path)
    sealed = old.seal("the token")
    assert "the token" not in sealed
    vault.create(tmp_path / "new")
    path.write_text((tmp_path / "new").read_text() + path.read_text())
    rotated = vault.load(path)
    assert rotated.open(sealed) == "the token"
    with pytest.raises(Misconfigured):
        vault.load(tmp_path / "new").open(sealed)


@pytest.mark.parametrize("content", ["", "not a key", "é"])
def test_a_file_that_is_no_key_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(Misconfigured, match="key"):
        vault.load(path)


def test_signatures_follow_both_schemes() -> None:
    body, key = b'{"a":1}', bytes(range(32))
    secret = "whsec_" + base64.b64encode(key).decode()
    assert (
        signing.hub_signature(secret, body) == "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    )
    assert signing.standard_key(secret) == key
    signed = hmac.new(key, b'evt_1.1700000000.{"a":1}', hashlib.sha256).digest()
    expected = "v1," + base64.b64encode(signed).decode()
    assert signing.standard_signature([key], "evt_1", 1_700_000_000, body) == expected
    for other in ("plain", "whsec_%%%", "whsec_" + base64.b64encode(b"short").decode()):
        assert signing.standard_key(other) is None


@pytest.mark.parametrize(
    ("header", "wanted_s"),
    [
        (None, None), ("", None), ("7", 7), (" 120 ", 120), ("-1", None), ("soon", None), ("²", None),
        ("Fri, 15 Jan 2027 08:00:30 GMT", 30), ("Fri, 15 Jan 2027 07:00:00 GMT", 0), ("9" * 40, None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(header: str | None, wanted_s: float | None) -> None:
    assert crm.retry_after_s(header, START_S) == wanted_s


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream, root = io.StringIO(), logging.getLogger()
    before, level = root.handlers[:], logging.getLogger("crmbridge").level
    log.setup("info", stream)
    yield stream
    root.handlers[:] = before
    logging.getLogger("crmbridge").setLevel(level)


def test_a_log_line_is_one_line_with_secrets_struck_out(lines: io.StringIO) -> None:
    with log.correlated("req_1"):
        log.info(
            "thing.done", text="two\nlines", token="IGAAabcdefghijkl", key="crmb_abcdefghijkl_" + "x" * 38, ms=1.25
        )
    log.debug("thing.unseen")
    (line,) = lines.getvalue().splitlines()
    assert line.endswith('info thing.done text="two\\nlines" token=[secret] key=[secret] ms=1.25 correlation=req_1')


def test_a_logged_exception_shows_where_but_not_what(lines: io.StringIO) -> None:
    try:
        raise ValueError("what the customer wrote")
    except ValueError:
        log.exception("thing.failed")
    assert "exception=ValueError" in lines.getvalue()
    assert "test_small_rooms.py" in lines.getvalue()
    assert "customer wrote" not in lines.getvalue()


def test_a_log_that_is_rotated_goes_on_in_the_new_file_and_loses_nothing(tmp_path: Path) -> None:
    path, root = tmp_path / "it.log", logging.getLogger()
    before, level = root.handlers[:], logging.getLogger("crmbridge").level
    with path.open("a") as stream, ThreadPoolExecutor(4) as threads:
        log.setup("info", stream)
        written = [threads.submit(log.info, "line", number=number) for number in range(2_000)]
        for number in range(5):
            written[number * 400].result()
            path.rename(tmp_path / f"it.log.{number}")
            path.touch()
        for one in written:
            one.result()
        root.handlers[:] = before
        logging.getLogger("crmbridge").setLevel(level)
    found = "".join(one.read_text() for one in tmp_path.iterdir())
    assert sorted(int(line.rpartition("=")[2]) for line in found.splitlines()) == list(range(2_000))
