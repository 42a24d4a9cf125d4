"""A family's model class with some of its parts only.

Invariant: what is left runs as the family wrote it. The class is built whole (on the meta device, by the loader) and
then cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import CheckpointError
from corolla.models.attention.packed_bloom import pack_bloom
from corolla.models.attention.rotary import by_length
from corolla.models.blocks_pass import stand_in
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checkpoints.pretrained import load_parts
from corolla.models.cut_layout import CutLayout
from corolla.models.families import TIES, Structure, keep_ties, names_of_blocks, slice_config
from corolla.models.shell import BlocksLayer, replace_blocks


def span_class(found: Structure, start: int, end: int, cuts: CutLayout) -> type[PreTrainedModel]:
    """The model that runs the blocks, with blocks [start, end) only."""
    holder = found.holder

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        holder.__init__(self, config)
        cut_to_blocks(self, found.blocks, start, end, cuts)

    return _built_by(holder, build)


def cut_to_blocks(model: PreTrainedModel, blocks: str, start: int, end: int, cuts: CutLayout) -> None:
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
            setattr(model, name, stand_in(child, cuts, end - start))
    for name, weight in list(
        model.named_parameters(recurse=False)
    ):  # used before the first block, or behind the last
        delattr(model, name)
        model.register_buffer(name, torch.zeros_like(weight, requires_grad=False), persistent=False)
    setattr(model, blocks, nn.ModuleList(kept))
    if TIES in vars(model):
        ties = names_of_blocks(model.all_tied_weights_keys, blocks)
        keep_ties(model, {f"{blocks}.{one}": f"{blocks}.{other}" for one, other in _within(ties, start, end)})
    model.whole_config = model.config
    # Blocks keep the whole model's config, by which they know their own place; the model that runs them
    # counts its blocks from 0.
    model.config = slice_config(model.config, start, end)


def _within(ties: Mapping[str, str], start: int, end: int) -> Iterator[tuple[str, str]]:
    """Of weights that blocks have in common, by names that begin with a block's index, those that several of blocks
    [start, end) have: of each but the first such block, and the first's; blocks are counted from `start`."""
    first: dict[str, str] = {}
    for name in sorted({*ties, *ties.values()}, key=lambda name: int(name.partition(".")[0])):
        index, _, rest = name.partition(".")
        if start <= int(index) < end:
            own = f"{int(index) - start}.{rest}"
            known = first.setdefault(ties.get(name, name), own)
            if known != own:
                yield own, known


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


def load_blocks(
    checkpoint: Checkpoint,
    found: Structure,
    cuts: CutLayout,
    start: int,
    end: int,
    state: dict[str, Tensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The family's own loader, on the span's class; it also converts layouts (mixtures of experts)."""
    model, info = load_parts(span_class(found, start, end, cuts), checkpoint, state, dtype)
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise CheckpointError(
            f"{checkpoint.name} lacks tensors of blocks {start}:{end}, among them {first} (counted from "
            f"block {start})."
        )
    model.requires_grad_(False)
    if checkpoint.config.model_type == "bloom":
        pack_bloom(getattr(model, found.blocks))
    by_length(model)
    # The family's code asks the model for its dtype and device, which it reads off the first parameter; frozen
    # layers have none, nor have some norms.
    model.register_parameter("_like", nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
    return model.eval()
