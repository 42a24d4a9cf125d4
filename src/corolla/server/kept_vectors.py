"""What blocks are given and a server need not be sent again: prefixes and adapters that a peer has sent, and those of
the operator's bundles.

Invariant: a peer finds what it has sent itself, or what the server's operator has, and nothing of other peers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from corolla.errors import RequestRefused
from corolla.models.prompts import GIVEN, BlockVectors
from corolla.server.peers import PeerCache
from corolla.wire.messages import Backward, Forward, OpenSession

KEPT_SECONDS = 3600.0
MOST_KEPT = 4096  # for all peers together
A_PEERS_KEPT = 8  # a training run has others at each step
BY_NAME = ("prefix", "lora", "targets")  # tensors that are not sent again


@dataclass(frozen=True)
class KnownVectors:
    """Tensors of `BY_NAME`, of the `count` blocks from `start` on."""

    start: int
    count: int
    tensors: Mapping[str, Tensor]

    @staticmethod
    def whole(vectors: BlockVectors, start: int, end: int) -> KnownVectors:
        """Those of blocks [start, end) among all of a model's."""
        return KnownVectors(start, end - start, vectors.of(start, end))

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(one.nbytes for one in self.tensors.values())

    def of(self, start: int, end: int) -> dict[str, Tensor] | None:
        """Those of some of the blocks, if it has them."""
        first, last = start - self.start, end - self.start
        if not 0 <= first < last <= self.count:
            return None
        return {name: one[first:last] if name in GIVEN else one for name, one in self.tensors.items()}


class KeptVectors(PeerCache[KnownVectors]):
    """Prefixes and adapters that need not be sent again, by the digest of the whole model's."""

    def __init__(self, budget: int, clock: Callable[[], float]) -> None:
        super().__init__(budget, seconds=KEPT_SECONDS, most=MOST_KEPT, clock=clock)
        self.public: dict[str, KnownVectors] = {}  # of the operator's bundles

    def with_known(
        self, peer: str, message: OpenSession | Forward | Backward, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a request with those that it names (`known`): they were sent, and are kept now, or are here.

        What the operator has is taken from there although it was sent: nobody answers for its memory by itself.
        Raises `RequestRefused` (no_bundle).
        """
        assert message.known is not None  # callers ask
        if (found := self.of_operator(message)) is not None:
            return tensors | found
        key = f"{message.known}/{message.start}"
        # They came in the memory of all that was sent with them.
        sent = {name: tensors[name].clone() for name in BY_NAME if name in tensors}
        if sent:
            self.keep(peer, key, KnownVectors(message.start, message.end - message.start, sent))
            self._limit(peer)
            return tensors | sent
        one = self.take(peer, key)
        found = None if one is None else one.of(message.start, message.end)
        if one is None or found is None:
            raise RequestRefused(
                "This server has not got that prefix or adapter; send it.", code="no_bundle", field="known"
            )
        self.keep(peer, key, one)  # it was used last
        return tensors | found

    def of_operator(self, message: OpenSession | Forward | Backward) -> dict[str, Tensor] | None:
        """Those of the operator's that a request names, if it has them for all of its blocks."""
        one = None if message.known is None else self.public.get(message.known)
        return None if one is None else one.of(message.start, message.end)

    def _limit(self, peer: str) -> None:
        with self._lock, self._kept.timer:
            own = [name for name in self._kept if name[0] == peer]
            for name in own[:-A_PEERS_KEPT]:
                del self._kept[name]
