"""A family's model class with some of its parts only.

Invariant: what is left runs as the family wrote it. The class is built whole (on the meta device, by the loader) and
then cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.models.crossing import Crossing
from corolla.models.families import Structure, slice_config
from corolla.models.shell import BlocksLayer, replace_blocks


class _NoEmbedding(nn.Module):
    """Stands in for an embedding, of positions mostly: adds nothing."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros((), dtype=torch.long)


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


class _Nothing(nn.Module):
    """Stands in for another module with weights outside of the blocks: a norm, a projection."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor that is no index, as it is."""
        given = (*args, *kwargs.values())
        return next(one for one in given if isinstance(one, Tensor) and one.is_floating_point())


def span_class(found: Structure, start: int, end: int, crossing: Crossing) -> type[PreTrainedModel]:
    """The model that runs the blocks, with blocks [start, end) only."""
    holder = found.holder

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        holder.__init__(self, config)
        cut_to_blocks(self, found.blocks, start, end, crossing)

    return _built_by(holder, build)


def cut_to_blocks(model: PreTrainedModel, blocks: str, start: int, end: int, crossing: Crossing) -> None:
    """Keep blocks [start, end) of a family's model, and no other weights.

    Modules without weights stay: they may make what the blocks are called with, such as rotary embeddings.
    """
    kept = getattr(model, blocks)[start:end]
    depth = len(getattr(model, blocks))
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleList) and len(child) == depth:  # of something that each block has
            setattr(model, name, nn.ModuleList(child[start:end]))
            continue
        if name != blocks and any(True for _ in child.parameters()):
            setattr(model, name, _stand_in(child, crossing, end - start))
    setattr(model, blocks, nn.ModuleList(kept))
    model.whole_config = model.config
    # Blocks keep the whole model's config, by which they know their own place; the model that runs them
    # counts its blocks from 0.
    model.config = slice_config(model.config, start, end)


def _stand_in(child: nn.Module, crossing: Crossing, count: int) -> nn.Module:
    """For a part with weights outside of the `count` blocks that are kept."""
    if crossing.plain:
        return _NoEmbedding() if isinstance(child, nn.Embedding) else _Nothing()
    if isinstance(child, nn.ModuleList):
        return nn.ModuleList([_stand_in(one, crossing, count) for one in child])
    if not isinstance(child, nn.Embedding | nn.Linear):
        return _Nothing()
    width = child.embedding_dim if isinstance(child, nn.Embedding) else child.out_features
    # What gives every block its own part gives it to these blocks only.
    each = any(one.each and width == crossing.depth * one.form.width for one in crossing.sides)
    return _Zeros(width, child.weight.dtype, of_block=width // crossing.depth if each else 0).of_blocks(count)


def narrow_stand_ins(model: PreTrainedModel, count: int) -> None:
    """Have what stands for parts outside of the blocks be that of `count` of them."""
    for name, child in list(model.named_children()):
        if isinstance(child, _Zeros):
            model._modules[name] = child.of_blocks(count)


def front_class(found: Structure, blocks: BlocksLayer) -> type[PreTrainedModel]:
    """The family's model class with `blocks` in the place of its blocks, and no embedding of tokens."""
    holder = found.holder

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        holder.__init__(self, config)
        embedding = self.get_input_embeddings()
        for name, child in list(self.named_children()):
            if child is embedding:
                setattr(self, name, None)
        replace_blocks(self, found.blocks, blocks)

    return _built_by(holder, build)


def _built_by(holder: type[PreTrainedModel], build: Callable[..., None]) -> type[PreTrainedModel]:
    # The loader looks conversions of weights up by the class's name and refuses them to classes that are not
    # transformers' own; so the class carries the family's name and module.
    return type(holder.__name__, (holder,), {"__init__": build, "__module__": holder.__module__})
