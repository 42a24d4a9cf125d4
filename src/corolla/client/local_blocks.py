"""The first blocks of a model, run by the client itself, so that no server sees what comes before them.

Invariant: they are the family's own code on the checkpoint's own weights, as at a server; a session's cache
here holds what the chain behind it does, rolled back and reordered by the same calls.
"""

from __future__ import annotations

import copy
import threading

import torch
from torch import Tensor

from corolla.client.sessions.span_session import History, order_of
from corolla.models.attention.span_cache import SpanCache
from corolla.models.cache import BlocksCall
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checks.steps import steps_differ
from corolla.models.kernels.apply import use_kernels
from corolla.models.span import Span, load_span


class LocalBlocks:
    """Blocks [0, end) here. Safe to call from any thread; one at a time runs them."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._lock = threading.Lock()

    @property
    def end(self) -> int:
        """The first block that is not here."""
        return self._span.end

    def new_cache(self, start: int, end: int) -> SpanCache:
        """An empty one for blocks [start, end)."""
        with self._lock:
            return self._span.view(start, end).new_cache()

    def run(self, hidden: Tensor, call: BlocksCall, start: int, end: int, cache: SpanCache | None) -> Tensor:
        """Blocks [start, end) on hidden states [R, T, H]; differentiable in them and what blocks are given besides."""
        rows = int(hidden.shape[0])
        positions = None if call.positions is None else call.positions.expand(rows, -1)
        given = {} if call.vectors is None else call.vectors.of(start, end)
        with self._lock:
            return self._span.view(start, end).forward(
                hidden, mask=call.mask, positions=positions, cache=cache, **given
            )

    def run_again(self, history: History, call: BlocksCall, start: int, end: int, cache: SpanCache) -> None:
        """Have an empty cache of blocks [start, end) hold what the history says, which comes before `call`."""
        inputs = history.inputs()
        assert inputs is not None
        mask = None if call.mask is None else call.mask[:, : call.start]
        given = {} if call.vectors is None else call.vectors.of(start, end)
        with self._lock:
            span = self._span.view(start, end)
            span.forward_again(*inputs, history.lengths(), cache, mask=mask, given=given)


class LocalSession:
    """The cache of one session over some of the local blocks."""

    def __init__(self, blocks: LocalBlocks, start: int, end: int) -> None:
        self._blocks = blocks
        self._start, self._end = start, end
        self._cache = blocks.new_cache(start, end)
        self.entered = History()
        self._order: Tensor | None = None
        self._lock = threading.Lock()

    def reorder(self, rows: Tensor) -> None:
        """The next step continues with these rows of the cached ones, int64 [R]."""
        self._order = rows if self._order is None else self._order[rows]

    @torch.no_grad()
    def step(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        """Run [R, T, H] on from `call.start`, forgetting what stood there."""
        with self._lock:
            self.entered.truncate(call.start)
            self._go_back(call.start)
            self._arrange(int(hidden.shape[0]))
            if self._cache.tokens < call.start:
                self._blocks.run_again(self.entered, call, self._start, self._end, self._cache)
            self.entered.append(hidden.detach(), call.positions)
            return self._blocks.run(hidden, call, self._start, self._end, self._cache)

    def _go_back(self, tokens: int) -> None:
        """Keep the first `tokens` of what is cached, or nothing where the blocks cannot go back."""
        if tokens and self._cache.reaches(tokens):
            self._cache.truncate(tokens)
        else:
            self._cache = self._blocks.new_cache(self._start, self._end)

    def _arrange(self, rows: int) -> None:
        """Bring the cached rows into order."""
        order, self._order = self._order, None
        if not self.entered.length:
            return
        order = order_of(rows, self.entered.rows if order is None else len(order), order)
        if order is not None:
            if self._cache.tokens:
                self._cache.reorder_cache(order)
            self.entered.select_rows(order)

    def read(self, tokens: int) -> Tensor:
        """The first `tokens` tokens' keys and values, as a prefix fp32 [blocks, tokens, D]."""
        with self._lock:
            return self._cache.read(tokens)

    def fork_from(self, other: LocalSession, tokens: int) -> None:
        """Hold the first `tokens` of what the other does; nothing is shared that either changes."""
        with other._lock:
            self._cache = copy.deepcopy(other._cache)
            self.entered = other.entered.copy(tokens)
            self._order = None if other._order is None else other._order.clone()
        self._go_back(tokens)

    def clear(self) -> None:
        """Give the memory back."""
        self._cache = self._blocks.new_cache(self._start, self._end)
        self.entered = History()


def load_local(checkpoint: Checkpoint, count: int, dtype: torch.dtype) -> LocalBlocks | None:
    """The first `count` blocks; None for none. Raises `CheckpointError`."""
    if not count:
        return None
    span = load_span(checkpoint, 0, count, dtype=dtype, steps_differ=steps_differ(checkpoint.config))
    use_kernels(span.model, "none", span.device)
    return LocalBlocks(span)
