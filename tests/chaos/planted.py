"""Starts the bridge with a bug on purpose: ``python -m tests.chaos.planted BUG serve --config FILE``.

Each bug breaks one sentence of the promise; the checker must tell. The package itself is not touched.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from crmbridge import cli, delivery, worker
from crmbridge.store import deliveries, inbound, turn


def _plant(room: Any, **bugs: Callable[..., Any]) -> None:
    for name, bug in bugs.items():
        assert hasattr(room, name)
        setattr(room, name, bug)


def ack_before_commit() -> None:
    """Answer Meta first and store the events a moment later."""
    keep = inbound.keep

    def keep_later(db: Any, events: Sequence[Any], **about: Any) -> list[Any]:
        def store() -> None:
            time.sleep(0.1)
            keep(db, events, **about)
            db.close_thread()

        threading.Thread(target=store, daemon=True).start()
        return []

    _plant(inbound, keep=keep_later)


def claim_without_fencing() -> None:
    """Lease nothing and take any claim as one's own: a row that is being called may be called again."""
    take, record = turn.take, deliveries.record

    def take_again(db: Any, finished: Any, terms: Any, **how: Any) -> Any:
        return take(db, finished, replace(terms, lease_s=0.0), **{**how, "in_flight": ()})

    def record_any(db: Any, claimed: Any, *about: Any) -> bool:
        current = db.value("SELECT claim_id FROM deliveries WHERE id = ?", (claimed.id,))
        return record(db, replace(claimed, claim_id=current or claimed.claim_id), *about)

    _plant(turn, take=take_again)
    _plant(deliveries, record=record_any)


def huey_as_record() -> None:
    """Look only at rows that a bell of this process named, as if the queue held what is owed; no sweep, no recovery."""
    owe, due, named = deliveries.owe, deliveries.due, set[str]()

    def owe_by_bell(*about: Any, **how: Any) -> str:
        delivery_id = owe(*about, **how)
        named.add(delivery_id)
        return delivery_id

    def due_by_bell(*about: Any) -> list[Any]:
        db, target, account_id, rank, most = about
        return [row for row in due(db, target, account_id, rank, 1000) if row["id"] in named][:most]

    _plant(deliveries, owe=owe_by_bell, due=due_by_bell)
    _plant(delivery.Engine, recover=lambda _: 0)
    _plant(worker.Worker, ring=lambda _: None)


def resend_without_asking() -> None:
    """Take a send that may have gone out as one that did not."""
    decide, release = delivery.decide, deliveries.release

    def decide_boldly(claimed: Any, outcome: Any, *about: Any, **how: Any) -> Any:
        if outcome.kind == "in_doubt":
            outcome = replace(outcome, kind="retry")
        return decide(claimed, outcome, *about, **how)

    def release_boldly(*about: Any, **how: Any) -> None:
        release(*about, **{**how, "in_doubt": False})

    _plant(delivery, decide=decide_boldly)
    _plant(deliveries, release=release_boldly)


def die_before_ringing() -> None:
    """Not a bug but a moment: the process ends after the commit and before the bell."""

    def die(*_: Any) -> None:
        os._exit(9)

    _plant(worker.Worker, wake=die, ring=lambda _: None)


PLANTED: dict[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (ack_before_commit, claim_without_fencing, huey_as_record, resend_without_asking, die_before_ringing)
}

if __name__ == "__main__":
    PLANTED[sys.argv[1]]()
    sys.exit(cli.main(sys.argv[2:]))
