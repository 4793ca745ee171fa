"""What needs no key: the contract and its page, the health of the bridge, and Meta's privacy callbacks."""

import threading
import time
from pathlib import Path
from urllib.parse import parse_qs

import bottle

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.errors import NotFound, Unauthorized, Unavailable
from crmbridge.events import Wake, epoch_s, instant
from crmbridge.instagram import signed_request
from crmbridge.store import privacy, vitals
from crmbridge.store.database import Row
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
_REMEMBER_S = 1.0
_DELETION = "/privacy/deletion"


def documents(root: Path) -> list[Route]:
    """Return the routes of the contract, all from this server alone; `root` has ``api-spec.yaml`` and ``static/``."""

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


def health() -> list[Route]:
    """Return the routes that tell whether the bridge can do its work, and whether the process answers.

    The last finding is remembered for a second, so that asking often costs no disk writes.
    """
    lock, asked_s, known = threading.Lock(), float("-inf"), list[str]()

    def live(call: Call) -> Reply:
        return Reply({"status": "alive", "timestamp": instant(call.now_s)})

    def well(call: Call) -> Reply:
        nonlocal asked_s, known
        with lock:
            if time.monotonic() - asked_s > _REMEMBER_S:
                known, asked_s = _reasons(call), time.monotonic()
            reasons = known
        state = "unhealthy" if reasons else "healthy"
        return Reply({"status": state, "timestamp": instant(call.now_s), "reasons": reasons}, 503 if reasons else 200)

    return [Route("GET", "/health", well, None), Route("GET", "/health/live", live, None)]


def _reasons(call: Call) -> list[str]:
    problem = call.db.schema_problem()
    if problem:
        return [problem]
    reasons = []
    try:
        vitals.probe(call.db)
    except Unavailable as error:
        reasons.append(error.message)
    last = vitals.last_beat(call.db, "worker")
    if last is None:
        reasons.append("no worker has run yet")
    elif call.now_s - epoch_s(last) > vitals.STALE_S:
        reasons.append(f"the worker's last heartbeat was at {last}")
    return reasons


def callbacks(app_secrets: tuple[str, ...], public_url: str, alarm: Alarm, wake: Wake) -> list[Route]:
    """Return the routes by which Meta tells that an owner removed the app or wants the data deleted.

    `public_url` is where the page that tells of a deletion is found from outside, or empty.
    """

    def read(call: Call) -> tuple[signed_request.Request, Row | None]:
        form = parse_qs(call.body.decode("ascii", "replace"))
        try:
            request = signed_request.read(form.get("signed_request", [""])[0], app_secrets)
        except Unauthorized as error:
            log.warning("privacy.refused", code=error.code, remote=call.remote, bytes=len(call.body))
            raise
        return request, privacy.find_account(call.db, request.user_id)

    def deauthorize(call: Call) -> Reply:
        request, account = read(call)
        if privacy.deauthorize(call.db, account, request.code, instant(call.now_s)):
            log.warning("account.deauthorized", account=account["id"] if account else None)
            if account is not None:
                alarm.alert("token_dead", "The owner removed the app.", account=account["id"])
        return Reply({"status": "accepted"})

    def delete(call: Call) -> Reply:
        request, account = read(call)
        if privacy.request_deletion(call.db, account, request.code, call.now_s):
            log.warning("account.deletion_requested", account=account["id"] if account else None)
            if account is not None:
                said = (
                    f"The owner asked Meta for it: account {account['id']} is deleted, and its data are being erased."
                )
                alarm.alert("data_deletion", said)
                wake(None)
        base = public_url.rstrip("/") or "https://" + call.headers.get("Host", "")
        return Reply({"url": f"{base}{_DELETION}/{request.code}", "confirmation_code": request.code})

    def status(call: Call) -> Reply:
        row = privacy.entry(call.db, call.path["code"])
        if row is None or row["kind"] != "account":
            raise NotFound("There is no request with this confirmation code.", code="deletion_not_found")
        headers = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
        return Reply(_told(row), 200, headers)

    return [
        Route("POST", "/privacy/deauthorize", deauthorize, None, query=None),
        Route("POST", _DELETION, delete, None, query=None),
        Route("GET", f"{_DELETION}/<code>", status, None),
    ]


def _told(row: Row) -> str:
    if row["account_id"] is None:
        done = "Done. Nothing was stored about this Instagram account."
    elif row["done_at"] is None:
        done = "In progress. The account and its access token are deleted; messages and names are being erased."
    else:
        done = f"Done on {row['done_at'][:10]}. The account, its access token, all messages and all names are erased."
    return f"Request for deletion {row['id']}\nReceived on {row['asked_at'][:10]}\n{done}\n"
