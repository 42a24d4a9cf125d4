"""What a trainer is given: a distributed model with something to train, and a local one that must do the same."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from tests.client.ways.table import Case
from tests.reference import Prompted
from torch import Tensor, nn


def twins(case: Case) -> tuple[Any, Any]:
    """The column's distributed model and its local twin, with the same things to train."""
    if case.column == "none":
        for model in (case.bare, case.whole):
            model.get_input_embeddings().weight.requires_grad_()
    elif not case.wrapped:
        _with_prompt(case.prompted)
    return case.model, case.local


def _with_prompt(prompted: Prompted) -> None:
    """Have the local model itself compute with the prompt, and hold it as its parameters."""
    model = prompted.model
    prompted.vectors = model.prompt_vectors = nn.Parameter(prompted.vectors.detach())
    if prompted.deep is not None:
        prompted.deep = model.prompt_deep = nn.Parameter(prompted.deep.detach())
    plain = model.forward

    @wraps(plain)
    def forward(
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        **options: Any,
    ) -> Any:
        if input_ids is None:  # the call below, with the prompt in front
            return plain(attention_mask=attention_mask, **options)
        answer = plain(input_ids[:, :1])
        answer.logits = _logits(prompted, input_ids, attention_mask, position_ids).contiguous()
        if labels is not None:
            count = options.get("num_items_in_batch")
            answer.loss = model.loss_function(
                answer.logits, labels, vocab_size=answer.logits.shape[-1], num_items_in_batch=count
            )
        answer.past_key_values = None
        return answer

    model.forward = forward


def _logits(prompted: Prompted, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Logits at the user's tokens; of each sequence by itself where position ids start anew."""
    if positions is None or bool((positions.diff(dim=-1) == 1).all()):
        return prompted.logits(ids, mask)
    borders = ((positions[0].diff() != 1).nonzero().flatten() + 1).tolist()
    parts = ids.tensor_split(borders, dim=1)
    return torch.cat([prompted.logits(part) for part in parts], 1)
