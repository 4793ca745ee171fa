"""A backlog in the database: what a claim costs beside a small one, what memory it takes, how fast it drains."""

import contextlib
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from crmbridge.endpoints import Room
from crmbridge.events import instant, new_id
from crmbridge.store import database, turn
from crmbridge.store.deliveries import Patience
from crmbridge.store.turn import Terms

_CLAIMS = 60
_DAY_S = 86_400.0


def fill(path: Path, account_id: str, shop: str, number: int, lanes: int) -> None:
    """Write `number` customer messages that wait for the account's CRM, in `lanes` conversations of equal length."""
    now_s = time.time()
    now, expires = instant(now_s), instant(now_s + _DAY_S)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for turn_number in range(number):
            lane, sequence = turn_number % lanes, turn_number // lanes + 1
            contact, event_id = f"70{lane:07}", new_id("evt")
            payload = f'{{"text": "waiting {turn_number}", "message_type": "text"}}'
            db.execute(
                "INSERT INTO inbound_events (id, account_id, instagram_account_id, contact, kind, dedupe_key,"
                " instagram_message_id, state, payload, occurred_at, received_at, correlation_id)"
                " VALUES (?, ?, ?, ?, 'message.received', ?, ?, 'forwarded', ?, ?, ?, 'bench')",
                (event_id, account_id, shop, contact, f"message:{event_id}", f"mid-{event_id}", payload, now, now),
            )
            db.execute(
                "INSERT INTO deliveries (id, target, account_id, contact, sequence, event, event_id, state, ready, due,"
                " correlation_id, accepted_at, expires_at)"
                " VALUES (?, 'crm', ?, ?, ?, 'message.received', ?, 'pending', ?, ?, 'bench', ?, ?)",
                (new_id("dlv"), account_id, contact, sequence, event_id, int(sequence == 1), now, now, expires),
            )
        for lane in range(lanes):
            db.execute(
                "INSERT INTO contacts (account_id, contact, conversation_id, crm_sequence, created_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (account_id, f"70{lane:07}", new_id("cnv"), number // lanes + 1, now),
            )


def claims_ms(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[float]:
    """Return the median time of a turn that claims one row, for each backlog of (number, lanes), in milliseconds.

    The backlogs take turns, so that a disk that is slow for a while is slow for all of them.
    """
    with contextlib.ExitStack() as stack:
        takes = [stack.enter_context(_backlog(folder, *size)) for size in sizes]
        times: list[list[float]] = [[] for _ in takes]
        for _ in range(_CLAIMS):
            for take, taken in zip(takes, times, strict=True):
                began = time.perf_counter()
                assert take() == 1
                taken.append((time.perf_counter() - began) * 1000)
    return [statistics.median(taken) for taken in times]


@contextlib.contextmanager
def _backlog(folder: Path, number: int, lanes: int) -> Iterator[Callable[[], int]]:
    path = folder / f"{new_id('backlog')}.db"
    db = database.create(path)
    db.migrate()
    account = {"id": new_id("acc"), "instagram_account_id": "1", "status": "active", "status_since": instant(0)}
    times = {"created_at": instant(0), "updated_at": instant(0), "crm_webhook_url": "http://127.0.0.1:1/"}
    db.write(lambda: db.insert("accounts", account | times))
    fill(path, account["id"], "1", number, lanes)
    terms = Terms(time.time(), 90, 5, Patience(_DAY_S, _DAY_S))
    yield lambda: len(turn.take(db, [], terms, room=lambda *_: Room(1, 1), senders=1).claimed)
    db.close()
