"""What a family computes before its first block, for prompts that a server runs by itself.

Invariant: it is the family's own code on the checkpoint's own weights, entered as at a client
(`models/shell.py`); so what comes out is, in the same dtype, what a client would send for the same prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corolla.errors import CheckpointError, UsageError
from corolla.models.cache import BlocksCall
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checkpoints.pretrained import load_parts
from corolla.models.checks.forms import cuts_of, values_returned
from corolla.models.families import structure
from corolla.models.parts import front_class
from corolla.models.prompts import SoftPrompt
from corolla.models.shell import BaseModelHooks, BlocksLayer


def entering(checkpoint: Checkpoint, prompts: Sequence[SoftPrompt], dtype: torch.dtype) -> list[Tensor]:
    """What each prompt [P, E] is where the first block begins, [P, H] in `dtype`.

    Reads neither blocks nor the vocabulary's embedding. Raises `CheckpointError` when a tensor is missing,
    `UsageError` for a family whose blocks are given more than hidden states.
    """
    cuts = cuts_of(checkpoint.config)
    if not cuts.plain:
        raise UsageError(
            f"Servers compute no prompts of {checkpoint.config.model_type} models by themselves, since their blocks "
            "take more than hidden states: leave the bundle out, clients send it."
        )
    entered: list[Tensor] = []
    begun: list[SoftPrompt] = []

    def run(hidden: Tensor, _call: BlocksCall) -> Tensor:
        entered.append(hidden[0])
        return hidden

    model = _load_front(
        checkpoint,
        BlocksLayer(run, returns=values_returned(checkpoint.config), cuts=cuts),
        dtype,
    )
    BaseModelHooks(model, prompts=lambda: begun[-1], caches=None)
    for prompt in prompts:
        begun.append(prompt)
        with torch.inference_mode():
            model(inputs_embeds=torch.empty(1, 0, prompt.input.shape[1], dtype=dtype))
    return entered


def _load_front(checkpoint: Checkpoint, blocks: BlocksLayer, dtype: torch.dtype) -> PreTrainedModel:
    """The model that runs the blocks, without them."""
    found = structure(checkpoint.config)
    front = front_class(found, blocks)
    with torch.device("meta"):
        names = set(front(copy.deepcopy(checkpoint.config)).state_dict())
    inner = found.prefix.removeprefix(found.optional_prefix).removesuffix(found.blocks)

    def name_of(key: str) -> str:
        return key.removeprefix(found.optional_prefix).removeprefix(inner)

    state = checkpoint.tensors(lambda key: name_of(key) in names, widen_to=dtype)
    named = {name_of(key): tensor for key, tensor in state.items()}
    model, info = load_parts(front, checkpoint, named, dtype)
    if info["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.name} lacks the tensor {min(info['missing_keys'])}; copy it again."
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded
