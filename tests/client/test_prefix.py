"""A prefix through the swarm equals the local model with a cache that holds it: losses, gradients, tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import THREE, TWO, Pair, goes_back_forks_and_heals, random_ids
from tests.models.every_family import tiny
from tests.reference import Prefixed, local_model, relative
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import FAMILIES, write_tiny

from corolla.errors import UnsupportedFamily, UsageError
from corolla.models.checks.miniature import random_model
from corolla.models.checks.prefixes import check_prefix
from corolla.models.families import structure

LOGITS = 1e-4
GRADIENTS = 1e-4
P = 5

PairOf = Callable[..., Pair]
DAILY = ("llama", "gemma2", "bloom", "gpt2")  # windows and soft caps, alibi, learned positions
WINDOWS = (
    "mistral",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "phi3",
    "gpt_oss",
)  # padding in front is refused
families = pytest.mark.parametrize(
    "family", [one if one in DAILY else pytest.param(one, marks=pytest.mark.nightly) for one in FAMILIES]
)
GREEDY: dict[str, Any] = {"do_sample": False}


def random_prefix(model: Any, seed: int = 1) -> None:
    for one in (model.prompts.frozen, model.prompts.trained.data):
        one.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))


def prefixed(pair: Pair, **arguments: Any) -> tuple[Any, Prefixed]:
    """A distributed model with a prefix of unlike numbers, and what it must equal."""
    model = pair.model(tuning_mode="prefix", pre_seq_len=P, **arguments)
    random_prefix(model)
    return model, Prefixed(pair.local, model.prompts.values)


@families
@pytest.mark.parametrize(
    "spans", [TWO, pytest.param(THREE, marks=pytest.mark.nightly)], ids=["two servers", "three servers"]
)
def test_losses_and_gradients(pair_of: PairOf, family: str, spans: tuple[tuple[int, int], ...]) -> None:
    model, local = prefixed(pair_of(family, spans))
    ids = random_ids(4, 150)  # more than one micro-batch
    mask = torch.ones_like(ids)
    mask[2, 100:] = 0
    if family not in WINDOWS:
        mask[3, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[3, 7] = -100
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    expected = local.loss(ids, labels, mask)
    expected.backward()
    assert abs(loss.item() - expected.item()) < LOGITS
    assert relative(model.prompts.trained.grad, local.values.grad[:, 1:]) < GRADIENTS
    assert [name for name, one in model.named_parameters() if one.requires_grad] == ["prompts.trained"]


@families
def test_it_starts_from_what_the_swarm_computes_and_generates(pair_of: PairOf, family: str) -> None:
    pair = pair_of(family)
    model = pair.model(tuning_mode="prefix", pre_seq_len=P)
    ids = random_ids(2, 7)
    chosen = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(0))[:P]
    with torch.no_grad():
        wanted = pair.local(torch.cat([chosen.expand(2, -1), ids], 1)).logits[:, P:]
        assert (model(ids).logits - wanted).abs().max() < LOGITS
    random_prefix(model)
    local = Prefixed(pair.local, model.prompts.values)
    found = model.generate(ids, max_new_tokens=10, **GREEDY)
    assert torch.equal(found, local.greedy(ids, 10))
    left = torch.ones_like(ids)
    left[0, :3] = 0
    if getattr(model.config, "sliding_window", None):  # which reach over the padding
        with pytest.raises(UsageError, match="Padding stands between tokens"):
            model.generate(ids, attention_mask=left, max_new_tokens=6, **GREEDY)
        return
    found = model.generate(ids, attention_mask=left, max_new_tokens=6, **GREEDY)
    assert torch.equal(found[1:], local.greedy(ids[1:], 6))
    assert torch.equal(found[:1, 3:], local.greedy(ids[:1, 3:], 6))  # padding moves nothing


@pytest.mark.parametrize(
    ("family", "count"),
    [("llama", 0), ("gemma2", 0), ("llama", 2), pytest.param("gpt2", 3, marks=pytest.mark.nightly)],
)
def test_rollback_forks_and_lost_servers(pair_of: PairOf, family: str, count: int) -> None:
    pair = pair_of(family)
    model, local = prefixed(pair, **({"local_blocks": count} if count else {}))
    ids = random_ids(1, 8)
    whole = local.greedy(ids, 14)
    with model.inference_session() as session:
        goes_back_forks_and_heals(pair, model, session, ids, whole)
        session.position = 0
        again = model.generate(ids[:, :4], max_new_tokens=3, **GREEDY)
        assert torch.equal(again, local.greedy(ids[:, :4], 3))


def test_gradients_through_ones_own_blocks(pair_of: PairOf) -> None:
    model, local = prefixed(pair_of("llama"), local_blocks=1)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    local.loss(ids, ids).backward()
    assert relative(model.prompts.trained.grad, local.values.grad[:, 1:]) < GRADIENTS


def test_a_backward_is_done_by_another_server(pair_of: PairOf) -> None:
    pair = pair_of("llama", ((0, 2), (2, 4), (0, 4)))
    model, local = prefixed(pair)
    ids = random_ids(3, 20)
    loss = model(ids, labels=ids).loss
    used = [peer for peer, server in pair.swarm.servers.items() if server.counters.forward]
    pair.swarm.kill(used[-1])
    loss.backward()
    expected = local.loss(ids, ids)
    expected.backward()
    assert relative(model.prompts.trained.grad, local.values.grad[:, 1:]) < GRADIENTS


def test_a_long_prefix_is_read_through_windows(tmp_path: Path) -> None:
    """Blocks that have given back what their windows have passed over."""
    folder = write_tiny("gemma2", tmp_path)
    with MemorySwarm(folder, TWO, margin=0) as swarm:
        model = swarm.model(tuning_mode="prefix", pre_seq_len=70)
        chosen = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(0))[:70]
        ids = random_ids(1, 30)
        with torch.no_grad():
            whole = local_model(folder)(torch.cat([chosen[None], ids], 1)).logits[:, 70:]
            assert (model(ids).logits - whole).abs().max() < LOGITS
        assert not model.prompts.values[0, 0].any()  # nobody sees that
        random_prefix(model)
        local = Prefixed(local_model(folder), model.prompts.values)
        model.generation_config.eos_token_id = None
        assert torch.equal(model.generate(ids, max_new_tokens=10, **GREEDY), local.greedy(ids, 10))


def test_sessions_with_unlike_prefixes_share_nothing(pair_of: PairOf) -> None:
    model, local = prefixed(pair_of("llama"))
    ids = random_ids(1, 80)
    with model.inference_session() as first:
        model.generate(ids, max_new_tokens=2, **GREEDY)
        random_prefix(model, seed=3)
        other = Prefixed(local.model, model.prompts.values)
        found = model.generate(ids, max_new_tokens=6, session=model.inference_session(), **GREEDY)
        assert torch.equal(found, other.greedy(ids, 6))
        # The first goes on with what it began with.
        assert torch.equal(
            model.generate(None, max_new_tokens=4, session=first, **GREEDY), local.greedy(ids, 6)[:, 82:]
        )


def test_ones_own_blocks_go_on_with_what_a_session_began_with(pair_of: PairOf) -> None:
    model, local = prefixed(pair_of("llama"), local_blocks=2)
    ids = random_ids(1, 8)
    with model.inference_session() as session:
        model.generate(ids, max_new_tokens=3, **GREEDY)
        random_prefix(model, seed=3)
        session.position = 0
        assert torch.equal(model.generate(ids, max_new_tokens=6, **GREEDY), local.greedy(ids, 6))


def test_a_prefix_of_latents(tmp_path: Path) -> None:
    """Of multi-head latent attention a prefix is latents and rotary parts, which are not as wide."""
    config = tiny("deepseek_v2")
    torch.manual_seed(3)
    local = random_model(structure(config).causal_lm, config)
    local.save_pretrained(tmp_path)
    with MemorySwarm(tmp_path, [(0, 2), (2, config.num_hidden_layers)]) as swarm:
        model = swarm.model(tuning_mode="prefix", pre_seq_len=P)
        random_prefix(model)
        reference = Prefixed(local, model.prompts.values)
        ids = random_ids(2, 9) % (config.vocab_size - 3) + 3
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, 3] = -100
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        reference.loss(ids, labels, mask).backward()
        assert relative(model.prompts.trained.grad, reference.values.grad[:, 1:]) < GRADIENTS
        model.generation_config.eos_token_id = None
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
        assert torch.equal(found[1:], reference.greedy(ids[1:], 6))
        assert torch.equal(found[:1, 3:], reference.greedy(ids[:1, 3:], 6))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pre_seq_len": 1}, "at least 2, but pre_seq_len is 1"),
        ({"prompt_init": "random"}, "give prompt_init='text'"),
    ],
)
def test_what_cannot_be_trained_is_refused(pair_of: PairOf, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        pair_of("llama").model(**({"tuning_mode": "prefix"} | options))


@pytest.mark.parametrize("family", ["lfm2", "gemma3n_text"])
def test_a_family_that_keeps_something_else_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedFamily, match="other things than keys and values"):
        check_prefix(tiny(family))
