"""Whose key is it? A secret is checked by bcrypt once; checks wait in a queue that takes the callers in turn."""

import hmac
import math
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256

import bcrypt

from crmbridge import apikey
from crmbridge.errors import TooMany, Unauthorized
from crmbridge.events import instant
from crmbridge.store import keys
from crmbridge.store.database import Database, Row
from crmbridge.web.callers import Failures, group

REFUSED = frozenset(("unauthorized", "too_many_checks"))  # the codes of what is raised here
_REMEMBERED = 1000
_CHECKS_AT_MOST = 64
_CHECK_WAITS_S = 3.0


class Keyring:
    """Finds the row of the key that a request carries. A key that is not remembered has to wait for its check."""

    def __init__(
        self, db: Database, clock: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
    ) -> None:
        self._db = db
        self._clock = clock
        self._failures = Failures(steady)
        self._verifier = Verifier(self._failures, steady)

    def is_new(self, header: str) -> bool:
        """Tell whether the Authorization header holds a key that has yet to be looked at."""
        parts = _parts(header)
        return parts is not None and self._verifier.verdict(parts) is None

    def find(self, header: str, address: str) -> Row | Future[bool]:
        """Return the row of a key, or the check that it has to wait for: then ask again. Does not block.

        The row is read each time, so that a revoked key ends at once. Raises Unauthorized or TooMany; so may the check.
        """
        parts = _parts(header)
        verdict = self._verifier.verdict(parts) if parts else False
        if parts is None or verdict is False:
            raise _unauthorized()
        caller = group(address)
        if verdict is None and (wait_s := self._failures.wait_s(caller)):
            raise _throttled(wait_s)
        row = keys.find(self._db, parts.id)
        if row is None or row["revoked_at"] is not None:
            if verdict is None:
                self._verifier.conclude(parts, caller, False)
            raise _unauthorized()
        if verdict is None:
            return self._verifier.check(parts, row["secret_hash"], caller)
        # Not remembered: by a clock that is set right it may be good again.
        if row["expires_at"] is not None and row["expires_at"] <= instant(self._clock()):
            raise _unauthorized()
        return row

    def require(self, header: str, address: str) -> Row:
        """Return the row of a key, after a check that may take its time. Raises Unauthorized or TooMany."""
        while isinstance(found := self.find(header, address), Future):
            found.result()
        return found


@dataclass(frozen=True)
class _Waiting:
    parts: apikey.Parts
    secret_hash: str
    caller: str
    until_s: float
    matched: Future[bool] = field(default_factory=Future)


class Verifier:
    """Checks secrets against their hashes, one at a time, in a thread that lives while there is something to check.

    Each verdict is remembered by a digest of the key's id and secret that only this process can make.
    """

    def __init__(self, failures: Failures, steady: Callable[[], float]) -> None:
        self._failures = failures
        self._steady = steady
        self._digest_key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._queues: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # by caller; whose turn it is comes first
        self._under_way: dict[tuple[str, apikey.Parts], _Waiting] = {}
        self._works = False

    def verdict(self, parts: apikey.Parts) -> bool | None:
        """Tell whether a key is known to be right, or wrong; None when it is not remembered."""
        digest = self._digest(parts)
        with self._lock:
            for known, verdict in ((self._right, True), (self._wrong, False)):
                if digest in known:
                    known.move_to_end(digest)
                    return verdict
        return None

    def conclude(self, parts: apikey.Parts, caller: str, matched: bool) -> None:
        """Remember what a key that was not remembered is; a wrong one counts as a failure of its caller."""
        if not matched:
            self._failures.note(caller)
        with self._lock:
            known = self._right if matched else self._wrong
            known[self._digest(parts)] = None
            if len(known) > _REMEMBERED:
                known.popitem(last=False)

    def check(self, parts: apikey.Parts, secret_hash: str, caller: str) -> Future[bool]:
        """Return whether a secret has this hash, once that is known.

        It raises TooMany when too many others wait, this one waited for too long, or its caller failed too often.
        """
        crowded_out = None
        with self._lock:
            waiting = self._under_way.get((caller, parts))
            if waiting is not None:
                return waiting.matched
            waiting = _Waiting(parts, secret_hash, caller, self._steady() + _CHECK_WAITS_S)
            if sum(map(len, self._queues.values())) >= _CHECKS_AT_MOST:
                crowded_out = self._longest(waiting)
            if crowded_out is not waiting:
                if not self._works:  # first: what starts no thread leaves nothing that waits for one
                    threading.Thread(target=self._work, name="keys", daemon=True).start()
                    self._works = True
                self._under_way[caller, parts] = waiting
                self._queues.setdefault(caller, deque()).append(waiting)
        if crowded_out is not None:
            self._settle(crowded_out, _crowded())
        return waiting.matched

    def _longest(self, newcomer: _Waiting) -> _Waiting:
        """Take the last check out of the longest queue, but that of a newcomer whose own would be as long."""
        queue = max(self._queues.values(), key=len)
        if len(queue) <= len(self._queues.get(newcomer.caller, ())) + 1:
            return newcomer
        return queue.pop()

    def _digest(self, parts: apikey.Parts) -> bytes:
        return hmac.new(self._digest_key, f"{parts.id}\0{parts.secret}".encode(), sha256).digest()

    def _work(self) -> None:
        while (waiting := self._next()) is not None:
            self._settle(waiting, self._judge(waiting))

    def _next(self) -> _Waiting | None:
        late, found = [], None
        with self._lock:
            now_s = self._steady()
            for queue in self._queues.values():
                while queue and queue[0].until_s < now_s:
                    late.append(queue.popleft())
            while self._queues and found is None:
                caller, queue = self._queues.popitem(last=False)
                if queue:
                    found = queue.popleft()
                    self._queues[caller] = queue
            self._works = found is not None
        for waiting in late:
            self._settle(waiting, _crowded())
        return found

    def _judge(self, waiting: _Waiting) -> bool | TooMany:
        known = self.verdict(waiting.parts)  # from another address, meanwhile
        if known is not None:
            return known
        wait_s = self._failures.wait_s(waiting.caller)
        if wait_s:
            return _throttled(wait_s)
        try:
            matched = bcrypt.checkpw(waiting.parts.secret.encode(), waiting.secret_hash.encode())
        except ValueError:  # what is stored is no hash
            matched = False
        self.conclude(waiting.parts, waiting.caller, matched)
        return matched

    def _settle(self, waiting: _Waiting, outcome: bool | TooMany) -> None:
        with self._lock:
            self._under_way.pop((waiting.caller, waiting.parts), None)
        if isinstance(outcome, TooMany):
            waiting.matched.set_exception(outcome)
        else:
            waiting.matched.set_result(outcome)


def _parts(header: str) -> apikey.Parts | None:
    scheme, _, given = header.partition(" ")
    return apikey.split(given.strip()) if scheme.lower() == "bearer" else None


def _unauthorized() -> Unauthorized:
    return Unauthorized("A valid API key is required: Authorization: Bearer crmb_…")


def _throttled(wait_s: float) -> TooMany:
    after_s = math.ceil(wait_s)
    message = f"Too many keys from this address were refused; a new one is looked at in {after_s} s."
    return TooMany(message, code="too_many_checks", after_s=after_s)


def _crowded() -> TooMany:
    return TooMany("Too many new keys are being checked; try again in 3 seconds.", code="too_many_checks", after_s=3)
