"""Where media of the local Instagram are fetched from: well, gone, expired, slow, or under a wrong type.

As Meta's content network does, it asks for no token: whoever has the address can open it.
"""

import base64
import time

import bottle

from crmbridge.sandbox import server

_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
_SLOW_S, _SLOW_MOST_S = 5.0, 60.0


def add_routes(app: bottle.Bottle) -> None:
    """Add ``/cdn/<state>``: ok, gone (404), expired (403), slow (``?seconds=``), mistyped (an image as text/html)."""

    def fetch(state: str) -> bottle.HTTPResponse:
        if state == "slow":
            given = bottle.request.query.seconds
            time.sleep(min(float(given) if given.replace(".", "", 1).isdigit() else _SLOW_S, _SLOW_MOST_S))
        refusals = {"gone": (404, "Not Found"), "expired": (403, "URL signature expired")}
        if state in refusals:
            status, said = refusals[state]
            return server.answer(said, status)
        kind = {"ok": "image/png", "slow": "image/png", "mistyped": "text/html"}.get(state)
        if kind is None:
            return server.answer("Bad URL hash", 403)
        return bottle.HTTPResponse(_PIXEL, 200, {"Content-Type": kind})

    app.route("/cdn/<state>", "GET", fetch)
