"""What both sandbox servers stand on: a loopback-only HTTP server, JSON in and out, a torn connection.

Knows neither Meta nor the CRM.
"""

import functools
import ipaddress
import json
import logging
import socket
import struct
import threading
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import bottle
import waitress.server
from waitress import wasyncore

_LINGER_OFF = struct.pack("ii", 1, 0)  # close() sends RST instead of FIN


class LoopbackServer:
    """A WSGI app behind Waitress in daemon threads; bound once constructed, answering once started.

    Refuses (ValueError) to bind anything but a loopback address, and refuses requests that a web page of another
    origin made the browser send.
    """

    def __init__(self, app: Callable[..., Any], host: str = "127.0.0.1", port: int = 0) -> None:
        address = "127.0.0.1" if host == "localhost" else host
        if not _is_loopback(address):
            raise ValueError(f"the sandbox binds loopback addresses only, not {host!r}")
        logging.getLogger("waitress").setLevel(logging.ERROR)
        self._sockets: dict[int, Any] = {}
        listen = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._server = waitress.server.create_server(
            _guard(app),
            map=self._sockets,
            listen=listen,
            threads=16,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=True,
        )
        self.url = f"http://{listen.rpartition(':')[0]}:{self._server.effective_port}"
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Begin to answer requests."""
        self._thread = threading.Thread(target=self._loop, name=f"sandbox {self.url}", daemon=True)
        self._thread.start()
        return self

    def _loop(self) -> None:
        while not self._stopping:
            wasyncore.loop(timeout=5, use_poll=True, map=self._sockets, count=1)

    def close(self) -> None:
        """Stop listening and close every connection; a second call does nothing."""
        if self._stopping:
            return
        self._stopping = True
        if self._thread is not None:
            self._server.pull_trigger()
            self._thread.join(10)
        self._server.task_dispatcher.shutdown(timeout=2)
        wasyncore.close_all(self._sockets)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: type[BaseException] | BaseException | types.TracebackType | None) -> None:
        self.close()


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _guard(app: Callable[..., Any]) -> Callable[..., Iterable[bytes]]:
    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        host, origin = environ.get("HTTP_HOST"), environ.get("HTTP_ORIGIN")
        if (host and not _is_loopback(urlsplit(f"//{host}").hostname)) or (origin and urlsplit(origin).netloc != host):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"the sandbox answers its own machine only\n"]
        answered: Iterable[bytes] = app(environ, start_response)
        return answered

    return guarded


def tear(environ: dict[str, Any]) -> None:
    """Reset the connection that a request came in on; whatever its handler returns is never sent."""
    channel = environ["waitress.client_disconnected"].__self__
    channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)
    channel.cancel()
    channel.server.pull_trigger()


def answer(body: object = None, status: int = 200, headers: dict[str, str] | None = None) -> bottle.HTTPResponse:
    """Build an answer: text as it is, None as an empty body, anything else as JSON."""
    if body is None or isinstance(body, str):
        content, kind = body or "", "text/plain; charset=utf-8"
        if content.lstrip()[:1] in ("{", "["):
            kind = "application/json"
        elif content.lstrip()[:1] == "<":
            kind = "text/html; charset=utf-8"
    else:
        content, kind = json.dumps(body), "application/json"
    return bottle.HTTPResponse(content.encode(), status, {"Content-Type": kind, **(headers or {})})


def control(handler: Callable[..., object]) -> Callable[..., bottle.HTTPResponse]:
    """Wrap a control handler: what it returns becomes JSON, a ValueError or TypeError a 400 that says why."""

    @functools.wraps(handler)
    def wrapped(**arguments: str) -> bottle.HTTPResponse:
        try:
            return answer(handler(**arguments))
        except (ValueError, TypeError) as problem:
            return answer({"error": str(problem)}, 400)

    return wrapped


def read_object(required: Iterable[str] = (), optional: Iterable[str] = ()) -> dict[str, Any]:
    """Read the request's body as a JSON object with these names; ValueError otherwise."""
    try:
        given = json.loads(bottle.request.body.read() or b"{}")
    except ValueError:
        raise ValueError("the body is not JSON") from None
    if not isinstance(given, dict):
        raise ValueError("the body must be a JSON object")
    if missing := set(required) - given.keys():
        raise ValueError(f"missing: {', '.join(sorted(missing))}")
    if unknown := given.keys() - set(required) - set(optional):
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    return given


def page(meta: str | None, crm: str | None) -> bottle.HTTPResponse:
    """Serve the two-pane page, told below which paths the control APIs of Meta and the CRM are."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return answer(html.replace("{/*paths*/}", json.dumps({"meta": meta, "crm": crm})))
