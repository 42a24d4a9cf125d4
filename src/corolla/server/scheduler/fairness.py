"""Fair shares of the compute thread between peers: whoever had least of it comes first.

Invariant: between two peers that both always have work, the difference in what they were given stays below
one job each, however much they ask for. A peer that had nothing to do gathers no credit: it begins where
the least served of the busy ones stands.

Virtual time as in Sheng et al. 2024 (arXiv:2401.00588), counted in seconds of computing.
"""

from __future__ import annotations

from collections.abc import Collection


class Shares:
    """Seconds of computing that each peer was given, as far as they still matter."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._floor = 0.0  # what the least served of the busy peers has had

    def given(self, peer: str) -> float:
        """The peer's place in the order: smaller is sooner."""
        return max(self._floor, self._given.get(peer, 0.0))

    def give(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._given[peer] = self.given(peer) + seconds

    def settle(self, busy: Collection[str]) -> None:
        """Only `busy` peers have work now: what others may no longer claim is forgotten."""
        if busy:
            self._floor = max(self._floor, min(self.given(peer) for peer in busy))
        for peer in [peer for peer, given in self._given.items() if given <= self._floor]:
            del self._given[peer]

    def __len__(self) -> int:
        return len(self._given)
