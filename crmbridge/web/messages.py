"""Messages and events of a CRM: ``/api/v1/messages/…`` and ``GET /api/v1/events``."""

import hashlib
import json
from typing import Any

from crmbridge import contract, log
from crmbridge.errors import NotFound
from crmbridge.events import Wake, instant
from crmbridge.instagram import outgoing
from crmbridge.store import accounts, feed, messages
from crmbridge.store.deliveries import COMMENT_LANE
from crmbridge.web.app import Call, Reply, Route

_FORMS = ("attachments", "reaction", "action", "template", "quick_replies", "reply_to", "comment_id")


def routes(wake: Wake) -> list[Route]:
    """Return the routes; `wake` is called after a send is on disk."""

    def send(call: Call) -> Reply:
        request = call.read(contract.SendRequest)
        call.require(request.account_id)
        wanted = _wanted(request, call.correlation_id)
        told = outgoing.check(wanted.content)
        if request.dry_run:
            _, outlook = messages.check(call.db, wanted, instant(call.now_s))
            return Reply({"dry_run": True, **_shown(outlook, told)})
        row, outlook, is_new = messages.accept(call.db, wanted)
        if is_new:
            wake({request.account_id})
        log.info("message.accepted", message_id=row["id"], account=request.account_id, repeated=not is_new)
        accepted = {"message_id": row["id"], "status": row["status"], "created_at": row["created_at"]}
        return Reply({**accepted, **_shown(outlook, told)}, 202)

    def status(call: Call) -> Reply:
        return Reply(_found(call))

    def cancel(call: Call) -> Reply:
        message_id = _found(call)["message_id"]
        if messages.cancel(call.db, message_id):
            wake(None)  # another may have waited behind it
            log.info("message.cancelled", message_id=message_id)
        return Reply(_found(call))

    def events(call: Call) -> Reply:
        limit, wanted = call.limit(), call.query.get("account_id")
        if wanted is not None:
            readable = [call.account(wanted)]
        else:
            readable = [account for account in accounts.everyone(call.db) if call.may_see(account["id"])]
        found = feed.page(call.db, readable, after=call.query.get("after"), limit=limit)
        rest = {"next_cursor": found.next_cursor, "has_more": found.has_more, "expired": found.expired}
        return Reply(f'{{"events":[{",".join(found.events)}],{json.dumps(rest)[1:]}')

    return [
        Route("POST", "/api/v1/messages/send", send, "messages:send"),
        Route("GET", "/api/v1/messages/<message_id>/status", status, "messages:read"),
        Route("DELETE", "/api/v1/messages/<message_id:re:msg_[^/]+>", cancel, "messages:send"),
        Route("GET", "/api/v1/events", events, "events:read", query=frozenset(("after", "account_id", "limit"))),
    ]


def _wanted(request: contract.SendRequest, correlation_id: str) -> messages.Request:
    given = request.model_dump(exclude={"idempotency_key", "dry_run"}, exclude_none=True)
    content: dict[str, Any] = {name: given[name] for name in _FORMS if name in given}
    if "message" in given:
        content["text"] = given["message"]
    if given.get("author") == {"type": "human"}:
        content["human"] = True
    return messages.Request(
        account_id=request.account_id,
        recipient_id=given.get("recipient_id") or COMMENT_LANE + given["comment_id"],
        idempotency_key=request.idempotency_key,
        hash=hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest(),
        content=content,
        metadata=request.metadata,
        correlation_id=correlation_id,
        send_before=given.get("send_before"),
    )


def _shown(outlook: messages.Outlook, told: list[str]) -> dict[str, Any]:
    return {"window_expires_at": outlook.window_expires_at, "warnings": outlook.warnings + told}


def _found(call: Call) -> dict[str, Any]:
    found = messages.status(call.db, call.path["message_id"])
    if found is None or not call.may_see(found["account_id"]):
        raise NotFound("There is no such message.", code="message_not_found")
    return found
