"""Attention caches of a server's sessions, and the budget that they share.

Invariant: the tokens reserved never exceed the budget; a session's cache holds exactly the tokens of the
steps that were answered, or it is gone. Only the compute thread touches tensors; reservations are made on
the event loop before a step is enqueued.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.models.span import Span
from corolla.models.span_cache import SpanCache, crop_cache, select_rows

RETRY_SECONDS = 5.0


@dataclass
class Reservation:
    """Room that one session holds, in block-tokens: rows × tokens × blocks."""

    amount: int = 0


class CacheBudget:
    """How many block-tokens all sessions may hold together."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in block-tokens: tokens that one block's keys and values are kept for."""
        self.capacity = capacity
        self.reserved = 0

    @property
    def free(self) -> int:
        """Block-tokens that nobody has reserved."""
        return self.capacity - self.reserved

    def resize(self, reservation: Reservation, amount: int, field: str) -> None:
        """Grow or shrink a reservation; `field` is the message field that asks for it.

        Raises `RequestRefused` (busy, too_large) and leaves the reservation as it was.
        """
        if amount > self.capacity:
            raise RequestRefused(
                f"This session would need {amount} of the server's {self.capacity} cached block-tokens: "
                "ask for fewer tokens or rows.",
                code="too_large",
                field=field,
            )
        if amount - reservation.amount > self.free:
            raise RequestRefused(
                f"The server's attention cache is full ({self.free} of {self.capacity} block-tokens are free).",
                code="busy",
                field=field,
                retry_after=RETRY_SECONDS,
            )
        self.reserved += amount - reservation.amount
        reservation.amount = amount

    def release(self, reservation: Reservation) -> None:
        """Give everything back; safe to call twice."""
        self.reserved -= reservation.amount
        reservation.amount = 0


class CachedSession:
    """One session's cache over the blocks of `span`."""

    def __init__(
        self, span: Span, budget: CacheBudget, *, rows: int, max_tokens: int, prompts: Tensor | None
    ) -> None:
        """`prompts` are the deep prompts [blocks, P, H] of these blocks. Raises `RequestRefused`."""
        self.span = span
        self.rows = rows
        self.length = 0
        self._prompts = prompts
        self._budget = budget
        self._reservation = Reservation()
        self._tokens = 0
        self._cache: SpanCache = span.new_cache()
        self.reserve(rows, max_tokens, "max_tokens")

    def reserve(self, rows: int, tokens: int, field: str = "reserve") -> None:
        """Make sure that `rows` may reach `tokens` each. Raises `RequestRefused`, naming `field`."""
        tokens = max(tokens, self._tokens)
        self._budget.resize(self._reservation, rows * tokens * (self.span.end - self.span.start), field)
        self._tokens = tokens

    def step(
        self,
        hidden: Tensor,
        *,
        position: int,
        rows: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Outputs [R, T, H] for new tokens that stand at `position`; runs on the compute thread.

        What is cached from `position` on is forgotten, and the rows are reordered, before that.
        """
        if rows is not None and self.length:
            select_rows(self._cache, rows)
        if position == 0:
            self._cache = self.span.new_cache()
        elif position < self.length:
            crop_cache(self._cache, position)
        with torch.inference_mode():
            output = self.span.forward(
                hidden, mask=mask, positions=positions, cache=self._cache, prompts=self._prompts
            )
        self.rows, self.length = int(hidden.shape[0]), position + int(hidden.shape[1])
        return output

    def close(self) -> None:
        """Free the cache; safe to call twice."""
        self._budget.release(self._reservation)
        self._cache = self.span.new_cache()
        self.length = 0


def default_capacity(span: Span, free_bytes: int) -> int:
    """Block-tokens that half of the free memory can hold, by the span's own layout of keys and values."""
    return max(1, free_bytes // 2 // bytes_per_block_token(span))


def bytes_per_block_token(span: Span) -> int:
    """Memory that one token of one row takes in one block's cache, measured on the span itself."""
    cache = span.new_cache()
    probe = torch.zeros(1, 1, span.hidden_size, dtype=span.dtype, device=span.device)
    with torch.inference_mode():
        span.forward(probe, cache=cache)
    total: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return max(1, total // (span.end - span.start))
