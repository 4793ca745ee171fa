"""The WSGI application: request ids, keys, limits, and every error as JSON. Routes come as data."""

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload
from urllib.parse import parse_qsl

import bottle

from crmbridge import contract, log
from crmbridge.alerts import Alarm
from crmbridge.errors import (
    BridgeError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    TooLarge,
    TooMany,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
)
from crmbridge.events import CORRELATION_ID, instant, new_id
from crmbridge.store import accounts
from crmbridge.store.database import Database, Row
from crmbridge.web.callers import Refusals
from crmbridge.web.keyring import REFUSED, Keyring

BODY_BYTES = 256 * 1024
SLOW_S = 1.0
_LARGE_AT_ONCE = 2
_PAGE, _PAGE_MOST = 50, 200
REFUSAL = "crmbridge.refusal"  # in the environment: the error with which the server's door refused a request
_TOLD = "crmbridge.told"
_TIMED = 1000
Headers = dict[str, str]
_Request = TypeVar("_Request", bound=contract._Request)
_STATUS: tuple[tuple[type[BridgeError], int], ...] = (
    (TooLarge, 413),
    (UnsupportedMedia, 415),
    (Invalid, 400),
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (TooMany, 429),
    (Unavailable, 503),
)
# The body is in memory before a route runs; the application's own limits lie below this one.
bottle.BaseRequest.MEMFILE_MAX = 16 * 1024 * 1024


class _Headers:
    """A request's headers as WSGI has them: any byte is a character, so that none is an error."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._environ = environ

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: str) -> str: ...
    def get(self, name: str, default: str | None = None) -> str | None:
        key = name.upper().replace("-", "_")
        found: str | None = self._environ.get(key if key == "CONTENT_TYPE" else f"HTTP_{key}", default)
        return found


def _query(text: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(text, keep_blank_values=True, errors="strict"))
    except ValueError:
        raise Invalid("The query is not UTF-8 text.") from None


@dataclass(frozen=True)
class Reply:
    """An answer: a JSON object, or text or a file of another type."""

    content: Any
    status: int = 200
    headers: Headers = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One request, after its key was checked."""

    db: Database
    key: Row | None
    path: Mapping[str, str]
    query: Mapping[str, str]
    headers: "_Headers"
    body: bytes
    remote: str
    correlation_id: str
    now_s: float

    def read(self, model: type[_Request]) -> _Request:
        """Return the JSON body as a request of the contract. Raises Invalid or UnsupportedMedia."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in ("", "application/json"):
            raise UnsupportedMedia("The body must be JSON, sent with Content-Type: application/json.")
        return contract.read(model, self.body)

    def account(self, account_id: str) -> Row:
        """Return an account that the key is bound to. Raises Forbidden for another, NotFound for an admin's typo."""
        self.require(account_id)
        found = accounts.find(self.db, account_id)
        if found is None:
            raise NotFound("There is no such account.", code="account_not_found")
        return found

    def require(self, account_id: str) -> None:
        """Raise Forbidden unless the key is bound to an account, be it here or not."""
        assert self.key is not None  # noqa: S101
        if not self.key["admin"] and account_id not in self.key["accounts"]:
            raise Forbidden("This key is not bound to that account.", code="wrong_account")

    def key_id(self) -> str:
        """Return who asks, for the log and the notes."""
        assert self.key is not None  # noqa: S101
        return str(self.key["id"])

    def limit(self) -> int:
        """Return how many entries a page of a list may have. Raises Invalid."""
        given = self.query.get("limit", str(_PAGE))
        if not (given.isascii() and given.isdigit() and len(given) <= 3 and 1 <= int(given) <= _PAGE_MOST):
            detail = {"field": "limit", "problem": f"must be a whole number from 1 to {_PAGE_MOST}"}
            raise Invalid("limit is not a whole number in range.", details=[detail])
        return int(given)

    def may_see(self, account_id: str) -> bool:
        """Tell whether the key is bound to an account."""
        return self.key is not None and bool(self.key["admin"] or account_id in self.key["accounts"])


@dataclass(frozen=True)
class Route:
    """A method and path, its handler, and what a key must be allowed: None for an open route, or ``admin``."""

    method: str
    path: str
    handler: Callable[[Call], Reply]
    permission: str | None
    body_bytes: int = BODY_BYTES
    query: frozenset[str] | None = frozenset()  # the parameters it takes; None: anything


@dataclass(frozen=True)
class Asked:
    """What the headers of a request tell before its body is taken. `path` is text as WSGI has it."""

    method: str
    path: str
    authorization: str
    address: str
    has_body: bool
    body_bytes: int = 0  # 0, too, where that is not known before


class Timings:
    """How long this process took for its last requests."""

    def __init__(self) -> None:
        self._ms: deque[float] = deque(maxlen=_TIMED)
        self._count = self._slow = 0
        self._lock = threading.Lock()

    def note(self, ms: float) -> None:
        """Add a request."""
        with self._lock:
            self._ms.append(ms)
            self._count += 1
            self._slow += ms > SLOW_S * 1000

    def summary(self) -> dict[str, Any]:
        """Return how many requests there were, how many slow, and percentiles of the last thousand in ms."""
        with self._lock:
            ordered, count, slow = sorted(self._ms), self._count, self._slow
        places = {f"p{share}_ms": math.ceil(len(ordered) * share / 100) - 1 for share in (50, 95, 99)}
        return {"count": count, "slow": slow, **{name: ordered[at] if ordered else None for name, at in places.items()}}


class App:
    """Callable as WSGI, and asked by the server's door about each request before its body is taken.

    `busy` tells when requests wait faster than they are answered.
    """

    def __init__(
        self,
        db: Database,
        routes: Sequence[Route],
        *,
        alarm: Alarm,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        busy: Callable[[], bool] = lambda: False,
        timings: "Timings | None" = None,
    ) -> None:
        self.routes = tuple(routes)
        self.busy = busy
        self.timings = timings or Timings()
        self.db = db
        self._alarm = alarm
        self._clock = clock
        self._keys = Keyring(db, clock, steady)
        self._refusals = Refusals(steady)
        self._large_bodies = threading.Semaphore(_LARGE_AT_ONCE)  # memory for no more than these
        self._bottle = bottle.Bottle()
        self._bottle.default_error_handler = self._unrouted
        self._served: dict[Callable[..., Any], Route] = {}
        for route in routes:
            handler = self._handler(route)
            self._served[handler] = route
            self._bottle.route(route.path, route.method, handler)

    def admit(self, asked: Asked) -> int | Future[bool]:
        """Return how many bytes of body a request may have, or what it has to wait for; then ask again.

        Raises the error to answer with instead of taking the body. Does not block.
        """
        try:
            route = self._route(asked.method, asked.path)
        except bottle.HTTPError:  # no such path, or not by this method; the answer is the router's
            if asked.has_body:
                raise NotFound("There is nothing at this path.") from None
            return 0
        if route.permission and (asked.has_body or self._keys.is_new(asked.authorization)):
            try:
                found = self._keys.find(asked.authorization, asked.address)
                if isinstance(found, Future):
                    return found
                _allow(route, found)
            except BridgeError:
                raise
            except Exception:
                return route.body_bytes  # the handler meets it again, and tells of it
        _fit(route, asked.body_bytes)
        return route.body_bytes

    def look(self, *, last: bool = False) -> None:
        """Write the log lines that are due by now, or left at the `last` look; to be called every few seconds."""
        self._refusals.tell(every=last)

    def _route(self, method: str, path: str) -> Route:
        known = self._known(method, _decoded(path))
        target, _ = self._bottle.router.match({"REQUEST_METHOD": method, "PATH_INFO": known})
        return self._served[target.callback]

    def _known(self, method: str, path: str) -> str:
        """Return the path without the slash at its end where only that leads to a route."""
        if path.endswith("/") and path != "/":
            try:
                self._bottle.router.match({"REQUEST_METHOD": method, "PATH_INFO": path})
            except bottle.HTTPError as error:
                return path[:-1] if error.status_code == 404 else path
        return path

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = environ.get("HTTP_X_REQUEST_ID", "")
        correlation = given if CORRELATION_ID.match(given) else new_id("req")
        started = time.monotonic()
        answered: list[str] = []

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            answered.append(status[:3])
            return start_response(status, [*headers, ("X-Correlation-Id", correlation)], exc_info)

        path = _decoded(environ.get("PATH_INFO", ""))
        if self._known(environ["REQUEST_METHOD"], path) != path:
            environ["PATH_INFO"] = environ["PATH_INFO"][:-1]
        with log.correlated(correlation):
            body: Iterable[bytes] = self._bottle(environ, start)
            elapsed_s = time.monotonic() - started
            facts = {
                "method": environ["REQUEST_METHOD"][:16],
                "path": path[:200],
                "status": answered[-1] if answered else None,
                "ms": round(elapsed_s * 1000, 1),
            }
            self.timings.note(facts["ms"])
            told = environ.get(_TOLD, {})
            is_probe = path.startswith("/health") and facts["status"] == "200"
            is_repeated = told.get("code") in REFUSED and not self._refusals.is_first(told["remote"])
            (log.debug if is_probe or is_repeated else log.info)("request", **facts, **told)
            if elapsed_s > SLOW_S:
                log.warning("performance.request_slow", **facts)
        return body

    def _handler(self, route: Route) -> Callable[..., Any]:
        def handle(**path: str) -> Any:
            try:
                if (refusal := bottle.request.environ.get(REFUSAL)) is not None:
                    raise refusal
                large = bottle.request.content_length > BODY_BYTES
                with self._large_bodies if large else contextlib.nullcontext():
                    return self._render(route.handler(self._call(route, path)))
            except BridgeError as error:
                return self._error(error)
            except Exception:
                log.exception("request.fault", method=route.method, route=route.path)
                self._alarm.alert("request_fault", f"the request {route.method} {route.path} failed")
                return self._error(BridgeError("The bridge failed; the log tells more.", code="internal_error"))

        return handle

    def _call(self, route: Route, path: Mapping[str, str]) -> Call:
        request = bottle.request
        headers = _Headers(request.environ)
        remote = request.environ.get("REMOTE_ADDR", "")
        key = self._keys.require(headers.get("Authorization", ""), remote) if route.permission else None
        if key is not None:
            _allow(route, key)
        # A signed request of Meta is never turned away, and health must be told; neither carries a key.
        if key is not None and self.busy():
            raise Unavailable("More requests are waiting than are being answered.", code="overloaded")
        query = _query(request.query_string)
        unknown = set(query) - route.query if route.query is not None else set()
        if unknown:
            details = [
                {"field": name[:64], "problem": "is not a parameter of this request"} for name in sorted(unknown)
            ]
            raise Invalid("The request has unknown query parameters.", details=details)
        _fit(route, request.content_length)
        return Call(
            db=self.db,
            key=key,
            path=path,
            query=query,
            headers=headers,
            body=request.environ["wsgi.input"].read(request.content_length) if request.content_length > 0 else b"",
            remote=remote,
            correlation_id=log.correlation_id(),
            now_s=self._clock(),
        )

    def _render(self, reply: Reply) -> Any:
        if isinstance(reply.content, bottle.HTTPResponse):
            for name, value in reply.headers.items():
                reply.content.set_header(name, value)
            return reply.content
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store", **reply.headers}
        content = reply.content
        if not isinstance(content, str):
            content = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return bottle.HTTPResponse(content.encode(), reply.status, **headers)

    def _error(self, error: BridgeError) -> Any:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        headers: Headers = {}
        if status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="crmbridge"'
        if isinstance(error, Unavailable):
            headers["Retry-After"] = str(error.after_s)
        if status >= 500:
            log.error("request.failed", status=status, code=error.code, error=error.message)
        else:  # told in the request's own line
            fields = ",".join(entry["field"] for entry in error.details[:10])
            remote = bottle.request.environ.get("REMOTE_ADDR", "") if status in (401, 429) else None
            bottle.request.environ[_TOLD] = {"code": error.code, "fields": fields or None, "remote": remote}
        return self._render(Reply(self._described(error.code, error.message, error.details), status, headers))

    def _described(self, code: str, message: str, details: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "error": code,
            "message": message,
            "details": details,
            "correlation_id": log.correlation_id(),
            "timestamp": instant(self._clock()),
        }

    def _unrouted(self, answer: Any) -> bytes:
        """Answer what reached no handler: no such path, or a method that the path does not take."""
        code, message = {
            404: ("not_found", "There is nothing at this path."),
            405: ("method_not_allowed", "This path does not take that method."),
        }.get(answer.status_code, ("invalid_request", "The request cannot be read."))
        if answer.status_code >= 500:
            log.error("request.failed", status=answer.status_code)
            self._alarm.alert("request_fault", "a request failed outside its handler")
            code, message = "internal_error", "The bridge failed; the log tells more."
        bottle.response.content_type = "application/json"
        return json.dumps(self._described(code, message, []), ensure_ascii=False).encode()


def _decoded(path: str) -> str:
    """Return a path of WSGI, one character a byte, as the text that Bottle matches."""
    return path.encode("latin-1").decode("utf-8", "ignore")


def _allow(route: Route, key: Row) -> None:
    if not key["admin"] and route.permission not in key["permissions"]:
        raise Forbidden(f"This key lacks the permission {route.permission}.", code="permission_missing")


def _fit(route: Route, body_bytes: int) -> None:
    if body_bytes > route.body_bytes:
        raise TooLarge(f"The body has {body_bytes} bytes; this route takes {route.body_bytes}.")
