"""Examples side by side in one batch.

Invariant: padding is on the right, masked, and never a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.data.render import NO_LOSS, Example


class Collator:
    """Pads to the longest of the batch, or to `pad_to` tokens."""

    def __init__(self, pad_token_id: int, *, pad_to: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to = pad_to

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 [R, T]."""
        width = self.pad_to or max(len(example.input_ids) for example in examples)
        ids = torch.full((len(examples), width), self.pad_token_id)
        mask = torch.zeros(len(examples), width, dtype=torch.int64)
        labels = torch.full((len(examples), width), NO_LOSS)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            ids[row, :length] = torch.tensor(example.input_ids)
            mask[row, :length] = 1
            labels[row, :length] = torch.tensor(example.labels)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
