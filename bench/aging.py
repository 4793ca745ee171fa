"""Old messages in the database, and when the bridge was busy taking them away."""

import contextlib
import re
import sqlite3
import time
from pathlib import Path

from crmbridge.events import epoch_s, instant, new_id

_DAY_S = 86_400.0
_TEXT = "What an average message says, and then some: " + "is the blue lamp still in stock? " * 8


def fill(path: Path, account_id: str, shop: str, number: int) -> None:
    """Write `number` delivered messages with their attempts: half have a text to lose, half are to go altogether."""
    now_s = time.time()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for turn in range(number):
            gone = int(turn < number // 2)
            at = instant(now_s - (91 if gone else 8) * _DAY_S + turn / 100)
            contact, event_id, delivery_id = f"60{turn % 500:07}", new_id("evt"), new_id("dlv")
            payload = None if gone else f'{{"text": "{_TEXT}", "message_type": "text"}}'
            body = None if gone else f'{{"event": "message.received", "event_id": "{event_id}", "message": "{_TEXT}"}}'
            db.execute(
                "INSERT INTO inbound_events (id, account_id, instagram_account_id, contact, kind, dedupe_key,"
                " instagram_message_id, state, payload, occurred_at, received_at, correlation_id)"
                " VALUES (?, ?, ?, ?, 'message.received', ?, ?, 'forwarded', ?, ?, ?, ?)",
                (
                    event_id,
                    account_id,
                    shop,
                    contact,
                    f"message:{event_id}",
                    f"mid-{event_id}",
                    payload,
                    at,
                    at,
                    event_id,
                ),
            )
            db.execute(
                "INSERT INTO deliveries (id, target, account_id, contact, sequence, event, event_id, body, state,"
                " ready, due, attempts, tried_at, correlation_id, accepted_at, expires_at, finished_at, gone)"
                " VALUES (?, 'crm', ?, ?, ?, 'message.received', ?, ?, 'done', 1, ?, 1, ?, ?, ?, ?, ?, ?)",
                (delivery_id, account_id, contact, turn // 500 + 1, event_id, body, at, at, event_id, at, at, at, gone),
            )
            db.execute(
                "INSERT INTO delivery_attempts (delivery_id, claim_id, kind, number, started_at, finished_at, outcome,"
                " http_status, duration_ms) VALUES (?, ?, 'call', 1, ?, ?, 'done', 200, 12)",
                (delivery_id, new_id("clm"), at, at),
            )


def left(path: Path) -> int:
    """Return how many of the old messages are still to be seen to."""
    before = instant(time.time() - 7.5 * _DAY_S)
    sql = "SELECT SUM(gone = 0) + SUM(finished_at < ?) FROM deliveries WHERE state <> 'pending' AND finished_at < ?"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return int(db.execute(sql, (instant(time.time() - 90.5 * _DAY_S), before)).fetchone()[0] or 0)


def runs(log: str) -> list[tuple[float, float]]:
    """Return from when to when each run of retention took, in time.monotonic() seconds, as the log tells."""
    ahead_s = time.time() - time.monotonic()
    found = re.findall(r"^(\S+) info retention\.pruned .*?\bseconds=([\d.]+)", log, re.MULTILINE)
    return [(epoch_s(at) - ahead_s - float(seconds), epoch_s(at) - ahead_s) for at, seconds in found]
