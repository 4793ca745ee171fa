"""A CRM that knows the bridge by api-spec.yaml alone: it connects an account, reads events, answers, and follows.

usage: loop.py URL ADMIN_KEY INSTAGRAM_ACCOUNT_ID ACCESS_TOKEN
"""

import json
import sys
import time

from bridge_client import AuthenticatedClient
from bridge_client.api.accounts import create_account
from bridge_client.api.events import list_events
from bridge_client.api.messages import send_message, show_message_status
from bridge_client.models import (
    AccountChanged,
    AccountCreate,
    EventPage,
    MessageReceived,
    MessageStatus,
    MessageStatusEvent,
    OtherEvent,
    SendAccepted,
    SendRequest,
)
from bridge_client.types import UNSET, Unset

PATIENCE_S = 60


def main(url: str, key: str, instagram_account_id: str, access_token: str) -> None:
    client = AuthenticatedClient(base_url=url, token=key)
    asked = AccountCreate(instagram_account_id=instagram_account_id, access_token=access_token)
    account = create_account.sync(client=client, body=asked)
    assert isinstance(account, AccountChanged), account

    after: str | Unset = UNSET
    others: set[str] = set()
    heard: list[str | None] = []
    warnings: list[str] = []
    statuses: list[str] = []
    message_id = ""
    deadline_s = time.monotonic() + PATIENCE_S
    while not ({"message.delivered", "delivered"} <= set(statuses)):
        assert time.monotonic() < deadline_s, (heard, statuses)
        page = list_events.sync(client=client, account_id=account.account_id, after=after)
        assert isinstance(page, EventPage), page
        after = page.next_cursor or UNSET
        for event in page.events:
            if isinstance(event, MessageReceived):
                heard.append(event.message)
                reply = SendRequest(
                    account_id=event.account_id,
                    recipient_id=event.sender_id,
                    message=f"You wrote at {event.timestamp:%H:%M}.",
                    idempotency_key=f"answer to {event.event_id}",
                )
                sent = send_message.sync(client=client, body=reply)
                assert isinstance(sent, SendAccepted), sent
                message_id = sent.message_id
                warnings += sent.warnings
                statuses.append(sent.status)
            elif isinstance(event, MessageStatusEvent):
                statuses.append(event.event.value)
            elif isinstance(event, OtherEvent):
                others.add(event.event)
        if message_id:
            status = show_message_status.sync(message_id, client=client)
            assert isinstance(status, MessageStatus), status
            statuses.append(status.status)
        if not page.has_more:
            time.sleep(0.1)
    print(json.dumps({"heard": heard, "others": sorted(others), "warnings": warnings, "statuses": statuses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
