"""A backlog in the database: what a turn costs beside a small one, what memory it takes, how fast it drains."""

import contextlib
import itertools
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from bench import proc
from bench.proc import say
from bench.stage import SHOP, Stage
from crmbridge import vault
from crmbridge.events import instant, new_id
from crmbridge.health import Room
from crmbridge.store import accounts, database, endpoints, turn
from crmbridge.store.deliveries import Patience
from crmbridge.store.turn import Terms

_TURNS, _FEW = 60, 100
_DAY_S = 86_400.0


def fill(path: Path, account_id: str, shop: str, number: int, lanes: int) -> None:
    """Write `number` customer messages that wait for the account's CRM, in `lanes` conversations of equal length."""
    now_s = time.time()
    now = instant(now_s)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for turn_number in range(number):
            lane, sequence = turn_number % lanes, turn_number // lanes + 1
            contact, event_id = f"70{lane:07}", new_id("evt")
            payload = f'{{"text": "waiting {turn_number}", "message_type": "text"}}'
            db.execute(
                "INSERT INTO events (id, account_id, instagram_account_id, contact, kind, sequence, dedupe_key,"
                " instagram_message_id, state, payload, occurred_at, received_at, correlation_id)"
                " VALUES (?, ?, ?, ?, 'message.received', ?, ?, ?, 'forwarded', ?, ?, ?, 'bench')",
                (
                    event_id,
                    account_id,
                    shop,
                    contact,
                    sequence,
                    f"message:{event_id}",
                    f"mid-{event_id}",
                    payload,
                    now,
                    now,
                ),
            )
            db.execute(
                "INSERT INTO deliveries (id, target, account_id, contact, event, event_id, place, due,"
                " correlation_id, accepted_at, aged_from)"
                " VALUES (?, 'crm', ?, ?, 'message.received', ?, ?, ?, 'bench', ?, ?)",
                (
                    new_id("dlv"),
                    account_id,
                    contact,
                    event_id,
                    "head" if sequence == 1 else "behind",
                    now,
                    now,
                    now,
                ),
            )
        for lane in range(lanes):
            db.execute(
                "INSERT INTO contacts (account_id, contact, conversation_id, crm_sequence, created_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (account_id, f"70{lane:07}", new_id("cnv"), number // lanes + 1, now),
            )


def show(options: Any) -> None:
    """Print what a turn takes, and how a server does that has a backlog: it is to drain in the lanes' order."""
    many, place = options.waiting, tempfile.TemporaryDirectory(prefix="crmbridge-bench-", dir=options.folder)
    with place, Stage(Path(place.name)) as stage:
        say("A turn, ms, by deliveries that wait", _FEW, many, "ratio")
        for name, lanes, is_held in (
            ("claims one, each in a lane of its own", many, False),
            ("claims one, behind 100 lane heads", _FEW, False),
            ("claims none, all of them held", many, True),
        ):
            small, large = _turns_ms(stage.folder, [(_FEW, _FEW), (many, lanes)], is_held=is_held)
            say(f"  {name}", small, large, large / small)
        stage.stop()
        stage.crm_works(False)
        fill(stage.folder / "var" / "bridge.db", stage.account_id, SHOP, many, max(many // 100, 1))
        stage.start()
        time.sleep(10)
        say(f"{many} behind a dead CRM, MB", "dirty", "PSS", "RSS")
        say("  after ten seconds", *list(proc.memory(stage.pid).values())[:3])
        stage.crm_works(True)
        began = time.monotonic()
        came = stage.arrivals(min(many, 20_000), wait_s=600)
        pairs = [pair for heard in came.lanes.values() for pair in itertools.pairwise(heard)]
        say("  draining, a second", len(came.texts) / (came.last - began))
        say("  out of their order", sum(later < earlier for earlier, later in pairs))
        say("  while draining", *list(proc.memory(stage.pid).values())[:3])


def _turns_ms(folder: Path, sizes: Sequence[tuple[int, int]], *, is_held: bool) -> list[float]:
    """Return the median time of a turn that claims one row, or none, for each backlog of (number, lanes).

    The backlogs take turns, so that a disk that is slow for a while is slow for all of them.
    """
    with contextlib.ExitStack() as stack:
        takes = [stack.enter_context(_backlog(folder, *size, is_held=is_held)) for size in sizes]
        times: list[list[float]] = [[] for _ in takes]
        for _ in range(_TURNS):
            for take, taken in zip(takes, times, strict=True):
                began = time.perf_counter()
                assert take() == (not is_held)
                taken.append((time.perf_counter() - began) * 1000)
    return [statistics.median(taken) for taken in times]


@contextlib.contextmanager
def _backlog(folder: Path, number: int, lanes: int, *, is_held: bool) -> Iterator[Callable[[], int]]:
    path = folder / f"{new_id('backlog')}.db"
    db = database.create(path)
    db.migrate()
    keys = vault.Vault([Fernet.generate_key().decode()])
    account = accounts.create(
        db, keys, {"instagram_account_id": "1"}, token="IGAA", secret="bench-secret", url="http://127.0.0.1:1/"
    )
    fill(path, account["id"], "1", number, lanes)
    if is_held:
        endpoints.pause(db, account["id"], ["deliveries"])
    terms = Terms(time.time(), 90, 5, Patience(_DAY_S, _DAY_S))
    yield lambda: len(turn.take(db, [], terms, look=None, room=lambda *_: Room(1, 1), senders=1).claimed)
    db.close()
