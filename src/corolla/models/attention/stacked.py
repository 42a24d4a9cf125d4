"""Sequences with one new token each, of families whose blocks keep states, as a batch of the family's own code.

Invariant: the caches that are stacked are read only, until `commit`: a pass that fails has changed none of them. A row
sees its own cache and nothing else: states are stacked along the batch, since they are of one size whatever the length
of their sequence, and attention, which is not, is computed cache by cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from corolla.models.attention.one_sequence import TableSegment, attend_one
from corolla.models.attention.one_token_rows import Rules
from corolla.models.attention.packing import attend_latents
from corolla.models.attention.span_cache import NOTHING, SpanCache

# Kinds of layers that are understood; no others, nor kinds that are made of these.
KINDS = (DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, NOTHING)
STATES = ("conv_states", "recurrent_states")  # of a layer that has some, by their number


class StackedCaches(Cache):  # type: ignore[misc]
    """Stands in one pass for the caches of several requests, and for the batch to which attention goes.

    The family's code takes it for a cache of R rows, all of them (`SpanCache`), and gives it one token each.
    """

    is_compileable = False
    segments: Sequence[Any] = ()  # nothing is packed
    goes_on = True

    def __init__(self, caches: Sequence[SpanCache], latent: frozenset[int]) -> None:
        """`latent` are the blocks whose attention keeps latents. Raises `TypeError` for other kinds of caches."""
        if any(not can_be_stacked(one) for one in caches):
            raise TypeError("These caches are of a kind that cannot be stacked.")
        self._caches = caches
        self._latent = latent
        self._new: dict[int, list[tuple[Tensor, Tensor]]] = {}  # keys and values of each cache, by block
        super().__init__(
            layers=[_stacked(layers) for layers in zip(*(one.layers for one in caches), strict=True)]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_others: Any, **_more: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' [R, heads, 1, D], which are given back: attention looks for the others itself."""
        self._new[layer_idx] = [
            (_behind(layer.keys, keys), _behind(layer.values, values))
            for layer, keys, values in zip(
                (one.layers[layer_idx] for one in self._caches),
                self._of_caches(key_states),
                self._of_caches(value_states),
                strict=True,
            )
        ]
        return key_states, value_states

    @property
    def states(self) -> list[Tensor]:
        """Those of all rows and blocks, always in the same order."""
        own = [
            getattr(one, name)
            for one in self.layers
            if isinstance(one, LinearAttentionLayer)
            for name in STATES
        ]
        return [one for states in own for one in states.values() if one is not None]

    def _of_caches(self, rows: Tensor) -> Sequence[Tensor]:
        return torch.split(rows, [one.rows for one in self._caches])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(one.get_seq_length() for one in self._caches)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    # --- attention, see `packing.PackedBatch` ---------------------------------------------------------------

    def has_latents(self, block: int) -> bool:
        """Whether attention of this block is over latents."""
        return block in self._latent

    def attend(self, block: int, query: Tensor, _key: Tensor, _value: Tensor, rules: Rules) -> Tensor:
        """Attention of `query` [R, heads, 1, D] over what each row's cache holds: [R, 1, heads, D]."""
        return self._attended(block, query, lambda own, one, held: attend_one(own, *held, one, rules))

    def attend_latents(
        self, attention: Any, query: Tensor, _new: tuple[Tensor, Tensor], rules: Rules
    ) -> Tensor:
        """The same over latents."""
        return self._attended(
            int(attention.layer_idx),
            query,
            lambda own, one, held: attend_latents(attention, own, rules, one, *held),
        )

    def _attended(
        self,
        block: int,
        query: Tensor,
        attend: Callable[[Tensor, TableSegment, tuple[Tensor, Tensor]], Tensor],
    ) -> Tensor:
        parts = []
        for own, (keys, values) in zip(self._of_caches(query), self._new[block], strict=True):
            one = TableSegment(0, 1, past=int(keys.shape[2]) - 1)
            for row in range(own.shape[0]):
                here = slice(row, row + 1)
                parts.append(attend(own[here], one, (keys[here], values[here])))
        return torch.cat(parts).transpose(1, 2)

    # --- its end --------------------------------------------------------------------------------------------

    def commit(
        self, output: Tensor, hidden: Sequence[Tensor], positions: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Give each cache what is its own, after a pass through all blocks; returns the part of each in `output`.

        `hidden` [R, 1, W] and `positions` int64 [R, 1] are what each was given.
        """
        for block, stacked in enumerate(self.layers):
            layers = [one.layers[block] for one in self._caches]
            for layer, (keys, values) in zip(layers, self._new.get(block, ()), strict=False):
                layer.keys, layer.values = keys, values
            if isinstance(stacked, LinearAttentionLayer):
                for name in STATES:
                    self._hand_out(getattr(stacked, name), [getattr(layer, name) for layer in layers])
        for cache, own, places in zip(self._caches, hidden, positions, strict=True):
            cache.record(own, places)
        return self._of_caches(output)

    def _hand_out(self, stacked: dict[int, Tensor | None], own: Sequence[dict[int, Tensor]]) -> None:
        """Copy states of all rows into each cache's."""
        for at, whole in stacked.items():
            if whole is not None:
                for states, part in zip(own, self._of_caches(whole), strict=True):
                    states[at].copy_(part)


def can_be_stacked(cache: SpanCache) -> bool:
    """Whether a cache, that holds some tokens, is of layers that are understood."""
    return not cache.of_its_own and all(type(one) in KINDS for one in cache.layers)


def _behind(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], dim=-2)


def _stacked(layers: Sequence[Any]) -> Any:
    """The states of some caches' layers, of one block, in one layer."""
    first = layers[0]
    if not isinstance(first, LinearAttentionLayer):
        return type(first)() if type(first) is NOTHING else DynamicLayer()
    made = type(first)(first.number_of_states)
    for name in STATES:
        setattr(made, name, _joined([getattr(one, name) for one in layers]))
    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
        setattr(made, name, dict(getattr(first, name)))
    made.conv_kernel_size = dict(first.conv_kernel_size)
    made.device, made.dtype = first.device, first.dtype
    return made


def _joined(states: Sequence[dict[int, Tensor | None]]) -> dict[int, Tensor | None]:
    found: dict[int, Tensor | None] = {}
    for at in states[0]:
        parts = [one[at] for one in states]
        given = [one for one in parts if one is not None]
        if given and len(given) < len(parts):
            raise TypeError("Some of these caches have a state that others lack.")
        found[at] = torch.cat(given) if given else None
    return found
