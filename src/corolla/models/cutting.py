"""A family's model class with nothing but some of its blocks.

Invariant: the blocks see what they see in the whole model. What the family's code computes before the first
block and after the last is replaced by nothing or comes to nothing: `hooks.py: Passage` gives the first block
the hidden states that were sent, whatever the code made of them, and takes what leaves the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.models.families import Structure, slice_config


class _NoEmbedding(nn.Module):
    """Stands in for an embedding, of positions mostly: adds nothing."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros((), dtype=torch.long)


class _Nothing(nn.Module):
    """Stands in for another module with weights outside of the blocks: a norm, a projection."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor that is no index, as it is."""
        given = (*args, *kwargs.values())
        return next(one for one in given if isinstance(one, Tensor) and one.is_floating_point())


def span_class(found: Structure, start: int, end: int) -> type[PreTrainedModel]:
    """The family's model class, built whole (on the meta device, by the loader) and then cut."""
    holder = found.holder

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        holder.__init__(self, config)
        cut_to_blocks(self, found.blocks, start, end)

    # The loader looks conversions of weights up by the class's name and refuses them to classes that are not
    # transformers' own; so the class carries the family's name and module.
    return type(holder.__name__, (holder,), {"__init__": build, "__module__": holder.__module__})


def cut_to_blocks(model: PreTrainedModel, blocks: str, start: int, end: int) -> None:
    """Keep blocks [start, end) of a family's model, and no other weights.

    Modules without weights stay: they may make what the blocks are called with, such as rotary embeddings.
    """
    kept = getattr(model, blocks)[start:end]
    for name, child in list(model.named_children()):
        if name != blocks and any(True for _ in child.parameters()):
            setattr(model, name, _NoEmbedding() if isinstance(child, nn.Embedding) else _Nothing())
    setattr(model, blocks, nn.ModuleList(kept))
    # Blocks keep the whole model's config, by which they know their own place; the model that runs them
    # counts its blocks from 0.
    model.config = slice_config(model.config, start, end)
