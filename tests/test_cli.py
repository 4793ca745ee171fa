"""The command line, in a folder of its own."""

import contextlib
import http.server
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crmbridge import vault
from crmbridge.store import accounts, database
from tests import typed
from tests.far import Far
from tests.shop import Shop
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent


_CHANGE_THE_PROCESS = {"backup", "demo", "restore", "sandbox", "serve", "worker", "--rehearse"}


def run(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder: in this process where that does it no harm."""
    if _CHANGE_THE_PROCESS & {*words} or not all(name.startswith("CRMBRIDGE_") for name in environ):
        return program(folder, *words, **environ)
    return typed.run(folder, *words, **environ)


def program(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a program in a folder."""
    with started(folder, *words, stdin=subprocess.DEVNULL, **environ) as process:
        said = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(words, process.returncode, *said)


def started(folder: Path, *words: str, stdin: int = subprocess.DEVNULL, **environ: str) -> subprocess.Popen[str]:
    """Start a command as a program in a folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CRMBRIDGE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "crmbridge", *words],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), **environ},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    assert run(tmp_path, "init").returncode == 0
    return tmp_path


def test_it_is_a_program(tmp_path: Path) -> None:
    made = program(tmp_path, "init")
    assert (made.returncode, made.stdout.count("made "), made.stderr) == (0, 3, "")
    assert stat.S_IMODE((tmp_path / "var" / "bridge.db").stat().st_mode) == 0o600
    wrong = program(tmp_path, "nonsense")
    assert (wrong.returncode, wrong.stdout, wrong.stderr[:6]) == (2, "", "usage:")
    missing = program(tmp_path, "check", "--config", "elsewhere.ini")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("crmbridge: no configuration at elsewhere.ini")


@pytest.mark.parametrize("words", [("check", "--verbose"), ("dlq", "list"), ("--help",), ("check", "--help")])
def test_a_pipe_that_nobody_reads_any_more_ends_a_command_quietly(made: Path, words: tuple[str, ...]) -> None:
    with started(made, *words) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE_S) == 128 + signal.SIGPIPE


def test_check_shows_what_is_set_otherwise_than_by_default(made: Path) -> None:
    some = run(made, "check", CRMBRIDGE_WEB_PORT="9999", CRMBRIDGE_INSTAGRAM_APP_SECRETS="0" * 32).stdout
    shown = [line for line in some.splitlines() if line.startswith("  ")]
    assert shown[:2] == ["  web.port = 9999", "  instagram.app_secrets = (set)"]
    number = re.fullmatch(r"  (\d+) settings have their defaults; --verbose shows them, too", shown[2])
    assert number
    every = run(made, "check", "--verbose", CRMBRIDGE_WEB_PORT="9999").stdout.splitlines()
    assert len([line for line in every if line.startswith("  ")]) == int(number[1]) + 2
    assert {"  web.port = 9999", "  log.level = info"} <= set(every)


def test_init_makes_what_is_missing_and_changes_nothing_twice(tmp_path: Path) -> None:
    first = run(tmp_path, "init")
    assert first.stdout.count("made ") == 3
    key_file = tmp_path / "var" / "crmbridge.key"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert (tmp_path / "crmbridge.ini").read_text() == (ROOT / "crmbridge.ini").read_text()
    before = key_file.read_bytes()
    again = run(tmp_path, "init")
    assert (again.returncode, again.stdout.count("kept ")) == (0, 3)
    assert key_file.read_bytes() == before


def test_init_makes_no_new_key_for_secrets_that_are_sealed_already(made: Path) -> None:
    with contextlib.closing(database.Database(made / "var" / "bridge.db")) as db:
        keys = vault.load(made / "var" / "crmbridge.key")
        accounts.create(db, keys, {"instagram_account_id": "1"}, token="IGAA", url=None, secret=None)
    (made / "var" / "crmbridge.key").unlink()
    done = run(made, "init")
    assert done.returncode == 1
    assert "put the saved key file back" in done.stderr
    assert not (made / "var" / "crmbridge.key").exists()


def test_check_says_whether_it_can_run(made: Path) -> None:
    good = run(made, "check", CRMBRIDGE_INSTAGRAM_VERIFY_TOKEN="dont-show-me")
    assert good.returncode == 0, good.stdout
    assert good.stdout.splitlines()[-1].startswith("it starts, but is broken: [instagram] app_secrets is empty: ever")
    quiet = {"CRMBRIDGE_INSTAGRAM_APP_SECRETS": "0" * 32, "CRMBRIDGE_INSTAGRAM_VERIFY_TOKEN": "dont-show-me"}
    assert run(made, "check", **quiet).stdout.splitlines()[-1] == "fit to run, but see to the 2 warning(s) above"
    assert re.search(r"sizes in MB: database \d+\.\d, wal \d+\.\d, free \d+\.\d, disk_free \d+", good.stdout)
    assert "dont-show-me" not in good.stdout
    for doubt in (
        "no worker has run yet; nothing goes out until it is started: crmbridge serve",
        "nobody is told of an alert",
    ):
        assert doubt in good.stdout
    assert "look_up_s are" not in good.stdout
    assert "look_up_s are 29.5 s in all" in run(made, "check", CRMBRIDGE_DELIVERY_LOOK_UP_S="4.5 25").stdout
    (made / "var" / "crmbridge.key").chmod(0o644)
    bad = run(made, "check")
    assert bad.returncode == 1
    assert "chmod 600" in bad.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("serve",), "no configuration at crmbridge.ini"),
        (("check", "--config", "elsewhere.ini"), "no configuration at elsewhere.ini"),
        (("key", "list"), "run 'crmbridge init'"),
    ],
)
def test_a_missing_configuration_is_named(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = run(tmp_path, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr


def test_keys_are_made_listed_and_revoked(made: Path) -> None:
    done = run(made, "key", "create", "--name", "the boss", "--admin", "--expires-days", "1")
    assert re.fullmatch(r"crmb_[0-9a-z]{12}_[0-9A-Za-z]{38}\n", done.stdout)
    key_id = "key_" + done.stdout.split("_")[1]
    listed = run(made, "key", "list").stdout
    assert key_id in listed
    assert "active" in listed
    assert done.stdout.split("_")[2].strip() not in listed
    assert run(made, "key", "revoke", key_id).returncode == 0
    assert "revoked" in run(made, "key", "list").stdout
    for words in (
        ("revoke", "key_none"),
        ("create", "--name", "x"),
        ("create", "--name", "x", "--account", "acc_none"),
    ):
        failed = run(made, "key", *words)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.startswith("crmbridge: ")
        assert "Traceback" not in failed.stderr


def test_a_server_does_not_start_on_an_older_schema(made: Path) -> None:
    subprocess.run(["sqlite3", "var/bridge.db", "DELETE FROM schema_migration"], cwd=made, check=True)
    older = run(made, "serve")
    assert older.returncode == 1
    assert "crmbridge migrate" in older.stderr


@pytest.mark.parametrize("words", [(), ("nonsense",), ("key",), ("key", "create"), ("serve", "--nonsense")])
def test_wrong_usage_is_2(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: crmbridge")


def test_dead_deliveries_are_named_to_be_retried(made: Path) -> None:
    assert run(made, "dlq", "list", "--older-than", "2h", "--sends").stdout == "no dead letters\n"
    assert "--older-than: must be a duration" in run(made, "dlq", "list", "--older-than", "2").stderr
    asked = run(made, "dlq", "retry", "--all", "--preview")
    assert (asked.returncode, asked.stdout.count(": 0 match, 0 to be revived")) == (0, 2)
    unknown = run(made, "dlq", "retry", "dlv_none")
    assert (unknown.returncode, "left     dlv_none" in unknown.stdout) == (1, True)
    assert "--all" in run(made, "dlq", "retry").stderr
    for words in (("retry", "dlv_none", "--preview"), ("discard", "dlv_none")):
        unknown = run(made, "dlq", *words)
        assert (unknown.returncode, unknown.stdout) == (1, "left     dlv_none  There is no such delivery or send.\n")
    assert run(made, "dlq", "discard", "--all").stdout == "webhooks: 0 discarded\nsends: 0 discarded\n"


@pytest.mark.parametrize("command", [("list",), ("retry", "--all", "--preview"), ("discard", "--all")])
@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (("--account", "acc_none"), "no account acc_none"),
        (("--event", "message.recieved"), "no event message.recieved; known: message.received,"),
        (("--older-than", "3d", "--newer-than", "1d"), "Nothing can have died"),
    ],
)
def test_a_filter_that_nothing_can_match_is_an_error(
    made: Path, command: tuple[str, ...], filters: tuple[str, ...], said: str
) -> None:
    done = run(made, "dlq", *command, *filters)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr


def test_version_and_lists(made: Path) -> None:
    assert re.fullmatch(r"crmbridge \d+\.\d+\.\d+\n", run(made, "--version").stdout)
    assert run(made, "account", "list").stdout == ""
    assert run(made, "migrate").stdout == "nothing to do\n"
    assert run(made, "check", CRMBRIDGE_CONFIG=str(made / "crmbridge.ini")).returncode == 0


def test_the_sandbox_binds_loopback_alone(tmp_path: Path) -> None:
    done = run(tmp_path, "sandbox", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert "loopback" in done.stderr


def test_health_asks_the_running_server(fresh_shop: Shop, tmp_path: Path) -> None:
    shop, address = fresh_shop, fresh_shop.url.removeprefix("http://")
    ini = str(shop.bridge.folder / "crmbridge.ini")
    well = run(tmp_path, "health", "--wait", "50", "--config", ini, CRMBRIDGE_WEB_PORT=address.rpartition(":")[2])
    assert (well.returncode, well.stdout) == (0, "healthy\n")
    unknown = run(tmp_path, "health", "--config", ini)
    assert (unknown.returncode, "port is 0" in unknown.stderr) == (1, True)
    assert run(tmp_path, "health", "--wait", "50", "--at", address).returncode == 0
    live = run(tmp_path, "health", "--live", "--wait", "50", "--at", address)
    assert (live.returncode, live.stdout) == (0, "alive\n")
    shop.kill()
    dead = run(tmp_path, "health", "--live", "--wait", "0.5", "--at", address)
    assert (dead.returncode, dead.stdout) == (3, f"no answer from {address}: [Errno 111] Connection refused\n")


def test_health_asks_a_process_wherever_it_listens(fresh_shop: Shop, tmp_path: Path) -> None:
    process = fresh_shop.bridge._process
    assert process is not None
    pid = str(process.pid)
    for words, said in (([], "healthy\n"), (["--live"], "alive\n")):
        asked = run(tmp_path, "health", *words, "--wait", "50", "--pid", pid)
        assert (asked.returncode, asked.stdout) == (0, said)
    with subprocess.Popen(["sleep", "600"]) as deaf:
        nowhere = run(tmp_path, "health", "--pid", str(deaf.pid))
        assert (nowhere.returncode, nowhere.stdout) == (3, f"process {deaf.pid} listens nowhere\n")
        deaf.kill()
    fresh_shop.kill()
    gone = run(tmp_path, "health", "--wait", "50", "--pid", pid)
    assert (gone.returncode, gone.stdout) == (3, f"there is no process {pid}\n")


def test_a_database_that_is_gone_beside_its_key_file_is_not_made_anew(made: Path) -> None:
    (made / "var" / "bridge.db").unlink()
    for words in (["init"], ["check"], ["serve"], ["migrate"], ["key", "list"]):
        done = run(made, *words)
        assert done.returncode == 1
        assert "though crmbridge was set up here: is its disk mounted (df)?" in done.stdout + done.stderr
        assert "crmbridge init" not in done.stdout + done.stderr
    assert not (made / "var" / "bridge.db").exists()
    (made / "var" / "crmbridge.key").unlink()
    assert "crmbridge init" in run(made, "check").stdout
    assert run(made, "init").returncode == 0


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"status": "ok"}'])
def test_health_takes_no_other_program_for_the_bridge(tmp_path: Path, body: bytes) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        for words in ([], ["--live"]):
            asked = run(tmp_path, "health", *words, "--at", address)
            assert (asked.returncode, asked.stdout) == (3, f"what answers at {address} is not crmbridge: HTTP 200\n")
        server.shutdown()
    wrong = run(tmp_path, "health", "--at", "localhost")
    assert (wrong.returncode, wrong.stderr) == (1, "crmbridge: --at localhost: not HOST:PORT\n")


def test_health_waits_for_the_final_answer(tmp_path: Path) -> None:
    healthy = b'HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{"status": "healthy"}'
    with Far(lambda _: [b"HTTP/1.1 102 Processing\r\n\r\n", 0.2, b"HTTP/1.1 103 Hints\r\n\r\n", healthy]) as far:
        asked = run(tmp_path, "health", "--at", f"127.0.0.1:{far.port}")
        assert (asked.returncode, asked.stdout) == (0, "healthy\n")


def test_health_tells_the_reasons(tmp_path: Path) -> None:
    said = json.dumps({"status": "unhealthy", "reasons": ["the disk is full", "no worker has run yet"]}).encode()
    head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n" % len(said)
    with Far(lambda _: [head + said]) as far:
        for words, status in (([], 1), (["--live"], 0)):
            asked = run(tmp_path, "health", *words, "--at", f"127.0.0.1:{far.port}")
            assert asked.returncode == status
            assert asked.stdout == "unhealthy: the disk is full; no worker has run yet\n"


def test_a_key_of_an_earlier_version_is_named_and_stops_nothing(made: Path) -> None:
    ini = made / "crmbridge.ini"
    ini.write_text(ini.read_text().replace("senders = 12\n", "senders = 12\nreplay_per_s = 20\n"))
    said = run(made, "check").stdout
    assert "[delivery] replay_per_s does nothing any more: take it out of the configuration" in said


def test_init_shows_the_keys_that_the_configuration_does_not_have(made: Path) -> None:
    assert "new " not in run(made, "init").stdout
    ini = made / "crmbridge.ini"
    ini.write_text(ini.read_text().replace("mentions = false\n", "").replace("instagram_sends_per_s = 50\n", ""))
    said = run(made, "init").stdout
    assert "  [instagram]\n  # Whether the CRM is told of comments" in said
    assert "  mentions = false\n  [delivery]\n  # Sends a second" in said
    assert "comments = false" not in said
    assert "[web]" not in said
