"""Meta's webhook: the handshake, and verify → read → keep → wake → 200."""

from collections import Counter
from collections.abc import Callable

from crmbridge import log
from crmbridge.config import Instagram
from crmbridge.errors import Unauthorized
from crmbridge.events import instant
from crmbridge.instagram import webhook
from crmbridge.store import inbound
from crmbridge.store.deliveries import Patience
from crmbridge.web.app import Call, Reply, Route

BODY_BYTES = 8 * 1024 * 1024  # a batch of 1000 updates with long escaped texts is legal


def routes(settings: Instagram, wake: Callable[[], None], patience: Patience) -> list[Route]:
    """Return the routes; `wake` is called after events are on disk."""
    switches = {"comment.received": settings.comments, "mention.received": settings.mentions}
    quiet = frozenset(kind for kind, is_on in switches.items() if not is_on)

    def handshake(call: Call) -> Reply:
        text = webhook.challenge(call.query, settings.verify_token)
        return Reply(text, 200, {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"})

    def receive(call: Call) -> Reply:
        try:
            webhook.verify(call.body, call.headers.get("X-Hub-Signature-256"), settings.app_secrets)
        except Unauthorized as error:
            log.warning("webhook.refused", code=error.code, remote=call.remote, bytes=len(call.body))
            raise
        events = webhook.read(call.body, instant(call.now_s), quiet=quiet)
        kept = inbound.keep(call.db, events, correlation_id=call.correlation_id, now_s=call.now_s, patience=patience)
        wake()
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
