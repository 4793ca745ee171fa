"""A CRM that was dead for 25 hours: how its dead letters come to be, and whether they came back in order."""

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.stage import SHOP, Arrivals, customer
from crmbridge import config, log, wiring
from crmbridge.clock import Clock
from crmbridge.delivery import Engine, Schedule
from crmbridge.events import instant
from crmbridge.instagram import webhook
from crmbridge.sandbox import wire
from crmbridge.store import inbound
from crmbridge.upkeep import Upkeep
from tests.rig import LIMITS, SCHEDULE

_HOUR_S = 3600
_CUSTOMERS, _FIRST = 200, 25  # the ones from 25 to 49 write live, too
_TALKER, _SHARE = 49, 5  # one customer wrote every fifth message


class _Silent:
    """Alerts are not what is measured."""

    def alert(self, kind: str, message: str, **facts: Any) -> None:
        pass

    def clear(self, kind: str, **facts: Any) -> None:
        pass

    def withdraw(self, kind: str, **facts: Any) -> None:
        pass

    def opened(self, kind: str) -> dict[str, str]:
        return {}


def die(folder: Path, number: int) -> Counter[str]:
    """Have `number` messages of the last 25 hours be dead, as they die: by an engine that calls a dead CRM.

    The bridge must be stopped, and the CRM fail. Returns how many ended with each code.
    """
    log.setup("critical")
    rooms = wiring.open_rooms(config.load(folder / "crmbridge.ini", {}))
    end_s = time.time()
    now_s = end_s - 25.1 * _HOUR_S
    clock = Clock(lambda: now_s, lambda: now_s)
    engine = Engine(
        rooms.db,
        wiring.make_senders(rooms),
        Schedule(**SCHEDULE, patience=rooms.patience),  # type: ignore[arg-type]
        LIMITS,
        _Silent(),
        askers=wiring.make_askers(rooms),
        conversations=rooms.client.conversations,
        clock=clock,
        linger_s=0,
    )
    upkeep = Upkeep(rooms.db, rooms.settings.retention, rooms.patience, _Silent(), clock=clock)
    began_s = expire_s = now_s
    written = 0
    while now_s < end_s:
        # All of them in the first three quarters of an hour.
        due = min(int(number * (now_s - began_s + 15) / (0.75 * _HOUR_S)), number)
        for turn in range(written, due):
            _write(rooms, turn, now_s)
        written = due
        if now_s >= expire_s:
            upkeep.expire()
            expire_s = now_s + 600
        next_s = engine.drain()
        now_s = min(max(next_s or (end_s if written == number else 0), now_s + 15), end_s)
    upkeep.expire()
    engine.stop(5)
    found = rooms.db.rows("SELECT state, last_code, COUNT(*) AS number FROM deliveries GROUP BY 1, 2")
    rooms.db.close()
    return Counter({f"{row['state']} {row['last_code']}": row["number"] for row in found})


def _write(rooms: wiring.Rooms, turn: int, now_s: float) -> None:
    sender = customer(_TALKER if turn % _SHARE == 0 else _FIRST + turn % _CUSTOMERS)
    message = {"mid": wire.mint_mid(SHOP, sender, int(now_s * 1000) + turn), "text": f"dead {turn}"}
    item = {"sender": {"id": sender}, "recipient": {"id": SHOP}, "timestamp": int(now_s * 1000), "message": message}
    events = webhook.read(wire.webhook_body(wire.envelope(SHOP, int(now_s * 1000), item)), instant(now_s))
    inbound.keep(rooms.db, events, correlation_id="bench", now_s=now_s, patience=rooms.patience)


def out_of_order(came: Arrivals) -> int:
    """Return how many messages came too early or too late in their conversation.

    What was dead keeps its order, what is new keeps its own, and nothing new comes between what was dead.
    """
    wrong = 0
    for heard in came.lanes.values():
        for was_dead in (True, False):
            sequences = [sequence for sequence, text in heard if text.startswith("dead ") == was_dead]
            wrong += sum(later < earlier for earlier, later in itertools.pairwise(sequences))
        places = [place for place, (_, text) in enumerate(heard) if text.startswith("dead ")]
        wrong += places[-1] - places[0] + 1 - len(places) if places else 0
    return wrong
