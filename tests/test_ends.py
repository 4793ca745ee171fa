"""What has ended leaves nothing of the database open: each thread closes its own connection."""

import sqlite3
import threading
from pathlib import Path

import pytest
import requests

from crmbridge import bridge
from crmbridge.store import sqlite
from crmbridge.store.deliveries import Claimed, Outcome
from tests import rig as rigs
from tests import served as servers
from tests.waiting import PATIENCE_S, until


def is_open(connection: sqlite3.Connection) -> bool:
    try:
        return connection.total_changes >= 0  # which any thread may ask for
    except sqlite3.ProgrammingError:
        return False


def test_threads_that_end_close_their_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[sqlite3.Connection, str]] = []  # kept here, so that none is closed by being forgotten
    guard = sqlite.guard

    def note(connection: sqlite3.Connection) -> sqlite3.Connection:
        made.append((connection, threading.current_thread().name))
        guarded: sqlite3.Connection = guard(connection)
        return guarded

    monkeypatch.setattr(sqlite, "guard", note)

    def send(claimed: Claimed) -> Outcome:
        rig.db.value("SELECT 1")
        return Outcome("done")

    with rigs.opened(tmp_path) as rig:
        rig.account()
        rig.engine._senders = {"crm": send}
        rig.say("hello", "mid-1")
        rig.drain()
        worker = bridge.make_worker(rig.rooms)
        worker._helpers = ()  # nobody waits for their end, and they close after each work
        worker.start()
        with servers.opened(rig) as server:
            headers = {"Authorization": f"Bearer {server.make_key()}"}
            answer = requests.get(f"{server.url}/api/v1/accounts", headers=headers, timeout=PATIENCE_S)
            assert answer.status_code == 200
            until(lambda: {name.strip("-_0123456789") for _, name in made}, {"sender", "waitress", "Worker"}.issubset)
        assert worker.stop(PATIENCE_S)
    until(lambda: [name for connection, name in made if is_open(connection)], lambda left: not left)
