"""Attention of one sequence in few and many pieces, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corolla.models.attention.one_sequence import FEW_KEYS, FEW_KEYS_TOKENS, TableSegment, attend_one
from corolla.models.attention.one_token_rows import Rules

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
LONG = 2 * FEW_KEYS_TOKENS + 13
RULES = {
    "plain": Rules(None, None, None, None),
    "window": Rules(None, 50, None, None),
    "window of one": Rules(None, 1, None, None),
    "softcap": Rules(0.3, None, 2.0, None),
    "sinks and window": Rules(None, 20, None, torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "slopes": Rules(None, None, None, None, torch.tensor([0.5, 0.25, 0.1, 0.05])),
}


def by_formula(query: Tensor, keys: Tensor, values: Tensor, past: int, rules: Rules) -> Tensor:
    """In float64, with all scores."""
    query, keys, values = (
        query.double(),
        keys.double().repeat_interleave(2, 1),
        values.double().repeat_interleave(2, 1),
    )
    scale = query.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    scores = query @ keys.transpose(2, 3) * scale
    own = torch.arange(past, past + query.shape[2])[:, None]
    other = torch.arange(keys.shape[2])[None, :]
    if rules.slopes is not None:
        scores = scores - rules.slopes.double()[:, None, None] * (own - other)
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    unseen = other > own
    if rules.window is not None:
        unseen = unseen | (other <= own - rules.window)
    weights = scores.masked_fill(unseen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if rules.sinks is not None:
        total = total + rules.sinks.double().exp()[:, None, None]
    return weights / total @ values


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("count", "past"), [(LONG, 0), (LONG, 30), (FEW_KEYS_TOKENS, 5), (FEW_KEYS + 70, 9)])
@pytest.mark.parametrize("width", [WIDTH, WIDTH - 3], ids=["", "narrow values"])
def test_pieces_give_what_the_formula_gives(rules: Rules, count: int, past: int, width: int) -> None:
    numbers = torch.Generator().manual_seed(count + past)
    query = torch.randn(1, HEADS, count, WIDTH, generator=numbers).requires_grad_()
    keys = torch.randn(1, KEY_HEADS, past + count, WIDTH, generator=numbers).requires_grad_()
    values = torch.randn(1, KEY_HEADS, past + count, width, generator=numbers).requires_grad_()
    found = attend_one(query, keys, values, TableSegment(0, count, past=past), rules)
    wanted = by_formula(query, keys, values, past, rules)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=3e-5)
    gradient = torch.randn(found.shape, generator=numbers)
    given = (query, keys, values)
    for own, right in zip(
        torch.autograd.grad(found, given, gradient),
        torch.autograd.grad(wanted, given, gradient.double()),
        strict=True,
    ):
        torch.testing.assert_close(own, right, rtol=1e-3, atol=3e-5)
