"""One pass through some blocks of a family's model, whatever the family's code does around them.

What stands around the blocks of a server's span, with weights of its own, is replaced by what changes nothing.

Invariant: hooks stand on blocks that other spans' views share, and in a pause other passes go through the same blocks;
so each hook acts in its own pass and in no other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corolla.models.attention.span_cache import SpanCache
from corolla.models.checks.tracing import replaced
from corolla.models.cut_layout import CutLayout, CutTensors, PassedOn, SharedTensor
from corolla.models.lora import Hook
from corolla.models.prompts import BlockHook

_running: ContextVar[BlocksPass | None] = ContextVar("corolla_blocks_pass", default=None)


def first_of(output: Any) -> Tensor:
    """The hidden states [R, T, H] among what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


@contextmanager
def attention_named(name: str, configs: Sequence[Any]) -> Iterator[None]:
    """Families' code with these configs uses the attention function of that name inside."""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


class BlocksPass:
    """One pass of hidden states through a list of blocks: what enters the first, and what leaves the last.

    Families' code does something to its inputs before the first block (positions are added, they are scaled)
    which has been done at the client, and something after the last, which is done there too.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        hidden: Tensor,
        hooks: Sequence[Sequence[BlockHook]],
        behind: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> None:
        """`hooks` are each block's own, or none at all; they see, and may replace, its inputs. Those `behind` layers
        see, and may replace, what these give."""
        self._blocks = blocks
        self._hidden = hidden
        self._hooks = hooks
        self._behind = behind
        self.left: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The family's code runs its blocks inside."""
        handles = [
            self._blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            self._blocks[-1].register_forward_hook(self._leave),
        ]
        for block, own in zip(self._blocks, self._hooks, strict=bool(self._hooks)):
            handles += [block.register_forward_pre_hook(self._only_here(hook)) for hook in own]
        handles += [layer.register_forward_hook(self._only_behind(hook)) for layer, hook in self._behind]
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
            for handle in handles:
                handle.remove()

    def _enter(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _running.get() is not self:
            return None
        kwargs.pop("hidden_states", None)
        return (self._hidden, *args[1:]), kwargs

    def _leave(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if _running.get() is self:
            self.left = first_of(output)

    def _only_here(self, hook: BlockHook) -> BlockHook:
        return lambda block, args: hook(block, args) if _running.get() is self else None

    def _only_behind(self, hook: Hook) -> Hook:
        return lambda layer, args, output: hook(layer, args, output) if _running.get() is self else None


class _NoEmbedding(nn.Module):
    """Stands in for an embedding, of positions mostly: adds nothing."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros((), dtype=torch.long)


class _Nothing(nn.Module):
    """Stands in for another module with weights outside of the blocks: a norm, a projection."""

    def __init__(self, child: nn.Module) -> None:
        """Its weights are of the child's, none of their numbers: code around the blocks may ask for their dtype."""
        super().__init__()
        for name, weight in child.named_parameters(recurse=False):
            self.register_buffer(name, torch.empty(0, dtype=weight.dtype), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor that is no index, as it is."""
        given = (*args, *kwargs.values())
        return next(one for one in given if isinstance(one, Tensor) and one.is_floating_point())


class _Zeros(nn.Module):
    """Stands in for an embedding or a projection where blocks are given more than hidden states: zeros, as wide."""

    def __init__(self, width: int, dtype: torch.dtype, *, of_block: int = 0) -> None:
        """`of_block` is how much of the width is one block's, where each has its own part."""
        super().__init__()
        self._width, self._dtype, self._of_block = width, dtype, of_block

    def forward(self, given: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        sizes = given.shape[:-1] if given.is_floating_point() else given.shape
        return torch.zeros(*sizes, self._width, dtype=self._dtype, device=given.device)

    def of_blocks(self, count: int) -> _Zeros:
        """The same for fewer blocks."""
        if not self._of_block:
            return self
        return _Zeros(self._of_block * count, self._dtype, of_block=self._of_block)


def stand_in(child: nn.Module, cuts: CutLayout, count: int) -> nn.Module:
    """For a part with weights outside of the `count` blocks that are kept."""
    if cuts.plain:
        return _NoEmbedding() if isinstance(child, nn.Embedding) else _Nothing(child)
    if isinstance(child, nn.ModuleList):
        return nn.ModuleList([stand_in(one, cuts, count) for one in child])
    if not isinstance(child, nn.Embedding | nn.Linear):
        return _Nothing(child)
    width = child.embedding_dim if isinstance(child, nn.Embedding) else child.out_features
    # What gives every block its own part gives it to these blocks only.
    each = any(one.each and width == cuts.depth * one.layout.width for one in cuts.sides)
    return _Zeros(width, child.weight.dtype, of_block=width // cuts.depth if each else 0).of_blocks(count)


def narrow_stand_ins(model: PreTrainedModel, count: int) -> None:
    """Have what stands for parts outside of the blocks be that of `count` of them."""
    for name, child in list(model.named_children()):
        if isinstance(child, _Zeros):
            model._modules[name] = child.of_blocks(count)


class WideBlocksPass(BlocksPass):
    """A pass whose blocks are given more than hidden states (`models/cut_layout.py`)."""

    def __init__(
        self,
        blocks: nn.ModuleList,
        cuts: CutLayout,
        crossed: CutTensors,
        hooks: Sequence[Sequence[BlockHook]],
        cache: SpanCache | None,
        size: int,
        behind: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> None:
        """Of what an earlier span's blocks share, `cache` keeps all that there has been; a stream is `size` wide."""
        super().__init__(blocks, crossed.hidden, hooks, behind)
        self._size = size
        self._cuts = cuts
        self._crossed = crossed
        self._cache = cache
        self._past = 0 if cache is None else cache.get_seq_length()
        self._store: Any = None
        self._returned: Any = None  # by the last block

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        super()._leave(block, args, output)
        if _running.get() is self:
            self._returned = output

    def _only_here(self, hook: BlockHook) -> BlockHook:
        """A hook sees all streams, as so many rows."""
        form, plain = self._cuts.hidden, super()._only_here(hook)
        size = self._size

        def each_stream(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            rows = args[0].shape[form.rows]
            found = plain(block, (form.as_rows(args[0], size), *args[1:]))
            return None if found is None else (form.of_rows(found[0], rows), *found[1:])

        return each_stream

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [
            block.register_forward_pre_hook(partial(self._give, index), with_kwargs=True)
            for index, block in enumerate(self._blocks, self._crossed.cut)
        ]
        try:
            with super().hooked():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _give(
        self, index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _running.get() is not self:
            return None
        for side, value in self._crossed.of_block(index):
            args, kwargs = replaced(args, kwargs, side.name, side.place, value)
        if self._cuts.counted is not None:  # the family's loop counts from the first block that it is given
            args, kwargs = replaced(args, kwargs, *self._cuts.counted, index)
        if index == self._crossed.cut:
            for one, flat in self._crossed.handed.items():
                if isinstance(one, PassedOn):
                    args, kwargs = replaced(args, kwargs, one.name, one.place, one.shaped(flat, self._past))
        if self._cuts.store is not None and self._store is None:
            name, place = self._cuts.store
            self._store = args[place] if place < len(args) else kwargs[name]
            self._fill()
        return args, kwargs

    def _fill(self) -> None:
        """What earlier blocks have put into the dictionary, as those behind them find it there."""
        shared: dict[Any, list[Tensor]] = defaultdict(list)
        for one, flat in self._crossed.handed.items():
            if isinstance(one, PassedOn):
                continue
            value = one.layout.shaped(flat)
            if self._cache is not None:
                value = self._cache.keep_shared(one, value)
            shared[one.key].append(value)
        for key, values in shared.items():
            self._store[key] = tuple(values)

    def join(self, end: int) -> Tensor:
        """What crosses the cut behind the last block, [R, T, W]."""
        assert self.left is not None
        handed = {one: self._handed(one) for one in self._cuts.handed if one.crosses(end)}
        return self._cuts.join(replace(self._crossed, hidden=self.left, handed=handed), end)

    def _handed(self, one: SharedTensor | PassedOn) -> Tensor:
        """What these blocks, or earlier ones, hand to those behind them, [R, T, width]."""
        if isinstance(one, PassedOn):
            return one.flat(self._returned[one.index], self._past)
        if one.made_by < self._crossed.cut:
            return self._crossed.handed[one]
        tokens = self._crossed.hidden.shape[self._cuts.hidden.tokens]
        value = self._store[one.key][one.index]
        newest = value.narrow(one.layout.tokens, value.shape[one.layout.tokens] - tokens, tokens)
        return one.layout.flat(newest)
