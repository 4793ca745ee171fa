"""Sending and following messages: ``/api/v1/messages/…``."""

import hashlib
import json
from collections.abc import Callable

from crmbridge import contract, log
from crmbridge.errors import Invalid, NotFound
from crmbridge.store import messages
from crmbridge.store.deliveries import Patience
from crmbridge.web.app import Call, Reply, Route


def routes(wake: Callable[[], None], patience: Patience) -> list[Route]:
    """Return the routes; `wake` is called after a send is on disk."""

    def send(call: Call) -> Reply:
        request = call.read(contract.SendRequest)
        account = call.account(request.account_id)
        size = len(request.message.encode())
        if size > contract.MESSAGE_BYTES:
            problem = f"has {size} UTF-8 bytes; Instagram takes {contract.MESSAGE_BYTES}"
            detail = {"field": "message", "problem": problem}
            raise Invalid(f"The message {problem}.", code="message_too_long", details=[detail])
        body = request.model_dump(exclude={"idempotency_key"}, exclude_none=True)
        row, is_new = messages.accept(
            call.db,
            messages.Request(
                account_id=account["id"],
                recipient_id=request.recipient_id,
                idempotency_key=request.idempotency_key,
                hash=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(),
                content={"text": request.message},
                metadata=request.metadata,
                correlation_id=call.correlation_id,
            ),
            patience,
            call.now_s,
        )
        if is_new:
            wake()
        log.info("message.accepted", message_id=row["id"], account=account["id"], repeated=not is_new)
        return Reply({"message_id": row["id"], "status": row["status"], "created_at": row["created_at"]}, 202)

    def status(call: Call) -> Reply:
        found = messages.status(call.db, call.path["message_id"])
        if found is None or not call.may_see(found["account_id"]):
            raise NotFound("There is no such message.", code="message_not_found")
        return Reply(found)

    return [
        Route("POST", "/api/v1/messages/send", send, "messages:send"),
        Route("GET", "/api/v1/messages/<message_id>/status", status, "messages:read"),
    ]
