"""The load of a run: Meta posting webhooks until they are answered 200, clients asking for sends until they get 202."""

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import requests

from crmbridge.sandbox import wire
from tests.chaos.history import History, Order
from tests.chaos.weather import UnreliableMeta
from tests.shop import SHOP_ID

_WAITING = 6  # webhooks that Meta holds for a later try before it stops making new ones
_BACKLOG = 150  # acknowledged and not delivered: more than that only makes a run longer
_SENDS = 8  # the same for one contact's sends
_SHARE = 0.04  # of the messages come from buyers: what a look-up shows must reach back far enough
_DELAYS_S = (0.1, 0.2, 0.4)


class Load:
    """Threads that make a run's traffic; everything they do is drawn from the seed, save its timing."""

    def __init__(
        self, meta: UnreliableMeta, history: History, url: str, order: dict[str, Any], key: str, seed: int
    ) -> None:
        self._meta, self._history, self._url = meta, history, url
        self._order, self._key, self._seed = order, key, seed
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    def start(self, *, inbound: int, outbound: int, pause_s: float) -> None:
        """Start that many threads of each direction."""
        for target, number in (
            *((self._customers, number) for number in range(inbound)),
            *((self._client, number) for number in range(outbound)),
        ):
            thread = threading.Thread(target=self._guarded, args=(target, number, pause_s), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, timeout_s: float = 30) -> None:
        """Make nothing new, and wait until everything is acknowledged; TimeoutError when it is not."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.01))
        if self._failures:
            raise self._failures[0]
        if any(thread.is_alive() for thread in self._threads):
            raise TimeoutError("some of the load is still not acknowledged")

    def _guarded(self, target: Callable[[int, float], None], number: int, pause_s: float) -> None:
        try:
            target(number, pause_s)
        except Exception as failure:
            self._failures.append(failure)
            raise

    # --- Meta ---

    def _customers(self, thread: int, pause_s: float) -> None:
        rng = random.Random(f"{self._seed} customers {thread}")
        contacts = [f"70{thread}{number}" for number in range(4)]
        numbers, last_ms = itertools.count(), 0
        waiting: deque[tuple[float, int, bytes]] = deque()
        acknowledged: deque[bytes] = deque(maxlen=30)

        def post(batch: bytes, tries: int) -> None:
            """Post items under a new entry time, as Meta does at each repetition."""
            if self._meta.post(self._enveloped(batch)).status == 200:
                acknowledged.append(batch)
            else:
                waiting.append((time.monotonic() + _DELAYS_S[min(tries, 2)] * rng.uniform(0.7, 1.3), tries + 1, batch))

        while not self._stopping.is_set() or waiting:
            for _ in range(len(waiting)):
                due_s, tries, batch = waiting.popleft()
                if due_s <= time.monotonic():
                    post(batch, tries)
                else:
                    waiting.append((due_s, tries, batch))
            if self._stopping.is_set() or len(waiting) >= _WAITING or self._history.waiting() > _BACKLOG:
                time.sleep(0.02)
                continue
            items = []
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                contact = rng.choice(contacts) if rng.random() > _SHARE else _buyer(rng.randrange(8))
                last_ms = max(last_ms + 1, int(time.time() * 1000))
                items.append(self._says(contact, f"{self._seed}.{thread}.{next(numbers)}", last_ms))
            if rng.random() < 0.3:
                rng.shuffle(items)
            if rng.random() < 0.08 and (receipt := self._receipt(rng)):
                items.append(receipt)
            batch = wire.webhook_body(items)
            if rng.random() < 0.04:
                twin = threading.Thread(target=self._meta.post, args=(self._enveloped(batch),))
                twin.start()
                post(batch, 0)
                twin.join()
            else:
                post(batch, 0)
            if acknowledged and rng.random() < 0.08:
                post(rng.choice(acknowledged), 0)
            self._stopping.wait(rng.uniform(0, 2 * pause_s))

    def _says(self, contact: str, name: str, at_ms: int) -> dict[str, Any]:
        message = {"mid": f"mid.{name}", "text": f"in {name}"}
        self._meta._log(SHOP_ID, contact, "customer", message["mid"], message, at_ms)
        return _item(contact, at_ms, "message", message)

    def _receipt(self, rng: random.Random) -> dict[str, Any] | None:
        """Read one of the last messages that took effect."""
        sent = self._meta.sent[-8:]
        if not sent:
            return None
        chosen = rng.choice(sent)
        return _item(chosen.recipient_id, int(time.time() * 1000), "read", {"mid": chosen.mid})

    def _enveloped(self, batch: bytes) -> bytes:
        head = f'{{"object":"instagram","entry":[{{"time":{int(time.time() * 1000)},"id":"{SHOP_ID}","messaging":'
        return head.encode() + batch + b"}]}"

    # --- the CRM's client ---

    def _client(self, thread: int, pause_s: float) -> None:
        rng = random.Random(f"{self._seed} client {thread}")
        contact, text = _buyer(thread), ""
        with requests.Session() as session:
            session.trust_env = False
            for number in itertools.count():
                while not self._stopping.is_set() and self._is_late(contact, number):
                    time.sleep(0.05)
                if self._stopping.is_set():
                    return
                if not text or rng.random() > 0.2:
                    text = f"out {self._seed}.{thread}.{number}"
                key = f"key-{self._seed}-{thread}-{number}"
                while self._ask(session, key, contact, text) != 202:
                    time.sleep(0.1 * rng.uniform(0.5, 1.5))
                if rng.random() < 0.1:
                    self._ask(session, key, contact, text)
                if rng.random() < 0.05:
                    # Its own session: a repetition that is under way at the same time.
                    twin = threading.Thread(target=self._ask, args=(requests.Session(), key, contact, text))
                    twin.start()
                    self._ask(session, key, contact, text)
                    twin.join()
                self._stopping.wait(rng.uniform(0, 25 * pause_s))

    def _is_late(self, contact: str, sends: int) -> bool:
        """Tell whether the bridge has enough to do as it is."""
        effects = sum(sent.recipient_id == contact for sent in self._meta.sent)
        return sends - effects > _SENDS or self._meta.is_behind() or self._history.waiting() > _BACKLOG

    def _ask(self, session: requests.Session, key: str, contact: str, text: str) -> int:
        order = self._history.add(Order(time.time(), 0, key, contact, text))
        body = {**self._order, "recipient_id": contact, "message": text, "idempotency_key": key}
        try:
            answer = session.post(
                f"{self._url}/api/v1/messages/send",
                json=body,
                headers={"Authorization": f"Bearer {self._key}"},
                timeout=5,
            )
            order.status = answer.status_code
            order.message_id = answer.json()["message_id"] if answer.status_code == 202 else ""
        except requests.RequestException:
            order.status = 0
        order.until = time.time()
        return order.status


def _buyer(thread: int) -> str:
    return f"79{thread}"


def _item(sender: str, at_ms: int, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"sender": {"id": sender}, "recipient": {"id": SHOP_ID}, "timestamp": at_ms, kind: content}
