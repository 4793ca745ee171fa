"""The engine: claim, call, record, follow up. Knows schedules, lanes' endpoints and slots, but no channel.

Senders are passed in: functions that make one call and return its Outcome, or raise Retry, Refused or InDoubt.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from crmbridge import log
from crmbridge.errors import AttemptFailed, BridgeError, InDoubt, Refused, Retry
from crmbridge.events import epoch_s, instant
from crmbridge.store import turn
from crmbridge.store.contacts import Target
from crmbridge.store.database import Database
from crmbridge.store.deliveries import Claimed, Outcome, Verdict
from crmbridge.store.messages import Patience
from crmbridge.store.turn import Endpoint, Finished

Sender = Callable[[Claimed], Outcome]
Alert = Callable[..., None]

HINT_MIN_S, HINT_MAX_S = 1.0, 21_600.0
FAULT_S = 60.0
SLOW_S = 5.0
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Schedule:
    """The visible lists of delays, in seconds, and the engine's sizes."""

    crm_quick_s: tuple[float, ...]
    crm_slow_s: tuple[float, ...]
    instagram_retry_s: tuple[float, ...]
    instagram_unavailable_s: tuple[float, ...]
    in_doubt_s: float
    lease_s: float
    senders: int
    slots_per_endpoint: int
    patience: Patience


def decide(
    claimed: Claimed, outcome: Outcome, schedule: Schedule, now_s: float, jitter: Callable[[], float]
) -> Verdict:
    """Return what becomes of a delivery. `jitter` yields a factor around 1 for the listed delays.

    A Retry-After of the far side wins over the list, within 1 s and 6 h. The last try comes no later
    than the row's `expires_at`, so that no change of the lists can strand a row.
    """
    now = instant(now_s)
    if outcome.kind == "done":
        return Verdict("done", now)
    if outcome.kind == "refused":
        return Verdict("dead", now)
    if outcome.kind == "in_doubt":
        return Verdict("pending", instant(now_s + schedule.in_doubt_s), in_doubt=True)
    if outcome.kind == "fault":
        return Verdict("pending", instant(now_s + FAULT_S * jitter()))
    expires_s = epoch_s(claimed.expires_at)
    if now_s >= expires_s:
        return Verdict("dead", now)
    steps_aside = False
    if claimed.target == "crm":
        delays, tried = schedule.crm_quick_s + schedule.crm_slow_s, claimed.retries
        steps_aside = tried >= len(schedule.crm_quick_s)
    elif outcome.counts:
        delays, tried = schedule.instagram_retry_s, claimed.retries
        if tried >= len(delays):
            return Verdict("dead", now)
    else:
        delays, tried = schedule.instagram_unavailable_s, claimed.waits
    if outcome.after_s is not None:
        delay_s = min(max(outcome.after_s, HINT_MIN_S), HINT_MAX_S)
    else:
        delay_s = delays[min(tried, len(delays) - 1)] * jitter()
    return Verdict("pending", instant(min(now_s + delay_s, expires_s)), steps_aside=steps_aside)


class Engine:
    """Drains what is due; one drain at a time does all bookkeeping, a few threads make the calls."""

    def __init__(
        self,
        db: Database,
        senders: Mapping[Target, Sender],
        schedule: Schedule,
        alert: Alert,
        *,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2),  # noqa: S311
        linger_s: float = 2.0,
    ) -> None:
        self._db = db
        self._senders = senders
        self._schedule = schedule
        self._alert = alert
        self._clock = clock
        self._jitter = jitter
        self._linger_s = linger_s  # a drain sleeps this long for the next due row; Huey's schedule is coarser
        self._pool = ThreadPoolExecutor(schedule.senders, thread_name_prefix="sender")
        self._changed = threading.Condition()
        self._finished: list[tuple[Claimed, Outcome]] = []
        self._in_flight: Counter[Endpoint] = Counter()
        self._draining = False
        self._news = False
        self._stopping = False

    def tell(self) -> bool:
        """Tell a running drain that there may be something new; False when none runs and a bell is needed."""
        with self._changed:
            self._news = True
            self._changed.notify()
            return self._draining

    def recover(self) -> int:
        """Take back what a worker that no longer runs had claimed. Only for the holder of the worker lock."""
        return turn.recover(self._db, self._clock(), self._schedule.in_doubt_s)

    def drain(self) -> float | None:
        """Work until nothing is due or in flight; return when to come back, in seconds since the epoch."""
        with self._changed:
            if self._draining:
                self._news = True
                return None
            self._draining = True
        try:
            while True:
                next_s = self._turn()
                if not self._wait(next_s):
                    return next_s
        except BaseException:
            with self._changed:
                self._draining = False
            raise

    def stop(self, grace_s: float) -> bool:
        """Claim no more and wait for the calls in flight; False when some were left to their lease."""
        deadline = time.monotonic() + grace_s
        with self._changed:
            self._stopping = True
            self._changed.notify()
            while (self._draining or self._busy()) and time.monotonic() < deadline:
                self._changed.wait(0.05)
            clean = not self._busy() and not self._draining
        self._pool.shutdown(wait=False, cancel_futures=True)
        return clean

    def _busy(self) -> bool:
        return bool(self._in_flight.total() or self._finished)

    def _turn(self) -> float | None:
        """Do one round of bookkeeping and start the calls it claimed; return when the next row is due."""
        with self._changed:
            self._news = False
            finished, self._finished = self._finished, []
            free = self._schedule.senders - self._in_flight.total()
        now_s = self._clock()
        settled = [
            Finished(claimed, outcome, decide(claimed, outcome, self._schedule, now_s, self._jitter))
            for claimed, outcome in finished
        ]
        try:
            found = turn.take(
                self._db,
                settled,
                free=self._free_slots,
                senders=0 if self._stopping else free,
                now_s=now_s,
                lease_s=self._schedule.lease_s,
                in_doubt_s=self._schedule.in_doubt_s,
                patience=self._schedule.patience,
            )
        except BaseException:
            with self._changed:  # what came back must be recorded by the next drain
                self._finished = finished + self._finished
            raise
        for claimed in found.claimed:
            with self._changed:
                self._in_flight[claimed.target, claimed.account_id] += 1
            self._pool.submit(self._attempt, claimed)
        for entry in settled:
            self._report(entry, now_s)
        for claimed in found.fenced:
            log.warning("delivery.fenced", delivery=claimed.id, claim=claimed.claim_id)
        for row in found.in_doubt:
            self._alert("in_doubt", f"send {row['message_id']} ended in doubt", delivery=row["id"])
        for row in found.unrendered:
            self._alert("system_fault", f"delivery {row['id']} cannot be rendered", delivery=row["id"])
        return epoch_s(found.next_due) if found.next_due else None

    def _free_slots(self, endpoint: Endpoint) -> int:
        return self._schedule.slots_per_endpoint - self._in_flight[endpoint]

    def _wait(self, next_s: float | None) -> bool:
        """Sleep until there is something to do; False when the drain should end."""
        with self._changed:
            if self._finished:
                return True
            if self._stopping and not self._in_flight.total():
                return self._leave()
            if self._news and not self._stopping:
                return True
            left_s = None if next_s is None else next_s - self._clock()
            if self._in_flight.total():
                self._changed.wait(_LOOK_AGAIN_S if left_s is None or left_s <= 0 else min(left_s, _LOOK_AGAIN_S))
                return True
            if left_s is None or left_s > self._linger_s:
                return self._leave()
            self._changed.wait(max(left_s, 0.001))
            return True

    def _leave(self) -> bool:
        # Under the lock, so that no news can slip in between the last look and the end of the drain.
        self._draining = False
        return False

    def _attempt(self, claimed: Claimed) -> None:
        started = time.monotonic()
        with log.correlated(claimed.correlation_id):
            try:
                outcome = self._senders[claimed.target](claimed)
            except AttemptFailed as failure:
                outcome = _outcome(failure)
            except BridgeError as failure:
                outcome = Outcome("fault", failure.code, failure.message, counts=False)
            except Exception as error:
                log.exception("delivery.fault", delivery=claimed.id, target=claimed.target)
                # A send may have gone out before our own code failed.
                kind = "in_doubt" if claimed.target == "instagram" else "fault"
                outcome = Outcome(kind, "system_fault", type(error).__name__, counts=False)  # type: ignore[arg-type]
        outcome = replace(outcome, ms=int((time.monotonic() - started) * 1000))
        with self._changed:
            self._in_flight[claimed.target, claimed.account_id] -= 1
            self._finished.append((claimed, outcome))
            self._changed.notify()

    def _report(self, entry: Finished, now_s: float) -> None:
        claimed, outcome, verdict = entry.claimed, entry.outcome, entry.verdict
        latency_s = turn.latency_s(claimed, now_s)
        write = log.info if outcome.kind == "done" else log.warning
        write(
            "delivery.attempted",
            delivery=claimed.id,
            target=claimed.target,
            event=claimed.event,
            account=claimed.account_id,
            event_id=claimed.event_id,
            message_id=claimed.message_id,
            attempt=claimed.number,
            outcome=outcome.kind,
            code=outcome.code,
            http=outcome.http_status,
            error=outcome.message if outcome.kind != "done" else None,
            ms=outcome.ms,
            latency_ms=int(latency_s * 1000),
            state=verdict.state,
            next_s=round(epoch_s(verdict.due) - now_s, 1) if verdict.state == "pending" else None,
            correlation=claimed.correlation_id,
        )
        if verdict.state == "done" and latency_s > SLOW_S:
            log.warning(
                "performance.delivery_slow",
                delivery=claimed.id,
                target=claimed.target,
                account=claimed.account_id,
                latency_ms=int(latency_s * 1000),
                correlation=claimed.correlation_id,
            )
        if outcome.kind in ("fault", "in_doubt") and outcome.code == "system_fault":
            self._alert("system_fault", f"our own code failed at delivery {claimed.id}", delivery=claimed.id)
        if outcome.alert:
            self._alert(outcome.code or "refused", outcome.message or "", account=claimed.account_id)
        elif verdict.state == "dead" and claimed.target == "crm":
            problem = f"a delivery to the CRM of {claimed.account_id} is dead: {outcome.message}"
            self._alert("dead_letter", problem, account=claimed.account_id, delivery=claimed.id)


def _outcome(failure: AttemptFailed) -> Outcome:
    known = {"code": failure.code, "message": failure.message, "http_status": failure.http_status}
    if isinstance(failure, Retry):
        return Outcome("retry", **known, after_s=failure.after_s, counts=failure.counts)  # type: ignore[arg-type]
    if isinstance(failure, Refused):
        return Outcome("refused", **known, alert=failure.alert)  # type: ignore[arg-type]
    if isinstance(failure, InDoubt):
        return Outcome("in_doubt", **known)  # type: ignore[arg-type]
    raise TypeError(type(failure).__name__)
