"""Tells a slow engine from one that hangs."""

from __future__ import annotations

from enum import Enum

#: The longest time between two looks, in seconds.
_LONGEST_INTERVAL = 1.0
_LOOKS = 8


class Condition(Enum):
    FINE = "fine"
    #: Nothing has moved for the limit.
    STALLED = "stalled"
    #: Nothing has moved for twice the limit.
    HOPELESS = "hopeless"


class Watchdog:
    """Counts looks without progress; `limit` is in seconds.

    It counts looks and reads no clock: where both processes were suspended, or a clock jumped, only one look is lost.
    """

    def __init__(self, limit: float) -> None:
        self.interval = min(_LONGEST_INTERVAL, limit / _LOOKS)
        # Fewer than the limit has: progress may have ended just after a look, and looks may be late.
        self._patience = max(int(limit / self.interval) - 2, 1)
        self._hopeless = max(round(2 * limit / self.interval), self._patience + 1)
        self._misses = 0

    def look(self, progressed: bool) -> Condition:
        """To be called every `interval` seconds, with whether anything moved since the last call."""
        self._misses = 0 if progressed else self._misses + 1
        if self._misses < self._patience:
            return Condition.FINE
        return Condition.STALLED if self._misses < self._hopeless else Condition.HOPELESS

    @property
    def waited(self) -> float:
        """Seconds without progress, to an interval."""
        return self._misses * self.interval
