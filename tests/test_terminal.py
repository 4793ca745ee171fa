"""What commands print: no value moves the cursor, hides or reorders words, or makes up a line of its own."""

import contextlib
import io
import json
import re
import sqlite3
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crmbridge import terminal
from crmbridge.alerts import telling
from crmbridge.events import instant
from crmbridge.sandbox import wire
from tests import shop as shops
from tests.shop import SHOP_ID, SHOP_SCOPED_ID, TOKEN, Shop
from tests.test_cli import program, run
from tests.typed import typed

FAKE = "ok: all is well"  # a line that no command prints
# C0 with CR and ESC, DEL, C1, marks and isolates of direction, line and paragraph ends, and what shows nothing.
MARKS = (
    "\r\x08\x07\x1b[2J\x1b]0;title\x07\x7f\x85\x9b31m\u061c\u200b\u200c\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
    "\u2060\u2066\u2067\u2068\u2069\u2028\u2029\ufeff\u00ad\u034f\u180e\u2800\u3164\ufe0f\ufff9\U000e0041\ue000\u00a0"
)
EVIL = f"shop{MARKS}\r\n{FAKE}\n{FAKE}\x1b[8m"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Yield a shop, stopped, where everything that others name is called so, by Meta, a CRM or a customer."""
    with shops.opened(tmp_path_factory.mktemp("evil"), shops.QUICK, account=False) as shop:
        shop.meta.add_account(SHOP_ID, token=TOKEN, app_scoped_id=SHOP_SCOPED_ID, username=EVIL)
        shop.open()
        sender = {"sender": {"id": EVIL}, "recipient": {"id": SHOP_ID}, "timestamp": 1_800_000_000_000}
        shop.crm.answer(401)
        assert (
            shop.meta.post(wire.envelope(SHOP_ID, 1, {**sender, "message": {"mid": EVIL, "text": "x"}})).status == 200
        )
        assert shop.meta.post(wire.envelope(EVIL, 1, {**sender, "message": {"mid": "m", "text": "x"}})).status == 200
        refusal = {"error": {"code": 100, "message": EVIL, "type": EVIL, "fbtrace_id": EVIL}}
        shop.meta.fault("messages", status=400, body=refusal)
        shop.meta.fault("subscribed_apps", status=400, body=refusal)
        assert shop.send("hello", "key-1").status_code == 202
        shop.wait_rows("SELECT COUNT(*) FROM deliveries WHERE state = 'dead'", [(2,)])
        shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"access_token": TOKEN}, key=shop.admin_key)
        assert json.loads(shop.call("GET", f"/api/v1/accounts/{shop.account_id}").text)["username"] == EVIL
        shop.wait_rows("SELECT COUNT(*) FROM alerts WHERE kind = 'dead_letter'", [(1,)])
        shop.close()
        now = instant(1_800_000_000)
        with contextlib.closing(sqlite3.connect(shop.database)) as db, db:
            db.execute(
                "UPDATE endpoints SET held_by = 'error', held_at = aged_from, held_reason = ? WHERE kind <> 'crm'",
                (EVIL,),
            )
            db.execute("UPDATE alerts SET message = ?", (EVIL,))
            db.execute("UPDATE api_keys SET name = ?", (EVIL,))
            db.execute("UPDATE endpoints SET paused_at = ?, paused_reason = ? WHERE kind = 'crm'", (now, EVIL))
            db.execute("UPDATE contacts SET name = ?, username = ?", (EVIL, EVIL))
        yield shop


# Every command that prints what it finds, or what was typed; ids stand for the shop's own.
COMMANDS = (
    ("account", "list"),
    ("key", "list"),
    ("alert", "list"),
    ("alert", "list", "--all"),
    ("dlq", "list"),
    ("dlq", "list", "--all"),
    ("account", "set", "ACCOUNT", "--url", EVIL),
    ("account", "set", EVIL, "--active"),
    ("dlq", "retry", "--preview", EVIL),
    ("dlq", "list", "--account", EVIL),
    ("check", "--verbose"),
    ("doctor", "--no-calls", "--verbose"),
    ("doctor", "--no-calls", "--account", EVIL),
    ("explain", "ACCOUNT"),
    ("explain", "EVENT"),
    ("explain", "MESSAGE"),
    ("explain", EVIL),
    ("explain", f"no such id{EVIL}"),
    ("account", "pause", EVIL),
    ("account", "pause", "ACCOUNT", "--reason", EVIL),
    ("account", "pause", "ACCOUNT", "--until", EVIL),
    ("key", "create", "--admin", "--name", EVIL),
    ("key", "create", "--name", "x", "--account", EVIL),
    ("key", "create", "--name", "x", "--permission", EVIL),
    ("key", "revoke", EVIL),
    ("erase", "--contact", "x", "--account", EVIL),
    ("backfill", EVIL),
    ("backfill", "--since", EVIL),
    ("restore", f"/nowhere/{EVIL}"),
    ("support-bundle", f"/nowhere/{EVIL}"),
    ("health", "--at", EVIL),
    ("check", "--rehearse", EVIL),
    ("check", "--config", EVIL),
    ("serve", EVIL),
    (EVIL,),
)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words).replace(EVIL, "EVIL"))
def test_whatever_others_are_called_a_command_prints_lines_of_its_own_alone(evil: Shop, words: tuple[str, ...]) -> None:
    ((event, message),) = evil.rows(
        "SELECT (SELECT id FROM events WHERE account_id IS NULL), (SELECT id FROM outbound_messages)"
    )
    ids = {"ACCOUNT": evil.account_id, "EVENT": event, "MESSAGE": message}
    _, said = typed(evil.bridge.folder, *(ids.get(word, word) for word in words))
    shows(said)


def shows(said: str) -> None:
    for line in said.split("\n"):
        assert line == terminal.escaped(line)
        assert not line.startswith(FAKE)
    assert "Traceback" not in said


def test_it_is_so_in_a_process_of_its_own(evil: Shop, tmp_path: Path) -> None:
    ini = str(evil.bridge.folder / "crmbridge.ini")
    for words in (("account", "list"), ("explain", EVIL), ("backup", f"{tmp_path}/{EVIL}/"), (EVIL,)):
        done = program(tmp_path, *words, CRMBRIDGE_CONFIG=ini)
        shows(done.stdout + done.stderr)
        assert r"\r\x08\x07\x1b[2J\x1b]0;title\x07\x7f\x85\x9b31m\u061c\u200b\u200c" in done.stdout + done.stderr


def test_a_terminal_that_lacks_a_character_gets_it_written_out(evil: Shop) -> None:
    folder = evil.bridge.folder
    with contextlib.closing(sqlite3.connect(evil.database)) as db, db:
        db.execute("UPDATE accounts SET username = 'café 喫茶 ❤'")
    shown = {"ascii": r"caf\xe9 \u55ab\u8336 \u2764", "latin-1": r"café \u55ab\u8336 \u2764", "utf-8": "café 喫茶 ❤"}
    for encoding, name in shown.items():
        assert f"  {name}  " in typed(folder, "account", "list", encoding=encoding)[1]
    for words in (("check",), ("doctor", "--no-calls"), ("explain", evil.account_id), ("--help",), ("explain", "ü")):
        assert typed(folder, *words, encoding="ascii")[1]
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run(folder, "account", "list", **plain)
    assert (done.stderr, shown["ascii"] in done.stdout) == ("", True)
    assert "(default: $CRMBRIDGE_CONFIG" in run(folder, "key", "list", "--help", **plain).stdout


def test_json_for_programs_is_ascii_and_holds_what_was_there(evil: Shop) -> None:
    with contextlib.closing(sqlite3.connect(evil.database)) as db, db:
        db.execute("UPDATE accounts SET username = ?", (EVIL,))
    _, said = typed(evil.bridge.folder, "doctor", "--no-calls", "--json")
    assert said.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    findings = json.loads(said)["findings"]
    assert any(EVIL in one["what"] for one in findings)


@pytest.mark.parametrize("words", [("explain",), ("dlq", "retry"), ("key", "create", "--name"), ("erase", "--contact")])
def test_an_argument_that_is_no_text_is_wrong_usage(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words, b"caf\xe9".decode(errors="surrogateescape"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == r"crmbridge: error: not UTF-8 text: caf\udce9"


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    name = b"caf\xe9.ini".decode(errors="surrogateescape")
    made = run(tmp_path, "init", "--config", name)
    assert (made.returncode, made.stdout.splitlines()[0]) == (0, r"made     caf\udce9.ini")
    assert run(tmp_path, "check", "--config", name).returncode == 0


def test_only_what_can_do_harm_is_written_out() -> None:
    unseen = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, 0x180B, 0x180C, 0x180D, 0x180F}
    unseen |= {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}  # variation selectors
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if (unicodedata.category(char)[0] in "LNPSM" or char == " ") and code not in unseen:
            assert terminal.escaped(char) == char, hex(code)
        else:
            assert terminal.escaped(char)[0] == "\\", hex(code)
    assert terminal.escaped("café 喫茶 مقهى 👩🏽") == "café 喫茶 مقهى 👩🏽"
    assert terminal.escaped("one\r\ntwo\t\\n") == r"one\r\ntwo\t\n"


def test_neither_a_letter_nor_a_chat_message_is_moved_by_a_name(evil: Shop) -> None:
    news = telling.News(
        kind="dead_letter", state="raised", message=f"a delivery of {EVIL} is dead", todo=f"look at {EVIL}",
        account_id="acc_1", account_name=EVIL, since_s=1_800_000_000, now_s=1_800_000_000, count=1, more=1,
    )  # fmt: skip
    letter, posted = telling.text(news), json.loads(telling.body(news))
    assert len(letter.splitlines()) == len(letter.split("\n")) - 1 == 9
    for line in [*letter.splitlines(), *(value for value in posted.values() if isinstance(value, str))]:
        assert line == terminal.escaped(line)
        assert not line.startswith(FAKE)


def test_a_line_of_the_log_is_ascii(evil: Shop) -> None:
    lines = evil.bridge.log_path.read_bytes().decode("ascii").split("\n")
    assert not [line for line in lines if line != terminal.escaped(line)]
    assert any(r"\u007f" in line for line in lines)


def test_a_closed_or_simple_stream_is_written_to_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    written: Any = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    terminal.say("one\n", "two", at_once=True)
    assert written.getvalue() == "one\\n\ntwo\n"
    monkeypatch.setattr(sys, "stdout", None)
    terminal.say("nowhere", at_once=True)
