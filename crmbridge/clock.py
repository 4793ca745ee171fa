"""The time of day, and whether somebody has set it: then the times that are stored go by another clock for a moment."""

import time
from collections.abc import Callable

SET_S = 30.0  # less is drift
_WARY_S = 3600.0


class Clock:
    """A clock that a second one, which only ever goes on, tells when it was set.

    Whoever moves the stored times along calls `follow`. Safe from any thread.
    """

    def __init__(
        self, now_s: Callable[[], float] = time.time, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.now_s = now_s
        self._monotonic_s = monotonic_s
        self._ahead_s = now_s() - monotonic_s()
        self._wary_until_s = 0.0

    def jump_s(self) -> float:
        """Return by how many seconds the clock was set and nobody has followed yet; 0 when it was not."""
        jump_s = self.now_s() - self._monotonic_s() - self._ahead_s
        if abs(jump_s) < SET_S:
            return 0.0
        self.doubt()
        return jump_s

    def follow(self, seconds: float) -> None:
        """Note that all that is stored goes by the clock as it was set."""
        self._ahead_s += seconds

    def steady(self) -> Callable[[], bool]:
        """Return what tells whether a time that is read from now on is still one that the stored ones go by."""
        ahead_s = self._ahead_s
        return lambda: not self.jump_s() and self._ahead_s == ahead_s

    def doubt(self) -> None:
        """Have what the clock calls old not be believed for an hour."""
        self._wary_until_s = self._monotonic_s() + _WARY_S

    def is_trusted(self) -> bool:
        """Tell whether the clock has not been set for an hour."""
        return not self.jump_s() and self._monotonic_s() >= self._wary_until_s
