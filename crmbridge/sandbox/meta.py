"""A local Meta: the part of the Graph API that crmbridge calls, and the webhooks that Meta would send it.

Instagram Login flavour. Everything is in memory; every answer can be scripted.
"""

import functools
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from typing import Any
from urllib.parse import urljoin

import bottle
import requests

from crmbridge.sandbox import cdn, graph, meta_control, server, wire

APP_SECRET = "sandbox-app-secret"
VERIFY_TOKEN = "sandbox-verify-token"
FIELDS = frozenset(
    """messages message_echoes message_reactions message_edit messaging_postbacks messaging_seen messaging_referral
    messaging_optins messaging_handover standby comments live_comments mentions""".split()  # noqa: SIM905
)
ECHO = ("after", "before", "never")
ME_FORM = ("flat", "data")
MEDIA = ("ok", *graph.MEDIA_FAULTS)
_WINDOW_S, _HUMAN_WINDOW_S = 86_400, 7 * 86_400
PROFILE = ("told", "no_consent", "fails")
TOKEN_LASTS_S, TOKEN_TOO_YOUNG_S = 5_184_000, 86_400
_RETRY_DELAYS_S = (0.05, 0.2, 0.5, 1.0)
_CONVERSATION = "aWdfZAG06"
_NEWEST = 20  # Meta gives details of no more
_WEBHOOK_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Posted:
    """What the bridge answered to a webhook; status 0: no answer, and `body` says why."""

    mid: str
    status: int
    body: str
    ms: float


@dataclass(frozen=True, slots=True)
class Sent:
    """One accepted call of the Send API; a sender action has no `mid` and an empty `message`."""

    user_id: str
    recipient_id: str
    text: str | None
    message: dict[str, Any]
    mid: str | None
    at: float
    body: bytes
    headers: dict[str, str]
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the Graph API, without its query; status 0: the connection was reset."""

    method: str
    path: str
    status: int
    at: float


@dataclass(slots=True)
class Account:
    """An Instagram professional account; `tokens` are those given out, and when. Empty them to invalidate them."""

    user_id: str
    app_scoped_id: str
    username: str
    tokens: dict[str, float]
    subscribed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Fault:
    path: str
    times: int
    status: int
    body: dict[str, Any] | str | None
    headers: dict[str, str] | None
    delay_s: float
    after_effect: bool
    drop: bool


@dataclass(slots=True)
class _Owed:
    """A webhook that a send brings about."""

    user_id: str
    item: dict[str, Any]
    delay_s: float
    done: threading.Event = field(default_factory=threading.Event)


class Meta:
    """Emulates Meta for one app; safe to use from any thread.

    `echo`, `echo_delay_s`, `auto_read`, `me_form`, `window` (refuse sends to who did nothing for 24 hours),
    `human_agent` (that tag is approved), `media` (what comes of fetching it), `profile` (whether names are told),
    `profile_delay_s` and `conversations_page` may be set at any time; `configure` checks them first.
    """

    webhook_body = staticmethod(wire.webhook_body)

    def __init__(
        self,
        callback_url: str | None = None,
        app_secret: str = APP_SECRET,
        verify_token: str = VERIFY_TOKEN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.callback_url, self.app_secret, self.verify_token, self.clock = (
            callback_url,
            app_secret,
            verify_token,
            clock,
        )
        self.echo: str = "after"
        self.echo_delay_s: float = 0.0
        self.auto_read: bool = False
        self.me_form: str = "flat"
        self.window: bool = False
        self.human_agent: bool = True
        self.media: str = "ok"
        self.profile: str = "told"
        self.profile_delay_s: float = 0.0
        self.conversations_page: int = 25
        self.accounts: dict[str, Account] = {}
        self.customers: dict[str, dict[str, str]] = {}
        self.sent: list[Sent] = []
        self.calls: list[Call] = []
        self.messages: list[dict[str, Any]] = []
        self.undelivered: list[dict[str, Any]] = []
        self._faults: list[_Fault] = []
        self._heard: dict[tuple[str, str], float] = {}
        self._open_until: dict[tuple[str, str], float] = {}
        self._answered: set[str] = set()
        self._owed = 0
        self._queue: queue.SimpleQueue[_Owed | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._changed = threading.Condition(threading.RLock())
        self._closing = threading.Event()
        self._local = threading.local()
        self.page_paths: tuple[str | None, str | None] = ("/sandbox", None)
        self.app = bottle.Bottle()
        self.app.route("/", "GET", lambda: server.page(*self.page_paths))
        meta_control.add_routes(self.app, self)
        cdn.add_routes(self.app)
        self.app.route("/<path:path>", ["GET", "POST", "DELETE"], self._graph)

    def close(self) -> None:
        """Stop the thread that posts echoes and receipts."""
        self._closing.set()
        self._queue.put(None)
        if self._worker is not None:
            self._worker.join(10)

    def add_account(
        self, user_id: str, *, token: str, app_scoped_id: str, username: str, token_age_s: float = TOKEN_TOO_YOUNG_S
    ) -> None:
        """Add an account, or replace the one with this id; `user_id` is what webhooks call it."""
        with self._changed:
            given_out = {token: self.clock() - token_age_s}
            self.accounts[user_id] = Account(user_id, app_scoped_id, username, given_out)

    def subscribe(self, user_id: str, fields: list[str]) -> None:
        """Set what an account is subscribed to; nothing, as Meta does when webhooks have failed for an hour."""
        self.accounts[user_id].subscribed = list(fields)

    def add_customer(self, igsid: str, *, username: str | None = None, name: str | None = None) -> None:
        """Make a customer's profile readable; `customer_says` does it by itself."""
        with self._changed:
            known = self.customers.get(igsid, {})
            self.customers[igsid] = {
                "username": username or known.get("username") or f"customer_{igsid[-4:]}",
                "name": name or known.get("name") or f"Customer {igsid[-4:]}",
            }

    def configure(self, **settings: Any) -> None:
        """Change settings; ValueError on an unknown name or a value that is none."""
        allowed: dict[str, Callable[[Any], bool]] = {
            "echo": lambda value: value in ECHO,
            "echo_delay_s": _is_duration,
            "auto_read": lambda value: isinstance(value, bool),
            "me_form": lambda value: value in ME_FORM,
            "window": lambda value: isinstance(value, bool),
            "human_agent": lambda value: isinstance(value, bool),
            "media": lambda value: value in MEDIA,
            "profile": lambda value: value in PROFILE,
            "profile_delay_s": _is_duration,
            "conversations_page": lambda value: isinstance(value, int) and 1 <= value <= 100,
            "callback_url": lambda value: value is None or str(value).startswith(("http://", "https://")),
        }
        for name, value in settings.items():
            if name not in allowed:
                raise ValueError(f"unknown setting {name!r}; there are: {', '.join(allowed)}")
            if not allowed[name](value):
                raise ValueError(f"{name} can't be {value!r}")
        for name, value in settings.items():
            setattr(self, name, value)

    def fault(
        self,
        path: str = "*",
        *,
        times: int = 1,
        status: int = 500,
        body: dict[str, Any] | str | None = None,
        headers: dict[str, str] | None = None,
        delay_s: float = 0,
        after_effect: bool = False,
        drop: bool = False,
    ) -> None:
        """Script the answers to the next calls whose path ends with `path`, ``*`` for any; the first script goes first.

        Without a body the answer is empty, not Meta's error object: see `wire.error_body`. With `after_effect` the call
        does what it should and then gets the scripted answer, or its own if the script is status 200 without a body;
        with `drop` the connection is reset instead of answered.
        """
        if not path.strip("/") or times < 1 or not 200 <= status <= 599 or not _is_duration(delay_s):
            raise ValueError("a fault needs a path, times >= 1, status 200..599 and delay_s >= 0")
        with self._changed:
            self._faults.append(
                _Fault("/" + path.strip("/"), times, status, body, headers, delay_s, after_effect, drop)
            )

    def clear_faults(self) -> None:
        """Answer as usual again."""
        with self._changed:
            self._faults.clear()

    def reset(self) -> None:
        """Forget what was recorded and scripted; settings, accounts and customers stay."""
        with self._changed:
            recorded: tuple[list[Any], ...] = (self.sent, self.calls, self.messages, self.undelivered, self._faults)
            for one in recorded:
                one.clear()

    # What Meta sends

    def customer_says(
        self,
        user_id: str,
        igsid: str,
        text: str | None = None,
        *,
        attachments: list[dict[str, Any]] | None = None,
        reply_to: str | dict[str, Any] | None = None,
        mid: str | None = None,
        timestamp_ms: int | None = None,
        told: str = "message",
    ) -> Posted:
        """Send a customer's message to the bridge; with a `mid` used before it is a repetition.

        `told` is how: as a `message`, as an `edit` with number 0 and no more than the mid, or `never`, so that only
        the conversation shows it.
        """
        if text is None and not attachments:
            raise ValueError("a message needs text or attachments")
        if told not in ("message", "edit", "never"):
            raise ValueError("told must be message, edit or never")
        at_ms = timestamp_ms or self.now_ms()
        mid = mid or wire.mint_mid(user_id, igsid, at_ms)
        message: dict[str, Any] = {"mid": mid}
        if text is not None:
            message["text"] = text
        if attachments:
            message["attachments"] = attachments
        if reply_to:
            message["reply_to"] = {"mid": reply_to, "is_self_reply": False} if isinstance(reply_to, str) else reply_to
        self._log(user_id, igsid, "customer", mid, message, at_ms)
        self.add_customer(igsid)  # who has written lets their profile be read
        self.customer_acted(user_id, igsid, at_ms)
        if told == "never":
            return Posted(mid, 0, "not told", 0)
        if told == "edit":
            return self._post_item(user_id, {"timestamp": at_ms, "message_edit": {"mid": mid, "num_edit": 0}})
        return self._post_item(user_id, _item(igsid, user_id, at_ms, "message", message))

    def customer_acted(self, user_id: str, igsid: str, at_ms: int, lasts_s: float = _WINDOW_S) -> None:
        """Open the window from an act of the customer on."""
        for known, time_s in ((self._heard, at_ms / 1000), (self._open_until, at_ms / 1000 + lasts_s)):
            known[user_id, igsid] = max(time_s, known.get((user_id, igsid), 0))

    def shop_says(self, user_id: str, igsid: str, text: str, *, told: bool = True) -> Posted:
        """Have the shop write in Instagram's own app, with or without the echo that tells it."""
        at_ms = self.now_ms()
        mid = wire.mint_mid(user_id, igsid, at_ms)
        self._log(user_id, igsid, "business", mid, {"text": text}, at_ms)
        echo = wire.echo_message(mid, {"text": text})
        return (
            self._post_item(user_id, _item(user_id, igsid, at_ms, "message", echo)) if told else Posted(mid, 0, "", 0)
        )

    def customer_reads(self, user_id: str, igsid: str, mid: str) -> Posted:
        """Send the receipt for a message of the business."""
        self._mark_read(user_id, igsid, mid)
        return self._post_item(user_id, _item(igsid, user_id, self.now_ms(), "read", {"mid": mid}))

    def post(
        self,
        payload: dict[str, Any] | list[Any] | bytes,
        *,
        secret: str | None = None,
        signature: str = "good",
        headers: Mapping[str, str] | None = None,
    ) -> Posted:
        """Send any payload, bytes as they are; `signature` is good, bad, missing or sha1_only."""
        body = payload if isinstance(payload, bytes) else wire.webhook_body(payload)
        signed = wire.signature_headers(self.app_secret if secret is None else secret, body, signature)
        sent = {"Content-Type": "application/json", "User-Agent": "Webhooks/1.0", **signed, **(headers or {})}
        return self._exchange(_first_mid(payload), "POST", data=body, headers=sent)

    def verify_handshake(self, *, verify_token: str | None = None, challenge: str | None = None) -> Posted:
        """Ask the bridge to prove that it knows the verify token; its answer's body should be the challenge."""
        challenge = challenge or str(secrets.randbelow(9 * 10**9) + 10**9)
        token = self.verify_token if verify_token is None else verify_token
        query = {"hub.mode": "subscribe", "hub.challenge": challenge, "hub.verify_token": token}
        return self._exchange("", "GET", params=query)

    def owner_asks(self, what: str, user_id: str, *, secret: str | None = None) -> Posted:
        """Have the owner of an account remove the app (``deauthorize``) or ask for ``deletion`` of the data.

        The callbacks are taken to lie beside the one for webhooks, under /privacy.
        """
        if what not in ("deauthorize", "deletion"):
            raise ValueError(f"an owner asks for deauthorize or deletion, not {what!r}")
        with self._changed:
            account = self.accounts[user_id]
            account.tokens.clear()
        secret = self.app_secret if secret is None else secret
        asked = wire.signed_request(secret, account.app_scoped_id, int(self.clock()))
        return self._exchange("", "POST", data={"signed_request": asked}, path=f"/privacy/{what}")

    def _exchange(self, mid: str, method: str, *, path: str | None = None, **arguments: Any) -> Posted:
        if self.callback_url is None:
            raise ValueError("no callback_url is set")
        url = self.callback_url if path is None else urljoin(self.callback_url, path)
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
        began = time.perf_counter()
        try:
            came = self._local.session.request(
                method, url, timeout=_WEBHOOK_TIMEOUT_S, allow_redirects=False, **arguments
            )
            status, body = came.status_code, came.text
        except requests.RequestException as problem:
            status, body = 0, f"{type(problem).__name__}: {problem}"
        return Posted(mid, status, body, (time.perf_counter() - began) * 1000)

    def _post_item(self, user_id: str, item: Mapping[str, Any]) -> Posted:
        return self.post(wire.envelope(user_id, self.now_ms(), item))

    # What a send brings about

    def flush(self, timeout_s: float = 60) -> None:
        """Wait until every echo and receipt of the sends so far has been posted or given up."""
        self._wait(lambda: not self._owed, timeout_s, lambda: f"{self._owed} webhooks are still owed")

    def wait_sent(self, n: int, timeout_s: float = 60) -> list[Sent]:
        """Wait until the Send API has accepted at least n calls; return all of them."""
        self._wait(lambda: len(self.sent) >= n, timeout_s, lambda: f"{len(self.sent)} of {n} sends came")
        with self._changed:
            return list(self.sent)

    def _wait(self, ready: Callable[[], bool], timeout_s: float, problem: Callable[[], str]) -> None:
        with self._changed:
            if not self._changed.wait_for(ready, timeout_s):
                raise TimeoutError(f"{problem()} after {timeout_s} s")

    def _owe(self, user_id: str, igsid: str, mid: str, at_ms: int, payload: Mapping[str, Any]) -> list[_Owed]:
        """Count what this send brings about; `_release` lets it go, in this order."""
        owed = []
        if self.echo != "never":
            message = wire.echo_message(mid, payload["message"])
            if "reply_to" in payload:
                message["reply_to"] = payload["reply_to"]
            owed.append(_Owed(user_id, _item(user_id, igsid, at_ms, "message", message), self.echo_delay_s))
        if self.auto_read:
            owed.append(_Owed(user_id, _item(igsid, user_id, at_ms, "read", {"mid": mid}), 0))
        if self.callback_url is None:
            owed = []
        with self._changed:
            self._owed += len(owed)
            if owed and self._worker is None:
                self._worker = threading.Thread(target=self._post_owed, name="sandbox webhooks", daemon=True)
                self._worker.start()
        return owed

    def _release(self, owed: Iterable[_Owed]) -> None:
        for one in owed:
            self._queue.put(one)

    def _post_owed(self) -> None:
        while (owed := self._queue.get()) is not None:
            self._closing.wait(owed.delay_s)
            if "read" in owed.item:
                owed.item["timestamp"] = self.now_ms()
                self._mark_read(owed.user_id, owed.item["sender"]["id"], owed.item["read"]["mid"])
            for delay_s in (*_RETRY_DELAYS_S, None):
                # Each repetition has a new entry time, as Meta's have.
                try:
                    posted = self._post_item(owed.user_id, owed.item)
                except ValueError as problem:
                    posted = Posted("", 0, str(problem), 0)
                if posted.status == 200:
                    break
                if delay_s is None or self._closing.wait(delay_s):
                    self.undelivered.append(asdict(posted) | {"item": owed.item})
                    break
            owed.done.set()
            with self._changed:
                self._owed -= 1
                self._changed.notify_all()

    def _log(self, user_id: str, igsid: str, author: str, mid: str, message: Mapping[str, Any], at_ms: int) -> None:
        with self._changed:
            self.messages.append(
                {"user_id": user_id, "igsid": igsid, "from": author, "mid": mid, "read": False, "at": at_ms / 1000}
                | {"text": message.get("text"), "attachments": wire.attachments_of(message)}
                | {"reply_to": message.get("reply_to")}
            )

    def _mark_read(self, user_id: str, igsid: str, mid: str) -> None:
        with self._changed:
            thread = [one for one in self.messages if (one["user_id"], one["igsid"]) == (user_id, igsid)]
            upto = next((place for place, one in enumerate(thread) if one["mid"] == mid), -1)
            for one in thread[: upto + 1]:
                one["read"] = True

    def now_ms(self) -> int:
        return int(self.clock() * 1000)

    # The Graph API

    def _graph(self, path: str) -> bottle.HTTPResponse:
        request = bottle.request
        path = "/" + path
        bare = re.sub(r"^/v\d+\.\d+(?=/)", "", path).rstrip("/")
        fault = self._take_fault(bare)
        late: list[_Owed] = []
        try:
            result, late = self._result(request.method, bare, fault)
        except graph.GraphError as problem:
            result, fault = server.answer(problem.body, problem.status), None
        if "Date" not in result.headers:  # a fault may tell another time
            result.set_header("Date", formatdate(self.clock(), usegmt=True))
        dropped = fault is not None and fault.drop
        with self._changed:
            self.calls.append(Call(request.method, path, 0 if dropped else result.status_code, self.clock()))
        if dropped:
            server.tear(request.environ)
        if late:
            result.set_header("Content-Length", str(len(result.body)))
            result.body = _Then(result.body, functools.partial(self._release, late))
        return result

    def _result(self, method: str, path: str, fault: _Fault | None) -> tuple[bottle.HTTPResponse, list[_Owed]]:
        """Do what was asked; return the answer and the webhooks that must follow it, not precede it."""
        if fault is not None and not fault.after_effect:
            self._closing.wait(fault.delay_s)
            return server.answer(fault.body, fault.status, fault.headers), []
        body, owed = self._call(method, path)
        early = owed if fault is not None else owed[: int(self.echo == "before")]
        self._release(early)
        if early and self.echo == "before":
            early[0].done.wait(_WEBHOOK_TIMEOUT_S)
        if fault is not None:
            self._closing.wait(fault.delay_s)
            if fault.status != 200 or fault.body is not None:
                return server.answer(fault.body, fault.status, fault.headers), []
        return server.answer(body), owed[len(early) :]

    def _take_fault(self, path: str) -> _Fault | None:
        with self._changed:
            fault = next((one for one in self._faults if one.path == "/*" or path.endswith(one.path)), None)
            if fault is not None:
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
            return fault

    def _call(self, method: str, path: str) -> tuple[dict[str, Any], list[_Owed]]:
        account = self._authenticated()
        head, _, edge = path.strip("/").partition("/")
        own = head in ("me", account.user_id, account.app_scoped_id)
        match method, edge:
            case "GET", "" if head == "refresh_access_token":
                return self._refresh(account), []
            case "GET", "" if own:
                return self._me(account), []
            case "GET", "conversations" if own:
                return self._conversations(account), []
            case "GET", "" if head.startswith(_CONVERSATION):
                return self._conversation(account, head), []
            case "GET", "" if any(one["mid"] == head for one in self.messages):
                return self._message(account, head), []
            case "GET", "" if head.isdigit():
                return self._profile(head), []
            case "POST", "messages" if own:
                return self._send(account)
            case (("GET" | "POST" | "DELETE"), "subscribed_apps") if own:
                return self._subscription(account, method), []
        raise graph.GraphError(
            100,
            f"Unsupported {method.lower()} request. Object with ID '{head}' does not exist, cannot be loaded due to"
            " missing permissions, or does not support this operation",
            subcode=33,
        )

    def _authenticated(self) -> Account:
        header = bottle.request.get_header("Authorization", "")
        token = header.removeprefix("Bearer ") if header.startswith("Bearer ") else bottle.request.query.access_token
        with self._changed:
            for account in self.accounts.values():
                if token in account.tokens:
                    if self.clock() - account.tokens[token] > TOKEN_LASTS_S:
                        said = "Error validating access token: Session has expired"
                        raise graph.GraphError(190, said, subcode=463, type="OAuthException")
                    return account
        raise graph.GraphError(190, "Invalid OAuth access token - Cannot parse access token", type="OAuthException")

    def _me(self, account: Account) -> dict[str, Any]:
        known = {
            "user_id": account.user_id,
            "username": account.username,
            "id": account.app_scoped_id,
            "name": account.username,
            "account_type": "BUSINESS",
        }
        chosen = graph.chosen(known, "profile_picture_url followers_count follows_count media_count biography")
        return chosen if self.me_form == "flat" else {"data": [chosen]}

    def _profile(self, igsid: str) -> dict[str, Any]:
        self._closing.wait(self.profile_delay_s)
        if self.profile == "fails":
            raise graph.GraphError(2, "An unexpected error has occurred. Please retry", 500, is_transient=True)
        if igsid not in self.customers or self.profile == "no_consent":
            raise graph.GraphError(230, "User consent is required to access user profile")
        also = "profile_pic follower_count is_user_follow_business is_business_follow_user is_verified_user"
        return graph.chosen({**self.customers[igsid], "id": igsid}, also)

    def _conversations(self, account: Account) -> dict[str, Any]:
        query = bottle.request.query
        with self._changed:
            latest = {one["igsid"]: one["at"] for one in self.messages if one["user_id"] == account.user_id}
        found = [
            {"id": _CONVERSATION + igsid, "updated_time": wire.iso_time(at)}
            for igsid, at in sorted(latest.items(), key=lambda entry: -entry[1])
            if query.user_id in ("", igsid)
        ]
        size = min(int(query.limit or 25), self.conversations_page)
        begin = int(query.after.removeprefix("after") or 0)
        page: dict[str, Any] = {"data": found[begin : begin + size]}
        if begin + size < len(found):
            cursor = f"after{begin + size}"
            page |= {"paging": {"cursors": {"after": cursor}, "next": f"{bottle.request.url}&after={cursor}"}}
        return page

    def _conversation(self, account: Account, name: str) -> dict[str, Any]:
        igsid = name.removeprefix(_CONVERSATION)
        newest = [graph.shown(one) for one in reversed(self._thread(account, igsid)[-_NEWEST:])]
        return {"messages": {"data": newest}, "id": name}

    def _message(self, account: Account, mid: str) -> dict[str, Any]:
        with self._changed:
            found = next(one for one in self.messages if one["mid"] == mid)
        if found not in self._thread(account, found["igsid"])[-_NEWEST:]:
            raise graph.GraphError(100, "The message has been deleted or is too old", subcode=33)
        return graph.shown(found)

    def _thread(self, account: Account, igsid: str) -> list[dict[str, Any]]:
        with self._changed:
            return [one for one in self.messages if (one["user_id"], one["igsid"]) == (account.user_id, igsid)]

    def _refresh(self, account: Account) -> dict[str, Any]:
        query = bottle.request.query
        if query.grant_type != "ig_refresh_token":
            raise graph.GraphError(100, "Invalid grant_type")
        given_out = account.tokens.get(query.access_token)
        if given_out is None or self.clock() - given_out < TOKEN_TOO_YOUNG_S:
            raise graph.GraphError(100, "The access token cannot be refreshed: it is less than 24 hours old")
        fresh = "IGAA" + secrets.token_hex(40)
        account.tokens[fresh] = self.clock()
        return {"access_token": fresh, "token_type": "bearer", "expires_in": TOKEN_LASTS_S}

    def _subscription(self, account: Account, method: str) -> dict[str, Any]:
        if method == "GET":
            app = {"id": "100000000000001", "name": "sandbox", "subscribed_fields": list(account.subscribed)}
            return {"data": [app] if account.subscribed else []}
        if method == "DELETE":
            account.subscribed = []
            return {"success": True}
        given: Any = bottle.request.query.subscribed_fields or bottle.request.forms.get("subscribed_fields")
        if not given:
            given = graph.json_body().get("subscribed_fields")
        fields = given.split(",") if isinstance(given, str) else given
        if not isinstance(fields, list) or not fields or not FIELDS.issuperset(fields):
            raise graph.GraphError(100, "Param subscribed_fields must be one of {" + ", ".join(sorted(FIELDS)) + "}")
        account.subscribed = fields
        return {"success": True}

    def _send(self, account: Account) -> tuple[dict[str, Any], list[_Owed]]:
        payload = graph.json_body()
        igsid = graph.recipient(payload)
        message = {} if graph.is_action(payload) else graph.message(payload, self.media)
        self._check_window(account, payload, igsid)
        at_ms = self.now_ms()
        mid = wire.mint_mid(account.user_id, igsid, at_ms) if message else None
        shown = {name: value for name, value in bottle.request.headers.items() if name.lower() != "authorization"}
        body = bottle.request.body.read()
        sent = Sent(account.user_id, igsid, message.get("text"), message, mid, self.clock(), body, shown, payload)
        with self._changed:
            self.sent.append(sent)
            self._changed.notify_all()
            if mid is None:
                return {"recipient_id": igsid}, []
            self._log(account.user_id, igsid, "business", mid, message, at_ms)
            owed = self._owe(account.user_id, igsid, mid, at_ms, payload)
        return {"recipient_id": igsid, "message_id": mid}, owed

    def _check_window(self, account: Account, payload: dict[str, Any], igsid: str) -> None:
        """Refuse a send that comes too late; a comment opens one private reply."""
        tag, comment = graph.tag(payload, self.human_agent), graph.comment(payload)
        if comment is not None:
            with self._changed:
                if comment in self._answered:
                    raise graph.GraphError(10900, "This comment has already been replied to")
                self._answered.add(comment)
        elif self.window and igsid not in (account.user_id, account.app_scoped_id):
            lane = account.user_id, igsid
            lasts_s = _HUMAN_WINDOW_S if tag else _WINDOW_S
            usual_s = self._heard.get(lane, -_HUMAN_WINDOW_S) + lasts_s
            if self.clock() >= max(usual_s, self._open_until.get(lane, 0)):
                problem = "(#10) This message is sent outside of allowed window."
                raise graph.GraphError(10, problem, 403, subcode=2534022)


class _Then:
    """An answer's body that does something once it has been sent."""

    def __init__(self, body: bytes, then: Callable[[], None]) -> None:
        self._body, self.close = body, then

    def __iter__(self) -> Iterator[bytes]:
        return iter((self._body,))


def _item(sender: str, recipient: str, at_ms: int, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"sender": {"id": sender}, "recipient": {"id": recipient}, "timestamp": at_ms, kind: content}


def _first_mid(payload: object) -> str:
    """Find the first message id in a payload, else the empty text."""
    found = re.search(rb'"mid":"([^"]*)"', payload if isinstance(payload, bytes) else wire.webhook_body(payload))
    return found[1].decode() if found else ""


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 3600
