"""Regular upkeep: lanes and unrouted events put right, heartbeats, retention. Each job is safe to run at any time."""

import time
from collections.abc import Callable

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.clock import Clock
from crmbridge.config import Retention
from crmbridge.errors import Unavailable
from crmbridge.events import instant
from crmbridge.store import accounts, endpoints, inbound, privacy, retention, turn, vitals
from crmbridge.store.database import Database
from crmbridge.store.deliveries import Patience

_DAY_S = 86_400
_MB = 2**20
_KEY_DAYS = 7  # the channel repeats events for days, and CRMs their sends
_YOUNG_DAYS = 1  # a CRM that pulls, or a person, may still want the text
_LEFTOVERS_S = 10.0
_LARGE_LOG_BYTES = 32 * _MB


class Upkeep:
    """The jobs, with the database and the clock they work by."""

    def __init__(
        self,
        db: Database,
        retain: Retention,
        patience: Patience,
        alarm: Alarm,
        *,
        clock: Clock | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._db = db
        self._retention = retain
        self._patience = patience
        self._alarm = alarm
        self._clock = clock or Clock()
        self._pause = pause

    def sweep(self) -> None:
        """Give headless lanes a head, end what is owed where nothing goes, and route what came before its account."""
        repaired = turn.repair(self._db)
        if repaired:
            log.warning("sweep.repaired", lanes=repaired)
        ended = turn.end_leftovers(self._db, budget_s=_LEFTOVERS_S, pause=self._pause)
        if ended:
            log.info("sweep.ended", deliveries=ended)
        for account in accounts.everyone(self._db):
            adopted = inbound.adopt(self._db, account)
            if adopted:
                log.info("account.adopted", account=account["id"], events=adopted)

    def expire(self) -> None:
        """End what could not even be tried in its time."""
        is_steady = self._clock.steady()
        ended = turn.expire(self._db, self._clock.now_s(), self._patience, go_on=is_steady)
        for (target, code, account), rows in ended.items():
            log.error("delivery.expired", target=target, account=account, code=code, deliveries=rows)
            kind = "dead_letter" if target == "crm" else "in_doubt" if code == "in_doubt" else "sends_expired"
            what = "deliveries to the CRM" if target == "crm" else "sends"
            problem = f"{rows} {what} could not be tried in time: the far side was unavailable for too long"
            self._alarm.alert(kind, problem, account=account, causes=rows)

    def resume(self) -> bool:
        """End the pauses whose time has come; tell whether there were any."""
        is_steady = self._clock.steady()
        ended = False
        for over in endpoints.paused_too_long(self._db, instant(self._clock.now_s())):
            account, target = over["account_id"], over["kind"]
            if is_steady() and endpoints.resume(self._db, account, target, only_over=True):
                log.info("account.resumed", account=account, target=target, until=over["paused_until"], by="until")
                ended = True
        return ended

    def beat(self) -> None:
        """Write the worker's heartbeat."""
        vitals.beat(self._db, "worker", self._clock.now_s())

    def erase(self) -> None:
        """Erase the accounts whose owners asked Meta for it."""
        for done in privacy.erase_accounts(self._db, self._clock.now_s()):
            rows = {name: done[name] for name in ("deliveries", "messages", "events")}
            log.info("account.erased", account=done["account_id"], request=done["id"], **rows)

    def prune(self) -> None:
        """Take the texts and rows that are older, or more, than retention says; no clock that was just set tells."""
        if not self._clock.is_trusted():
            return
        now_s, kept, began = self._clock.now_s(), self._retention, time.monotonic()

        def before(days: int) -> str:
            return instant(now_s - days * _DAY_S)

        terms = retention.Terms(
            texts_before=before(kept.text_days),
            rows_before=before(kept.metadata_days),
            unrouted_before=before(kept.unrouted_days),
            keys_before=before(_KEY_DAYS),
            young_from=before(_YOUNG_DAYS),
            unrouted_most=kept.unrouted_max,
            bytes_most=kept.max_mb * _MB,
        )
        swept = retention.sweep(self._db, terms, pause=self._pause)
        if swept.unrouted:
            log.warning("unrouted.dropped", events=swept.unrouted)
        if swept.texts or swept.rows or swept.pages:
            log.info(
                "retention.pruned",
                texts=swept.texts,
                rows=swept.rows,
                pages_freed=swept.pages,
                seconds=round(time.monotonic() - began, 2),
                **self._db.sizes(),
            )
        if swept.is_large:
            used = self._db.used_bytes()
            problem = (
                f"the database uses {used / _MB:.1f} MB, more than [retention] max_mb = {kept.max_mb}: what is left is "
                f"owed, or younger than {_KEY_DAYS} days"
            )
            self._alarm.alert("database_large", problem)
            log.warning("storage.database_large", max_mb=kept.max_mb, used_bytes=used)
        elif swept.is_large is False:
            self._alarm.clear("database_large")

    def checkpoint(self) -> None:
        """Carry the database's log over; say so when it grows all the same."""
        try:
            carried = self._db.checkpoint()
        except Unavailable as error:
            log.warning("storage.checkpoint_failed", error=error.message)
            return
        size = self._db.sizes()["wal_bytes"]
        if not carried and size > _LARGE_LOG_BYTES:
            log.warning("storage.wal_large", wal_bytes=size, cause="a long read of the database")
