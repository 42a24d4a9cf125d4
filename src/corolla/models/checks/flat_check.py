"""Whether a family tells the sequences of a row without padding apart by their position ids.

It is tried on a miniature, once a process and family, when such a row is first met: most families do, those
with positions of another kind (bloom, opt, …) read such a row as one sequence.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from corolla.models.checks.miniature import miniature, random_model, undisturbed
from corolla.models.families import structure

_found: dict[type[PretrainedConfig], bool] = {}


def reads_flat_rows(config: PretrainedConfig) -> bool:
    """Whether in a row of two sequences the second one is blind for the first."""
    known = _found.get(type(config))
    if known is None:
        known = _found[type(config)] = _tried(config)
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
