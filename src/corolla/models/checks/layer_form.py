"""In which form a family's blocks give their hidden states to the code that runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from corolla.errors import UnsupportedFamily
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.miniature import miniature, undisturbed
from corolla.models.families import blocks_prefix, structure

_seen: dict[bytes, bool] = {}


def returns_tuple(config: PretrainedConfig) -> bool:
    """Whether the family's blocks return a tuple (hidden states first), seen in a miniature at work.

    Once a process and config. Raises `UnsupportedFamily` when there is no miniature to look at.
    """
    found = structure(config)
    try:
        small = miniature(config)
        key = canonical_config(small.to_dict())
        if key not in _seen:
            with undisturbed():
                _seen[key] = _look(found.causal_lm(small).eval(), blocks_prefix(config))
    except Exception as error:  # whatever the family's own code makes of its miniature
        reason = " ".join(str(error).split())
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be used: a miniature of this one does not run "
            f"({type(error).__name__}: {reason:.120})."
        ) from error
    return _seen[key]


def _look(model: nn.Module, blocks: str) -> bool:
    outputs: list[Any] = []
    block = model.get_submodule(blocks)[0]  # type: ignore[index]
    block.register_forward_hook(lambda _block, _arguments, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    return isinstance(outputs[0], tuple | list)
