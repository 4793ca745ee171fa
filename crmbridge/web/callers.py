"""What is remembered of callers by their address: how often a key of theirs failed, and the sum of what was refused.

Both are bounded: when too many addresses are known, the one that was heard of longest ago is forgotten.
"""

import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Callable

from crmbridge import log

_ADDRESSES = 4096
_FAILURES, _MINUTE_S = 10, 60.0
_FAILURE_S = _MINUTE_S / _FAILURES


def group(address: str) -> str:
    """Return what counts as one caller: an IPv4 address, or the /64 of an IPv6 one, as text."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]  # what a trusted proxy names instead of an address
    if found.version == 4:
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


class Failures:
    """Counts failed keys: a caller may fail ten times at once, then once in six seconds."""

    def __init__(self, steady: Callable[[], float]) -> None:
        self._steady = steady
        self._lock = threading.Lock()
        self._forgotten_s: OrderedDict[str, float] = OrderedDict()  # when the last failure will not count any more

    def note(self, caller: str) -> None:
        """Count a failure of a caller, as `group` names it."""
        with self._lock:
            now_s = self._steady()
            self._forgotten_s[caller] = max(self._forgotten_s.get(caller, now_s), now_s) + _FAILURE_S
            self._forgotten_s.move_to_end(caller)
            if len(self._forgotten_s) > _ADDRESSES:
                self._forgotten_s.popitem(last=False)

    def wait_s(self, caller: str) -> float:
        """Return for how many seconds no further key of this caller is looked at; 0: it may try."""
        with self._lock:
            rest_s = self._forgotten_s.get(caller, 0.0) - self._steady()
        return max(rest_s - _MINUTE_S + _FAILURE_S, 0.0)


class Refusals:
    """Sums up what one caller is refused again and again, so that a flood writes a line a minute to the log."""

    def __init__(self, steady: Callable[[], float]) -> None:
        self._steady = steady
        self._lock = threading.Lock()
        self._sums: OrderedDict[str, tuple[float, int]] = OrderedDict()  # since when, and how many; the oldest first

    def is_first(self, address: str) -> bool:
        """Note a refusal; tell whether it deserves a line of its own."""
        caller, now_s = group(address), self._steady()
        with self._lock:
            lines = self._due(now_s)
            since_s, count = self._sums.get(caller, (now_s, -1))
            self._sums[caller] = since_s, count + 1
            if len(self._sums) > _ADDRESSES:
                self._end(*self._sums.popitem(last=False), now_s, lines)
        _write(lines)
        return count < 0

    def tell(self, *, every: bool = False) -> None:
        """Write the sums that are a minute old, or every one; whoever is quiet for a minute begins anew."""
        with self._lock:
            lines = self._due(self._steady(), every=every)
        _write(lines)

    def _due(self, now_s: float, *, every: bool = False) -> list[dict[str, object]]:
        lines: list[dict[str, object]] = []
        while self._sums:
            caller, (since_s, count) = next(iter(self._sums.items()))
            if not every and now_s - since_s < _MINUTE_S:
                break
            del self._sums[caller]
            self._end(caller, (since_s, count), now_s, lines)
            if count and not every:
                self._sums[caller] = now_s, 0
        return lines

    @staticmethod
    def _end(caller: str, told: tuple[float, int], now_s: float, lines: list[dict[str, object]]) -> None:
        since_s, count = told
        if count:
            lines.append({"remote": caller, "count": count, "seconds": round(now_s - since_s)})


def _write(lines: list[dict[str, object]]) -> None:
    for line in lines:
        log.warning("requests.refused", **line)
