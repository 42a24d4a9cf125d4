"""Graphs of recent training forwards, kept for the backward that will probably follow.

Invariant: what is kept never exceeds the budget; a lease is its peer's alone, is taken once, and is gone
after `LEASE_SECONDS` at the latest. Nobody depends on one: without it a backward computes its forward again.
Used from the compute thread only, but for `close`.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

LEASE_SECONDS = 60.0
MOST_LEASES = 1024  # a graph takes memory beside its tensors


@dataclass
class Lease:
    """A forward's output with the graph behind it, and the leaves whose gradients may be asked for."""

    blocks: tuple[int, int]
    output: Tensor
    hidden: Tensor
    prompts: Tensor | None
    nbytes: int
    tokens: int
    until: float = 0.0


class Leases:
    """All leases of a server, least recently made first.

    Where there is no room, the peer that has most loses its oldest: nobody can drive out others' leases by
    making many.
    """

    def __init__(self, budget: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`budget` in bytes of saved activations."""
        self.budget = budget
        self.held = 0
        self._by_peer: Counter[str] = Counter()  # bytes
        self._bytes_a_token = 0.0
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], Lease] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def may_fit(self, tokens: int) -> bool:
        """Whether the graph of so many tokens is worth making, by what the last one took."""
        return tokens * self._bytes_a_token <= self.budget

    def keep(self, peer: str, key: str, lease: Lease) -> None:
        """Keep it, at the expense of others; one that is larger than the budget is let go."""
        self.expire()
        self._bytes_a_token = lease.nbytes / lease.tokens
        self._drop((peer, key))
        if lease.nbytes > self.budget:
            return
        lease.until = self._clock() + LEASE_SECONDS
        self._kept[peer, key] = lease
        self._count(peer, lease.nbytes)
        while self.held > self.budget or len(self._kept) > MOST_LEASES:
            most = max(self._by_peer, key=self._by_peer.__getitem__)
            self._drop(next(name for name in self._kept if name[0] == most))

    def take(self, peer: str, key: str) -> Lease | None:
        """The peer's lease, which is kept no longer; None when there is none."""
        self.expire()
        lease = self._kept.get((peer, key))
        self._drop((peer, key))
        return lease

    def expire(self) -> None:
        """Let go of what is too old."""
        now = self._clock()
        for name in [name for name, lease in self._kept.items() if lease.until <= now]:
            self._drop(name)

    def _drop(self, name: tuple[str, str]) -> None:
        lease = self._kept.pop(name, None)
        if lease is not None:
            self._count(name[0], -lease.nbytes)

    def _count(self, peer: str, more: int) -> None:
        self.held += more
        self._by_peer[peer] += more
        if not self._by_peer[peer]:
            del self._by_peer[peer]


class Saved:
    """Counts the bytes that autograd keeps for a backward."""

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        """`weights` are there anyway, so neither they nor views of them count."""
        self._weights = {one.untyped_storage().data_ptr() for one in weights if one.layout is torch.strided}
        self._storages: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct tensors' memory, without weights."""
        return sum(self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Everything that is saved inside is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _same):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()  # which views and slices share
            if storage.data_ptr() not in self._weights:
                self._storages[storage.data_ptr()] = storage.nbytes()
        # Detached: a node that held its own output with its history would hold itself, and be freed never.
        return tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor
