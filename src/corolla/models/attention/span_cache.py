"""The attention cache of one span.

Invariant: a cache keeps every position it was given, in every layer, sliding-window layers included (the
window is applied by the mask). So any rollback is exact, at the price of memory for layers with a window.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache


class SpanCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of blocks [first, …), addressed by the blocks' indices in the whole model."""

    def __init__(self, first: int) -> None:
        """Made without a config, so that all layers are plain growing ones."""
        super().__init__()
        self.first = first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [R, heads, T, head_dim] to block `layer_idx` of the whole model; returns all so far."""
        updated: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx - self.first, *args, **kwargs
        )
        return updated


def crop_cache(cache: SpanCache, length: int) -> None:
    """Forget what stands at position `length` and behind; nothing happens when there is less."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)


def select_rows(cache: SpanCache, rows: Tensor) -> None:
    """Make row i continue what was row `rows[i]` (int64 [R'], R' may differ from the R cached so far)."""
    cache.reorder_cache(rows)
