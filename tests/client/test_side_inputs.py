"""Families whose blocks take more than hidden states: sessions, failover, local blocks, prompts and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.covering import covering
from tests.models.every_family import tiny
from tests.swarm_fixture import MemorySwarm
from torch import Tensor

from corolla.errors import UsageError
from corolla.models.checks.miniature import random_model
from corolla.models.families import blocks_prefix, structure
from corolla.models.prompts import add_deep

# Inputs of each block, keys and values that are shared; besides, several streams.
FAMILIES = ("gemma4_text", "gemma3n_text")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
PROMPT = 3


@pytest.fixture(scope="module", params=FAMILIES)
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
    with MemorySwarm(tmp_path, []) as made:
        for start, end, name, throughput in (
            (0, 2, "a", 1000),
            (2, 5, "b", 1000),
            (0, 4, "c", 10),
            (3, 5, "d", 10),
        ):
            made.add(start, end, name, throughput=throughput)
        yield made


def client(swarm: MemorySwarm, **options: Any) -> Any:
    model = swarm.model(**options)
    model.generation_config.eos_token_id = None
    return model


def random_ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("local", "victim"), covering(FAMILIES, "ab", together=1), indirect=["local"])
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
    more = {}
    if local.config.model_type == "gemma4_text":
        padded = torch.cat([torch.zeros(len(ids), PROMPT, dtype=torch.long), ids], 1)
        more["per_layer_inputs"] = local.model.get_per_layer_inputs(padded)
    handles = []
    for block, deep in zip(local.get_submodule(blocks_prefix(local.config)), prompts.deep, strict=True):

        def add(_block: Any, args: tuple[Any, ...], deep: Tensor = deep) -> tuple[Any, ...]:
            hidden = args[0]
            streams = (
                [add_deep(one, deep, 0) for one in hidden]
                if hidden.ndim == 4
                else [add_deep(hidden, deep, 0)]
            )
            return (torch.stack(streams) if hidden.ndim == 4 else streams[0], *args[1:])

        handles.append(block.register_forward_pre_hook(add))
    try:
        logits: Tensor = local(inputs_embeds=rows, use_cache=False, **more).logits[:, PROMPT:]
    finally:
        for handle in handles:
            handle.remove()
    return logits


def test_prompts_and_their_gradients(swarm: MemorySwarm, local: Any) -> None:
    model = client(swarm, tuning_mode="deep_ptune", pre_seq_len=PROMPT)
    model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    ids = random_ids(2, 6)
    weight = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(4))
    found, wanted = model(ids, use_cache=False).logits, with_prompt(local, model.prompts, ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    parts = [model.prompts.input, model.prompts.deep]
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), parts),
        torch.autograd.grad((wanted * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_blocks_alone_say_how_wide_their_inputs_are(swarm: MemorySwarm, local: Any) -> None:
    model = client(swarm)
    with pytest.raises(UsageError, match="numbers a token"):
        model.blocks[0:2](torch.randn(1, 3, local.config.hidden_size))
