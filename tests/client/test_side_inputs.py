"""Families whose blocks take more than hidden states: sessions, failover, local blocks, prompts and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.covering import every_time
from tests.models.every_family import tiny
from tests.swarm_fixture import MemorySwarm
from torch import Tensor

from corolla.errors import UsageError
from corolla.models.checks.miniature import random_model
from corolla.models.families import blocks_prefix, structure
from corolla.models.prompts import add_deep

# Inputs of each block, keys and values that are shared; besides, several streams; token ids; what the block before has
# returned; first embeddings in blocks with weights in common; which tokens an earlier block has chosen; streams side
# by side.
FAMILIES = ("gemma4_text", "gemma3n_text", "deepseek_v4", "zaya", "zamba", "hy_v4", "qwen4_exp_text")
EACH_TIME = ("gemma3n_text", "zaya", "hy_v4")  # the schedules of faults try the others
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
PROMPT = 3


@pytest.fixture(scope="module", params=every_time(FAMILIES[:2], FAMILIES))
def local(request: pytest.FixtureRequest) -> Any:
    config = tiny(request.param)
    torch.manual_seed(5)
    model: Any = random_model(structure(config).causal_lm, config)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def swarm(local: Any, tmp_path: Path) -> Iterator[MemorySwarm]:
    """Two fast servers, and slower replicas that are cut differently."""
    local.save_pretrained(tmp_path)
    depth = local.config.num_hidden_layers
    with MemorySwarm(tmp_path, []) as made:
        for start, end, name, throughput in (
            (0, 2, "a", 1000),
            (2, depth, "b", 1000),
            (0, 4, "c", 10),
            (3, depth, "d", 10),
        ):
            made.add(start, end, name, throughput=throughput)
        yield made


def client(swarm: MemorySwarm, **options: Any) -> Any:
    model = swarm.model(**options)
    model.generation_config.eos_token_id = None
    return model


def random_ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("local", "victim"),
    [
        pytest.param(family, victim, marks=[] if family in EACH_TIME else [pytest.mark.nightly])
        for family, victim in product(FAMILIES, "ab")
    ],
    indirect=["local"],
)
def test_a_server_killed_between_two_turns(swarm: MemorySwarm, local: Any, victim: str) -> None:
    model = client(swarm)
    ids, more = random_ids(1, 6), random_ids(1, 3)
    with model.inference_session() as session:
        first = model.generate(ids, session=session, **GREEDY)
        assert torch.equal(first, local.generate(ids, **GREEDY))
        swarm.kill(victim)
        second = model.generate(more, session=session, **GREEDY)
        both = torch.cat([first, more], 1)
        assert torch.equal(second[:, -4:], local.generate(both, **GREEDY)[:, -4:])
        session.position = 5
        third = model.generate(more, session=session, **GREEDY)
    assert torch.equal(third[:, -4:], local.generate(torch.cat([ids[:, :5], more], 1), **GREEDY)[:, -4:])


def test_blocks_of_the_client_s_own_and_beams(swarm: MemorySwarm, local: Any) -> None:
    model = client(swarm, local_blocks=1)
    ids = random_ids(2, 7)
    for beams in (1, 3):
        assert torch.equal(
            model.generate(ids, num_beams=beams, **GREEDY), local.generate(ids, num_beams=beams, **GREEDY)
        )


def test_answers_of_honest_servers_pass_audits(swarm: MemorySwarm, local: Any) -> None:
    model = client(swarm, audit=1.0)
    ids = random_ids(1, 7)
    for _ in range(3):
        assert torch.equal(model.generate(ids, **GREEDY), local.generate(ids, **GREEDY))
    assert not model.blocks.connection.view.verdicts.condemned


def with_prompt(local: Any, prompts: Any, ids: Tensor) -> Tensor:
    """The local model's logits; a prompt's token ids are those of padding, where the family needs some."""
    embedded = local.get_input_embeddings()(ids)
    rows = torch.cat([prompts.input.expand(len(ids), -1, -1), embedded], 1)
    more: dict[str, Any] = {"inputs_embeds": rows}
    handles = []
    padded = torch.cat([torch.zeros(len(ids), PROMPT, dtype=torch.long), ids], 1)
    if local.config.model_type == "gemma4_text":
        more["per_layer_inputs"] = local.model.get_per_layer_inputs(padded)
    if local.config.model_type in ("deepseek_v4", "qwen4_exp_text"):
        more = {"input_ids": padded}
        handles.append(local.get_input_embeddings().register_forward_hook(lambda *_: rows))
    for block, deep in zip(local.get_submodule(blocks_prefix(local.config)), prompts.deep, strict=True):

        def add(_block: Any, args: tuple[Any, ...], deep: Tensor = deep) -> tuple[Any, ...]:
            hidden = args[0]
            if hidden.ndim == 3:
                streams = hidden.split(local.config.hidden_size, -1)
                return (torch.cat([add_deep(one, deep, 0) for one in streams], -1), *args[1:])
            at = 0 if local.config.model_type == "gemma3n_text" else 2  # where the streams are
            streams = [add_deep(one, deep, 0) for one in hidden.unbind(at)]
            return (torch.stack(streams, at), *args[1:])

        handles.append(block.register_forward_pre_hook(add))
    try:
        logits: Tensor = local(use_cache=False, **more).logits[:, PROMPT:]
    finally:
        for handle in handles:
            handle.remove()
    return logits


def test_prompts_and_their_gradients(swarm: MemorySwarm, local: Any) -> None:
    model = client(swarm, tuning_mode="deep_ptune", pre_seq_len=PROMPT)
    model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    ids = random_ids(2, 6)
    weight = torch.randn(2, 6, local.config.vocab_size, generator=torch.Generator().manual_seed(4))
    found, wanted = model(ids, use_cache=False).logits, with_prompt(local, model.prompts, ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    parts = [model.prompts.input, model.prompts.deep]
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), parts),
        torch.autograd.grad((wanted * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("local", every_time(["deepseek_v4"], ["deepseek_v4", "hy_v4"]), indirect=True)
def test_whole_numbers_are_sent_in_no_8_bits(swarm: MemorySwarm, local: Any) -> None:
    with pytest.raises(UsageError, match="beside hidden states, which 8 bits would change"):
        client(swarm, wire="int8")
    model, ids = client(swarm, wire="float16"), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for given in (mask, mask.flip(1)):
        found, wanted = (one(ids, attention_mask=given).logits[given.bool()] for one in (model, local))
        torch.testing.assert_close(found, wanted, atol=3e-2, rtol=3e-2)


def test_blocks_alone_say_how_wide_their_inputs_are(swarm: MemorySwarm, local: Any) -> None:
    model = client(swarm)
    with pytest.raises(UsageError, match="numbers a token"):
        model.blocks[1:2](torch.randn(1, 3, local.config.hidden_size))
