"""A local Meta and a sample CRM over real HTTP on loopback, for tests, demos and CRM developers without a Meta app.

Knows nothing of the server but its event values and signatures.
"""

import time
import types
from collections.abc import Callable, Iterable
from typing import Any, Self

from crmbridge.sandbox.crm import WEBHOOK_SECRET, SampleCrm
from crmbridge.sandbox.meta import APP_SECRET, VERIFY_TOKEN, Meta
from crmbridge.sandbox.server import LoopbackServer

__all__ = ["LoopbackServer", "Meta", "SampleCrm", "Sandbox"]

_CRM = "/crm"


class Sandbox:
    """Meta at the root and the sample CRM under ``/crm``, on one port; the page at ``/`` shows both."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        callback_url: str | None = None,
        secret: str = WEBHOOK_SECRET,
        app_secret: str = APP_SECRET,
        verify_token: str = VERIFY_TOKEN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.meta = Meta(callback_url, app_secret, verify_token, clock)
        self.crm = SampleCrm(secret, clock)
        self.meta.page_paths = self.crm.page_paths = ("/sandbox", f"{_CRM}/sandbox")
        self._server = LoopbackServer(self._app, host, port)
        self.url = self._server.url
        self.graph_url = f"{self.url}/v27.0"
        self.crm_webhook_url = f"{self.url}{_CRM}/webhook"

    def _app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, app = environ["PATH_INFO"], self.meta.app
        if path == _CRM or path.startswith(f"{_CRM}/"):
            environ["SCRIPT_NAME"], environ["PATH_INFO"] = _CRM, path.removeprefix(_CRM) or "/"
            app = self.crm.app
        answered: Iterable[bytes] = app(environ, start_response)
        return answered

    def start(self) -> Self:
        """Begin to answer requests."""
        self._server.start()
        return self

    def close(self) -> None:
        """Stop everything that was started."""
        self.meta.close()
        self.crm.close()
        self._server.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: type[BaseException] | BaseException | types.TracebackType | None) -> None:
        self.close()
