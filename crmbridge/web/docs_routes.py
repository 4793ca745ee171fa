"""The contract and its page: ``/``, ``/docs`` and ``/api-spec.yaml``, all from this server alone."""

from pathlib import Path

import bottle

from crmbridge.errors import NotFound
from crmbridge.web.app import Call, Reply, Route

_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_FILES = {
    "docs.js": "docs.js",
    "swagger-ui.css": "swagger-ui/swagger-ui.css",
    "swagger-ui-bundle.js": "swagger-ui/swagger-ui-bundle.js",
    "favicon-32x32.png": "swagger-ui/favicon-32x32.png",
}


def routes(root: Path) -> list[Route]:
    """Return the routes; `root` holds ``api-spec.yaml`` and ``static/``."""

    def home(call: Call) -> Reply:
        return Reply({"docs": "/docs", "spec": "/api-spec.yaml"}, 302, {"Location": "/docs"})

    def page(call: Call) -> Reply:
        return Reply(bottle.static_file("static/docs.html", root=root), headers=_PAGE_HEADERS)

    def file(call: Call) -> Reply:
        name = _FILES.get(call.path["name"])
        if name is None:
            raise NotFound("There is no such file.")
        return Reply(bottle.static_file("static/" + name, root=root), headers=_PAGE_HEADERS)

    def spec(call: Call) -> Reply:
        found = bottle.static_file("api-spec.yaml", root=root, mimetype="application/yaml")
        return Reply(found, headers={"X-Content-Type-Options": "nosniff"})

    return [
        Route("GET", "/", home, None),
        Route("GET", "/docs", page, None),
        Route("GET", "/docs/<name>", file, None),
        Route("GET", "/api-spec.yaml", spec, None),
    ]
