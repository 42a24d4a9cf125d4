"""A prefix through the swarm equals the local model with a cache that holds it: losses, gradients, tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.client.conftest import THREE, TWO, Pair, random_ids
from tests.reference import relative
from tests.tiny_models import FAMILIES
from torch import Tensor
from transformers import DynamicCache

from corolla.models.cache import cache_argument

LOGITS = 1e-4
GRADIENTS = 1e-4
P = 5

PairOf = Callable[..., Pair]


class Prefixed:
    """A local model whose cache holds a prefix before its first token; plainly written."""

    def __init__(self, model: Any, values: Tensor) -> None:
        self.model = model
        self.values = values.detach().clone().requires_grad_()  # [blocks, P, keys and then values]

    def cache(self, rows: int) -> DynamicCache:
        heads, dim = self._shape
        cache = DynamicCache(config=self.model.config)
        for index, own in enumerate(self.values):
            keys, values = own.view(own.shape[0], 2, heads, dim).permute(1, 2, 0, 3).unsqueeze(1)
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return cache

    @property
    def _shape(self) -> tuple[int, int]:
        with torch.no_grad():
            cache = self.model(torch.tensor([[5]]), use_cache=True).past_key_values
        return cache.layers[0].keys.shape[1], cache.layers[0].keys.shape[3]

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        whole = F.pad(mask, (self.values.shape[1], 0), value=1)
        name = cache_argument(self.model.forward)
        arguments = {name: self.cache(ids.shape[0]), "use_cache": True}
        return self.model(ids, attention_mask=whole, **arguments).logits

    def loss(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = self.logits(ids, mask)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    @torch.no_grad()
    def greedy(self, ids: Tensor, count: int) -> Tensor:
        for _ in range(count):
            best = self.logits(ids)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
        return ids


def random_prefix(model: Any, seed: int = 1) -> None:
    for one in (model.prompts.frozen, model.prompts.trained.data):
        one.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spans", [TWO, THREE], ids=["two servers", "three servers"])
def test_losses_and_gradients(pair_of: PairOf, family: str, spans: tuple[tuple[int, int], ...]) -> None:
    pair = pair_of(family, spans)
    model = pair.model(tuning_mode="prefix", pre_seq_len=P)
    random_prefix(model)
    local = Prefixed(pair.local, model.prompts.values)
    ids = random_ids(4, 150)  # more than one micro-batch
    mask = torch.ones_like(ids)
    mask[2, 100:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    expected = local.loss(ids, labels, mask)
    expected.backward()
    assert abs(loss.item() - expected.item()) < LOGITS
    assert relative(model.prompts.trained.grad, local.values.grad[:, 1:]) < GRADIENTS


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_from_what_the_swarm_computes(pair_of: PairOf, family: str) -> None:
    pair = pair_of(family)
    model = pair.model(tuning_mode="prefix", pre_seq_len=P)
    ids = random_ids(2, 9)
    chosen = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(0))[:P]
    whole = torch.cat([chosen.expand(2, -1), ids], 1)
    with torch.no_grad():
        assert (model(ids).logits - pair.local(whole).logits[:, P:]).abs().max() < LOGITS


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(pair_of: PairOf, family: str) -> None:
    pair = pair_of(family)
    model = pair.model(tuning_mode="prefix", pre_seq_len=P)
    random_prefix(model)
    local = Prefixed(pair.local, model.prompts.values)
    ids = random_ids(2, 7)
    found = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, local.greedy(ids, 10))
    left = torch.ones_like(ids)
    left[0, :3] = 0
    found = model.generate(ids, attention_mask=left, max_new_tokens=6, do_sample=False)
    assert torch.equal(found[1:], local.greedy(ids[1:], 6))
    assert torch.equal(found[:1, 3:], local.greedy(ids[:1, 3:], 6))  # padding moves nothing
