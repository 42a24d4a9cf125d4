"""Prefixes as peft writes and reads them: equal logits, losses and steps, both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from tests.client.conftest import Pair, random_ids
from tests.client.test_prefix import GRADIENTS, LOGITS, P, prefixed, random_prefix
from tests.reference import Prefixed, relative
from tests.swarm_fixture import MemorySwarm
from torch import Tensor

from corolla.errors import BundleError

pytestmark = pytest.mark.filterwarnings("ignore")
PairOf = Callable[..., Pair]
STEPS = 3


def peft_vectors(values: Tensor) -> Tensor:
    """[blocks, P, D] as peft keeps it, [P, blocks × D]."""
    return values.detach().permute(1, 0, 2).reshape(values.shape[1], -1)


def unpacked(local: Any, vectors: Tensor) -> Tensor:
    """The other way round."""
    return vectors.view(len(vectors), local.config.num_hidden_layers, -1).permute(1, 0, 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", pytest.param("falcon", marks=pytest.mark.nightly)])
def test_ours_loads_there_and_theirs_here(pair_of: PairOf, family: str, tmp_path: Path) -> None:
    pair = pair_of(family)
    model, local = prefixed(pair)
    model.save_pretrained(tmp_path / "ours")
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    theirs = PeftModel.from_pretrained(pair.local, tmp_path / "ours").eval()
    assert theirs.peft_config["default"].peft_type == "CARTRIDGE"
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
    assert ((found - wanted) * mask[..., None]).abs().max() < LOGITS
    theirs.save_pretrained(tmp_path / "theirs")
    again = pair.model(prompts=tmp_path / "theirs")
    assert torch.equal(again.prompts.values, model.prompts.values)
    assert again.prompts.frozen.shape[1] == 1
    assert torch.equal(again.generate(ids[:1], max_new_tokens=6, do_sample=False), local.greedy(ids[:1], 6))


@pytest.mark.parametrize("projection", [False, True])
def test_their_prefix_tuning_loads_here(pair_of: PairOf, projection: bool, tmp_path: Path) -> None:
    pair = pair_of("llama")
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=P,
        prefix_projection=projection,
        encoder_hidden_size=12,
    )
    torch.manual_seed(0)
    theirs = get_peft_model(pair.local, config).eval()
    theirs.save_pretrained(tmp_path)
    model, ids = pair.model(prompts=tmp_path), random_ids(2, 9)
    assert model.prompts.frozen.shape[1] == 0
    with torch.no_grad():
        assert (model(ids).logits - theirs(input_ids=ids).logits).abs().max() < LOGITS


def test_steps_equal_pefts(pair_of: PairOf) -> None:
    """Loss, gradient and what AdamW makes of it, from the same start."""
    pair = pair_of("llama")
    model, _ = prefixed(pair)
    config = CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=P)
    theirs = get_peft_model(pair.local, config)
    encoder = theirs.prompt_encoder["default"]
    encoder.load_prompt_embeddings(peft_vectors(model.prompts.values))
    optimizers = [
        torch.optim.AdamW([one for one in each.parameters() if one.requires_grad], lr=3e-2, weight_decay=0.1)
        for each in (model, theirs)
    ]
    ids = random_ids(4, 20)
    for _ in range(STEPS):
        losses = [model(ids, labels=ids).loss, theirs(input_ids=ids, labels=ids).loss]
        assert abs(losses[0].item() - losses[1].item()) < LOGITS
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        gradient = unpacked(pair.local, encoder.trainable_embedding.grad)
        assert relative(model.prompts.trained.grad, gradient) < GRADIENTS
        for optimizer in optimizers:
            optimizer.step()
    values = unpacked(pair.local, encoder.weight.detach())
    assert relative(model.prompts.values.detach(), values) < 1e-3
    assert torch.equal(model.prompts.values[:, :1], values[:, :1])  # nobody trains that


def test_what_an_operator_has_is_not_sent(pair_of: PairOf, tmp_path: Path) -> None:
    pair = pair_of("llama")
    model, local = prefixed(pair)
    model.save_pretrained(tmp_path)
    name = pair.swarm.checkpoint.source.location
    with MemorySwarm(name, ()) as swarm:
        server = swarm.servers[swarm.add(0, 4, "operator's", bundles=[tmp_path])]
        again, ids = swarm.model(prompts=tmp_path), random_ids(1, 7)
        again.generation_config.eos_token_id = None
        assert torch.equal(again.generate(ids, max_new_tokens=6, do_sample=False), local.greedy(ids, 6))
        assert not len(server.kept)
        random_prefix(again, seed=4)
        other = Prefixed(local.model, again.prompts.values)
        assert torch.equal(again.generate(ids, max_new_tokens=6, do_sample=False), other.greedy(ids, 6))
        assert len(server.kept) == 1


def test_another_models_prefix_is_refused(pair_of: PairOf, tmp_path: Path) -> None:
    pair = pair_of("llama")
    prefixed(pair)[0].save_pretrained(tmp_path)
    (tmp_path / "prompt.json").unlink()
    about = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(about.replace('"num_layers": 4', '"num_layers": 3'))
    with pytest.raises(BundleError, match="a model of 3 blocks"):
        pair.model(prompts=tmp_path)


def test_a_prefix_of_another_width_is_refused_by_its_server(pair_of: PairOf, tmp_path: Path) -> None:
    pair = pair_of("llama")
    model = pair.model(tuning_mode="prefix", pre_seq_len=P)
    model.prompts.trained.data = model.prompts.trained.data[:, :, :-2]
    model.prompts.frozen = model.prompts.frozen[:, :, :-2]
    with pytest.raises(Exception, match="A prefix for these blocks is"):
        model(random_ids(1, 4))


def test_a_copy_has_a_prefix_of_its_own(pair_of: PairOf) -> None:
    import copy

    model, local = prefixed(pair_of("llama"))
    with copy.deepcopy(model) as twin:
        random_prefix(twin, seed=9)
        ids = random_ids(1, 6)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), local.greedy(ids, 5))
        other = Prefixed(local.model, twin.prompts.values)
        assert torch.equal(twin.generate(ids, max_new_tokens=5, do_sample=False), other.greedy(ids, 5))
