"""Twenty real prompts through two server processes: the same words alone and in a crowd."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.e2e.processes import processes
from tests.reference import Prompted, local_model
from torch import Tensor
from transformers import AutoTokenizer

import corolla as public
from corolla.data.sources import load_conversations
from corolla.models.checkpoints.checkpoint import open_checkpoint

PROMPTS, CROWD, NEW_TOKENS = 20, 16, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with processes(tmp_path_factory.mktemp("swarm")) as started:
        join, _ = started.swarm("smollm2", ["0:15", "15:30"], "--threads", "1")
        with public.AutoDistributedModelForCausalLM.from_pretrained(
            "smollm2", initial_peers=[join]
        ) as loaded:
            loaded.generation_config.eos_token_id = None
            yield loaded


def real_prompts(tokenizer: Any) -> list[Tensor]:
    """The beginnings of people's conversations, 8 to 60 tokens long."""
    conversations, _ = load_conversations("chitchat")
    prompts = []
    for conversation in conversations:
        text = "\n".join(turn.text for turn in conversation.turns[:3])
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :60]
        if ids.shape[1] >= 8:
            prompts.append(ids)
        if len(prompts) == PROMPTS:
            break
    assert len(prompts) == PROMPTS
    assert len({int(ids.shape[1]) for ids in prompts}) > 5
    return prompts


@pytest.mark.nightly
def test_tokens_are_the_same_alone_and_in_a_crowd(model: Any) -> None:
    """Equal, or one of two that the local model cannot tell apart either (such cases are shown)."""
    source = open_checkpoint("smollm2").source.location
    prompts = real_prompts(AutoTokenizer.from_pretrained(source))

    def reply(ids: Tensor) -> Tensor:
        with model.inference_session() as session:
            found: Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                session=session,
            )
        return found

    alone = [reply(ids) for ids in prompts]
    with ThreadPoolExecutor(CROWD) as pool:
        crowded = list(pool.map(reply, prompts))
    local = Prompted(local_model(source), torch.zeros(0, model.config.hidden_size))
    different = [pair for pair in zip(alone, crowded, strict=True) if not torch.equal(*pair)]
    for ids, found in zip(prompts, alone, strict=True):
        local.assert_greedy(found, ids.shape[1])
    for ids, found in zip(prompts, crowded, strict=True):
        local.assert_greedy(found, ids.shape[1])
    print(f"{len(different)} of {PROMPTS} replies differ between alone and in a crowd")
    assert len({tuple(found[0, -NEW_TOKENS:].tolist()) for found in alone}) > PROMPTS // 2
