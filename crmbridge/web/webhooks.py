"""Meta's webhook: the handshake, and verify → read → keep → wake → 200."""

import re
import threading
from collections import Counter

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.config import Instagram
from crmbridge.errors import Unauthorized
from crmbridge.events import Wake, instant
from crmbridge.instagram import webhook
from crmbridge.store import inbound
from crmbridge.web.app import Call, Reply, Route

BODY_BYTES = 8 * 1024 * 1024  # a batch of 1000 updates with long escaped texts is legal
_SIGNATURE = re.compile(r"sha256=[0-9a-f]{64}\Z")
_MANY_IN_A_ROW = 20
_SOME_IN_A_ROW, _SOME_S = 5, 300.0  # a small shop's day may not bring more, and Meta waits for an hour


class _Signatures:
    """Tells a wrong app secret from a stranger's noise: what comes is signed in the right form, and never right."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._lock = threading.Lock()
        self._wrong = 0
        self._since_s = 0.0

    def right(self) -> None:
        """Note a right signature."""
        self._wrong = 0
        self._alarm.clear("wrong_signatures")

    def wrong(self, signature: str | None, now_s: float) -> None:
        """Note a signature that matches no app secret."""
        if not _SIGNATURE.match(signature or ""):
            return
        with self._lock:
            if not self._wrong:
                self._since_s = now_s
            self._wrong += 1
            wrong, lasts_s = self._wrong, now_s - self._since_s
        if wrong >= _MANY_IN_A_ROW or (wrong >= _SOME_IN_A_ROW and lasts_s >= _SOME_S):
            since = instant(self._since_s)
            self._alarm.alert("wrong_signatures", f"{wrong} webhooks in a row had a wrong signature, since {since}")


def routes(settings: Instagram, wake: Wake, ask_s: float, alarm: Alarm) -> list[Route]:
    """Return the routes; `wake` is called after events are on disk."""
    switches = {"comment.received": settings.comments, "mention.received": settings.mentions}
    quiet = frozenset(kind for kind, is_on in switches.items() if not is_on)
    signatures = _Signatures(alarm)

    def handshake(call: Call) -> Reply:
        text = webhook.challenge(call.query, settings.verify_token)
        return Reply(text, 200, {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"})

    def receive(call: Call) -> Reply:
        signature = call.headers.get("X-Hub-Signature-256")
        try:
            webhook.verify(call.body, signature, settings.app_secrets)
        except Unauthorized as error:
            signatures.wrong(signature, call.now_s)
            log.warning("webhook.refused", code=error.code, remote=call.remote, bytes=len(call.body))
            raise
        signatures.right()
        events = webhook.read(call.body, instant(call.now_s), quiet=quiet)
        kept = inbound.keep(call.db, events, correlation_id=call.correlation_id, ask_s=ask_s)
        wake({entry.account_id for entry in kept if entry.account_id})
        for entry in kept:
            write = log.warning if entry.state == "unrouted" else log.info
            write(
                "event.kept",
                state=entry.state,
                kind=entry.event.kind,
                account=entry.account_id,
                instagram_account_id=entry.event.external_account_id if entry.account_id is None else None,
                event_id=entry.event_id,
                message_id="msg_" + entry.event_id.removeprefix("evt_") if entry.event_id else None,
            )
        states = Counter(entry.state for entry in kept)
        log.info("webhook.received", bytes=len(call.body), events=len(kept), **states)
        return Reply({"status": "accepted"})

    path = "/webhooks/instagram"
    return [
        Route("GET", path, handshake, None, query=None),
        Route("POST", path, receive, None, body_bytes=BODY_BYTES, query=None),
    ]
