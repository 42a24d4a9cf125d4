"""Which servers a client avoids for a while, and why: they failed, are busy, or disagree with another.

Invariant: a peer that answers is forgiven its failures, but not that it disagreed with another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

FIRST_AVOIDANCE = 2.0  # seconds for which others are preferred; doubles with each failure in a row
LONGEST_AVOIDANCE = 60.0
FIRST_REST = 0.1  # seconds for which a peer is left alone after failing twice in a row; doubles likewise
LONGEST_REST = 5.0
DOUBT_SECONDS = 600.0  # for which others are preferred to servers that disagree
BUSY_SECONDS = 2.0  # how long a busy server is left alone that does not say how long

Clock = Callable[[], float]  # seconds


class Health:
    """Which peers are to be avoided or left alone, and until when."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: dict[str, int] = defaultdict(int)  # in a row
        self._avoid_until: dict[str, float] = {}
        self._rest_until: dict[str, float] = {}
        self._busy_until: dict[str, float] = {}
        self._doubted_until: dict[str, float] = {}

    def failed(self, peer: str, after: float | None) -> None:
        """Prefer others for a while, longer each time in a row; for `after` seconds where the peer said so.

        At first it may be asked again at once, should there be nobody else: it may be back already.
        """
        now, times = self._clock(), min(self._failures[peer], 10)  # before this one
        self._failures[peer] += 1
        self._avoid_until[peer] = now + min(LONGEST_AVOIDANCE, FIRST_AVOIDANCE * 2**times)
        self._rest_until[peer] = now + (min(LONGEST_REST, FIRST_REST * 2 ** (times - 1)) if times else 0.0)
        if after is not None:
            self.leave_alone(peer, after)

    def leave_alone(self, peer: str, seconds: float) -> None:
        """Do not ask the peer at all for so long."""
        self._avoid_until[peer] = self._rest_until[peer] = self._clock() + seconds

    def busy(self, peer: str, after: float | None) -> None:
        """The same, without any blame, of one that is only busy."""
        self._busy_until[peer] = self._clock() + (BUSY_SECONDS if after is None else after)

    def doubt(self, peers: Iterable[str]) -> None:
        """Prefer others to these for a while: an audit could not tell which of them is right."""
        self._doubted_until.update(dict.fromkeys(peers, self._clock() + DOUBT_SECONDS))

    def doubted(self) -> set[str]:
        """Peers that disagreed with others not long ago."""
        return self._still(self._doubted_until)

    def forgive(self, peer: str) -> None:
        """Forget the peer's earlier failures."""
        for book in (self._failures, self._avoid_until, self._rest_until):
            book.pop(peer, None)

    def is_busy(self, peer: str) -> bool:
        """Whether the peer asked to be left alone until later than now."""
        return self._busy_until.get(peer, 0.0) > self._clock()

    def now(self) -> tuple[set[str], set[str], set[str]]:
        """Peers that others are preferred to, those that are not to be asked, and of these the busy ones."""
        avoided, resting, busy = map(self._still, (self._avoid_until, self._rest_until, self._busy_until))
        return avoided, resting | busy, busy

    def next_return(self) -> float:
        """Seconds until the first peer that is left alone may be asked again; 0 when there is none."""
        now = self._clock()
        moments = (*self._rest_until.values(), *self._busy_until.values())
        return min((until - now for until in moments if until > now), default=0.0)

    def _still(self, until: dict[str, float]) -> set[str]:
        now = self._clock()
        return {peer for peer, end in until.items() if end > now}
