"""What a span's blocks keep of the sequences of one request: keys and values, and states of fixed size.

Invariant: keys and values of every position are kept, in every layer, sliding-window layers included (the window is
applied by the mask), so they can be set back to any token. States (convolutions, recurrences) are those of the last
token only: where there are some, a cache goes on from where it is, from a snapshot (`snapshots.py`), or begins anew,
and `reaches` says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from corolla.models.attention.prefixes import KeyValueForm, as_prefix
from corolla.models.attention.snapshots import Snapshot, Snapshots, copied
from corolla.models.cache import own_cache
from corolla.models.cut_layout import SharedTensor
from corolla.models.families import depth_of, layers_of_block

ENDLESS = 2**62  # tokens
# An attribute of one layer: position ids [kinds, R, T] of all tokens. A family's loop, which counts the layers of its
# own blocks only, keeps them where it finds the first of a kind.
PLACES = "indexer_position_ids"
# The layers of blocks that keep nothing; older releases have no such kind.
NOTHING: Any = getattr(cache_utils, "DummyLayer", type(None))


class SpanCache(DynamicCache):  # type: ignore[misc]
    """Of blocks [start, end), addressed by the indices that their layers have in the whole model."""

    of_its_own = False  # a family's own kind of cache, which keeps a state in no layer
    steps_differ = False  # see `Span`

    def __init__(self, start: int, end: int, config: PretrainedConfig) -> None:
        """`config` is the whole model's, by which the blocks are of different kinds."""
        self.layers: list[Any]
        if self.of_its_own:
            super().__init__()  # it makes layers as they are needed
        else:
            super().__init__(config=config)
        self._of_block = layers_of_block(config)
        self._start = first = start * self._of_block
        own = [_without_window(layer) for layer in self.layers[first : end * self._of_block]]
        self.layers = [*(DynamicLayer() for _ in range(first)), *own]  # the former stay empty
        for layer in self.layers:
            vars(layer).setdefault(PLACES, None)
        self.rows = 0
        self._length = 0
        self.prefix_length = 0  # positions before all tokens
        self._shared: dict[SharedTensor, Tensor] = {}
        self._snapshots = Snapshots()

    def keep_shared(self, one: SharedTensor, new: Tensor) -> Tensor:
        """Keep what an earlier span's block shares of the new tokens; gives that of all tokens."""
        past = self._shared.get(one)
        whole = new if past is None else torch.cat([past, new], dim=one.layout.tokens)
        self._shared[one] = whole
        return whole

    def begin_with(self, prefix: Tensor, rows: int, form: KeyValueForm) -> None:
        """An empty cache holds in each row what a prefix [blocks, P, D] says; differentiable."""
        for layer, own in zip(self.layers[self._start :], prefix, strict=True):
            keys, values = form.split(own)
            layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        self.prefix_length = int(prefix.shape[1])
        self.rows, self._length = rows, self.prefix_length

    def read(self, tokens: int) -> Tensor:
        """What the first `tokens` tokens of the first row have left, as a prefix fp32 [blocks, tokens, D]."""
        first, last = self.prefix_length, self.prefix_length + tokens
        own = self.layers[self._start :]
        return torch.stack(
            [as_prefix(one.keys[0, :, first:last], one.values[0, :, first:last]) for one in own]
        )

    @property
    def form(self) -> KeyValueForm | None:
        """Of what is cached, where that is keys and values of one form and nothing else, once a block."""
        own = self.layers[self._start :]
        if (
            self._of_block > 1
            or self.of_its_own
            or self._shared
            or any(type(one) is not DynamicLayer for one in own)
        ):
            return None
        forms = {KeyValueForm.of(one.keys, one.values) for one in own if one.is_initialized}
        return forms.pop() if len(forms) == 1 and all(one.is_initialized for one in own) else None

    @property
    def tokens(self) -> int:
        """Tokens a row that are cached, behind the prefix."""
        return self._length - self.prefix_length

    def record(self, hidden: Tensor, positions: Tensor | None) -> None:
        """A pass over new tokens [R, T, W] with these position ids is over."""
        self._snapshots.record(hidden, positions, self._length)
        self.rows, self._length = int(hidden.shape[0]), self._length + int(hidden.shape[1])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    @property
    def nbytes(self) -> int:
        """Memory of everything that is kept."""
        shared = sum(one.nbytes for one in self._shared.values())
        more = sum(
            one.nbytes for name, value in vars(self).items() if name != "layers" for one in _tensors(value)
        )
        layers = sum(one.nbytes for layer in self.layers for one in _tensors(vars(layer)))
        return shared + more + layers + self._snapshots.nbytes

    @property
    def keeps_everything(self) -> bool:
        """Whether the blocks have keys and values only, and none of them is ever forgotten."""
        return not self.of_its_own and all(map(_keeps_everything, self.layers))

    def reaches(self, length: int) -> bool:
        """Whether the cache can go on from its first `length` tokens."""
        if not 0 < length < self.tokens or self.keeps_everything:
            return True
        return self._snapshots.before(length, steps_differ=self.steps_differ) is not None

    @property
    def has_known_states(self) -> bool:
        """Whether there are states, in layers of kinds that `remember` knows."""
        known = (LinearAttentionLayer, DynamicLayer, DynamicIndexedLayer, NOTHING)
        return not self.keeps_everything and all(
            isinstance(one, known) and not isinstance(one, DynamicSlidingWindowLayer) for one in self.layers
        )

    def remember(self, *, turn: bool) -> None:
        """Take a snapshot of the states, if one is due: a `turn` begins here, or many tokens have passed."""
        if not self.keeps_everything and self._snapshots.is_due(self._length, turn=turn):
            self._snapshots.add(Snapshot(self._length, turn, copied(self._states())))

    def go_back(self, length: int) -> tuple[Tensor, Tensor, list[int]] | None:
        """Hold the first `length` tokens, which is not 0, or the beginning of them.

        Then gives inputs [R, T, W] and position ids [R, T] of the others, which are to be computed again, and in
        passes of how many tokens they came.
        """
        last = (
            None if self.keeps_everything else self._snapshots.before(length, steps_differ=self.steps_differ)
        )
        if last is None or length >= self._length:
            self.truncate(length)
            return None
        again = self._snapshots.go_back(length, last)
        for values, now in zip(copied(last.states, last.order), self._holders(), strict=False):
            now.update(values)
        self._cut(last.length)
        return again

    def _places(self) -> list[tuple[Any, Tensor]]:
        found = ((layer, getattr(layer, PLACES, None)) for layer in self.layers)
        return [(layer, places) for layer, places in found if places is not None]

    def fork(self) -> SpanCache:
        """Another cache that goes on from here."""
        return copy.deepcopy(self, {id(self._snapshots): self._snapshots.copy()})

    def _holders(self) -> list[dict[str, Any]]:
        """Where states are: attributes of the layers, and of a family's own cache."""
        own = [vars(self)] if self.of_its_own else []
        return [*own, *(vars(one) for one in self.layers[self._start :])]

    def _states(self) -> list[dict[str, Any]]:
        """Everything that blocks keep but keys and values, which can be cut off."""
        lists = {name: one for name, one in vars(self).items() if isinstance(one, list) and name != "layers"}
        layers = [vars(one) if "conv_states" in vars(one) else {} for one in self.layers[self._start :]]
        rest = [
            {name: one for name, one in own.items() if name not in ("keys", "values", PLACES)}
            for own in layers
        ]
        return [lists, *rest] if self.of_its_own else rest

    def _cut(self, length: int) -> None:
        """Cut off keys and values."""
        surplus = self._length - length
        for layer in self.layers[self._start :]:
            if _keeps_everything(layer):
                layer.crop(-surplus)
            elif isinstance(layer, DynamicLayer):
                DynamicLayer.crop(layer, -surplus)
        for layer, places in self._places():
            setattr(layer, PLACES, places[..., :length])
        for one, whole in self._shared.items():
            self._shared[one] = whole.narrow(one.layout.tokens, 0, length)
        self._length = length

    def truncate(self, length: int) -> None:
        """Forget what stands at position `length`, which is not 0, and behind; for what has no states."""
        if length < self.tokens:
            self._cut(self.prefix_length + length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue what was row `beam_idx[i]` (int64 [R'], R' may differ from the R cached so far)."""
        for layer, places in self._places():
            if not isinstance(layer, DynamicIndexedLayer):  # which does it by itself
                setattr(layer, PLACES, places.index_select(1, beam_idx.to(places.device)))
        super().reorder_cache(beam_idx)
        if self.of_its_own:
            self._reorder_own(beam_idx)
        for one, whole in self._shared.items():
            self._shared[one] = whole.index_select(one.layout.rows, beam_idx.to(whole.device))
        self._snapshots.select_rows(beam_idx)
        self.rows = len(beam_idx)

    def _reorder_own(self, rows: Tensor) -> None:
        """The same of what a family's own cache keeps beside its layers: lists of a tensor each block, if any."""
        for value in vars(self).values():
            if isinstance(value, list) and value is not self.layers:
                value[:] = [one.index_select(0, rows) if isinstance(one, Tensor) else one for one in value]


def span_cache_class(forward: Callable[..., Any]) -> type[SpanCache]:
    """The cache of spans of a model with this `forward`, which may want one of its own class."""
    own = own_cache(forward)
    return SpanCache if own is None else _joined(cast(Any, own))


def keeps_states(forward: Callable[..., Any], config: PretrainedConfig) -> bool:
    """Whether any blocks of a whole model keep more than keys and values of all tokens."""
    return not span_cache_class(forward)(0, depth_of(config), config).keeps_everything


@lru_cache
def _joined(own: Any) -> type[SpanCache]:
    return type("SpanCache", (SpanCache, own), {"of_its_own": True})


def _without_window(layer: Any) -> Any:
    """The same kind of layer, which forgets nothing."""
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if isinstance(layer, LinearAttentionCacheLayerMixin) and isinstance(layer, DynamicSlidingWindowLayer):
        return LinearAttentionAndFullAttentionLayer(layer.number_of_states)
    if isinstance(layer, DynamicSlidingWindowLayer):  # a family's own, which keeps something else besides
        layer.sliding_window = ENDLESS
    return layer


def _keeps_everything(layer: Any) -> bool:
    return not isinstance(layer, LinearAttentionCacheLayerMixin | DynamicSlidingWindowLayer)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
