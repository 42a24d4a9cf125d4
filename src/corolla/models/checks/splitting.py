"""A family's miniature, whole and split into spans, and what crosses the whole one's cuts when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.files import scratch_folder
from corolla.models.blocks_pass import first_of
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checkpoints.source import LocalFolder
from corolla.models.checks.miniature import miniature, random_model, undisturbed
from corolla.models.checks.tracing import argument_names, replaced
from corolla.models.cut_layout import CutLayout
from corolla.models.families import blocks_prefix, depth_of, structure
from corolla.models.span import Span, load_span

CPU = torch.device("cpu")


@contextmanager
def split_miniature(
    config: PretrainedConfig, device: torch.device = CPU
) -> Iterator[tuple[PreTrainedModel, list[Span]]]:
    """A random miniature of this config, always the same, and the spans of which it consists."""
    small = miniature(config)
    with undisturbed(), scratch_folder() as folder:
        whole = random_model(structure(config).causal_lm, small)
        whole.save_pretrained(folder)
        moved: Any = whole
        yield moved.to(device), _spans(folder, depth_of(small), device)


def _spans(folder: Path, depth: int, device: torch.device) -> list[Span]:
    checkpoint = Checkpoint("miniature", None, LocalFolder(folder))
    cuts = sorted({0, 1, (depth + 2) // 2, depth})
    return [
        load_span(checkpoint, start, end, dtype=torch.float32, device=device) for start, end in pairwise(cuts)
    ]


@dataclass
class Seen:
    """What entered the first block and left the last, flat, one of each a call."""

    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    given: list[dict[str, Tensor]] = field(default_factory=list)  # to each block of the latest call


@contextmanager
def watched(whole: PreTrainedModel, cuts: CutLayout, *, grad: bool = False) -> Iterator[Seen]:
    """With `grad`, what is given to the blocks from outside comes from nowhere and needs gradients."""
    blocks: Any = whole.get_submodule(blocks_prefix(whole.config))
    hidden = argument_names(blocks[0])[0]
    from_outside = [(hidden, 0), *((side.name, side.place) for side in cuts.sides)]
    shared = {side.name for side in cuts.sides if not side.each}
    seen = Seen()

    def entering(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(seen.given) == len(blocks):
            seen.given.clear()
        given: dict[str, Tensor] = {}
        for name, place in from_outside if not seen.given else from_outside[1:]:
            value = args[place] if place < len(args) else kwargs[name]
            if grad and value.is_floating_point():
                again = name in shared and seen.given
                value = seen.given[0][name] if again else value.detach().requires_grad_()
                args, kwargs = replaced(args, kwargs, name, place, value)
            given[name] = value
        seen.given.append(given)
        if len(seen.given) == len(blocks):
            seen.entered.append(cuts.collect(seen.given[0][hidden], seen.given))
        return args, kwargs

    def leaving(_block: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        seen.left.append(cuts.hidden.flat(first_of(output)))

    handles = [one.register_forward_pre_hook(entering, with_kwargs=True) for one in blocks]
    handles.append(blocks[-1].register_forward_hook(leaving))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def chain(spans: list[Span], hidden: Tensor, **arguments: Any) -> Tensor:
    for span in spans:
        hidden = span.forward(hidden, **arguments)
    return hidden
