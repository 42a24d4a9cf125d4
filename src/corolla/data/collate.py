"""Examples side by side in one batch.

Invariant: padding is on the right, masked, and never a label. Logits are computed only where there is a label:
`logits_to_keep` marks these positions, and the first token of a row, which nothing predicts, never carries one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.data.render import NO_LOSS, Example


class Collator:
    """A data collator that pads to the longest of the batch."""

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 [R, T], and `logits_to_keep`, bool [R, T]."""
        width = max(len(example.input_ids) for example in examples)
        ids = torch.full((len(examples), width), self.pad_token_id)
        mask = torch.zeros(len(examples), width, dtype=torch.int64)
        labels = torch.full((len(examples), width), NO_LOSS)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            ids[row, :length] = torch.tensor(example.input_ids)
            mask[row, :length] = 1
            labels[row, 1:length] = torch.tensor(example.labels[1:])
        # Position t predicts token t+1; a bool mask, so that rows may keep different numbers of positions.
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != NO_LOSS
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": keep}
