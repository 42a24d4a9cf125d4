"""What a trainer is given: a distributed model with something to train, and a local one that must do the same."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from tests.client.ways.table import Case
from tests.reference import Prompted
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


def twins(case: Case) -> tuple[Any, Any]:
    """The column's distributed model and its local twin, with the same things to train."""
    if case.column == "none":
        for model in (case.bare, case.whole):
            model.get_input_embeddings().weight.requires_grad_()
    elif not case.wrapped:
        _with_prompt(case.prompted)
    for module in case.local.modules():
        if isinstance(module, nn.Dropout):  # servers' blocks are frozen, and drop nothing out
            module.p = 0.0
    return case.model, case.local


def _with_prompt(prompted: Prompted) -> None:
    """Have the local model itself compute with the prompt, and hold it as its parameters."""
    model = prompted.model
    prompted.vectors = model.prompt_vectors = nn.Parameter(prompted.vectors.detach())
    if prompted.deep is not None:
        prompted.deep = model.prompt_deep = nn.Parameter(prompted.deep.detach())
    base = model.base_model
    plain = base.forward

    @wraps(plain)
    def forward(
        input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **options: Any
    ) -> Any:
        if input_ids is None:
            return plain(attention_mask=attention_mask, position_ids=position_ids, **options)
        flat = position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())
        parts = _sequences(input_ids, position_ids) if flat else (input_ids,)
        mask = None if flat else attention_mask
        hidden = [_hidden(prompted, plain, part, mask) for part in parts]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.cat(hidden, 1).contiguous())

    base.forward = forward


def _sequences(ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Those of a single row [1, T], whose position ids start anew."""
    borders = ((positions[0].diff() != 1).nonzero().flatten() + 1).tolist()
    return ids.tensor_split(borders, dim=1)


def _hidden(prompted: Prompted, plain: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """What leaves the base model at the user's tokens, [R, T, H]."""
    length = prompted.vectors.shape[0]
    front = prompted.vectors.expand(ids.shape[0], -1, -1)
    embedded = torch.cat([front, prompted.model.get_input_embeddings()(ids)], 1)
    mask = torch.ones_like(ids) if mask is None else mask
    handles = [] if prompted.deep is None else prompted._hook(length)
    try:
        mask = torch.nn.functional.pad(mask, (length, 0), value=1)
        answer = plain(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    hidden: Tensor = answer.last_hidden_state[:, length:]
    return hidden
