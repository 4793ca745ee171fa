"""Meta's error codes: every row of the table through the sandbox, and the tables for people held to it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crmbridge import config
from crmbridge.instagram import codes
from crmbridge.instagram.codes import MEANINGS, Meaning
from crmbridge.sandbox import wire
from crmbridge.store import accounts
from tests import spec
from tests.rig import Rig, opened
from tests.test_cli import run

UNLISTED = 9_999_999
CASES = [
    (meaning, UNLISTED if code == "*" else code, UNLISTED if subcode == "*" else subcode)
    for meaning in MEANINGS
    for code, subcode in codes.codes_of(meaning)
] + [
    (meaning, number, None)
    for meaning in MEANINGS
    for code, subcode in codes.codes_of(meaning)
    for number in [subcode if code == "*" else code]
    if "*" in (code, subcode)
]
SPEC = spec.prose()
TRIES = {
    "retry": "counted", "once": "once", "limit": "waits", "final": "final", "alert": "final", "account": "holds",
    "unknown": "in doubt", "open": "in doubt",
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with opened(tmp_path_factory.mktemp("rig")) as rig:
        rig.account()
        yield rig


@pytest.mark.parametrize(
    ("meaning", "code", "subcode"), CASES, ids=lambda part: part.slug if isinstance(part, Meaning) else str(part)
)
def test_every_row_does_what_it_says(one_rig: Rig, meaning: Meaning, code: int, subcode: int | None) -> None:
    rig, (account,) = one_rig, accounts.everyone(one_rig.db)
    rig.engine.stop(0)
    rig.engine = rig.make_engine()
    rig.meta.reset()
    rig.alerts.clear()
    words = f"Übersetzt: {meaning.says}" if meaning.says else "(#{code}) エラーが発生しました"
    times = 1 if meaning.kind in ("unknown", "open") else 9
    rig.meta.fault("messages", times=times, status=400, body=wire.error_body(code, words, subcode=subcode))
    contact = f"9{code}{subcode or ''}"
    rig.say("hello", f"mid-{contact}-{meaning.slug}", contact=contact)
    message_id = rig.send(account, contact=contact)
    rig.drain()
    rig.live_through(100)
    calls, status = [call for call in rig.meta.calls if call.path.endswith("/messages")], rig.status(message_id)
    status_after, alerts = status["status"], [kind for kind, _ in rig.alerts]
    if meaning.kind in ("final", "alert", "retry", "once"):
        assert (status_after, status["error"]["code"]) == ("failed", meaning.slug)
        assert len(calls) == {"retry": 4, "once": 2}.get(meaning.kind, 1)
        assert status["error"]["message"].startswith(f"Instagram answered code {code}")
        assert status["error"]["message"].count(meaning.slug) == 1
        assert status["error"]["message"].endswith(f": {meaning.hint}") == (meaning.kind != "retry")
        assert alerts == (["send_refused"] if meaning.kind == "alert" else [])
        assert status["error"]["retryable"] == meaning.retryable
        return
    if meaning.kind in ("unknown", "open"):
        assert [attempt["outcome"] for attempt in status["attempts"]] == ["in_doubt", "absent", "absent", "done"]
        return
    assert status_after == "pending"
    shown = accounts.found(rig.db, account["id"])
    if meaning.kind == "account":
        assert (len(calls), shown["status"]) == (1, "error")
        assert shown["status_reason"].startswith(f"Instagram answered code {code}")
        assert shown["status_reason"].count(meaning.slug) == 1
        assert shown["status_reason"].endswith(": " + meaning.hint.replace("ACCOUNT", account["id"]))
        assert rig.alerts[0][1] == shown["status_reason"]
        assert alerts == ["token_dead" if code == 190 and subcode not in (459, 464) else "account_error"]
        assert status["held"]["reason"] == shown["status_reason"]
    else:
        assert (shown["status"], alerts, status["retry_count"] > 0) == ("active", [], True)
        assert rig.db.value("SELECT retries FROM deliveries WHERE message_id = ?", (message_id,)) == 0
    rig.meta.clear_faults()
    rig.change_account(account, status="active")
    rig.live_through(3600)
    assert rig.status(message_id)["status"] == "sent"


@pytest.mark.parametrize(
    ("status", "error", "slug"),
    [
        (400, {"code": UNLISTED}, "instagram_refused"),
        (400, {"code": 10, "error_subcode": UNLISTED}, "instagram_refused"),
        (400, {"code": 200, "error_subcode": UNLISTED}, "instagram_refused"),
        (400, {"code": UNLISTED, "is_transient": True}, "instagram_fault"),
        (503, {"code": UNLISTED}, "instagram_fault"),
        (429, {"code": UNLISTED}, "rate_limited"),
        (500, {"code": 2500}, "invalid_path"),
        (400, {"code": "190", "error_subcode": "463"}, "token_expired"),
        (400, {}, "instagram_refused"),
        (400, {"code": None, "error_subcode": [], "message": {}}, "instagram_refused"),
    ],
)
def test_what_is_not_listed_goes_by_the_stated_rules(status: int, error: dict[str, Any], slug: str) -> None:
    assert codes.classify(status, error).slug == slug


def test_a_code_has_one_meaning() -> None:
    pairs = [pair for meaning in MEANINGS if not meaning.says for pair in codes.codes_of(meaning)]
    assert len(pairs) == len(set(pairs))


def test_the_document_has_the_table_that_the_command_prints(tmp_path: Path) -> None:
    told = run(tmp_path, "codes").stdout
    assert told.count("\n") == len(MEANINGS) + 2
    assert f"\n\n{told}" in (config.ROOT / "docs" / "instagram.md").read_text()


def test_the_spec_tells_what_is_tried() -> None:
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| ([a-z ]+) \|", SPEC, re.MULTILINE)
    told = {slug: set(tries.split(" or ")) for slugs, tries in rows for slug in re.findall(r"[a-z_]+", slugs)}
    for slug in {meaning.slug for meaning in MEANINGS}:
        kinds = {TRIES[meaning.kind] for meaning in MEANINGS if meaning.slug == slug}
        assert kinds <= told[slug], slug
