"""The client runs the first blocks itself: as exact as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.client.conftest import Pair, random_ids
from tests.covering import covering
from tests.reference import Prompted, relative

from corolla.errors import UsageError

GREEDY: dict[str, Any] = {"do_sample": False}
PairOf = Callable[..., Pair]
FAMILIES = ["llama", "bloom", "gemma2", "gpt2", "qwen3_moe"]


@pytest.mark.parametrize(("family", "count"), covering(FAMILIES, [1, 3], together=1))
def test_generation(pair_of: PairOf, family: str, count: int) -> None:
    pair = pair_of(family)
    model, ids = pair.model(local_blocks=count), random_ids(2, 7)
    left = torch.ones_like(ids)
    left[0, :3] = 0
    settings = [
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "attention_mask": left},  # of one row; the other is greedy without padding
        {"do_sample": True, "temperature": 0.9, "num_return_sequences": 2},
    ]
    for extra in settings:
        torch.manual_seed(5)
        found = model.generate(ids, max_new_tokens=8, **extra)
        torch.manual_seed(5)
        assert torch.equal(found, pair.local.generate(ids, max_new_tokens=8, **extra)), extra


@pytest.mark.parametrize(("family", "mode"), covering(FAMILIES, ["ptune", "deep_ptune"], together=1))
def test_training_rollback_and_forks_with_prompts(pair_of: PairOf, family: str, mode: str) -> None:
    pair = pair_of(family)
    model = pair.model(tuning_mode=mode, pre_seq_len=3, local_blocks=2)
    if model.prompts.deep is not None:
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    local = Prompted(pair.local, model.prompts.input, model.prompts.deep)
    ids = random_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss, expected = model(ids, attention_mask=mask, labels=labels).loss, local.loss(ids, labels, mask)
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-4
    assert relative(model.prompts.input.grad, local.vectors.grad) < 1e-4
    if local.deep is not None:
        assert relative(model.prompts.deep.grad, local.deep.grad) < 1e-4
    whole = local.greedy(ids[:1], 9)
    with model.inference_session() as session:
        model.generate(ids[:1], max_new_tokens=5, **GREEDY)
        session.position = 22
        twin = session.fork()
        assert torch.equal(model.generate(None, max_new_tokens=7, **GREEDY), whole[:, 22:])
        assert torch.equal(twin_says(model, twin, 4), whole[:, 22:26])


def twin_says(model: Any, twin: Any, count: int) -> torch.Tensor:
    with twin:
        found: torch.Tensor = model.generate(None, max_new_tokens=count, session=twin, **GREEDY)
    return found


def test_servers_of_the_first_blocks_are_not_needed_nor_asked(pair_of: PairOf) -> None:
    pair = pair_of("llama", ((2, 4),))
    model, ids = pair.model(local_blocks=2), random_ids(1, 8)
    expected = pair.local.generate(ids, max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=6, **GREEDY), expected)
    hidden = model.get_input_embeddings()(ids)
    inner = pair.local(ids, output_hidden_states=True).hidden_states
    assert (model.blocks[:1](hidden) - inner[1]).abs().max() < 1e-4
    assert (model.blocks[1:3](inner[1]) - inner[3]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("count", "sentence"), [(-1, "0 to 3 may run"), (4, "0 to 3 may run"), (True, "whole"), (1.5, "whole")]
)
def test_a_number_of_blocks_that_cannot_be(pair_of: PairOf, count: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"local_blocks is .*{sentence}"):
        pair_of("llama").model(local_blocks=count)
