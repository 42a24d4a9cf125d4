"""Who comes again and again, and when they are due next: whoever gathers a batch waits for somebody, or not at all.

Only those are said to be due who have lately come at regular intervals; a pause is no interval.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

LONGEST_PERIOD = 1.0  # seconds; more is a pause


class ArrivalTracker:
    """Moments are in seconds, of any clock that only grows."""

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}
        self._periods: dict[Hashable, float] = {}

    def arrived(self, who: Hashable, now: float) -> None:
        """Note that somebody came; half of the latest interval goes into the period."""
        passed = now - self._last.get(who, float("-inf"))
        if passed < LONGEST_PERIOD:
            self._periods[who] = passed + 0.5 * (self._periods.get(who, passed) - passed)
        self._last[who] = now

    def forget(self, who: Hashable) -> None:
        """Somebody will not come again."""
        self._last.pop(who, None)
        self._periods.pop(who, None)

    def shortest_period(self, those: Collection[Hashable]) -> float:
        """The shortest period of those; 0 while none is known."""
        return min((self._periods[who] for who in those if who in self._periods), default=0.0)

    def since(self, moment: float) -> set[Hashable]:
        """Those whose last arrival was after that moment."""
        return {who for who, at in self._last.items() if at > moment}

    def others_arrived(self, since: float, but: Collection[Hashable]) -> bool:
        """Whether anybody else came after that moment."""
        return not self.since(since) <= set(but)

    def others_due(self, now: float, until: float, but: Collection[Hashable]) -> bool:
        """Whether anybody else is due by `until`; one that is late by a whole period is no longer awaited."""
        return any(
            self._last[who] + period < until and now < self._last[who] + 2 * period
            for who, period in self._periods.items()
            if who not in but
        )
