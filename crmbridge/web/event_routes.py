"""Reading events instead of being called: ``GET /api/v1/events``."""

import json

from crmbridge.store import accounts, feed
from crmbridge.web.app import Call, Reply, Route


def routes() -> list[Route]:
    """Return the route."""
    parameters = frozenset(("after", "account_id", "limit"))
    return [Route("GET", "/api/v1/events", page, "events:read", query=parameters)]


def page(call: Call) -> Reply:
    """List the events that follow a place, byte for byte as they are pushed."""
    limit, wanted = call.limit(), call.query.get("account_id")
    if wanted is not None:
        readable = [call.account(wanted)]
    else:
        readable = [account for account in accounts.everyone(call.db) if call.may_see(account["id"])]
    found = feed.page(call.db, readable, after=call.query.get("after"), limit=limit)
    rest = {"next_cursor": found.next_cursor, "has_more": found.has_more, "expired": found.expired}
    return Reply(f'{{"events":[{",".join(found.events)}],{json.dumps(rest)[1:]}')
