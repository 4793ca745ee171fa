"""``/health``: can the bridge do its work? ``/health/live``: does the process answer?"""

import threading
import time

from crmbridge.errors import Unavailable
from crmbridge.events import epoch_s, instant
from crmbridge.store import vitals
from crmbridge.web.app import Call, Reply, Route

_REMEMBER_S = 1.0


class HealthRoutes:
    """Remembers the last finding for a second, so that asking often costs no disk writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = float("-inf")
        self._reasons: list[str] = []

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route("GET", "/health", self.health, None), Route("GET", "/health/live", self.live, None)]

    def live(self, call: Call) -> Reply:
        """Answer that the process answers."""
        return Reply({"status": "alive", "timestamp": instant(call.now_s)})

    def health(self, call: Call) -> Reply:
        """Probe the database by writing, and look at the schema and the worker's heartbeat."""
        with self._lock:
            if time.monotonic() - self._asked > _REMEMBER_S:
                self._reasons = _reasons(call)
                self._asked = time.monotonic()
            reasons = list(self._reasons)
        state = "unhealthy" if reasons else "healthy"
        return Reply({"status": state, "timestamp": instant(call.now_s), "reasons": reasons}, 503 if reasons else 200)


def _reasons(call: Call) -> list[str]:
    problem = call.db.schema_problem()
    if problem:
        return [problem]
    reasons = []
    try:
        vitals.probe(call.db)
    except Unavailable as error:
        reasons.append(error.message)
    last = vitals.last_beat(call.db, "worker")
    if last is None:
        reasons.append("no worker has run yet")
    elif call.now_s - epoch_s(last) > vitals.STALE_S:
        reasons.append(f"the worker's last heartbeat was at {last}")
    return reasons
