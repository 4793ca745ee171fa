"""What every figure stands on: a server started as a user would, and the sandbox in a process of its own."""

import contextlib
import http.client
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from bench import proc
from crmbridge.sandbox import Sandbox
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.sandbox.demo import ini

SHOPS = [str(17841400000000001 + number) for number in range(500)]
SHOP, NEIGHBOUR = SHOPS[:2]
ROOT = Path(__file__).resolve().parent.parent
_START_S, _WAIT_S, _QUIET_S = 20, 60, 1.5
_NAMED = 500


def customer(number: int) -> str:
    """Return the id of a customer; Instagram knows the names of the first 500."""
    return str(900_000_000_000_000 + number)


@dataclass(frozen=True)
class Version:
    """A version of crmbridge in a folder, and how its server is run: by which words, in which environment."""

    name: str = "this"
    root: Path = ROOT
    words: Sequence[str] = ("-m", "crmbridge")
    environ: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def roots(against: str | None) -> Iterator[dict[str, Path]]:
    """Yield where this version is, and that of a revision taken from Git; it runs in this Python, with its packages."""
    with tempfile.TemporaryDirectory(prefix="crmbridge-version-") as folder:
        found = {"this": ROOT}
        if against:
            files = subprocess.run(["git", "archive", against], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=files, check=True)
            found[against] = Path(folder)
            if (found[against] / "requirements.txt").read_bytes() != (ROOT / "requirements.txt").read_bytes():
                print(f"{against} asks for other packages than are installed here")
        yield found


def quick_syncs(folder: Path, us: int) -> dict[str, str]:
    """Return what a server's environment needs for a sync to take so long, whatever the disk does; empty without cc."""
    if shutil.which("cc") is None:
        return {}
    library = folder / "sync.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, ROOT / "bench" / "sync.c"], check=True)
    return {"LD_PRELOAD": str(library), "SYNC_US": str(us)}


def free_port() -> int:
    """Return a port that nobody listens on, below those that the kernel gives to outgoing connections."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as free,
        ):
            return int(free.getsockname()[1])


class Arrivals:
    """What was accepted by the CRM and the Send API: how often each event and text, and when a text came first.

    `last` is when anything came last; `lanes` has the texts of each customer's messages at the CRM with their
    sequence, as they came.
    """

    def __init__(self, came: list[tuple[str, str | None, float]], heard: list[dict[str, Any]]) -> None:
        self.lanes: dict[str, list[tuple[int, str]]] = {}
        for event in heard:
            if "sender_id" in event:
                self.lanes.setdefault(event["sender_id"], []).append((event["sequence"], event["message"]))
        self.events = Counter(event for event, _, _ in came)
        self.texts = Counter(text for _, text, _ in came if text)
        self.at = {text: at for _, text, at in reversed(came) if text}
        self.last = max((at for _, _, at in came), default=0.0)


def _sandbox(pipe: Connection, ahead_s: float) -> None:
    """Run the sandbox and tell over the pipe what arrived, at which time.monotonic()."""
    with contextlib.suppress(EOFError), Sandbox(clock=lambda: time.monotonic() + ahead_s) as sandbox:
        meta, crm = sandbox.meta, sandbox.crm
        for shop in SHOPS:
            meta.add_account(shop, token=f"IGAA-bench-{shop}", app_scoped_id="24" + shop[2:], username=f"shop_{shop}")
        for number in range(_NAMED):
            meta.add_customer(customer(number), username=f"customer_{number}")
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
    """A bridge with accounts, and its sandbox; `folder` holds the database."""

    def __init__(self, folder: Path, version: Version | None = None, *, shops: int = 1, settings: str = "") -> None:
        self.folder, self.version, self.log_path = folder, version or Version(), folder / "bridge.log"
        processes = multiprocessing.get_context("spawn")
        self._pipe, far_end = processes.Pipe()
        ahead_s = time.time() - time.monotonic()
        self._sandbox = processes.Process(target=_sandbox, args=(far_end, ahead_s), daemon=True)
        self._sandbox.start()
        far_end.close()
        plain, self.crm_webhook_url = self._pipe.recv()
        self.port = free_port()
        self._pipe.send(f"http://127.0.0.1:{self.port}/webhooks/instagram")
        self._ini = folder / "crmbridge.ini"
        self._ini.write_text(plain.replace("port = 0", f"port = {self.port}") + settings)
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("CRMBRIDGE_")}
        self._environ["PYTHONPATH"] = str(self.version.root)
        self._process: subprocess.Popen[bytes] | None = None
        self.command("init")
        self.start_s = self.start()
        self.key = self.command("key", "create", "--name", "bench", "--admin")
        self.accounts = {shop: self.connect(shop, self.crm_webhook_url) for shop in SHOPS[:shops]}
        self.account_id = self.accounts[SHOP]

    def command(self, *words: str) -> str:
        """Run one command of the command line and return what it printed."""
        given = [sys.executable, "-m", "crmbridge", *words, "--config", str(self._ini)]
        done = subprocess.run(
            given, cwd=self.version.root, env=self._environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"crmbridge {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def connect(self, shop: str, crm_webhook_url: str) -> str:
        """Connect an account that the sandbox knows; return its id."""
        asked = {"instagram_account_id": shop, "access_token": f"IGAA-bench-{shop}"}
        crm = {"crm_webhook_url": crm_webhook_url, "webhook_secret": WEBHOOK_SECRET}
        return str(self._ask("POST", "/api/v1/accounts", asked | crm, self.key)["account_id"])

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
        words = [sys.executable, *self.version.words, "serve", "--config", str(self._ini)]
        environ = self._environ | self.version.environ
        with self.log_path.open("ab") as log:
            began = time.monotonic()
            self._process = subprocess.Popen(
                words, cwd=self.version.root, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        while time.monotonic() < began + _START_S and self._process.poll() is None:
            with contextlib.suppress(ConnectionError):
                self._ask("GET", "/health")
                return time.monotonic() - began
            time.sleep(0.002)
        raise SystemExit(f"the bridge did not start; its log:\n{self.log_path.read_text()}")

    def counts(self) -> dict[str, dict[str, int]]:
        """Return what a server that counts has counted since it was last asked."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        found: dict[str, dict[str, int]] = json.loads(self._process.stdout.readline())
        return found

    def reading(self) -> proc.Reading:
        """Return the figures of the server's process."""
        return proc.Reading.of(self.pid, self._sandbox.pid or 0)

    def stop(self) -> None:
        """Stop the bridge."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def wait_for(self, number: int, wait_s: float = _WAIT_S) -> None:
        """Wait until that many came to the CRM and the Send API together, or for so long."""
        deadline = time.monotonic() + wait_s
        self._pipe.send("count")
        while self._pipe.recv() < number and time.monotonic() < deadline:
            time.sleep(0.05)
            self._pipe.send("count")

    def arrivals(self, number: int, wait_s: float = _WAIT_S) -> Arrivals:
        """Wait until that many came, then a little for more than there should be; what came is forgotten."""
        self.wait_for(number, wait_s)
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
        self._sandbox.terminate()
        self._sandbox.join()
