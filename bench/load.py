"""Requests made ready beforehand and sent on a schedule fixed beforehand, over a few connections that stay open."""

import http.client
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from bench.stage import Arrivals, Stage, customer
from crmbridge import signing
from crmbridge.sandbox import wire
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.sandbox.meta import APP_SECRET

_CUSTOMERS = 50
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Order:
    """One request, whose `text` is found again where it arrives."""

    text: str
    url: str
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Shot:
    """What became of an order, in time.monotonic() seconds; status 0: no answer."""

    text: str
    due: float
    began: float
    answered: float
    status: int


def webhooks(
    stage: Stage, texts: Sequence[str], shop: str = "", *, customers: int = _CUSTOMERS, each: int = 1
) -> list[Order]:
    """Write signed webhooks as Meta would, `each` with so many messages, for one shop or all of the stage in turn."""
    shops, orders = [shop] if shop else list(stage.accounts), []
    for first in range(0, len(texts), each):
        shop, items = shops[first // each % len(shops)], []
        now_ms = int(time.time() * 1000) + first
        for number, text in enumerate(texts[first : first + each], first):
            sender = customer(number % customers)
            message = {"mid": wire.mint_mid(shop, sender, now_ms + number), "text": text}
            parties = {"sender": {"id": sender}, "recipient": {"id": shop}}
            items.append({**parties, "timestamp": now_ms, "message": message})
        body = wire.webhook_body(wire.envelope(shop, now_ms, *items))
        url = f"http://127.0.0.1:{stage.port}/webhooks/instagram"
        orders.append(Order(texts[first], url, body, _JSON | wire.signature_headers(APP_SECRET, body)))
    return orders


def sends(stage: Stage, texts: Sequence[str], *, customers: int = _CUSTOMERS) -> list[Order]:
    """Write the sends of a CRM, for all accounts of the stage in turn."""
    url, headers = f"http://127.0.0.1:{stage.port}/api/v1/messages/send", {"Authorization": f"Bearer {stage.key}"}
    accounts, orders = list(stage.accounts.values()), []
    for number, text in enumerate(texts):
        send = {"account_id": accounts[number % len(accounts)], "recipient_id": customer(number % customers)}
        body = json.dumps({**send, "message": text, "idempotency_key": text}).encode()
        orders.append(Order(text, url, body, _JSON | headers))
    return orders


def straight(url: str, texts: Sequence[str]) -> list[Order]:
    """Write what a CRM would get, for the CRM itself or a floor."""
    orders = []
    for text in texts:
        body = json.dumps({"event": "message.received", "message": text}).encode()
        signed = {"X-Hub-Signature-256": signing.hub_signature(WEBHOOK_SECRET, body)}
        orders.append(Order(text, url, body, _JSON | signed))
    return orders


def fire(orders: Sequence[Order], *, connections: int = 16, per_s: float = math.inf) -> list[Shot]:
    """Send the orders, each at its time whether or not earlier ones were answered; without a rate, at once."""
    where, numbers, begin = urlsplit(orders[0].url), itertools.count(), time.monotonic() + 0.1
    shots: list[Shot] = []

    def work() -> None:
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
        while (number := next(numbers)) < len(orders):
            order, due = orders[number], begin + number / per_s
            time.sleep(max(due - time.monotonic(), 0))
            began = time.monotonic()
            try:
                connection.request("POST", where.path, order.body, order.headers)
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            shots.append(Shot(order.text, due, began, time.monotonic(), status))
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(shots, key=lambda shot: shot.due)


def check(stage: Stage, orders: Sequence[Order], shots: Sequence[Shot], more: dict[str, int]) -> Arrivals:
    """Return what came of the orders, and as many of `more` events; exit when one is lost or comes twice."""
    came = stage.arrivals(len(orders) + sum(more.values()))
    refused = sum(shot.status not in (200, 202) for shot in shots)
    lost = sum(order.text not in came.at for order in orders)
    twice = sum(times - 1 for times in came.texts.values())
    strange = {event: came.events[event] for event, times in more.items() if came.events[event] != times}
    if refused or lost or twice or strange:
        sys.exit(f"of {len(orders)}: {refused} refused, {lost} lost, {twice} twice; of {more}: {strange}")
    return came
