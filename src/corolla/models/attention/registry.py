"""The way from the family's code to a packed batch: through transformers' registry of attention functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corolla.errors import UsageError
from corolla.models.attention.latent import absorbed
from corolla.models.attention.one_token_rows import Rules
from corolla.models.attention.packing import PackedBatch, Stretch, attend_one, side_by_side

# No mask function belongs to this name, so the family's code builds no masks: each sequence has its own here.
PACKED = "corolla_packed"

_batch: ContextVar[PackedBatch | None] = ContextVar("corolla_packed_batch", default=None)


@contextmanager
def packed(batch: PackedBatch) -> Iterator[None]:
    """Attention inside works on `batch`."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


def current_batch() -> PackedBatch | None:
    """The batch whose pass is running, if one is."""
    return _batch.get()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' registry takes them; see `PackedBatch.attend`."""
    batch = current_batch()
    if batch is None:
        raise UsageError("The blocks of a packed span were called without a packed batch.")
    rules = Rules(scaling, sliding_window, softcap, s_aux)
    block: Any = module.layer_idx
    held = batch.held(block) if isinstance(batch, PackedBatch) else []
    if held:
        return side_by_side([_attend_latents(module, query, rules, *one) for one in held]), None
    return batch.attend(block, query, key, value, rules), None


def _attend_latents(
    attention: Any, query: Tensor, rules: Rules, one: Stretch, latents: Tensor, rotary: Tensor
) -> Tensor:
    """A stretch over latents [1, 1, S, L] and rotary parts; in the form that is fewer products."""
    query = query.narrow(2, one.begin, one.count)
    short = absorbed(attention, latents, rotary)
    if not short.pays(one.count, int(latents.shape[2])):
        keys, values = attention.expand_kv(latents, rotary)
        return attend_one(query, keys, values, one, rules)
    rules = replace(rules, scale=query.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    both = torch.cat([latents, rotary], -1)
    return short.outputs(attend_one(short.queries(query), both, latents, one, rules))


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
