"""Whose request is computed next: seconds of computing are shared among peers, strangers together like one.

Only seconds are noted here, no requests; the engine decides with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

KNOWN_SECONDS = 10.0  # of computing, after which a peer has a history
MOST_REMEMBERED = 10_000  # peers


class PeerHistory:
    """For whom a server has computed, and how long: a stranger has to use it up, while others use it too.

    A server has one second of computing a second, so however many identities a stranger makes, few of them are known.
    Written on the compute thread, read anywhere.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}  # whoever was computed for last is last

    def computed(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._seconds[peer] = self._seconds.pop(peer, 0.0) + seconds
        if len(self._seconds) > MOST_REMEMBERED:
            del self._seconds[next(iter(self._seconds))]

    def __len__(self) -> int:
        return len(self._seconds)

    def known(self, peer: str) -> bool:
        """Whether the peer has a history."""
        return self._seconds.get(peer, 0.0) >= KNOWN_SECONDS

    def weights(self, peers: Collection[str]) -> Callable[[str], float]:
        """What each of these counts for where they share something: all new ones together no more than all known."""
        known = sum(self.known(peer) for peer in peers)
        new = min(1.0, known / max(1, len(peers) - known)) if known else 1.0
        return lambda peer: 1.0 if self.known(peer) else new


class Shares:
    """Seconds of computing that each peer was given: whoever had least of it comes first.

    Invariant: between two peers with a history that both always have work, the difference in what they were given
    stays below one request each, however much they ask for. A peer that had nothing to do gathers no credit: it
    begins where the least served of the busy ones stands.

    Virtual time as in Sheng et al. 2024 (arXiv:2401.00588), counted in seconds of computing. A second of one of many
    new peers counts for more: together they get no more than those with a history.
    """

    def __init__(self, history: PeerHistory | None = None) -> None:
        self._history = PeerHistory() if history is None else history
        self._given: dict[str, float] = {}
        self._floor = 0.0  # what the least served of the busy peers has had
        self._weigh = self._history.weights(())

    def after(self, peer: str, seconds: float = 0.0) -> float:
        """The peer's place in the order, once it was given so much more: smaller is sooner."""
        return max(self._floor, self._given.get(peer, 0.0)) + seconds / self._weigh(peer)

    def give(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._given[peer] = self.after(peer, seconds)
        self._history.computed(peer, seconds)

    def settle(self, busy: Collection[str]) -> None:
        """Only `busy` peers have work now: what others may no longer claim is forgotten."""
        if busy:
            self._floor = max(self._floor, min(self.after(peer) for peer in busy))
        self._weigh = self._history.weights(busy)
        for peer in [peer for peer, given in self._given.items() if given <= self._floor]:
            del self._given[peer]

    def __len__(self) -> int:
        return len(self._given)
