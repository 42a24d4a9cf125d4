"""bloom's attention for packed passes.

Invariant: outside a packed pass the family's own attention runs; inside one, the same projections and the
same scores, with the alibi of each token's place in its own sequence. bloom does not ask transformers'
registry for an attention function, which is why its module has to be replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corolla.models.attention.one_token_rows import Rules
from corolla.models.attention.packing import current_batch


class PackedBloomAttention(nn.Module):
    """Stands in for a `BloomAttention` and keeps it inside."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own
        self.layer_idx = own.layer_idx

    def forward(self, hidden_states: Tensor, residual: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        """As `BloomAttention.forward`: the block's hidden states with the residual added, and no weights."""
        batch, own = current_batch(), self.own
        if batch is None:
            result: tuple[Tensor, Any] = own(hidden_states, residual, **arguments)
            return result
        query, key, value = own._reshape(own.query_key_value(hidden_states))
        slopes = alibi_slopes(own.num_heads).to(query.device)
        rules = Rules(scale=own.inv_norm_factor, slopes=slopes)
        context = batch.attend(self.layer_idx, query, key, value, rules)
        return own.dense(context.flatten(2)) + residual, None


def named_as_loaded(name: str) -> str:
    """What a part of a bloom block was called before `pack_bloom`; other families' names are as they were."""
    return name.replace("self_attention.own.", "self_attention.")


def alibi_slopes(heads: int) -> Tensor:
    """Slopes [heads] of Press et al. 2022 (arXiv:2108.12409): a geometric series, filled up for odd counts."""
    nearest = 2 ** (heads.bit_length() - 1)
    base = 2.0 ** -(8.0 / nearest)
    slopes = [base**power for power in range(1, nearest + 1)]
    finer = 2.0 ** -(4.0 / nearest)
    slopes += [finer**power for power in range(1, 2 * (heads - nearest), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def pack_bloom(blocks: nn.ModuleList) -> None:
    """Replace the attention modules of bloom's blocks."""
    for block in blocks:
        block.self_attention = PackedBloomAttention(block.self_attention)
