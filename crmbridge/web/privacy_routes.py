"""Meta's privacy callbacks: the owner removed the app, or wants the data deleted; and the page that tells of it."""

from urllib.parse import parse_qs

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.errors import NotFound, Unauthorized
from crmbridge.events import Wake, instant
from crmbridge.instagram import signed_request
from crmbridge.store import privacy
from crmbridge.store.database import Row
from crmbridge.web.app import Call, Reply, Route

_STATUS = "/privacy/deletion"


class PrivacyRoutes:
    """The handlers; `public_url` is where the status page is found from outside, or empty."""

    def __init__(
        self,
        app_secrets: tuple[str, ...],
        public_url: str,
        alarm: Alarm,
        wake: Wake,
    ) -> None:
        self._app_secrets = app_secrets
        self._public_url = public_url.rstrip("/")
        self._alarm = alarm
        self._wake = wake

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("POST", "/privacy/deauthorize", self.deauthorize, None, query=None),
            Route("POST", _STATUS, self.delete, None, query=None),
            Route("GET", f"{_STATUS}/<code>", self.status, None),
        ]

    def deauthorize(self, call: Call) -> Reply:
        """Drop the token of an account whose owner removed the app, and hold its sends."""
        request, account = self._read(call)
        if privacy.deauthorize(call.db, account, request.code, instant(call.now_s)):
            log.warning("account.deauthorized", account=account["id"] if account else None)
            if account is not None:
                self._alarm.alert("token_dead", "The owner removed the app.", account=account["id"])
        return Reply({"status": "accepted"})

    def delete(self, call: Call) -> Reply:
        """Delete an account and all that is stored about it; tell where that can be followed."""
        request, account = self._read(call)
        if privacy.request_deletion(call.db, account, request.code, call.now_s):
            log.warning("account.deletion_requested", account=account["id"] if account else None)
            if account is not None:
                said = (
                    f"The owner asked Meta for it: account {account['id']} is deleted, and its data are being erased."
                )
                self._alarm.alert("data_deletion", said)
                self._wake(None)
        base = self._public_url or "https://" + call.headers.get("Host", "")
        return Reply({"url": f"{base}{_STATUS}/{request.code}", "confirmation_code": request.code})

    def status(self, call: Call) -> Reply:
        """Tell a person what became of a request for deletion."""
        row = privacy.entry(call.db, call.path["code"])
        if row is None or row["kind"] != "account":
            raise NotFound("There is no request with this confirmation code.", code="deletion_not_found")
        headers = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
        return Reply(_told(row), 200, headers)

    def _read(self, call: Call) -> tuple[signed_request.Request, Row | None]:
        form = parse_qs(call.body.decode("ascii", "replace"))
        try:
            request = signed_request.read(form.get("signed_request", [""])[0], self._app_secrets)
        except Unauthorized as error:
            log.warning("privacy.refused", code=error.code, remote=call.remote, bytes=len(call.body))
            raise
        return request, privacy.find_account(call.db, request.user_id)


def _told(row: Row) -> str:
    if row["account_id"] is None:
        done = "Done. Nothing was stored about this Instagram account."
    elif row["done_at"] is None:
        done = "In progress. The account and its access token are deleted; messages and names are being erased."
    else:
        done = f"Done on {row['done_at'][:10]}. The account, its access token, all messages and all names are erased."
    return f"Request for deletion {row['id']}\nReceived on {row['asked_at'][:10]}\n{done}\n"
