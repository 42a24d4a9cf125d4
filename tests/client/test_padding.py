"""Padding that changes a row in transformers itself changes it here too, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.models.every_family import tiny
from tests.reference import Prompted, local_model
from tests.swarm_fixture import MemorySwarm
from torch import Tensor
from transformers import AutoModelForCausalLM

from corolla.errors import UsageError
from corolla.models.checks.miniature import random_model

SPANS = [(0, 1), (1, 3), (3, 5)]
REFUSED = "where gradients are wanted servers are sent no padding"
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


class Pair:
    """A random model in a swarm, and on this machine."""

    def __init__(self, family: str, folder: Path, **changes: Any) -> None:
        config = tiny(family)
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            random_model(AutoModelForCausalLM.from_config, config).save_pretrained(folder)
        self.swarm, self.local = MemorySwarm(folder, SPANS), local_model(folder)
        self.local.generation_config.eos_token_id = None
        self.ids = random_ids(2, 12) % (config.vocab_size - 3) + 3
        self.left = torch.ones_like(self.ids)
        self.left[0, :4] = 0

    def model(self, **arguments: Any) -> Any:
        model = self.swarm.model(**arguments)
        model.generation_config.eos_token_id = None
        return model


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    family, changes = request.param
    made = Pair(family, tmp_path, **changes)
    with made.swarm:
        yield made


BIASED = [("lfm2", {"conv_bias": True}), ("bamba", {"mamba_proj_bias": True})]


@pytest.mark.parametrize("pair", BIASED, indirect=True, ids=str)
def test_padding_in_front_of_recurrences_with_biases(pair: Pair) -> None:
    model, ids, mask = pair.model(), pair.ids, pair.left
    with torch.no_grad():
        wanted = pair.local(ids, attention_mask=mask).logits
        alone = pair.local(ids[:1, 4:]).logits
        assert (wanted[0, 4:] - alone[0]).abs().max() > 1e-2  # what transformers itself makes of padding
        for use_cache in (False, True):
            found = model(ids, attention_mask=mask, use_cache=use_cache).logits
            torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
    found, wanted = (
        one.generate(ids, attention_mask=mask, num_beams=2, **GREEDY) for one in (model, pair.local)
    )
    assert torch.equal(found, wanted)
    with pytest.raises(UsageError, match=REFUSED):
        gradient(model, ids, mask)
    right = mask.flip(1)
    torch.testing.assert_close(
        gradient(model, ids, right), gradient(pair.local, ids, right), atol=1e-4, rtol=1e-3
    )


def gradient(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embeddings * 1.0, attention_mask=mask).logits
    return torch.autograd.grad(logits[mask.bool()].square().mean(), embeddings)[0]


@pytest.mark.parametrize("pair", [("lfm2", {}), ("llama4_text", {})], indirect=True, ids=str)
def test_padding_between_a_prompt_and_a_text(pair: Pair) -> None:
    model, ids, mask = pair.model(tuning_mode="ptune", pre_seq_len=3), pair.ids, pair.left
    local = Prompted(pair.local, model.prompts.input)
    with torch.no_grad():
        found, wanted = model(ids, attention_mask=mask).logits, local.logits(ids, mask)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100
    with pytest.raises(UsageError, match=REFUSED):
        model(ids, attention_mask=mask, labels=labels)
    right = mask.flip(1)
    labels = ids.masked_fill(right == 0, -100)
    loss = model(ids, attention_mask=right, labels=labels).loss
    torch.testing.assert_close(loss, local.loss(ids, labels, right), atol=1e-4, rtol=1e-4)


LINEAR_FIRST = ("minimax", {"layer_types": ["linear_attention", "full_attention"] * 2 + ["full_attention"]})


@pytest.mark.parametrize("pair", [LINEAR_FIRST], indirect=True, ids=str)
def test_a_cache_that_does_not_know_its_length(pair: Pair) -> None:
    model, ids = pair.model(), pair.ids
    with pytest.raises(UsageError, match="goes on wrongly from the cache of this minimax model"):
        model.generate(ids, attention_mask=pair.left, max_new_tokens=4)
    every = torch.ones_like(ids)
    found, wanted = (one.generate(ids, attention_mask=every, **GREEDY) for one in (model, pair.local))
    assert torch.equal(found, wanted)
