"""Requests made ready beforehand and sent on a schedule fixed beforehand, over a few connections that stay open."""

import http.client
import itertools
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from bench.stage import SHOP, Stage
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
    answered: float
    status: int
    arrived: float = math.inf

    def arriving(self, at: float) -> "Shot":
        """Return this shot with the time of its arrival."""
        return replace(self, arrived=at)


def customer(number: int) -> str:
    """Return the id of a customer; those from 0 to 49 write and are written to."""
    return str(900_000_000_000_000 + number)


def webhooks(stage: Stage, texts: Sequence[str], shop: str = SHOP, *, strangers_from: int = 0) -> list[Order]:
    """Write signed webhooks as Meta would, one message each; with `strangers_from`, each of somebody else."""
    orders = []
    for number, text in enumerate(texts):
        sender = customer(number % _CUSTOMERS if not strangers_from else strangers_from + number)
        now_ms = int(time.time() * 1000) + number
        message = {"mid": wire.mint_mid(shop, sender, now_ms), "text": text}
        item = {"sender": {"id": sender}, "recipient": {"id": shop}, "timestamp": now_ms, "message": message}
        body = wire.webhook_body(wire.envelope(shop, now_ms, item))
        url = f"http://127.0.0.1:{stage.port}/webhooks/instagram"
        orders.append(Order(text, url, body, _JSON | wire.signature_headers(APP_SECRET, body)))
    return orders


def sends(stage: Stage, texts: Sequence[str]) -> list[Order]:
    """Write the sends of a CRM."""
    url, headers = f"http://127.0.0.1:{stage.port}/api/v1/messages/send", {"Authorization": f"Bearer {stage.key}"}
    orders = []
    for number, text in enumerate(texts):
        send = {"account_id": stage.account_id, "recipient_id": customer(number % _CUSTOMERS)}
        body = json.dumps({**send, "message": text, "idempotency_key": text}).encode()
        orders.append(Order(text, url, body, _JSON | headers))
    return orders


def straight(stage: Stage, texts: Sequence[str]) -> list[Order]:
    """Write what the CRM would get, for the CRM itself: the floor under every bridge."""
    orders = []
    for text in texts:
        body = json.dumps({"event": "message.received", "message": text}).encode()
        signed = {"X-Hub-Signature-256": signing.hub_signature(WEBHOOK_SECRET, body)}
        orders.append(Order(text, stage.crm_webhook_url, body, _JSON | signed))
    return orders


def fire(orders: Sequence[Order], *, connections: int, per_s: float = math.inf) -> list[Shot]:
    """Send the orders, each at its time whether or not earlier ones were answered; without a rate, at once."""
    where, numbers, begin = urlsplit(orders[0].url), itertools.count(), time.monotonic() + 0.1
    shots: list[Shot] = []

    def work() -> None:
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
        while (number := next(numbers)) < len(orders):
            order, due = orders[number], begin + number / per_s
            time.sleep(max(due - time.monotonic(), 0))
            try:
                connection.request("POST", where.path, order.body, order.headers)
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            shots.append(Shot(order.text, due, time.monotonic(), status))
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(shots, key=lambda shot: shot.due)
