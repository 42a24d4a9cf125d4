"""Prefixes that a server need not be sent again: those that a peer has sent, and those of the operator's bundles.

Invariant: a peer finds what it has sent itself, or what the server's operator has, and nothing of other peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.peers import PeerCache
from corolla.wire.messages import Backward, Forward, OpenSession

PREFIX_SECONDS = 3600.0
MOST_PREFIXES = 4096  # for all peers together
A_PEERS_PREFIXES = 8  # a training run has another one at each step


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


class Prefixes(PeerCache[KnownPrefix]):
    """Prefixes that need not be sent again, by the digest of the whole model's."""

    def __init__(self, budget: int, clock: Callable[[], float]) -> None:
        super().__init__(budget, seconds=PREFIX_SECONDS, most=MOST_PREFIXES, clock=clock)
        self.public: dict[str, KnownPrefix] = {}  # of the operator's bundles

    def of(self, peer: str, message: OpenSession | Forward | Backward, sent: Tensor | None) -> Tensor:
        """The prefix that a request names, for its blocks: it was `sent`, and is kept now, or is known already.

        Raises `RequestRefused` (no_bundle).
        """
        assert message.known is not None
        key = f"{message.known}/{message.start}"
        if sent is not None:
            sent = sent.clone()  # it came in the memory of all that was sent with it
            self.keep(peer, key, KnownPrefix(message.start, sent))
            self._limit(peer)
            return sent
        public = self.public.get(message.known)
        one = public or self.take(peer, key)
        found = None if one is None else one.of(message.start, message.end)
        if one is None or found is None:
            raise RequestRefused(
                "This server has not got that prefix; send it.", code="no_bundle", field="known"
            )
        if public is None:
            self.keep(peer, key, one)  # it was used last
        return found

    def _limit(self, peer: str) -> None:
        with self._lock, self._kept.timer:
            own = [name for name in self._kept if name[0] == peer]
            for name in own[:-A_PEERS_PREFIXES]:
                del self._kept[name]
