"""What every figure stands on: a bridge started as a user would, and the sandbox in a process of its own."""

import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import types
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from crmbridge.sandbox import Sandbox
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.sandbox.demo import Bridge, ini

SHOP, NEIGHBOUR = "17841400000000001", "17841400000000002"
_ROOT = Path(__file__).resolve().parent.parent
_START_S, _WAIT_S, _QUIET_S = 20, 60, 1.5


class Arrivals:
    """What was accepted by the CRM and the Send API: how often each event and text, and when a text came first.

    `lanes` has the texts of each customer's messages at the CRM with their sequence, as they came.
    """

    def __init__(self, came: list[tuple[str, str | None, float]], heard: list[dict[str, Any]]) -> None:
        self.lanes: dict[str, list[tuple[int, str]]] = {}
        for event in heard:
            if "sender_id" in event:
                self.lanes.setdefault(event["sender_id"], []).append((event["sequence"], event["message"]))
        self.events = Counter(event for event, _, _ in came)
        self.texts = Counter(text for _, text, _ in came if text)
        self.at = {text: at for _, text, at in reversed(came) if text}


def _sandbox(pipe: Connection, ahead_s: float) -> None:
    """Run the sandbox and tell over the pipe what arrived, at which time.monotonic()."""
    with contextlib.suppress(EOFError), Sandbox(clock=lambda: time.monotonic() + ahead_s) as sandbox:
        meta, crm = sandbox.meta, sandbox.crm
        for shop in (SHOP, NEIGHBOUR):
            meta.add_account(shop, token=f"IGAA-bench-{shop}", app_scoped_id="24" + shop[2:], username=f"shop_{shop}")
        pipe.send((ini(sandbox), sandbox.crm_webhook_url))
        meta.callback_url = pipe.recv()
        while True:
            order = pipe.recv()
            if order == "count":
                pipe.send(len([one for one in crm.received if one.answered == 200]) + len(meta.sent))
                continue
            if isinstance(order, dict):
                meta.configure(**order)
                continue
            if order in ("fail", "work"):
                crm.answer_always(503 if order == "fail" else None)
                continue
            heard = [one for one in crm.received if one.answered == 200]
            came = [(str(one.event.get("event")), one.event.get("message"), one.at - ahead_s) for one in heard]
            came += [("message.send", one.text, one.at - ahead_s) for one in meta.sent]
            pipe.send(Arrivals(came, [one.event for one in heard]))
            crm.reset()
            meta.reset()


class Stage:
    """A bridge with one account, and its sandbox; `folder` holds the database."""

    def __init__(self, folder: Path) -> None:
        processes = multiprocessing.get_context("spawn")
        self._pipe, far_end = processes.Pipe()
        ahead_s = time.time() - time.monotonic()
        self._sandbox = processes.Process(target=_sandbox, args=(far_end, ahead_s), daemon=True)
        self._sandbox.start()
        far_end.close()
        settings, self.crm_webhook_url = self._pipe.recv()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._pipe.send(f"http://127.0.0.1:{self.port}/webhooks/instagram")
        self.bridge = Bridge(folder, settings.replace("port = 0", f"port = {self.port}"))
        self.bridge.command("init")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self._admin_key = self.bridge.command("key", "create", "--name", "bench-admin", "--admin")
        self.account_id = self.connect(SHOP, self.crm_webhook_url)
        self.key = self.bridge.command("key", "create", "--name", "bench", "--account", self.account_id)

    def connect(self, shop: str, crm_webhook_url: str) -> str:
        """Connect an account that the sandbox knows; return its id."""
        asked = {"instagram_account_id": shop, "access_token": f"IGAA-bench-{shop}"}
        crm = {"crm_webhook_url": crm_webhook_url, "webhook_secret": WEBHOOK_SECRET}
        return str(self._ask("POST", "/api/v1/accounts", asked | crm, self._admin_key)["account_id"])

    def crm_works(self, does: bool) -> None:
        """Have the sample CRM answer 503 from now on, or 200 again."""
        self._pipe.send("work" if does else "fail")

    def instagram(self, **settings: Any) -> None:
        """Change settings of the sandbox's Instagram."""
        self._pipe.send(settings)

    @property
    def pid(self) -> int:
        """The bridge's process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Start ``crmbridge serve``; return the seconds until it first answered that it is healthy."""
        words = [sys.executable, "-m", "crmbridge", "serve", "--config", str(self.bridge.folder / "crmbridge.ini")]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("CRMBRIDGE_")}
        with self.bridge.log_path.open("ab") as log:
            began = time.monotonic()
            self._process = subprocess.Popen(words, cwd=_ROOT, env=environ, stderr=log)
        while time.monotonic() < began + _START_S and self._process.poll() is None:
            with contextlib.suppress(ConnectionError):
                self._ask("GET", "/health")
                return time.monotonic() - began
            time.sleep(0.002)
        raise SystemExit(f"the bridge did not start; its log:\n{self.bridge.log_path.read_text()}")

    def stop(self) -> None:
        """Stop the bridge."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def end_sandbox(self) -> None:
        """End the sandbox, so that it neither shares the bridge's pages nor takes its time."""
        self._sandbox.terminate()
        self._sandbox.join()

    def arrivals(self, number: int, wait_s: float = _WAIT_S) -> Arrivals:
        """Wait until that many came to the CRM and the Send API together, then a little for more than there should be.

        What came is forgotten.
        """
        deadline = time.monotonic() + wait_s
        self._pipe.send("count")
        while self._pipe.recv() < number and time.monotonic() < deadline:
            time.sleep(0.1)
            self._pipe.send("count")
        time.sleep(_QUIET_S)
        self._pipe.send("arrivals")
        found: Arrivals = self._pipe.recv()
        return found

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, key: str = "") -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"} if key else {}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_START_S)) as connection:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read()
        if answer.status >= 300:
            raise ConnectionError(f"{method} {path} answered {answer.status}: {text.decode()}")
        found: dict[str, Any] = json.loads(text)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | types.TracebackType | None) -> None:
        self.stop()
        self.end_sandbox()
