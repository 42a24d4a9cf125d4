"""Blocks read and prepared a few at a time, so that a machine needs room for what is kept, not for what is read.

Invariant: what comes out is the span that `load_span` gives, prepared: the same modules, sharing one config.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checks.forms import cuts_of
from corolla.models.families import block_key_pattern, slice_config, structure
from corolla.models.span import Span, load_span

STEP_BYTES = 2**28  # of weights, in the dtype that is computed in


def load_prepared(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    packable: bool = False,
    stackable: bool = False,
    steps_differ: bool = False,
    prepare: Callable[[PreTrainedModel], object],
    step_bytes: int = STEP_BYTES,
) -> Span:
    """`load_span`, with `prepare` done to the blocks before many more are read; raises what both raise."""

    kind = {"packable": packable, "stackable": stackable, "steps_differ": steps_differ}

    def read(first: int, last: int) -> Span:
        span = load_span(checkpoint, first, last, dtype=dtype, device=device, **kind)
        prepare(span.model)
        return span

    bounds = _bounds(checkpoint, start, end, step_bytes // dtype.itemsize)
    if len(bounds) == 2 or not cuts_of(checkpoint.config).plain:
        return read(start, end)
    blocks = structure(checkpoint.config).blocks
    model = read(bounds[0], bounds[1]).model
    for first, last in pairwise(bounds[1:]):
        _append(model, read(first, last).model, blocks)
    model.config = slice_config(model.whole_config, start, end)
    cuts = cuts_of(checkpoint.config)
    return Span(model, blocks, start, end, cuts=cuts, **kind)


def _bounds(checkpoint: Checkpoint, start: int, end: int, most: int) -> list[int]:
    """Where steps of at most about `most` numbers begin, and where the last ends."""
    if not 0 <= start < end <= checkpoint.num_blocks:
        return [start, end]  # `load_span` says what is wrong
    pattern = block_key_pattern(checkpoint.config)

    def ours(name: str) -> bool:
        match = pattern.match(name)
        return match is not None and start <= int(match["index"]) < end

    each = checkpoint.elements(ours) / (end - start)
    return [*range(start, end, max(1, int(most / max(each, 1)))), end]


def _append(model: PreTrainedModel, more: PreTrainedModel, blocks: str) -> None:
    """Give `model` the blocks of `more`, which follow its own."""
    count = len(getattr(more, blocks))
    for name, child in list(more.named_children()):
        if isinstance(child, nn.ModuleList) and len(child) == count:
            getattr(model, name).extend(child)
    for module in more.modules():  # attention is chosen in the one config that all blocks look at
        if getattr(module, "config", None) is more.whole_config:
            module.config = model.whole_config
