"""Regular upkeep: lanes and unrouted events put right, heartbeats, retention. Each job is safe to run at any time."""

import time
from collections.abc import Callable

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.config import Retention
from crmbridge.events import instant
from crmbridge.store import accounts, inbound, pauses, turn, vitals
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import Patience

_DAY_S = 86_400


class Upkeep:
    """The jobs, with the database and the clock they work by."""

    def __init__(
        self,
        db: Database,
        retention: Retention,
        patience: Patience,
        alarm: Alarm,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db = db
        self._retention = retention
        self._patience = patience
        self._alarm = alarm
        self._clock = clock

    def sweep(self) -> None:
        """Give headless lanes a head, and route events whose account came after them."""
        repaired = turn.repair(self._db, self._clock())
        if repaired:
            log.warning("sweep.repaired", lanes=repaired)
        for account in accounts.everyone(self._db):
            adopted = inbound.adopt(self._db, account, self._clock(), self._patience)
            if adopted:
                log.info("account.adopted", account=account["id"], events=adopted)

    def expire(self) -> None:
        """End what could not even be tried in its time."""
        for (target, code, account), rows in turn.expire(self._db, self._clock(), self._patience).items():
            log.error("delivery.expired", target=target, account=account, code=code, deliveries=rows)
            problem = f"{rows} could not even be tried in time: the far side was unavailable for too long"
            if target == "crm":
                self._alarm.alert("dead_letter", problem, account=account, causes=rows)
            elif code == "in_doubt":
                self._alarm.alert("in_doubt", problem, account=account, causes=rows)

    def resume(self) -> bool:
        """End the pauses whose time has come; tell whether there were any."""
        now, ended = instant(self._clock()), False

        def is_over(pause: Row) -> bool:
            return pause["until"] is not None and pause["until"] <= now

        for pause in pauses.over(self._db, now):
            account, target = pause["account_id"], pause["target"]
            if pauses.resume(self._db, account, target, now=now, patience=self._patience, when=is_over):
                log.info("account.resumed", account=account, target=target, until=pause["until"])
                ended = True
        return ended

    def beat(self) -> None:
        """Write the worker's heartbeat."""
        vitals.beat(self._db, "worker", self._clock())

    def prune(self) -> None:
        """Erase texts and rows that are older than retention says."""

        def before(days: int) -> str:
            return instant(self._clock() - days * _DAY_S)

        kept = self._retention
        touched = vitals.prune(
            self._db,
            texts_before=before(kept.text_days),
            rows_before=before(kept.metadata_days),
            unrouted_before=before(kept.unrouted_days),
        )
        if touched:
            log.info("retention.pruned", rows=touched, **self._db.sizes())
