"""Graphs of recent training forwards, kept for the backward that will probably follow.

Invariant: what is kept never exceeds the budget; a lease is its peer's alone, is taken once, and is gone
after `LEASE_SECONDS` at the latest. Nobody depends on one: without it a backward computes its forward again.
Used from the compute thread only, but for `close`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from cachetools import TTLCache
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


class Leases:
    """All leases of a server, least recently made first.

    Where there is no room, the peer that has most loses its oldest: nobody can drive out others' leases by
    making many.
    """

    def __init__(self, budget: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`budget` in bytes of saved activations."""
        self.budget = budget
        self._bytes_a_token = 0.0
        self._kept: TTLCache[tuple[str, str], Lease] = TTLCache(math.inf, LEASE_SECONDS, timer=clock)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def held(self) -> int:
        """Bytes of all leases."""
        return sum(lease.nbytes for lease in self._kept.values())

    def may_fit(self, tokens: int) -> bool:
        """Whether the graph of so many tokens is worth making, by what the last one took."""
        return tokens * self._bytes_a_token <= self.budget

    def keep(self, peer: str, key: str, lease: Lease) -> None:
        """Keep it, at the expense of others; one that is larger than the budget is let go."""
        self._bytes_a_token = lease.nbytes / lease.tokens
        self._kept.pop((peer, key), None)
        if lease.nbytes > self.budget:
            return
        self._kept[peer, key] = lease
        while self.held > self.budget or len(self._kept) > MOST_LEASES:
            self._drop_one()

    def _drop_one(self) -> None:
        by_peer: Counter[str] = Counter()  # bytes
        for (peer, _), lease in self._kept.items():
            by_peer[peer] += lease.nbytes
        most = max(by_peer, key=by_peer.__getitem__)
        del self._kept[next(name for name in self._kept if name[0] == most)]

    def take(self, peer: str, key: str) -> Lease | None:
        """The peer's lease, which is kept no longer; None when there is none."""
        lease: Lease | None = self._kept.pop((peer, key), None)
        return lease

    def expire(self) -> None:
        """Let go of what is too old."""
        self._kept.expire()


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
