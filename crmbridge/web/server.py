"""Waitress as this server wants it: bounded, quiet, and answering in JSON even where no application runs."""

import json
import time
from typing import Any

import waitress.channel
import waitress.server
import waitress.task

from crmbridge.config import Web
from crmbridge.events import instant, new_id
from crmbridge.web.app import App

_BODY_BYTES = 12 * 1024 * 1024
_CONNECTIONS = 500
_WAITING_PER_THREAD = 16
_SLUGS = {413: "body_too_large", 431: "headers_too_large", 501: "not_implemented"}


class _JsonError(waitress.task.ErrorTask):  # type: ignore[misc]
    """What Waitress itself refuses: requests it cannot parse, or that are far too large."""

    def execute(self) -> None:
        error = self.request.error
        correlation = new_id("req")
        body = json.dumps(
            {
                "error": _SLUGS.get(error.code, "invalid_request"),
                "message": f"{error.reason}: the request cannot be read.",
                "details": [],
                "correlation_id": correlation,
                "timestamp": instant(time.time()),
            }
        ).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Correlation-Id", correlation)]
        self.content_length = len(body)
        self.set_close_on_finish()
        self.write(body)


class _Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    error_task_class = _JsonError


class Server:
    """The listening server. `run` serves until `stop` is called, from a signal handler for instance."""

    def __init__(self, app: App, settings: Web) -> None:
        proxy: dict[str, Any] = {}
        if settings.trusted_proxy:
            proxy = {
                "trusted_proxy": settings.trusted_proxy,
                "trusted_proxy_count": 1,
                "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"},
            }
        self._server = waitress.server.create_server(
            app,
            host=settings.host,
            port=settings.port,
            threads=settings.threads,
            connection_limit=_CONNECTIONS,
            max_request_body_size=_BODY_BYTES,
            asyncore_use_poll=True,
            channel_timeout=60,
            clear_untrusted_proxy_headers=True,
            ident="crmbridge",
            **proxy,
        )
        listeners = [self._server, *getattr(self._server, "map", {}).values()]
        for listener in listeners:
            if isinstance(listener, waitress.server.BaseWSGIServer):
                listener.channel_class = _Channel
        most = settings.threads * _WAITING_PER_THREAD
        app.busy = lambda: len(self._server.task_dispatcher.queue) > most
        self._host = settings.host

    @property
    def url(self) -> str:
        """The address that is listened on."""
        port = getattr(self._server, "effective_port", None) or self._server.effective_listen[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}"

    def run(self) -> None:
        """Serve in this thread until SystemExit or KeyboardInterrupt is raised in it; requests in work are finished."""
        self._server.run()

    def close(self) -> None:
        """Close the listening socket."""
        self._server.close()
