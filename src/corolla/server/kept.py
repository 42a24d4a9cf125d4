"""What a server keeps for its peers, who can do without: graphs of forwards, prefixes that they have sent.

Invariant: a peer finds what it has given itself, or what the server's operator has, and nothing of other peers.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cachetools import TTLCache
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.wire.messages import Backward, Forward, OpenSession

PREFIX_SECONDS = 3600.0
MOST_PREFIXES = 4096  # for all peers together
A_PEERS_PREFIXES = 8  # a training run has another one at each step


class Sized(Protocol):
    """What takes memory."""

    @property
    def nbytes(self) -> int:
        """Of memory."""


K = TypeVar("K", bound=Sized)


class Kept(Generic[K]):
    """Things that peers have names for, least recently kept first.

    Where there is no room, the peer that has most loses its oldest: nobody can drive out others' things by
    making many. For any thread: requests ask on the event loop, and what is old goes on the compute thread.
    """

    def __init__(self, budget: int, *, seconds: float, most: int, clock: Callable[[], float]) -> None:
        """`budget` in bytes; each is kept for so many `seconds`, and so many of them at `most`."""
        self.budget = budget
        self._most = most
        self._kept: TTLCache[tuple[str, str], K] = TTLCache(math.inf, seconds, timer=clock)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    @property
    def held(self) -> int:
        """Bytes of all."""
        with self._lock, self._kept.timer:  # nothing grows too old in between
            return sum(one.nbytes for one in self._kept.values())

    def keep(self, peer: str, key: str, one: K) -> None:
        """Keep it, at the expense of others; one that is larger than the budget is let go."""
        with self._lock, self._kept.timer:
            self._kept.pop((peer, key), None)
            if one.nbytes > self.budget:
                return
            self._kept[peer, key] = one
            while self.held > self.budget or len(self._kept) > self._most:
                self._drop_one()

    def _drop_one(self) -> None:
        by_peer: Counter[str] = Counter()  # bytes
        for (peer, _), one in self._kept.items():
            by_peer[peer] += one.nbytes
        most = max(by_peer, key=by_peer.__getitem__)
        del self._kept[next(name for name in self._kept if name[0] == most)]

    def take(self, peer: str, key: str) -> K | None:
        """What the peer calls so, which is kept no longer; None when there is none."""
        with self._lock:
            one: K | None = self._kept.pop((peer, key), None)
        return one

    def expire(self) -> None:
        """Let go of what is too old."""
        with self._lock:
            self._kept.expire()


@dataclass(frozen=True)
class KnownPrefix:
    """A prefix [blocks, P, D] of the blocks from `start` on."""

    start: int
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return self.values.nbytes

    def of(self, start: int, end: int) -> Tensor | None:
        """That of some of the blocks, if it has them."""
        first, last = start - self.start, end - self.start
        return self.values[first:last] if 0 <= first < last <= len(self.values) else None


class Prefixes(Kept[KnownPrefix]):
    """Prefixes that need not be sent again, by the digest of the whole model's."""

    def __init__(self, budget: int, clock: Callable[[], float]) -> None:
        super().__init__(budget, seconds=PREFIX_SECONDS, most=MOST_PREFIXES, clock=clock)
        self.everybodys: dict[str, KnownPrefix] = {}  # of the operator's bundles

    def of(self, peer: str, message: OpenSession | Forward | Backward, sent: Tensor | None) -> Tensor | None:
        """The prefix of a request's blocks: the one that was `sent`, or the known one that it names.

        Raises `RequestRefused` (no_bundle).
        """
        if message.known is None or sent is not None:
            if message.known is not None and sent is not None:
                sent = sent.clone()  # it came in the memory of all that was sent with it
                self.keep(peer, f"{message.known}/{message.start}", KnownPrefix(message.start, sent))
                self._limit(peer)
            return sent
        everybodys, key = self.everybodys.get(message.known), f"{message.known}/{message.start}"
        one = everybodys or self.take(peer, key)
        found = None if one is None else one.of(message.start, message.end)
        if one is None or found is None:
            raise RequestRefused(
                "This server has not got that prefix; send it.", code="no_bundle", field="known"
            )
        if everybodys is None:
            self.keep(peer, key, one)  # it was used last
        return found

    def _limit(self, peer: str) -> None:
        with self._lock, self._kept.timer:
            own = [name for name in self._kept if name[0] == peer]
            for name in own[:-A_PEERS_PREFIXES]:
                del self._kept[name]
