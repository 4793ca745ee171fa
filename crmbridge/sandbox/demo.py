"""``crmbridge demo``: the bridge as a process of its own, the sandbox around it, and one round trip told hop by hop."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import requests

from crmbridge import terminal
from crmbridge.sandbox import Sandbox
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.sandbox.meta import APP_SECRET, VERIFY_TOKEN

_SHOP, _SHOP_SCOPED, _CUSTOMER = "17841400000000001", "24000000000000001", "900000000000001"
_TOKEN = "IGAA-sandbox-token"
_WAIT_S = 60
_READY = re.compile(r"serve\.ready url=(\S+)")
_PORT = """[web]
port = 0
"""
_INI = f"""
{_PORT}[instagram]
graph_url = {{graph_url}}
app_secrets = {{app_secret}}
verify_token = {{verify_token}}
[crm]
allow_http = true
allow_networks = 127.0.0.0/8
"""


class HopFailed(Exception):
    """One step of the round trip did not happen."""


class Bridge:
    """A bridge in a folder of its own, started as a user would start it."""

    def __init__(self, folder: Path, ini: str) -> None:
        self.folder = folder
        self.log_path = folder / "bridge.log"
        self.url = ""
        (folder / "crmbridge.ini").write_text(ini)
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("CRMBRIDGE_")}
        root = str(Path(__file__).resolve().parent.parent.parent)
        self.environ["PYTHONPATH"] = root
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> str:
        """Run one command of the command line and return what it printed."""
        done = subprocess.run(self._words(words), env=self.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HopFailed(f"crmbridge {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start(self, *words: str) -> None:
        """Start ``crmbridge serve`` and wait until it listens."""
        with self.log_path.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(self._words(words or ("serve",)), env=self.environ, stderr=log)
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            found = _READY.search(self.log_path.read_bytes()[begin:].decode())
            if found:
                self.url = found[1]
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise HopFailed(f"the bridge did not start; its log:\n{self.log_path.read_text()}")

    @property
    def runs(self) -> bool:
        """Whether the server's process is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> int | None:
        """Ask the bridge to stop; return its exit status."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            return self._process.wait(_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _words(self, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "crmbridge", *words, "--config", str(self.folder / "crmbridge.ini")]


def ini(sandbox: Sandbox) -> str:
    """Return a configuration that talks to the sandbox alone."""
    return _INI.format(graph_url=sandbox.graph_url, app_secret=APP_SECRET, verify_token=VERIFY_TOKEN)


def alone(sandbox: Sandbox) -> str:
    """Give the sandbox its shop, and return what to type to lead a bridge and the chat page to it."""
    sandbox.meta.add_account(_SHOP, token=_TOKEN, app_scoped_id=_SHOP_SCOPED, username="your_shop")
    account = json.dumps(_account(sandbox), indent=2)
    callback_url = terminal.escaped(sandbox.meta.callback_url or "http://127.0.0.1:8080/")
    bridge = callback_url.partition("/webhooks")[0].rstrip("/")
    return f"""A local Instagram and a sample CRM; the chat page is at {sandbox.url}/

In the bridge's crmbridge.ini, under the sections that are there:
{ini(sandbox).replace(_PORT, "")}
With the bridge running, connect the shop (ADMIN is an admin key):
  curl -s {bridge}/api/v1/accounts -H "Authorization: Bearer $ADMIN" \\
    -H 'Content-Type: application/json' -d '{account}'

Let the chat page's reply box send (KEY is a key for that account):
  curl -s -X PUT {sandbox.url}/crm/sandbox/settings -H 'Content-Type: application/json' -d '{{
    "bridge_url": "{bridge}", "api_key": "'$KEY'", "account_id": "acc_…"}}'

Faults to rehearse: POST JSON to {sandbox.url}/sandbox/faults for Instagram,
  {{"path": "messages", "times": 2, "status": 500}}                                two answers of 500
  {{"path": "messages", "error": "10/2534022"}}                                    Meta's error with these codes
  {{"path": "messages", "error": "100/2534014"}}                                   nobody is this recipient
  {{"path": "messages", "delay_s": 40, "after_effect": true, "status": 200}}       delivers, then answers too late
  {{"path": "messages", "drop": true, "after_effect": true}}                       delivers, then breaks the connection
  {{"path": "messages", "drop": true}}                                             breaks it without delivering
  DELETE {sandbox.url}/sandbox/faults drops those that are left;
  POST {sandbox.url}/sandbox/reset drops all that was recorded, too
GET {sandbox.url}/sandbox/state shows what Instagram received ("sent"), its conversations ("messages") and calls
PUT JSON to {sandbox.url}/sandbox/settings for how Instagram takes sends,
  {{"auto_read": true}}              the customer reads each message at once
  {{"window": true}}                 refuses them 24 hours after the customer's last act, or before there was one
  {{"human_agent": false}}           has not approved the tag of a person's answer
  {{"media": "unreachable"}}         cannot fetch media; also timeout, rejected and too_large; ok as usual
POST JSON to {sandbox.url}/sandbox/privacy for what the account's owner asks Meta,
  {{"what": "deauthorize"}}    {{"what": "deletion"}}
PUT JSON to {sandbox.url}/sandbox/settings for what lasts,
  {{"profile": "no_consent"}}    {{"profile": "fails"}}    {{"profile_delay_s": 2}}    {{"conversations_page": 2}}
to {sandbox.url}/sandbox/accounts/{_SHOP}/subscription, to lose it,
  {{"fields": []}}                 and DELETE {sandbox.url}/sandbox/accounts/{_SHOP}/tokens to end its tokens,
POST JSON to {sandbox.url}/sandbox/accounts to make a new token, or another shop,
  {{"user_id": "{_SHOP}", "token": "IGAA-new", "username": "your_shop", "app_scoped_id": "{_SHOP_SCOPED}"}}
POST to {sandbox.url}/sandbox/customers/{_CUSTOMER}/messages what a customer writes (with "user_id" to another shop),
  {{"text": "hello"}}
what no webhook tells, for a backfill,
  {{"text": "hello", "told": "never"}}    {{"text": "hello", "told": "edit"}}      the latter only as an empty edit
  with "timestamp_ms" (milliseconds since 1970) the message is as old as you like, to rehearse the end of a window
to …/{_CUSTOMER}/replies what the shop writes in the app,
  {{"text": "hello", "told": false}}
and to {sandbox.url}/crm/sandbox/answers for the CRM,
  {{"status": 500, "times": 2}}    {{"status": 503, "always": true}}    {{"status": null, "always": true}}

Anything else that Instagram can say, by name (GET {sandbox.url}/sandbox/shapes lists them): as this customer,
  curl -s -X POST {sandbox.url}/sandbox/customers/{_CUSTOMER}/shapes/story_mention -d '{{}}'
  with "mid" for reaction, edit, unsend and reply, "times": 2 for a repetition,
  and "url" for its media: {sandbox.url}/cdn/ok, gone, expired, mistyped or slow?seconds=20

Ctrl-C ends it."""


def _account(sandbox: Sandbox) -> dict[str, str]:
    return {
        "instagram_account_id": _SHOP,
        "access_token": _TOKEN,
        "crm_webhook_url": sandbox.crm_webhook_url,
        "webhook_secret": WEBHOOK_SECRET,
    }


def run(*, once: bool) -> int:
    """Show the round trip; then serve until Ctrl-C, or return 0 when `once` and every hop arrived, else 1."""
    with tempfile.TemporaryDirectory(prefix="crmbridge-demo-") as folder, Sandbox() as sandbox:
        bridge = Bridge(Path(folder), ini(sandbox))
        try:
            admin_key = _round_trip(bridge, sandbox)
            if once:
                return 0
            terminal.say(
                "",
                f"  API and Swagger UI   {bridge.url}/docs",
                f"  chat on both sides   {sandbox.url}/",
                f"  an admin API key     {admin_key}",
                f"  the bridge's log     {bridge.log_path}",
                "",
                "Type as the customer or as the shop on the chat page. Ctrl-C ends the demo.",
                at_once=True,
            )
            return _wait_for_end(bridge)
        except HopFailed as failure:
            terminal.complain("", *f"FAILED  {failure}".split("\n"))
            return 1
        finally:
            bridge.stop()


def _wait_for_end(bridge: Bridge) -> int:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        while not ended.wait(0.5):
            if not bridge.runs:
                raise HopFailed(f"the bridge ended; its log:\n{bridge.log_path.read_text()[-4000:]}")
    except KeyboardInterrupt:
        terminal.say("")
    return 0


def _round_trip(bridge: Bridge, sandbox: Sandbox) -> str:
    meta, crm = sandbox.meta, sandbox.crm
    meta.add_account(_SHOP, token=_TOKEN, app_scoped_id=_SHOP_SCOPED, username="your_shop")
    terminal.say("A bridge, a local Instagram and a sample CRM, all on this machine:", "")
    bridge.command("init")
    admin_key = bridge.command("key", "create", "--name", "demo-admin", "--admin")
    hop = _Hops()
    bridge.start()
    hop("bridge answers", lambda: _ask("GET", f"{bridge.url}/health", None)["status"])
    meta.callback_url = f"{bridge.url}/webhooks/instagram"
    hop("Meta verifies the webhook address", lambda: f"HTTP {_is(meta.verify_handshake().status, 200)}")
    account = hop(
        "account connected, token checked, subscribed",
        lambda: _ask(
            "POST",
            f"{bridge.url}/api/v1/accounts",
            admin_key,
            _account(sandbox),
        )["account_id"],
    )
    key = bridge.command("key", "create", "--name", "demo-crm", "--account", account)
    crm.bridge_url, crm.api_key, crm.account_id = bridge.url, key, account

    terminal.say("", "Instagram -> CRM")
    meta.auto_read = True
    hop.restart()
    posted = meta.customer_says(_SHOP, _CUSTOMER, "Hello! Is the blue lamp in stock? 💡")
    hop("signed webhook stored and acknowledged", lambda: f"HTTP {_is(posted.status, 200)}  {posted.mid[:24]}…")
    hop("message.received at the CRM, signature verified", lambda: _event(crm, "message.received"))

    terminal.say("", "CRM -> Instagram")
    hop.restart()
    message_id = hop(
        "reply accepted and stored",
        lambda: _ask(
            "POST",
            f"{bridge.url}/api/v1/messages/send",
            key,
            {
                "account_id": account,
                "recipient_id": _CUSTOMER,
                "message": "Yes, two are left. Shall I keep one for you?",
                "idempotency_key": secrets.token_hex(8),
            },
        )["message_id"],
    )
    hop("Instagram received it", lambda: f"{(meta.wait_sent(1, timeout_s=_WAIT_S)[0].mid or '')[:24]}…")
    for status in ("sent", "delivered", "read"):
        hop(f"message.{status} at the CRM, signature verified", lambda event=f"message.{status}": _event(crm, event))  # type: ignore[misc]
    history = _ask("GET", f"{bridge.url}/api/v1/messages/{message_id}/status", key)["status_history"]
    said = " -> ".join(step["status"] for step in history)
    hop("status in the API", lambda: _is(said, "pending -> sent -> delivered -> read"))
    terminal.say("", "Every hop arrived.")
    return admin_key


class _Hops:
    """Prints each hop with the milliseconds since the flow began."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def restart(self) -> None:
        self._began = time.monotonic()

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        try:
            found = step()
        except (TimeoutError, requests.RequestException) as error:
            raise HopFailed(f"{name}: {error}") from None
        terminal.say(f"  {(time.monotonic() - self._began) * 1000:7.0f} ms  {name:49} {found}", at_once=True)
        return found


def _event(crm: Any, event: str) -> str:
    received = crm.wait(1, timeout_s=_WAIT_S, where=lambda entry: entry.event.get("event") == event)[0]
    if not received.verified:
        raise HopFailed(f"{event} came with a wrong signature")
    return str(received.event["event_id"])


def _is(found: Any, wanted: Any) -> Any:
    if found != wanted:
        raise HopFailed(f"expected {wanted}, got {found}")
    return found


def _ask(method: str, url: str, key: str | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = requests.request(method, url, json=body, headers=headers, timeout=_WAIT_S)
    if answer.status_code >= 300:
        raise HopFailed(f"{method} {url} answered {answer.status_code}: {answer.text}")
    found: dict[str, Any] = answer.json()
    return found
