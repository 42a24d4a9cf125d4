"""What a trainer is given: a distributed model with something to train, and a local one that must do the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from tests.client.ways.table import Case
from tests.reference import Prefixed, Prompted
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from corolla.models.cache import cache_argument


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


def _with_prompt(prompted: Prompted | Prefixed) -> None:
    """Have the local model itself compute with the prompt, and hold it as its parameters."""
    base, hidden = prompted.model.base_model, _hold(prompted)
    plain = base.forward

    @wraps(plain)
    def forward(
        input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **options: Any
    ) -> Any:
        if input_ids is None:
            return plain(attention_mask=attention_mask, position_ids=position_ids, **options)
        # bloom has none, and reads such rows as one sequence.
        known = position_ids is not None and "position_ids" in signature(plain).parameters
        flat = known and bool((position_ids.diff(dim=-1) != 1).any())
        parts = _sequences(input_ids, position_ids) if flat else (input_ids,)
        mask = None if flat else attention_mask
        masks = [torch.ones_like(part) if mask is None else mask for part in parts]
        found = [hidden(plain, part, mask) for part, mask in zip(parts, masks, strict=True)]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.cat(found, 1).contiguous())

    base.forward = forward


def _sequences(ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Those of a single row [1, T], whose position ids start anew."""
    borders = ((positions[0].diff() != 1).nonzero().flatten() + 1).tolist()
    return ids.tensor_split(borders, dim=1)


def _hold(prompted: Prompted | Prefixed) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Make the prompt parameters of its model; gives what computes the hidden states [R, T, H] of ids behind it."""
    model = prompted.model
    if isinstance(prompted, Prefixed):
        frozen = prompted.values[:, :1].detach()
        # Of its own memory: torch's fused AdamW goes wrong where a parameter is a part of another tensor.
        trained = model.prompt_values = nn.Parameter(prompted.values[:, 1:].detach().clone())
        prompted.cache(1)  # which asks the model for its shapes, as long as it is plain

        def behind_caches(plain: Any, ids: Tensor, mask: Tensor) -> Tensor:
            prompted.values = torch.cat([frozen, trained], 1)
            mask = F.pad(mask, (prompted.values.shape[1], 0), value=1)
            given = {cache_argument(plain): prompted.cache(ids.shape[0]), "use_cache": True}
            hidden: Tensor = plain(input_ids=ids, attention_mask=mask, **given).last_hidden_state
            return hidden

        return behind_caches
    prompted.vectors = model.prompt_vectors = nn.Parameter(prompted.vectors.detach())
    if prompted.deep is not None:
        prompted.deep = model.prompt_deep = nn.Parameter(prompted.deep.detach())
    return partial(_behind_vectors, prompted)


def _behind_vectors(prompted: Prompted, plain: Any, ids: Tensor, mask: Tensor) -> Tensor:
    length = prompted.vectors.shape[0]
    front = prompted.vectors.expand(ids.shape[0], -1, -1)
    embedded = torch.cat([front, prompted.model.get_input_embeddings()(ids)], 1)
    handles = [] if prompted.deep is None else prompted._hook(length)
    try:
        mask = F.pad(mask, (length, 0), value=1)
        answer = plain(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    hidden: Tensor = answer.last_hidden_state[:, length:]
    return hidden
