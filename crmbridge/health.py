"""How each far side is doing: how many calls it may get now, and when one that failed is asked again.

Kept in memory by the one worker; knows no rows and makes no calls.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Endpoint = tuple[str, str]  # target, account id; the target `ASK` stands for look-ups in Instagram's conversations
ASK = "ask"
Change = Literal["broken", "recovered", "proven"]
_BREAK_AFTER = 10  # failures in a row over all rows of an endpoint, while some are still in their quick retries
_OVERLOADED = (408, 429, 502, 503, 504)


@dataclass(frozen=True)
class Room:
    """What an endpoint may get now.

    `calls` at most, of which `retries` may be for rows that failed before, and `revived` of these for rows that
    were dead. While it is broken it gets one `probe` at a time: ``head`` tries a lane's first row, ``behind`` the row
    after the one that just failed, `failed`, to tell a message that the far side cannot take from a far side that is
    down.
    Instagram, which may take a message and answer with an error, must first answer a question (``ask``).
    `is_idle` tells that it has no call now: its first one is served before another endpoint's second.
    """

    calls: int
    retries: int
    is_idle: bool = True
    probe: Literal["head", "behind", "ask"] | None = None
    failed: str = ""
    revived: int = 1


NO_ROOM = Room(0, 0)


@dataclass
class _State:
    in_flight: int = 0
    retries_in_flight: int = 0
    failures: int = 0
    worked_s: float = 0.0
    worked_revision: int = 0
    broken: bool = False
    has_answered: bool = False  # a question, since it was broken
    failing_since_s: float = 0.0
    probes: int = 0
    rests_until_s: float = 0.0
    behind: str | None = None  # the delivery that failed, after which the next one is tried
    tokens: float = 0.0
    counted_s: float = 0.0
    revived_in_flight: int = 0


@dataclass(frozen=True)
class Limits:
    """Sizes: `slots` calls at a time to one endpoint, `for_first_tries` of them never given to retries.

    `probe_s` are the pauses between probes of a broken endpoint, the last one repeated; `per_s` bounds the
    calls a second to one endpoint of a target.
    """

    slots: int
    for_first_tries: int
    probe_s: Sequence[float]
    per_s: Mapping[str, float]


class Pace:
    """Spaces out an account's calls of one API; safe from any thread.

    Some go first: whoever does not waits as long as one of those is `wanted`.
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._between_s = 1 / per_s
        self._clock = clock
        self._next_s: dict[str, float] = {}
        self._wanted: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def want(self, accounts: frozenset[str]) -> None:
        """Note for which accounts calls that go first are waiting."""
        self._wanted = accounts

    def free_in_s(self, account: str) -> float:
        """Return in how many seconds a call may begin that goes first."""
        return max(self._next_s.get(account, 0.0) - self._clock(), 0.0)

    def take(self, account: str) -> float:
        """Take the next free moment; return in how many seconds it is."""
        with self._lock:
            now_s = self._clock()
            begin_s = max(self._next_s.get(account, now_s), now_s)
            self._next_s[account] = begin_s + self._between_s
            return begin_s - now_s

    def wait_last(
        self, account: str, pause: Callable[[float], None], is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until a call may begin that does not go first, and take that moment; give up when `is_over` says so."""
        while not is_over():
            wait_s = max(self.free_in_s(account), self._between_s if account in self._wanted else 0.0)
            if not wait_s:
                self.take(account)
                return
            pause(wait_s)


class Endpoints:
    """The states of all endpoints. Not locked: only the drain uses it. `pace` is that of ``ASK`` calls."""

    def __init__(self, limits: Limits, pace: Pace) -> None:
        self._limits = limits
        self._pace = pace
        self._states: dict[Endpoint, _State] = {}

    def room(self, endpoint: Endpoint, now_s: float, *, is_on_trial: bool = False) -> Room:
        """Return what an endpoint may get now: on trial a single call, and all others only when that succeeds."""
        state = self._state(endpoint)
        if is_on_trial and not state.broken:
            state.broken, state.has_answered, state.rests_until_s, state.probes = True, True, 0.0, 0
        if now_s < state.rests_until_s and state.behind is None:
            return NO_ROOM
        if endpoint[0] == ASK and (state.in_flight or self._pace.free_in_s(endpoint[1])):
            return NO_ROOM
        if state.broken:
            if state.in_flight:
                return NO_ROOM
            if endpoint[0] == "instagram" and not state.has_answered:
                return Room(0, 0, probe="ask")
            failed, state.behind = state.behind, None
            if failed is not None:
                return Room(1, 1, probe="behind", failed=failed)
            return Room(1, 1, probe="head")
        if endpoint[0] == ASK:
            return Room(1, 1)
        calls = self._limits.slots - state.in_flight
        per_s = self._limits.per_s.get(endpoint[0])
        if per_s is not None:
            earned = max(now_s - state.counted_s, 0.0) * per_s
            state.tokens = min(state.tokens + earned, max(per_s / 10, 1.0))
            state.counted_s = now_s
            calls = min(calls, int(state.tokens))
        retries = self._limits.slots - self._limits.for_first_tries - state.retries_in_flight
        return Room(max(calls, 0), max(retries, 0), is_idle=not state.in_flight, revived=1 - state.revived_in_flight)

    def rests_until_s(self, endpoint: Endpoint, now_s: float) -> float:
        """Return before when it is no use to look at an endpoint again."""
        state = self._state(endpoint)
        if endpoint[0] == ASK:
            return max(state.rests_until_s, now_s + self._pace.free_in_s(endpoint[1]))
        per_s = self._limits.per_s.get(endpoint[0])
        paced_s = state.counted_s + (1 - state.tokens) / per_s if per_s is not None and state.tokens < 1 else 0.0
        return max(state.rests_until_s, paced_s)

    def is_busy(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint has a call now."""
        return self._state(endpoint).in_flight > 0

    def is_broken(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint is believed to be down."""
        return self._state(endpoint).broken

    def worked_since(self, endpoint: Endpoint, since_s: float, revision: int | None = None) -> bool:
        """Tell whether the far side did what was asked after a time, and as a `revision` of it was then."""
        state = self._state(endpoint)
        return state.worked_s > since_s and revision in (None, state.worked_revision)

    def failing_s(self, endpoint: Endpoint, now_s: float) -> float:
        """Return for how long an endpoint has done nothing but fail, in seconds; 0 after a success."""
        state = self._state(endpoint)
        return now_s - state.failing_since_s if state.failures else 0.0

    def started(self, endpoint: Endpoint, *, is_retry: bool, is_revived: bool = False) -> None:
        """Count a call that begins."""
        state = self._state(endpoint)
        state.in_flight += 1
        state.retries_in_flight += int(is_retry)
        state.tokens = max(state.tokens - 1, 0.0)
        state.revived_in_flight += is_revived

    def ended(self, endpoint: Endpoint, *, is_retry: bool, is_revived: bool = False) -> None:
        """Count a call that ended."""
        state = self._state(endpoint)
        state.in_flight -= 1
        state.retries_in_flight -= int(is_retry)
        state.revived_in_flight -= is_revived

    def worked(self, endpoint: Endpoint, now_s: float, revision: int = 0) -> Change | None:
        """Note that the far side did what was asked; ``proven`` the first time since the start."""
        state = self._state(endpoint)
        is_first, state.worked_s = not state.worked_s, now_s
        state.worked_revision = max(state.worked_revision, revision)
        was_broken, state.failures, state.probes = state.broken, 0, 0
        state.broken, state.has_answered, state.behind = False, False, None
        state.rests_until_s = 0.0 if was_broken else state.rests_until_s
        return "recovered" if was_broken else "proven" if is_first else None

    def failed(
        self,
        endpoint: Endpoint,
        now_s: float,
        *,
        http_status: int | None,
        is_worn: bool,
        previous_s: float | None,
        delivery: str,
        was_head: bool,
    ) -> Change | None:
        """Note that the far side did not.

        `is_worn` tells that the row's quick retries are used up. When something else got through since its call
        before this one, at `previous_s`, the far side works and it is this row that it cannot take.
        """
        state = self._state(endpoint)
        if not state.failures:
            state.failing_since_s = now_s
        state.failures += 1
        state.has_answered = False
        was_broken = state.broken
        others_pass = previous_s is not None and self.worked_since(endpoint, previous_s)
        state.broken = was_broken or (is_worn and not others_pass) or state.failures >= _BREAK_AFTER
        if not state.broken:
            return None
        if was_broken and not was_head:
            return None  # the second half of one probe
        pauses = self._limits.probe_s
        self.rest(endpoint, now_s + pauses[min(state.probes, len(pauses) - 1)])
        state.probes += 1
        # Something answers there: it may be this message alone that it cannot take.
        answered = http_status is not None and http_status not in _OVERLOADED
        state.behind = delivery if answered and was_head and is_worn else None
        return None if was_broken else "broken"

    def rest(self, endpoint: Endpoint, until_s: float) -> None:
        """Leave an endpoint alone until then."""
        state = self._state(endpoint)
        state.rests_until_s = max(state.rests_until_s, until_s)

    def answered(self, endpoint: Endpoint) -> None:
        """Note that the far side answered a question: one that is broken may be sent something now."""
        self._state(endpoint).has_answered = True

    def unanswered(self, endpoint: Endpoint, now_s: float) -> None:
        """Note that the far side did not answer the question that was to tell whether it is well again."""
        state, pauses = self._state(endpoint), self._limits.probe_s
        self.rest(endpoint, now_s + pauses[min(state.probes, len(pauses) - 1)])
        state.probes += 1

    def ask_again(self, endpoint: Endpoint) -> None:
        """Do not wait any longer before the next probe of a broken endpoint: somebody says that it is well."""
        state = self._state(endpoint)
        state.rests_until_s = 0.0 if state.broken else state.rests_until_s

    def shift(self, seconds: float) -> None:
        """Follow a clock that was set."""
        for state in self._states.values():
            state.rests_until_s += seconds
            state.worked_s += seconds
            state.counted_s += seconds
            state.failing_since_s += seconds

    def _state(self, endpoint: Endpoint) -> _State:
        return self._states.setdefault(endpoint, _State())
