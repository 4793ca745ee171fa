"""Clients that are generated from api-spec.yaml compile, run the whole loop, and go on when something is added."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from crmbridge import config
from tests import shop as shops
from tests.needs import require
from tests.shop import CUSTOMER, SHOP_ID, TOKEN, Shop
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.contract, pytest.mark.slow]

SPEC = config.ROOT / "api-spec.yaml"
CLIENTS = Path(__file__).parent / "clients"
MODULES = CLIENTS / "node_modules"
# Python's generator has no name for YAML; ruff would tidy up what nobody reads.
GENERATOR = "post_hooks: []\ncontent_type_overrides: {application/yaml: text/plain}\n"
QUESTION = "Is the blue lamp in stock?"
COMPILER = ["--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"]


def run(folder: Path, *words: str | Path) -> str:
    """Run a program and return what it prints."""
    done = subprocess.run(list(map(str, words)), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """Generate Python's client and check the program against its types; return how the program is run."""
    folder, own = tmp_path_factory.mktemp("python"), Path(sys.executable).parent
    (folder / "generator.yaml").write_text(GENERATOR)
    generator: list[str | Path] = [own / "openapi-python-client", "generate", "--path", SPEC, "--meta", "none"]
    run(folder, *generator, "--output-path", "bridge_client", "--config", "generator.yaml", "--fail-on-warning")
    shutil.copy(CLIENTS / "loop.py", folder)
    run(folder, sys.executable, "-W", "error", "-m", "compileall", "-q", ".")
    run(folder, own / "mypy", "--strict", "--config-file", os.devnull, "--cache-dir", os.devnull, "loop.py")
    return [sys.executable, folder / "loop.py"]


@pytest.fixture(scope="module")
def typescript(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """Generate TypeScript's types and compile the program with them; return how the program is run."""
    require(MODULES.exists() and shutil.which("node"), "there is no node, or no `npm ci --prefix tests/clients`")
    folder = tmp_path_factory.mktemp("typescript")
    for name in ("loop.ts", "package.json"):
        shutil.copy(CLIENTS / name, folder)
    (folder / "node_modules").symlink_to(MODULES)
    run(folder, "node_modules/.bin/openapi-typescript", SPEC, "--output", "bridge.d.ts")
    run(folder, "node_modules/.bin/tsc", *COMPILER, "loop.ts")
    return ["node", folder / "loop.js"]


def grown(told: Any) -> Any:
    """Return an answer with a field that no specification of today knows in every object."""
    if isinstance(told, list):
        return [grown(inner) for inner in told]
    if not isinstance(told, dict):
        return told
    return {name: grown(inner) for name, inner in told.items()} | {"of_tomorrow": {"deep": [1, None]}}


def tomorrow(path: str, answer: Any) -> Any:
    """Return an answer of the bridge as a later version may give it."""
    if "events" in answer:
        new = {"event": "message.pinned", "event_id": "evt_01kghg01yg27h6p3amkdqg6sta", "sequence": None, "pin": [1]}
        new |= {"account_id": "acc_01kgh87y004tff59tdwh9edd1r", "timestamp": "2036-02-03T10:15:30.512Z"}
        answer["events"].insert(0, new)
    if path.endswith("/send"):
        answer |= {"status": "scheduled", "warnings": ["full_moon"]}
    if path.endswith("/status"):
        answer["status_history"].insert(0, {"status": "scheduled", "timestamp": answer["created_at"]})
        answer["attempts"] = [attempt | {"kind": "dream", "outcome": "dreamt"} for attempt in answer["attempts"]]
    return grown(answer)


@contextlib.contextmanager
def a_later_version(of: str) -> Iterator[str]:
    """Yield the URL of a server that answers as the bridge does, in the words of a later version."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kept = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
            answer = requests.request(self.command, of + self.path, data=body, headers=kept, timeout=PATIENCE_S)
            told = json.dumps(tomorrow(self.path, answer.json())).encode()
            self.send_response(answer.status_code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_POST = do_GET

        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Shop]:
    """Run a shop whose customer wrote before its account is connected."""
    with shops.opened(tmp_path, shops.QUICK, account=False) as shop:
        shop.hears(CUSTOMER, QUESTION)
        yield shop


@pytest.fixture(params=["python", "typescript"])
def loop(request: pytest.FixtureRequest, bridge: Shop) -> Callable[[str], dict[str, Any]]:
    """Return what runs the loop of a generated client against a URL, and returns what the client saw."""
    program = request.getfixturevalue(request.param)

    def runs(url: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run(CLIENTS, *program, url, bridge.admin_key, SHOP_ID, TOKEN))
        [sent] = bridge.meta.sent
        assert sent.recipient_id == CUSTOMER
        assert (sent.text or "").startswith("You wrote at ")
        assert found["heard"] == [QUESTION]
        assert {"message.sent", "message.delivered", "delivered"} <= set(found["statuses"])
        return found

    return runs


def test_a_generated_client_connects_polls_sends_and_follows(
    loop: Callable[[str], dict[str, Any]], bridge: Shop
) -> None:
    found = loop(bridge.url)
    assert (found["others"], found["warnings"], found["statuses"][0]) == ([], [], "pending")


def test_a_generated_client_goes_on_after_what_a_later_version_adds(
    loop: Callable[[str], dict[str, Any]], bridge: Shop
) -> None:
    with a_later_version(bridge.url) as url:
        found = loop(url)
    assert found["others"] == ["message.pinned"]
    assert (found["warnings"], found["statuses"][0]) == (["full_moon"], "scheduled")
