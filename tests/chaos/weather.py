"""A sandbox that misbehaves by a seed: a Meta and a CRM that fail in every way the bridge must live with.

What happens to a call depends on the seed, on what the call is about and on how often it came, and on the weather.
"""

import hashlib
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import bottle

from crmbridge import signing
from crmbridge.sandbox import Sandbox, server, wire
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.sandbox.meta import Account, Meta, Posted, _Fault, _Owed
from tests.chaos.history import CrmCall, History, Item, SendCall, Webhook

TIMEOUT_S = 2.0  # what the bridge is told to wait for either far side; a busy machine must not use it up
LATE_S = 2.6
_OWED = 12
_THREADS = 64  # a delayed answer must not hold up another call

# Chances in percent of what a call meets; what is left goes well.
CRM = {
    "calm": {"slow": 4, "500": 1, "reset": 1},
    "rough": {
        "500": 14, "503": 6, "limited": 2, "slow": 8, "reset": 5, "reset_after": 4, "timeout": 1, "timeout_after": 1,
    },
    "down": {"500": 40, "503": 40, "reset": 20},
}  # fmt: skip
META = {
    "calm": {"reset_after": 1, "transient": 1, "unavailable_after": 1},
    "rough": {
        "timeout_after": 4, "timeout": 3, "reset_after": 6, "reset": 5, "lost": 5, "lost_without": 2, "error_in_200": 4,
        "transient": 5, "transient_after": 5, "limited": 1, "unavailable": 4, "unavailable_after": 5,
    },
    "down": {"unavailable": 60, "unavailable_after": 10, "reset": 20, "transient": 2},
}  # fmt: skip
LOOK_UP = {"500": 5, "reset": 3, "slow": 5}
ECHO = {"before": 15, "late": 5, "never": 15}
_POISONED = 2  # percent of messages that the CRM cannot take until it was asked eight times
_POISON_TRIES = 8


@dataclass
class Weather:
    """How the far sides are doing; `clear` ends all faults."""

    seed: int
    crm: str = "calm"
    meta: str = "calm"
    clear: bool = False
    crm_table: dict[str, dict[str, int]] = field(default_factory=lambda: CRM)
    meta_table: dict[str, dict[str, int]] = field(default_factory=lambda: META)
    _counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def number(self, about: str) -> int:
        """Count how often something was asked."""
        with self._lock:
            self._counts[about] += 1
            return self._counts[about]

    def draw(self, chances: dict[str, int], *about: object) -> str:
        """Pick what happens, or `ok`."""
        if self.clear:
            return "ok"
        left = self.chance(*about) * 100
        for name, percent in chances.items():
            left -= percent
            if left < 0:
                return name
        return "ok"

    def chance(self, *about: object) -> float:
        """Return a number between 0 and 1 that belongs to this subject."""
        return random.Random(f"{self.seed} {about}").random()

    def turn(self, rng: random.Random) -> str:
        """Change the weather, and say how."""
        self.crm = rng.choice(("calm", "rough", "rough", "down"))
        self.meta = rng.choice(("calm", "rough", "rough", "rough", "down"))
        return f"weather: crm {self.crm}, meta {self.meta}"


class UnreliableMeta(Meta):
    """Meta with the weather's faults at the Send API; writes down every call and every webhook."""

    def __init__(self, weather: Weather, history: History) -> None:
        super().__init__()
        self._weather, self._history = weather, history
        self._mine = threading.local()

    def _graph(self, path: str) -> bottle.HTTPResponse:
        self._mine.call = None
        result = super()._graph(path)
        if self._mine.call is not None:
            self._mine.call.until = time.time()
        return result

    def _take_fault(self, path: str) -> _Fault | None:
        weather = self._weather
        if bottle.request.method == "POST" and path.endswith("/messages"):
            payload = json.loads(bottle.request.body.read())
            contact, text = payload["recipient"]["id"], payload["message"]["text"]
            about = (contact, text, weather.number(f"send {contact} {text}"))
            name = weather.draw(weather.meta_table[weather.meta], "send", *about)
            echo = weather.draw(ECHO, "echo", *about)
            self.echo = echo if echo in ("before", "never") else "after"
            self.echo_delay_s = 0.3 if echo == "late" else 0.0
            self._mine.call = self._history.add(SendCall(time.time(), 0, contact, text, name))
            return _send_fault(name, weather.chance("status", *about))
        if "/conversations" in path or path.startswith("/aWdf"):
            contact = bottle.request.query.user_id or path.removeprefix("/aWdfZAG06")
            name = weather.draw(LOOK_UP, "look", contact, weather.number(f"look {contact}"))
            self._mine.call = self._history.add(SendCall(time.time(), 0, contact, None, name))
            return {
                "500": _Fault("/", 1, 500, "", None, 0, False, False),
                "reset": _Fault("/", 1, 500, "", None, 0, False, True),
                "slow": _Fault("/", 1, 200, None, None, 0.3, True, False),
            }.get(name)
        return super()._take_fault(path)

    def _send(self, account: Account) -> tuple[dict[str, Any], list[_Owed]]:
        with self._changed:  # the history has the effects in their order
            answer, owed = super()._send(account)
            self._mine.call.mid, self._mine.call.position = answer.get("message_id"), len(self.sent)
        return answer, owed

    def post(self, payload: Any, **how: Any) -> Posted:
        """Post a webhook, and write down what came of it."""
        body = payload if isinstance(payload, bytes) else wire.webhook_body(payload)
        sent = json.loads(body)
        items = tuple(_item(item) for entry in sent["entry"] for item in entry["messaging"])
        batch = hashlib.sha256(json.dumps([entry["messaging"] for entry in sent["entry"]]).encode()).digest()
        fact = self._history.add(Webhook(time.time(), 0, items, 0, batch))
        posted = super().post(body, **how)
        fact.status, fact.until = posted.status, time.time()
        if posted.status == 200:
            self._history.owe(item.mid for item in items if item.kind == "message")
        return posted

    def owes(self) -> list[str]:
        """Say how many echoes and receipts still wait to be posted, if any do."""
        return [f"{self._owed} webhooks of Instagram"] if self._owed else []

    def is_behind(self) -> bool:
        """Tell whether many echoes and receipts still wait to be posted."""
        return self._owed > _OWED


def _item(item: dict[str, Any]) -> Item:
    if "read" in item:
        return Item("read", item["read"]["mid"], item["sender"]["id"], item["timestamp"])
    if item["message"].get("is_echo"):
        return Item("echo", item["message"]["mid"], item["recipient"]["id"], item["timestamp"])
    return Item("message", item["message"]["mid"], item["sender"]["id"], item["timestamp"])


def _send_fault(name: str, chance: float) -> _Fault | None:
    """Return what the sandbox does about a send; none of what happens without an effect has one later."""

    def fault(
        status: int,
        body: Any = "",
        *,
        headers: Any = None,
        delay_s: float = 0,
        effect: bool = False,
        drop: bool = False,
    ) -> _Fault:
        return _Fault("/", 1, status, body, headers, delay_s, effect, drop)

    odd = 500 if chance < 0.5 else 400
    return {
        "timeout_after": fault(200, None, delay_s=LATE_S, effect=True),
        "timeout": fault(503, delay_s=LATE_S),
        "reset_after": fault(200, None, effect=True, drop=True),
        "reset": fault(500, drop=True),
        "lost": fault(odd, wire.error_body(1, subcode=1357046), effect=True),
        "lost_without": fault(odd, wire.error_body(1, subcode=1357046)),
        "error_in_200": fault(200, wire.error_body(1), effect=chance < 0.7),
        "transient": fault(500, wire.error_body(2, is_transient=True)),
        "limited": fault(429, wire.error_body(613), headers={"Retry-After": "1"}),
        "transient_after": fault(500, wire.error_body(2), effect=True),
        "unavailable": fault(503),
        "unavailable_after": fault(504 if chance < 0.5 else 502, "<html>Bad Gateway</html>", effect=True),
    }.get(name)


class UnreliableCrm:
    """A CRM with the weather's faults; takes an event, or does not, and writes down which."""

    def __init__(self, weather: Weather, history: History) -> None:
        self._weather, self._history = weather, history
        self._closing = threading.Event()

    def close(self) -> None:
        """Let no delay hold an answer any longer."""
        self._closing.set()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO()
        event = json.loads(body)
        name = self._fault(event)
        call = self._history.add(_crm_call(event, body, environ, name))
        if name == "slow":
            self._closing.wait(0.05 + 0.25 * self._weather.chance("slow", event["event_id"]))
        elif name.startswith("timeout"):
            self._closing.wait(LATE_S)
        call.taken = call.genuine and name in ("ok", "slow", "reset_after", "timeout_after")
        if name.startswith("reset"):
            server.tear(environ)
        status = {"503": "503 Busy", "limited": "429 Too Many"}.get(name, "200 OK" if call.taken else "500 Broken")
        hint = [("Retry-After", "1")] if name == "limited" else []
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", "0"), *hint])
        call.until = time.time()
        call.heard = call.taken and name in ("ok", "slow") and call.until - call.at < 0.7 * TIMEOUT_S
        if call.heard:
            self._history.settle(call.subject)
        return [b""]

    def _fault(self, event: dict[str, Any]) -> str:
        weather = self._weather
        about = (event["event"], _subject(event), event.get("message"))
        number = weather.number(f"crm {about}")
        if not weather.clear and weather.chance("poison", *about) * 100 < _POISONED and number <= _POISON_TRIES:
            return "500"
        return weather.draw(weather.crm_table[weather.crm], "crm", *about, number)


def _subject(event: dict[str, Any]) -> str:
    received = event["event"] in ("message.received", "message.echo", "message.unsupported")
    return str(event["instagram_message_id"] if received else event["message_id"])


def _crm_call(event: dict[str, Any], body: bytes, environ: dict[str, Any], fault: str) -> CrmCall:
    signature = environ.get("HTTP_X_HUB_SIGNATURE_256")
    genuine = signing.hub_signature_matches([WEBHOOK_SECRET], signature, body)
    inbound = event["event"] == "message.received"
    return CrmCall(
        time.time(), 0, event["event"], event["event_id"], event["sequence"],
        str(event["sender_id"] if inbound else event["recipient_id"]), _subject(event),
        hashlib.sha256(body).hexdigest(), genuine and environ.get("HTTP_WEBHOOK_ID") == event["event_id"],
        fault, taken=False, heard=False,
    )  # fmt: skip


def unreliable(weather: Weather, history: History) -> tuple[Sandbox, UnreliableMeta]:
    """Return a sandbox whose Meta and CRM are the unreliable ones."""
    sandbox, meta, crm = Sandbox(), UnreliableMeta(weather, history), UnreliableCrm(weather, history)
    sandbox.meta.close()
    sandbox.meta = meta
    sandbox.crm.app = crm
    sandbox._server._server.task_dispatcher.set_thread_count(_THREADS)
    return sandbox, meta
