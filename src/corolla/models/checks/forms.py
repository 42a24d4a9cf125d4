"""What a client has to know of a family's code: seen in a miniature at work, once a process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from corolla.errors import UnsupportedFamily
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.miniature import miniature, random_model, undisturbed
from corolla.models.families import blocks_prefix, structure

_returned: dict[bytes, int] = {}
_flat_rows: dict[type[PretrainedConfig], bool] = {}


def values_returned(config: PretrainedConfig) -> int:
    """How many values the family's blocks return in a tuple, hidden states first; 0 where they return these alone.

    Seen in a miniature at work, once a process and config. Raises `UnsupportedFamily` when there is none to look at.
    """
    found = structure(config)
    try:
        small = miniature(config)
        key = canonical_config(small.to_dict())
        if key not in _returned:
            with undisturbed():
                _returned[key] = _look(found.causal_lm(small).eval(), blocks_prefix(config))
    except Exception as error:  # whatever the family's own code makes of its miniature
        reason = " ".join(str(error).split())
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be used: a miniature of this one does not run "
            f"({type(error).__name__}: {reason:.120})."
        ) from error
    return _returned[key]


def _look(model: nn.Module, blocks: str) -> int:
    outputs: list[Any] = []
    block = model.get_submodule(blocks)[0]  # type: ignore[index]
    block.register_forward_hook(lambda _block, _arguments, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    return len(outputs[0]) if isinstance(outputs[0], tuple | list) else 0


def reads_flat_rows(config: PretrainedConfig) -> bool:
    """Whether the family tells the sequences of a row without padding apart by their position ids.

    Most do; those with positions of another kind (bloom, opt, …) read such a row as one sequence.
    """
    known = _flat_rows.get(type(config))
    if known is None:
        known = _flat_rows[type(config)] = _tried(config)
    return known


def _tried(config: PretrainedConfig) -> bool:
    small = miniature(config)
    small._attn_implementation = "eager"  # at a client the config names one that computes nothing
    with undisturbed(), torch.no_grad():
        whole = random_model(structure(config).causal_lm, small)
        ids = torch.tensor([[3, 4, 5, 6], [7, 8, 5, 6]])
        positions = torch.tensor([[0, 1, 0, 1]]).expand(2, -1)
        logits = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
    return torch.equal(logits[0, -1], logits[1, -1])
