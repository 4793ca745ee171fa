"""One run: a bridge under load and weather, killed again and again, then left alone and judged."""

import contextlib
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import requests

from tests.chaos import processes, rules
from tests.chaos.history import History, Kill, Note, Order, SendCall
from tests.chaos.load import Load
from tests.chaos.processes import Process
from tests.chaos.weather import TIMEOUT_S, UnreliableMeta, Weather, unreliable
from tests.shop import Shop
from tests.waiting import BULK_S, PATIENCE_S, free_port, until

_QUICK_TRIES = 6
_SHOWN = 15
_STOPPED = 0.15  # how often an orderly stop, which excuses nothing, comes before a kill
SETTINGS = f"""
timeout_s = {TIMEOUT_S}
[delivery]
crm_quick_s = 0.1 0.1 0.1 0.2 0.2
crm_slow_s = 0.4
instagram_retry_s = 0.1 0.2 0.2
instagram_unavailable_s = 0.2
look_up_s = 0.3 0.7
probe_s = 0.2
"""


@dataclass(frozen=True)
class Plan:
    """What a run does.

    `up_s` is how long the bridge lives between two kills; `quiet_s` how long nothing may change at the end while
    something is still owed; `is_fair` means that there are no faults but the kills. `least` are the messages and the
    sends that must have been acknowledged before the end, however slow the machine is.
    """

    seed: int
    kills: int = 10
    planted: str | None = None
    up_s: tuple[float, float] = (0.1, 1.2)
    inbound: int = 3
    outbound: int = 8
    pause_s: float = 0.04
    quiet_s: float = 20.0
    is_fair: bool = False
    least: tuple[int, int] = (0, 0)


@dataclass
class Stage:
    """What a run's disturber may reach."""

    plan: Plan
    folder: Path
    bridge: Process
    history: History
    weather: Weather
    rng: random.Random


@dataclass
class Result:
    """What came out: the counts, and each violation with the evidence for it."""

    plan: Plan
    history: History
    counts: Counter[str]
    violations: list[rules.Violation]
    evidence: list[str] = field(default_factory=list)

    def told(self) -> str:
        """Return the table of counts, the violations and what is known about them."""
        plan = self.plan
        head = f"seed {plan.seed}" + (f", planted {plan.planted}" if plan.planted else "")
        table = [f"  {number:8}  {name}" for name, number in sorted(self.counts.items())]
        broken = [f"  VIOLATION  {entry.rule}: {entry.problem}" for entry in self.violations[:_SHOWN]]
        if len(self.violations) > _SHOWN:
            broken.append(f"  VIOLATION  and {len(self.violations) - _SHOWN} more")
        return "\n".join([head, *table, *broken, *self.evidence])


def run(plan: Plan, folder: Path, disturb: Callable[[Stage], None] | None = None) -> Result:
    """Make one run in an empty folder; `disturb` does something else than killing."""
    history, weather = History(), Weather(plan.seed, clear=plan.is_fair)
    sandbox, meta = unreliable(weather, history)
    with sandbox:
        shop = _shop(folder, sandbox)
        port = free_port()
        own = {"CRMBRIDGE_WEB_PORT": str(port), "CRMBRIDGE_INSTAGRAM_TIMEOUT_S": str(TIMEOUT_S)}
        bridge = Process("serve", folder / "crmbridge.ini", {**shop.bridge.environ, **own}, plan.planted)
        url = f"http://127.0.0.1:{port}"
        meta.callback_url = f"{url}/webhooks/instagram"
        load = Load(meta, history, url, {"account_id": shop.account_id}, shop.key, plan.seed)
        stage = Stage(plan, folder, bridge, history, weather, random.Random(f"{plan.seed} kills"))
        began = time.time()
        try:
            _start(bridge)
            load.start(inbound=plan.inbound, outbound=plan.outbound, pause_s=plan.pause_s)
            (disturb or kill_again_and_again)(stage)
            _start(bridge)
            time.sleep(1)
            _go_on(plan, history, weather)
            owed = _calm_down(plan, load, meta, weather, shop.database)
            statuses = _statuses(url, shop.key, history)
        finally:
            bridge.stop()
    seen = rules.Seen(history, statuses, owed, _QUICK_TRIES)
    violations = rules.check(seen)
    seen.counts.update(_counted(history, shop.database))
    seen.counts["seconds"] = int(time.time() - began)
    return Result(plan, history, seen.counts, violations, _evidence(violations, history, folder))


def _shop(folder: Path, sandbox: object) -> Shop:
    """Make a configured shop with its account and keys, not running."""
    shop = Shop(folder, sandbox, SETTINGS)  # type: ignore[arg-type]
    shop.start()
    try:
        shop.open()
    finally:
        shop.close()
    return shop


def kill_again_and_again(stage: Stage) -> None:
    """Kill and start the bridge at random moments, also while it starts."""
    plan, bridge, rng = stage.plan, stage.bridge, stage.rng
    for number in range(plan.kills):
        if number % 2 == 0 and not plan.is_fair:
            stage.history.add(Note(now := time.time(), now, stage.weather.turn(rng)))
        time.sleep(rng.uniform(*plan.up_s))
        if rng.random() < _STOPPED:
            stop = stage.history.add(Note(time.time(), 0, "stop"))
            bridge.stop()
            bridge.spawn()
            bridge.wait_ready()
            stop.until = time.time()
            time.sleep(rng.uniform(*plan.up_s))
        kill = stage.history.add(Kill(time.time(), 0))
        bridge.kill()
        kill.until = time.time()
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.3))
        bridge.spawn()
        if rng.random() < 0.8:
            bridge.wait_ready()


def _start(bridge: Process) -> None:
    """Start it unless it runs, and wait until it does its work."""
    if not bridge.runs():
        bridge.spawn()
    bridge.wait_ready()


def _go_on(plan: Plan, history: History, weather: Weather) -> None:
    """Let the load go on, in calm weather, until there was enough of it."""
    if any(plan.least):
        weather.crm = weather.meta = "calm"
        seen = until(
            lambda: (len(history.acknowledged()), len(history.accepted())),
            lambda seen: seen[0] >= plan.least[0] and seen[1] >= plan.least[1],
            timeout_s=BULK_S,
        )
        history.add(Note(now := time.time(), now, f"enough: {seen}"))


def _calm_down(plan: Plan, load: Load, meta: UnreliableMeta, weather: Weather, database: Path) -> list[str]:
    """End the faults and the load, and wait until nothing is owed, or nothing changes; return what still is."""
    weather.clear = True
    owed: list[str] = []
    try:
        load.stop(2 * plan.quiet_s)
        meta.flush(2 * plan.quiet_s)
    except TimeoutError as error:
        owed.append(str(error))
    deadline, least = time.monotonic() + plan.quiet_s, -1
    # What was sent last has an echo on its way when the database owes nothing more; the echo owes the CRM an event.
    while (waiting := _owed(database) or meta.owes() or _owed(database)) and time.monotonic() < deadline:
        if least < 0 or len(waiting) < least:
            deadline, least = time.monotonic() + plan.quiet_s, len(waiting)
        time.sleep(0.1)
    return owed + waiting[:_SHOWN]


@contextlib.contextmanager
def reading(database: Path) -> Iterator[sqlite3.Connection]:
    """Look into the database without being able to change it."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=PATIENCE_S)) as connection:
        yield connection


def _owed(database: Path) -> list[str]:
    with reading(database) as connection:
        rows = connection.execute(
            """
            SELECT id, target, contact, event, state, COALESCE(event_id, ''), COALESCE(message_id, ''), due, last_code
            FROM deliveries WHERE state = 'pending' OR (state = 'dead' AND target = 'crm')
            UNION ALL
            SELECT id, 'held', contact, kind, state, '', instagram_message_id, received_at, ''
            FROM events WHERE state IN ('held', 'unrouted')"""
        )
        return [" ".join(str(value) for value in row) for row in rows]


def _statuses(url: str, key: str, history: History) -> dict[str, dict[str, object]]:
    """Ask the API for every acknowledged message."""
    found = {}
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {key}"
        for message_id in dict.fromkeys(order.message_id for order in history.of(Order) if order.message_id):
            answer = session.get(f"{url}/api/v1/messages/{message_id}/status", timeout=PATIENCE_S)
            answer.raise_for_status()
            found[message_id] = answer.json()
    return found


def _counted(history: History, database: Path) -> Counter[str]:
    """Count what the rules do not."""
    counts = Counter[str]()
    counts["kills"] = len(history.of(Kill))
    counts["orderly stops"] = sum(note.text.startswith("stop") for note in history.of(Note))
    for call in history.of(SendCall):
        counts["look-ups" if call.text is None else "Send API calls"] += 1
    with reading(database) as connection:
        sql = "SELECT outcome, COUNT(*) FROM history WHERE kind IN ('call', 'look_up') GROUP BY outcome"
        counts.update({f"attempts {outcome}": number for outcome, number in connection.execute(sql)})
    return counts


def _evidence(violations: list[rules.Violation], history: History, folder: Path, most: int = 5) -> list[str]:
    told = []
    for violation in violations[:most]:
        told += ["", f"--- {violation.rule}: {violation.problem}", *history.around(violation.names)]
        ids = [name for name in violation.names if name.startswith(("evt_", "msg_", "dlv_"))]
        told += processes.log_lines(folder, ids) if ids else []
    return told
