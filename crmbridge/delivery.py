"""The engine: claim, call, record, follow up. Knows schedules, endpoints and slots, but no channel's words.

Senders are passed in: functions that make one call and return its Outcome, or raise Retry, Refused or InDoubt.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from crmbridge import log
from crmbridge.alerts import Alarm
from crmbridge.clock import SET_S, Clock
from crmbridge.errors import AttemptFailed, BridgeError, InDoubt, Invalid, Refused, Retry, Unclear
from crmbridge.events import epoch_s, instant, new_id
from crmbridge.health import ASK, NO_ROOM, Change, Endpoint, Endpoints, Limits, Pace, Room
from crmbridge.store import deliveries, endpoints, history, turn, vitals
from crmbridge.store.database import Database, Row
from crmbridge.store.deliveries import ACTION, Claimed, Outcome, Patience, Verdict
from crmbridge.store.turn import Finished, Question, Terms, Turn

Sender = Callable[[Claimed], Outcome]
Asker = Callable[[Row], None]  # asks a far side; raises AttemptFailed or BridgeError when it does not answer well

HINT_MIN_S, HINT_MAX_S = 1.0, 21_600.0
FLOORS_S = {
    "timeout": 5.0,
    "rate_limited": 30.0,
    "rate_uneven": 300.0,
}  # by outcome code: no sooner than this, whatever the list says
FAULT_S = 60.0
SLOW_S = 5.0
_LONG_GONE_S = 86_400.0
_LOOK_AGAIN_S = 1.0
_FAULTS_IN_FRONT = 3
_BARREN_TURNS = 20
_UNWANTED = "crm_error"  # what a 410 comes to when others get through
# The alerts of what stops an account, and what to do about them.
_STOPS = {"crm": ("crm_gone", "crm_unauthorized"), "instagram": ("token_dead", "account_error")}
_WELL = {"crm": "the CRM takes an event again", "instagram": "Instagram answers again"}
_ROUNDED_S = 0.0005  # stored times are told in whole milliseconds


@dataclass(frozen=True)
class Schedule:
    """The visible lists of delays, in seconds.

    `look_up_s` are the pauses after a call that ended in doubt, and between looking for what it sent.
    """

    crm_quick_s: tuple[float, ...]
    crm_slow_s: tuple[float, ...]
    instagram_retry_s: tuple[float, ...]
    instagram_unavailable_s: tuple[float, ...]
    look_up_s: tuple[float, ...]
    lease_s: float
    senders: int
    patience: Patience


def decide(
    claimed: Claimed,
    outcome: Outcome,
    schedule: Schedule,
    now_s: float,
    jitter: Callable[[], float],
    *,
    endpoint_works: bool = True,
) -> Verdict:
    """Return what becomes of a delivery. `jitter` yields a factor around 1 for the listed delays.

    The next delay is the list's, raised to the floor of its code; a Retry-After of the far side wins over both,
    within 1 s and 6 h. The last try comes no later than the row's `expires_at`. A CRM lane's head whose quick retries
    are used up steps aside only while its endpoint works.
    """
    now = instant(now_s)
    if outcome.kind == "done":
        return Verdict("done", now)
    if outcome.kind == "refused":
        return Verdict("dead", now)
    if outcome.stops:
        return Verdict("pending", now, in_doubt=claimed.kind == "look_up")
    expires_s = epoch_s(claimed.expires_at)
    if outcome.kind == "fault":
        # Our own failing, not the far side's refusal: it uses up nothing, and holds up no other for long.
        due, worn = instant(now_s + FAULT_S * jitter()), claimed.target == "crm" and claimed.waits >= _FAULTS_IN_FRONT
        state: Literal["dead", "pending"] = "dead" if now_s >= expires_s else "pending"
        return Verdict(state, due, steps_aside=worn, in_doubt=claimed.kind == "look_up")
    if outcome.kind == "in_doubt":
        return Verdict("pending", instant(now_s + schedule.look_up_s[0]), in_doubt=True)
    if outcome.kind in ("absent", "unclear"):
        return _after_look_up(claimed, outcome, schedule, now_s, jitter)
    if now_s >= expires_s:
        return Verdict("dead", now)
    steps_aside = False
    if claimed.target == "crm":
        delays, tried = schedule.crm_quick_s + schedule.crm_slow_s, claimed.retries
        steps_aside = endpoint_works and is_worn(claimed, schedule)
    elif outcome.counts:
        # What only shows that somebody is there must not hold up what they say.
        at_most = 1 if claimed.event == ACTION else outcome.at_most
        delays, tried = schedule.instagram_retry_s[:at_most], claimed.retries
        if tried >= len(delays):
            return Verdict("dead", now)
    else:
        delays, tried = schedule.instagram_unavailable_s, claimed.waits
    if outcome.after_s is not None:
        delay_s = min(max(outcome.after_s, HINT_MIN_S), HINT_MAX_S)
    else:
        delay_s = max(delays[min(tried, len(delays) - 1)], FLOORS_S.get(outcome.code or "", 0)) * jitter()
    due = instant(min(now_s + delay_s, expires_s))
    return Verdict("pending", due, steps_aside=steps_aside, in_doubt=claimed.kind == "look_up")


def _after_look_up(
    claimed: Claimed, outcome: Outcome, schedule: Schedule, now_s: float, jitter: Callable[[], float]
) -> Verdict:
    """The channel did not show a doubtful send. Only absent twice running means not sent; unclear twice is the end."""
    absent = 0
    for told in (*claimed.seen, outcome.kind):
        absent = absent + 1 if told == "absent" else 0
    wanted = max(len(schedule.look_up_s), 2)
    if absent < wanted:
        is_over = outcome.kind == "unclear" and "unclear" in claimed.seen
        due = instant(now_s + schedule.look_up_s[min(absent or 1, len(schedule.look_up_s) - 1)])
        return Verdict("dead", instant(now_s)) if is_over else Verdict("pending", due, in_doubt=True)
    delays = schedule.instagram_retry_s
    if claimed.retries > len(delays) or now_s >= epoch_s(claimed.expires_at):
        return Verdict("dead", instant(now_s))
    # The next try is a retry like any other: it keeps the distance that the list says.
    tried_s = epoch_s(claimed.previous_at) if claimed.previous_at else now_s
    return Verdict("pending", instant(max(now_s, tried_s + delays[max(claimed.retries, 1) - 1] * jitter())))


def is_worn(claimed: Claimed, schedule: Schedule) -> bool:
    """Tell whether a row to a CRM has used up its quick retries."""
    return claimed.target == "crm" and claimed.retries >= len(schedule.crm_quick_s)


class Engine:
    """Drains what is due; one drain at a time does all bookkeeping, a few threads make the calls."""

    def __init__(
        self,
        db: Database,
        senders: Mapping[str, Sender],
        schedule: Schedule,
        limits: Limits,
        alarm: Alarm,
        *,
        askers: Mapping[str, Asker],
        conversations: Pace,
        clock: Clock | None = None,
        jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2),  # noqa: S311
        linger_s: float = 2.0,
        down_after_s: float = 900.0,
    ) -> None:
        self._db = db
        self._senders = senders
        self._askers = askers
        self._conversations = conversations
        self._schedule = schedule
        self._alarm = alarm
        self._clock = clock or Clock()
        self._jitter = jitter
        self._linger_s = linger_s  # a drain sleeps this long for the next due row; Huey's schedule is coarser
        self._down_after_s = down_after_s
        self._endpoints = Endpoints(limits, conversations)
        self._pool = _started_pool(schedule.senders)
        self._changed = threading.Condition()
        self._finished: list[tuple[Claimed, Outcome]] = []
        self._unrecorded: list[Finished] = []
        self._in_flight: dict[str, Claimed] = {}
        self._hasten: dict[Endpoint, str] = {}
        self._asking: set[Endpoint] = set()
        self._answers: list[tuple[Question, bool]] = []
        self._late: dict[Endpoint, int] = {}  # how many deliveries in a row were late
        self._stops: list[tuple[float, str]] = []  # when which account was stopped, of late
        self._started_s = self._clock.now_s()
        self._newest = 0  # the last delivery that the turn before has seen
        self._seen: dict[Endpoint, str] = {}  # what each endpoint was like when it was looked at; "": closed
        self._dues: dict[Endpoint, float] = {}  # when there is something to do for those that have something
        self._look: set[str] = set()  # the accounts of which something new was told
        self._look_at_all = True
        self._barren = 0  # turns in a row that brought nothing
        self._draining = False
        self._news = False
        self._stopping = False

    def tell(self, accounts: Collection[str] | None = None) -> bool:
        """Tell a drain that there may be something new for these accounts, or for any; False when none runs.

        Then a bell is needed.
        """
        with self._changed:
            if accounts is None:
                self._look_at_all = True
            else:
                self._look.update(accounts)
            self._news = True
            self._changed.notify()
            return self._draining

    def recover(self) -> int:
        """Take back what a worker that no longer runs had claimed. Only for the holder of the worker lock."""
        now_s = self._clock.now_s()
        last = vitals.last_beat(self._db, "worker")
        if last is not None and abs(now_s - epoch_s(last)) > _LONG_GONE_S:
            self._clock.doubt()  # switched off for long, or wrong
        if last is not None and now_s < epoch_s(last) - SET_S:
            # Started before the clock was set right: it will move everything along again when it is.
            log.warning("clock.behind", seconds=now_s - epoch_s(last))
            turn.follow_clock(self._db, now_s - epoch_s(last), None)
        return turn.recover(self._db, self._terms(now_s))

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
        return bool(self._in_flight or self._finished or self._unrecorded or self._asking)

    # --- a turn: bookkeeping in one transaction, then calls ---

    def _turn(self) -> float | None:
        """Do one round of bookkeeping and start the calls it claimed; return when the next row is due."""
        self._follow_clock()
        with self._changed:
            self._news = False
            finished, self._finished = self._finished, []
            answers, self._answers = self._answers, []
            told, self._look = self._look, set()
            look_at_all, self._look_at_all = self._look_at_all, False
            free = 0 if self._stopping else self._schedule.senders - len(self._in_flight) - len(self._asking)
            in_flight = frozenset(self._in_flight)
        now_s = self._clock.now_s()
        for claimed, _ in finished:
            self._endpoints.ended(_endpoint(claimed), is_retry=_is_retry(claimed), is_revived=claimed.is_revived)
        for question, is_answered in answers:
            self._note_answer(question, now_s, is_answered=is_answered)
        # Judged once, and kept until it is recorded, by a later drain if this one fails.
        # What was done comes first: it tells that a far side works that refuses something else.
        finished.sort(key=lambda entry: entry[1].kind != "done")
        self._unrecorded += [self._judge(claimed, outcome, now_s) for claimed, outcome in finished]
        schedule = self._schedule
        look = None if look_at_all else told | self._accounts_due(answers, now_s)
        found = turn.take(
            self._db,
            self._unrecorded,
            self._terms(now_s),
            look=look,
            room=lambda endpoint, is_on_trial=False: self._room(endpoint, now_s, is_on_trial=is_on_trial),
            senders=free,
            spare=schedule.senders // 3,
            hasten=self._hasten,
            in_flight=in_flight,
        )
        settled, self._unrecorded = self._unrecorded, []
        self._barren = 0 if settled or found.claimed or found.late else self._barren + 1
        for claimed in found.claimed:
            with self._changed:
                self._in_flight[claimed.claim_id] = claimed
            self._endpoints.started(_endpoint(claimed), is_retry=_is_retry(claimed), is_revived=claimed.is_revived)
            self._pool.submit(self._attempt, claimed)
        self._remember(found, look, now_s)
        for question in found.questions:
            self._ask(question)
        for entry in found.stopped:  # before what came of it
            self._tell_stopped(entry, now_s)
        for entry in found.recorded:
            self._report(entry, now_s, is_ours=entry.claimed not in found.fenced)
        self._report_oddities(found)
        return now_s if self._hasten else self._next_s(now_s)

    def _remember(self, found: Turn, look: Collection[str] | None, now_s: float) -> None:
        """Keep what a turn has seen of the endpoints it looked at, so that the next one looks only where it must."""
        self._newest = max(self._newest, found.newest)
        self._hasten = {
            one: until for one, until in self._hasten.items() if found.hastened.get(one, 0) == turn.HASTEN_AT_ONCE
        }
        changed = [one for one, seen in found.served.items() if self._seen.get(one, seen) != seen]
        for endpoint in changed:  # it was let go, or goes elsewhere: what failed before goes now
            self._endpoints.ask_again(endpoint)
            self._hasten[endpoint] = instant(now_s)
        self._seen |= dict.fromkeys(found.dues, "") | found.served
        passed = {one: due_s for one, due_s in self._dues.items() if look is not None and one[1] not in look}
        self._dues = passed | {one: epoch_s(due) for one, due in found.dues.items() if due is not None}
        waiting = (one for (kind, one), due_s in self._dues.items() if kind == ASK and due_s <= now_s)
        self._conversations.want(frozenset(waiting))

    def _accounts_due(self, answers: Sequence[tuple[Question, bool]], now_s: float) -> set[str]:
        """Return the accounts for which there is something to do by now."""
        asked = {question.account["id"] for question, _ in answers}
        answered = {entry.claimed.account_id for entry in self._unrecorded}
        return (
            asked
            | answered
            | {one for _, one in self._hasten}
            | {endpoint[1] for endpoint in self._dues if self._at_s(endpoint, now_s) <= now_s}
        )

    def _at_s(self, endpoint: Endpoint, now_s: float) -> float:
        """Return when there may be something to do for an endpoint: a row is due and it may be called."""
        return max(self._dues[endpoint], self._endpoints.rests_until_s(endpoint, now_s))

    def _next_s(self, now_s: float) -> float | None:
        return min((self._at_s(endpoint, now_s) for endpoint in self._dues), default=None)

    def _terms(self, now_s: float) -> Terms:
        return Terms(now_s, self._schedule.lease_s, self._schedule.look_up_s[0], self._schedule.patience)

    def _room(self, endpoint: Endpoint, now_s: float, *, is_on_trial: bool) -> Room:
        return NO_ROOM if self._stopping else self._endpoints.room(endpoint, now_s, is_on_trial=is_on_trial)

    def _judge(self, claimed: Claimed, outcome: Outcome, now_s: float) -> Finished:
        """Note what a call says about its endpoint, and decide what becomes of its delivery."""
        endpoint = _endpoint(claimed)
        if claimed.target == "crm" and outcome.stops and self._is_unwanted_alone(claimed, outcome):
            is_gone = outcome.kind == "retry"
            outcome = replace(outcome, code=_UNWANTED if is_gone else outcome.code, counts=True, stops=None)
        if outcome.kind == "in_doubt" and self._endpoints.is_broken(endpoint):
            outcome = replace(outcome, counts=False)  # it is Instagram as a whole, not this send
        rest_s = max(outcome.rest_s, (outcome.after_s or 0) if claimed.target == "instagram" else 0)
        if rest_s:
            self._endpoints.rest(endpoint, now_s + min(rest_s, HINT_MAX_S))
        change = self._note_call(claimed, outcome, now_s)
        if change is not None:
            self._follow(endpoint, change, outcome, now_s)
        works = not self._endpoints.is_broken(endpoint)
        verdict = decide(claimed, outcome, self._schedule, now_s, self._jitter, endpoint_works=works)
        if verdict.state == "dead" and claimed.kind == "look_up" and outcome.kind in ("retry", "fault", "unclear"):
            outcome = replace(outcome, code="in_doubt")  # nobody could tell whether it was sent
        return Finished(claimed, outcome, verdict)

    def _note_call(self, claimed: Claimed, outcome: Outcome, now_s: float) -> Change | None:
        """Tell the endpoints, and the alarm, whether the far side works; return what changed by that."""
        endpoint, change = _endpoint(claimed), None
        answered = outcome.kind in ("refused", "absent", "unclear") or (outcome.kind == "retry" and outcome.counts)
        if outcome.kind == "done" or (claimed.target == "instagram" and answered):
            change = self._endpoints.worked(endpoint, now_s, claimed.revision)
            if claimed.kind == "look_up":
                self._endpoints.answered(("instagram", claimed.account_id))
            else:
                self._alarm.clear(f"{claimed.target}_down", account=claimed.account_id, message=_WELL[claimed.target])
        elif outcome.kind in ("retry", "in_doubt") and not outcome.stops:
            change = self._endpoints.failed(
                endpoint,
                now_s,
                http_status=outcome.http_status,
                is_worn=is_worn(claimed, self._schedule),
                previous_s=epoch_s(claimed.previous_at) if claimed.previous_at else None,
                delivery=claimed.id,
                was_head=claimed.place == "head",
            )
            ends = f"; what was tried is given up at {claimed.expires_at}"
            self._tell_down((claimed.target, claimed.account_id), f"the last try: {outcome.message}{ends}", now_s)
        return change

    def _follow(self, endpoint: Endpoint, change: Change, outcome: Outcome, now_s: float) -> None:
        """Do what follows from an endpoint's change: what failed while it was down is tried at once."""
        target, account_id = endpoint
        if change == "proven":  # and what failed before a restart
            self._hasten[endpoint] = instant(self._started_s)
            return
        probe_s = round(self._endpoints.rests_until_s(endpoint, now_s) - now_s, 1) if change == "broken" else None
        log.warning(f"endpoint.{change}", target=target, account=account_id, code=outcome.code, probe_s=probe_s)
        if change == "recovered":  # but not what failed in this very call
            self._hasten[endpoint] = instant(now_s - outcome.ms / 1000 - 0.001)
            if target == "instagram":
                self._hasten[ASK, account_id] = self._hasten[endpoint]

    def _tell_down(self, endpoint: Endpoint, problem: str, now_s: float) -> None:
        """Raise an alert when an endpoint has done nothing but fail for long."""
        failing_s = self._endpoints.failing_s(endpoint, now_s)
        if failing_s >= self._down_after_s:
            since = f"it has been failing since {instant(now_s - failing_s)}"
            self._alarm.alert(f"{endpoint[0]}_down", f"{since}; {problem}", account=endpoint[1])

    def _is_unwanted_alone(self, claimed: Claimed, outcome: Outcome) -> bool:
        """Tell whether a far side that takes nothing any more takes others: then it is this one that it does not want.

        So it is when it took another after a call of this one began.
        """
        if (claimed.last_code, claimed.last_http_status) == (_UNWANTED, outcome.http_status):
            return True  # found so before
        began = history.first_call(self._db, claimed.id) or claimed.claimed_at
        return self._endpoints.worked_since(_endpoint(claimed), epoch_s(began) + _ROUNDED_S, claimed.revision)

    def _follow_clock(self) -> None:
        """When the clock was set, move all times along: nothing becomes due, or dies, by that."""
        jump_s = self._clock.jump_s()
        if not jump_s:
            return
        log.warning("clock.set", seconds=jump_s)
        # In one write, though it takes half a second for 100,000 rows: a row that is moved twice, or not at all,
        # because the steps were broken off could wait for as long as the clock was wrong.
        turn.follow_clock(self._db, jump_s, self._newest)
        self._endpoints.shift(jump_s)
        self._clock.follow(jump_s)
        self._dues, self._seen, self._look_at_all = {}, {}, True

    def _wait(self, next_s: float | None) -> bool:
        """Sleep until there is something to do; False when the drain should end."""
        with self._changed:
            if self._finished:
                return True
            if self._answers:
                return True
            if self._stopping and not self._in_flight:
                return self._leave()
            if self._news and not self._stopping:
                return True
            left_s = None if next_s is None else next_s - self._clock.now_s()
            if self._in_flight or self._asking:
                self._changed.wait(_LOOK_AGAIN_S if left_s is None or left_s <= 0 else min(left_s, _LOOK_AGAIN_S))
                return True
            if left_s is None or left_s > self._linger_s or self._barren > _BARREN_TURNS:
                return self._leave()
            self._changed.wait(max(left_s, 0.001))
            return True

    def _leave(self) -> bool:
        # Under the lock, so that no news can slip in between the last look and the end of the drain.
        self._draining = False
        return False

    # --- a call, on a thread of its own ---

    def _attempt(self, claimed: Claimed) -> None:
        started = time.monotonic()
        outcome = Outcome("fault", "system_fault", "the call was broken off", counts=False)
        if not claimed.is_repeatable:  # it may have gone out before our own code failed
            outcome = replace(outcome, kind="in_doubt")
        try:
            with log.correlated(claimed.correlation_id):
                try:
                    outcome = self._senders[claimed.target if claimed.kind == "call" else claimed.kind](claimed)
                except AttemptFailed as failure:
                    outcome = _outcome(failure, claimed.account_id)
                except BridgeError as failure:
                    outcome = Outcome("fault", failure.code, failure.message, counts=False)
                except Exception as error:
                    log.exception("delivery.fault", delivery=claimed.id, target=claimed.target)
                    outcome = replace(outcome, message=type(error).__name__)
        finally:
            self._db.close_thread()
            outcome = replace(outcome, ms=int((time.monotonic() - started) * 1000))
            with self._changed:
                del self._in_flight[claimed.claim_id]
                self._finished.append((claimed, outcome))
                self._changed.notify()

    # --- a question, which no delivery is about ---

    def _ask(self, question: Question) -> None:
        """Ask a far side on a thread of its own; a look-up that is under way asks Instagram just as well."""
        endpoint, is_asked = question.endpoint, self._endpoints.is_busy((ASK, question.account["id"]))
        if endpoint in self._asking or self._stopping or (question.hold is None and is_asked):
            return
        if len(self._asking) >= max(self._schedule.senders // 3, 1):
            return  # it is found again; a far side that hangs must not hold up what the others wait for
        if question.hold is None:
            self._endpoints.started(endpoint, is_retry=False)
        self._asking.add(endpoint)
        self._pool.submit(self._put, question)

    def _put(self, question: Question) -> None:
        target, account, hold = question.endpoint[0], question.account, question.hold
        is_answered, is_well, problem = False, False, None
        try:
            with log.correlated(new_id("req")):
                try:
                    self._askers[target](account)
                    is_answered = is_well = True
                except (AttemptFailed, BridgeError) as failure:
                    is_answered, problem = isinstance(failure, Invalid), failure.message
                except Exception as error:
                    log.exception("endpoint.fault", target=target, account=account["id"])
                    problem = type(error).__name__
                log.info("endpoint.asked", target=target, account=account["id"], well=is_well, error=problem)
                if hold is not None:
                    self._weigh(question, is_well=is_well)
        finally:
            self._db.close_thread()
            with self._changed:
                self._asking.discard(question.endpoint)
                self._answers.append((question, is_answered))
                self._changed.notify()

    def _weigh(self, question: Question, *, is_well: bool) -> None:
        """Let an endpoint go on trial whose far side answered well, or ask again later."""
        hold, target, account = question.hold, question.endpoint[0], question.account
        assert hold is not None  # noqa: S101
        try:
            if not is_well:
                endpoints.ask_later(self._db, hold)
            elif endpoints.let_go(self._db, account["id"], hold["kind"], answered=hold):
                log.warning("endpoint.on_trial", target=target, account=account["id"], cause=hold["held_by"])
        except BridgeError as error:
            log.error("endpoint.unsettled", target=target, account=account["id"], error=error.message)

    def _note_answer(self, question: Question, now_s: float, *, is_answered: bool) -> None:
        """Note whether a broken endpoint answered the question that goes before the next send."""
        if question.hold is not None:
            return
        self._endpoints.ended(question.endpoint, is_retry=False)
        if is_answered:
            self._endpoints.answered(question.endpoint)
            self._endpoints.ask_again((ASK, question.account["id"]))
        else:
            self._endpoints.unanswered(question.endpoint, now_s)
            self._tell_down(question.endpoint, "it does not answer a question either", now_s)

    def _is_held(self, claimed: Claimed) -> bool:
        """Tell whether another call's answer holds the endpoint back: then this one had only begun before."""
        row = endpoints.find(self._db, claimed.account_id, claimed.target)
        return row is not None and row["held_by"] is not None

    # --- what is told ---

    def _report(self, entry: Finished, now_s: float, *, is_ours: bool) -> None:
        """Write a call's line into the log, and raise and clear the alerts that follow from it."""
        claimed, outcome = entry.claimed, entry.outcome
        latency_ms = deliveries.latency_ms(claimed.accepted_at, instant(now_s))
        _log(entry, now_s, latency_ms)
        if is_ours and entry.verdict.state == "done":
            self._tell_slow(claimed, latency_ms)
        if outcome.kind == "done":
            for kind in _STOPS[claimed.target]:
                if claimed.account_id in self._alarm.opened(kind) and not self._is_held(claimed):
                    self._alarm.clear(kind, account=claimed.account_id, message="the far side takes it again")
        if outcome.kind == "fault" or outcome.code == "system_fault":
            problem = f"we failed at delivery {claimed.id} ourselves: {outcome.message}"
            self._alarm.alert("system_fault", problem, account=claimed.account_id, delivery=claimed.id)
        if outcome.alert:
            self._alarm.alert(outcome.alert, outcome.message or "", account=claimed.account_id, delivery=claimed.id)
        if is_ours and entry.verdict.state == "dead":
            self._tell_dead(claimed, outcome)

    def _tell_slow(self, claimed: Claimed, latency_ms: int) -> None:
        """Warn of the first of an endpoint's deliveries that come late one after the other; then tell how many came."""
        endpoint = (claimed.target, claimed.account_id)
        late = self._late.pop(endpoint, 0)
        about = {"target": claimed.target, "account": claimed.account_id}
        if latency_ms > SLOW_S * 1000:
            self._late[endpoint] = late + 1
            if not late:
                told = {"latency_ms": latency_ms, "correlation": claimed.correlation_id}
                log.warning("performance.delivery_slow", delivery=claimed.id, **about, **told)
        elif late > 1:
            log.warning("performance.deliveries_slow", **about, deliveries=late)

    def _tell_dead(self, claimed: Claimed, outcome: Outcome) -> None:
        """Raise the alert about a delivery that is dead, where it was not the customer's or the CRM's own doing."""
        if claimed.target == "crm":
            kind, problem = "dead_letter", f"delivery {claimed.id} to the CRM is dead"
        elif outcome.code == "in_doubt":
            kind, problem = "in_doubt", f"send {claimed.message_id} ended in doubt"
        elif outcome.kind == "retry" and not outcome.counts:
            kind, problem = "sends_expired", f"send {claimed.message_id} could not go out in time"
        else:
            return
        self._alarm.alert(kind, f"{problem}: {outcome.message}", account=claimed.account_id, delivery=claimed.id)

    def _report_oddities(self, found: Turn) -> None:
        for claimed in found.fenced:
            log.warning("delivery.fenced", delivery=claimed.id, claim=claimed.claim_id)
        for row, code in found.late:
            log.warning("delivery.late", delivery=row["id"], message_id=row["message_id"], code=code)
        for row in found.unrendered:
            self._alarm.alert("system_fault", f"delivery {row['id']} cannot be rendered", delivery=row["id"])

    def _tell_stopped(self, entry: Finished, now_s: float) -> None:
        """Raise the alert of an endpoint that is held now; of several accounts that Instagram stopped, a single one."""
        kind, account, message = str(entry.outcome.stops), entry.claimed.account_id, entry.outcome.message or ""
        if entry.claimed.target == "instagram":
            late = [one for one in self._stops if now_s - one[0] < endpoints.TOGETHER_S and one[1] != account]
            self._stops = [*late, (now_s, account)]
            if late:
                names = sorted(name for _, name in self._stops)
                said = f"Instagram has stopped {len(names)} accounts within minutes: {', '.join(names)}"
                self._alarm.alert("meta_trouble", f"{said}; the last: {message}")
                for name in names:
                    for own in _STOPS["instagram"]:
                        self._alarm.withdraw(own, account=name)
                return
        self._alarm.alert(kind, message, account=account, delivery=entry.claimed.id)


def _log(entry: Finished, now_s: float, latency_ms: int) -> None:
    claimed, outcome, verdict = entry.claimed, entry.outcome, entry.verdict
    write = log.info if outcome.kind == "done" else log.error if verdict.state == "dead" else log.warning
    write(
        "delivery.attempted",
        delivery=claimed.id,
        target=claimed.target,
        kind=claimed.kind if claimed.kind != "call" else None,
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
        latency_ms=latency_ms,
        state=verdict.state,
        next_s=round(epoch_s(verdict.due) - now_s, 1) if verdict.state == "pending" else None,
        correlation=claimed.correlation_id,
    )


def _started_pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool whose threads run already: one that cannot be started must stop the start, not a claimed row."""
    pool, all_there = ThreadPoolExecutor(threads, thread_name_prefix="sender"), threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_there.wait)
    all_there.wait()
    return pool


def _is_retry(claimed: Claimed) -> bool:
    """Tell whether a call may not take the slots that are kept for first tries."""
    return claimed.number > 1


def _endpoint(claimed: Claimed) -> Endpoint:
    return ASK if claimed.kind == "look_up" else claimed.target, claimed.account_id


def _outcome(failure: AttemptFailed, account_id: str) -> Outcome:
    message = failure.message.replace("ACCOUNT", account_id)  # what to do may name the account
    known = {"code": failure.code, "message": message, "http_status": failure.http_status}
    if isinstance(failure, Retry):
        hints = {name: getattr(failure, name) for name in ("after_s", "counts", "at_most", "stops")}
        return Outcome("retry", **known, **hints)  # type: ignore[arg-type]
    if isinstance(failure, Refused):
        return Outcome("refused", **known, alert=failure.alert, stops=failure.stops)  # type: ignore[arg-type]
    if isinstance(failure, InDoubt):
        return Outcome("in_doubt", **known, after_s=failure.after_s)  # type: ignore[arg-type]
    if isinstance(failure, Unclear):
        return Outcome("unclear", **known)  # type: ignore[arg-type]
    raise TypeError(type(failure).__name__)
