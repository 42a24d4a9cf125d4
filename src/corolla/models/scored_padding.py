"""Where a prediction would come from padding.

Invariant: padding never reaches a server, so what stands at its places is not what a local model computes
there. It matters nowhere but for labels that are predicted there, which are refused here, and where generation
would go on from there (`guard.py: check_ends`).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from corolla.errors import UsageError
from corolla.models.guard import IGNORED


def check_labels_of(labels: Tensor, mask: Any, *, shifted: bool) -> None:
    """Raises `UsageError` for labels [R, T] that are predicted from padding; `mask` [R, S] ends where they do.

    That is padding behind padding, or a row's first token behind padding in front. `shifted` labels stand where they
    are predicted, others one place behind.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or labels.ndim != 2 or mask.shape[1] < labels.shape[1]:
        return
    mask = mask[:, mask.shape[1] - labels.shape[1] :].to(labels.device).expand_as(labels)
    before, labels = (mask, labels) if shifted else (mask[:, :-1], labels[:, 1:])
    own = F.pad(mask[:, 1:], (0, 1), value=0) if shifted else mask[:, 1:]
    from_padding = (labels != IGNORED) & (before == 0)
    if bool((from_padding & (own == 0)).any()):
        raise UsageError(
            "Some labels stand on padding, which servers never see: make them -100 "
            "(labels.masked_fill(attention_mask == 0, -100)), or leave the attention mask out to learn padding as "
            "any other token."
        )
    if bool(from_padding.any()):
        raise UsageError(
            "With padding in front, the label of a row's first token would be predicted from padding, which "
            "servers never see: pad on the right (tokenizer.padding_side = 'right'), or make that label -100."
        )
