"""A sample CRM: receives the bridge's webhooks, checks their signature, replies through the bridge's API.

Its answers can be scripted. What it does with a webhook is what a CRM's developers have to do.
"""

import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bottle
import requests

from crmbridge import signing
from crmbridge.sandbox import server

WEBHOOK_SECRET = "sandbox-webhook-secret"
_SHOWN = 500


@dataclass(frozen=True, slots=True)
class Received:
    """One delivery as it came; `answered` is the status it got. `event` is empty when the body is no JSON object."""

    event: dict[str, Any]
    body: bytes
    headers: dict[str, str]
    verified: bool
    at: float
    path: str
    answered: int


@dataclass(slots=True)
class _Script:
    status: int
    times: int
    body: str
    headers: dict[str, str] | None
    delay_s: float
    event: str | None
    containing: str | None


class SampleCrm:
    """One CRM for any number of accounts; `secrets` may hold another webhook secret for a path."""

    def __init__(self, secret: str = WEBHOOK_SECRET, clock: Callable[[], float] = time.time) -> None:
        self.secret, self.clock = secret, clock
        self.secrets: dict[str, str] = {}
        self.bridge_url: str | None = None
        self.api_key: str | None = None
        self.account_id: str | None = None
        self.received: list[Received] = []
        self.replies: list[dict[str, Any]] = []
        self._scripts: list[_Script] = []
        self._always: _Script | None = None
        self._changed = threading.Condition(threading.RLock())
        self._closing = threading.Event()
        self.page_paths: tuple[str | None, str | None] = (None, "/sandbox")
        self.app = bottle.Bottle()
        for method, path, handler in (
            ("GET", "received", self._state),
            ("POST", "answers", self._script),
            ("POST", "replies", self._reply),
            ("PUT", "settings", self._configure),
            ("POST", "reset", self._reset),
        ):
            self.app.route(f"/sandbox/{path}", method, server.control(handler))
        self.app.route("/", "GET", lambda: server.page(*self.page_paths))
        self.app.route(["/webhook", "/webhook/<_:path>"], "POST", self._receive)

    def close(self) -> None:
        """Let no scripted delay hold an answer any longer."""
        self._closing.set()

    def answer(
        self,
        status: int = 200,
        *,
        times: int = 1,
        body: str = "",
        headers: dict[str, str] | None = None,
        delay_s: float = 0,
        event: str | None = None,
        containing: str | None = None,
    ) -> None:
        """Script the answers to the next verified deliveries, of one event or with a text in their body if named.

        The oldest script that fits goes first.
        """
        if times < 1 or not 200 <= status <= 599 or not 0 <= delay_s <= 3600:
            raise ValueError("an answer needs times >= 1, status 200..599 and delay_s >= 0")
        with self._changed:
            self._scripts.append(_Script(status, times, body, headers, delay_s, event, containing))

    def answer_always(
        self, status: int | None, *, body: str = "", headers: dict[str, str] | None = None, delay_s: float = 0
    ) -> None:
        """Answer everything that no script is left for in this way; None: 200 again."""
        if status is not None and not 200 <= status <= 599:
            raise ValueError("an answer needs a status 200..599")
        with self._changed:
            self._always = None if status is None else _Script(status, 1, body, headers, delay_s, None, None)

    def clear_answers(self) -> None:
        """Answer as usual again."""
        with self._changed:
            self._scripts.clear()
            self._always = None

    def wait(self, n: int, *, timeout_s: float = 60, where: Callable[[Received], bool] | None = None) -> list[Received]:
        """Wait until at least n deliveries match; return all that do."""

        def matching() -> list[Received]:
            return [one for one in self.received if where is None or where(one)]

        with self._changed:
            if not self._changed.wait_for(lambda: len(matching()) >= n, timeout_s):
                came = [one.event.get("event") for one in self.received]
                raise TimeoutError(f"{len(matching())} of {n} deliveries after {timeout_s} s; received: {came}")
            return matching()

    def reset(self) -> None:
        """Forget what was recorded and scripted."""
        with self._changed:
            self.received.clear()
            self.replies.clear()
            self.clear_answers()

    def reply(self, recipient_id: str, text: str) -> dict[str, Any]:
        """Send a text through the bridge; return its HTTP status (0: unreachable) and answer."""
        if not (self.bridge_url and self.api_key and self.account_id):
            raise ValueError("replying needs bridge_url, api_key and account_id to be set")
        order = {
            "account_id": self.account_id,
            "recipient_id": recipient_id,
            "message": text,
            "idempotency_key": secrets.token_hex(16),
        }
        headers = {"Authorization": f"Bearer {self.api_key}"}
        url = f"{self.bridge_url.rstrip('/')}/api/v1/messages/send"
        with requests.Session() as session:
            session.trust_env = False
            try:
                came = session.post(url, json=order, headers=headers, timeout=10, allow_redirects=False)
                status, answered = came.status_code, _object(came.content) or {"error": came.text[:200]}
            except requests.RequestException as problem:
                status, answered = 0, {"error": f"{type(problem).__name__}: {problem}"}
        reply = {"recipient_id": recipient_id, "text": text, "at": self.clock(), "http": status, "answer": answered}
        with self._changed:
            self.replies.append(reply)
        return reply

    def _receive(self, _: str = "") -> bottle.HTTPResponse:
        request = bottle.request
        body, path = request.body.read(), request.path
        header = request.get_header("X-Hub-Signature-256")
        verified = signing.hub_signature_matches([self.secrets.get(path, self.secret)], header, body)
        event = _object(body)
        script = self._next_script(event.get("event"), body.decode("utf-8", "replace")) if verified else None
        if script is not None:
            self._closing.wait(script.delay_s)
        status = 401 if not verified else 200 if script is None else script.status
        headers = {name.title(): value for name, value in request.headers.items()}
        with self._changed:
            self.received.append(Received(event, body, headers, verified, self.clock(), path, status))
            self._changed.notify_all()
        return server.answer(script.body if script else "", status, script.headers if script else None)

    def _next_script(self, event: str | None, body: str) -> _Script | None:
        with self._changed:
            fitting = (one for one in self._scripts if one.event in (None, event) and (one.containing or "") in body)
            script = next(fitting, None)
            if script is None:
                return self._always
            script.times -= 1
            if not script.times:
                self._scripts.remove(script)
            return script

    # The control API

    def _state(self) -> dict[str, Any]:
        """Show what came, from `?after=` on."""
        after = int(bottle.request.query.after or 0)
        with self._changed:
            came = list(itertools.islice(self.received, max(after, len(self.received) - _SHOWN), None))
            shown = [
                {"event": one.event, "verified": one.verified, "answered": one.answered, "at": one.at, "path": one.path}
                for one in came
            ]
            can_reply = bool(self.bridge_url and self.api_key and self.account_id)
            always = self._always.status if self._always else None
            return {
                "received": shown,
                "total": len(self.received),
                "replies": self.replies[-_SHOWN:],
                "can_reply": can_reply,
                "always": always,
            }

    def _script(self) -> dict[str, Any]:
        """Script answers; with `"always": true` for good, and then status null means 200 again."""
        given = server.read_object(
            optional=["status", "times", "body", "headers", "delay_s", "event", "containing", "always"]
        )
        if given.pop("always", False):
            self.answer_always(given.pop("status", None), **given)
        else:
            self.answer(**given)
        return {"scripted": True}

    def _reply(self) -> dict[str, Any]:
        return self.reply(**server.read_object(required=["recipient_id", "text"]))

    def _configure(self) -> dict[str, Any]:
        given = server.read_object(optional=["secret", "bridge_url", "api_key", "account_id"])
        for name, value in given.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} must be text")
            setattr(self, name, value)
        return {"bridge_url": self.bridge_url, "account_id": self.account_id}

    def _reset(self) -> dict[str, Any]:
        self.reset()
        return {"reset": True}


def _object(body: bytes) -> dict[str, Any]:
    """Read a JSON object; empty when the body is none."""
    try:
        given = json.loads(body)
    except ValueError:
        return {}
    return given if isinstance(given, dict) else {}
