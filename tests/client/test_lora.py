"""LoRA adapters through the swarm equal peft's on a local model: logits, tokens, losses, gradients."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save
from tests.client.conftest import TWO, Pair, goes_back_forks_and_heals, random_ids
from tests.models.every_family import tiny
from tests.reference import relative
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import FAMILIES, write_tiny

from corolla.errors import BundleError, UnsupportedFamily, UsageError
from corolla.models.checkpoints.lora_files import peft_files
from corolla.models.checks.lora import check_adapter
from corolla.models.prompts import LoraAdapter
from corolla.server.kept_vectors import KeptVectors

LOGITS = 1e-4
GRADIENTS = 1e-4
GREEDY: dict[str, Any] = {"do_sample": False}
PairOf = Callable[..., Pair]
DAILY = ("llama", "bloom")  # the latter's attention is replaced
NIGHTLY = pytest.mark.nightly
WINDOWS = ("mistral", "qwen2", "gemma2", "gemma3_text", "mixtral", "phi3", "gpt_oss")
families = pytest.mark.parametrize(
    "family", [one if one in DAILY else pytest.param(one, marks=NIGHTLY) for one in FAMILIES]
)
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(local: Any, folder: Path, *, seed: int = 1, **options: Any) -> Any:
    """A local model with an adapter of peft's of unlike numbers, which is saved in `folder`."""
    given = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    if given["target_modules"] == "all-linear" and getattr(local.config, "num_local_experts", None):
        given["target_modules"] = ["q_proj", "v_proj"]  # not those of experts
    if given["target_modules"] == "all-linear" and local.config.model_type == "opt":
        given["target_modules"] = ["q_proj", "v_proj", "fc1", "fc2"]  # nor around the blocks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks of transformers
        model: Any = get_peft_model(copy.deepcopy(local), LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    for name, one in model.named_parameters():
        if "lora_" in name:
            one.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def greedy(local: Any, ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    found: torch.Tensor = local.generate(input_ids=ids, max_new_tokens=count, do_sample=False, **options)
    return found


@families
def test_an_adapter_of_pefts(pair_of: PairOf, family: str, tmp_path: Path) -> None:
    pair = pair_of(family)
    local = adapted(pair.local, tmp_path)
    model = pair.model(prompts=tmp_path)
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        wanted = local(input_ids=ids, attention_mask=mask).logits
        plain = pair.local(input_ids=ids, attention_mask=mask).logits
    assert ((found - wanted) * mask[..., None]).abs().max() < LOGITS
    assert (wanted - plain).abs().max() > 0.1
    assert torch.equal(model.generate(ids, max_new_tokens=8, **GREEDY), greedy(local, ids, 8))
    if family not in WINDOWS:
        left = torch.ones_like(ids)
        left[0, :3] = 0
        found = model.generate(ids, attention_mask=left, max_new_tokens=5, **GREEDY)
        assert torch.equal(found, greedy(local, ids, 5, attention_mask=left))


@pytest.mark.parametrize("count", [0, 2])
def test_rollback_forks_beams_and_lost_servers(pair_of: PairOf, count: int, tmp_path: Path) -> None:
    pair = pair_of("llama")
    local = adapted(pair.local, tmp_path)
    model = pair.model(prompts=tmp_path, **({"local_blocks": count} if count else {}))
    ids = random_ids(1, 8)
    whole = greedy(local, ids, 14)
    with model.inference_session() as session:
        goes_back_forks_and_heals(pair, model, session, ids, whole)
    found = model.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY)
    assert torch.equal(found, greedy(local, ids, 6, num_beams=3))


def test_beside_sessions_with_none_and_with_another(pair_of: PairOf, tmp_path: Path) -> None:
    """Steps that come together are computed together, each row with what is its own."""
    pair = pair_of("llama")
    locals_ = [
        pair.local,
        adapted(pair.local, tmp_path / "one"),
        adapted(pair.local, tmp_path / "two", seed=2, r=3, target_modules=["v_proj", "down_proj"]),
    ]
    models = [
        pair.model(),
        pair.model(prompts=tmp_path / "one"),
        pair.model(prompts=tmp_path / "two"),
        pair.model(prompts=tmp_path / "one"),
    ]
    ids = random_ids(4, 7)
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(model.generate, ids[at : at + 1], max_new_tokens=12, **GREEDY)
            for at, model in enumerate(models)
        ]
        found = [job.result() for job in jobs]
    for at, own in enumerate(found):
        assert torch.equal(own, greedy(locals_[at % 3 if at < 3 else 1], ids[at : at + 1], 12))


def test_the_operators_adapter_is_not_sent(pair_of: PairOf, tmp_path: Path) -> None:
    pair = pair_of("llama")
    local = adapted(pair.local, tmp_path / "adapter")
    folder = write_tiny("llama", tmp_path / "model")
    with MemorySwarm(folder, []) as swarm:
        for start, end in TWO:
            swarm.add(start, end, quantization="none", bundles=[tmp_path / "adapter"])
        model = swarm.model(prompts=tmp_path / "adapter")
        model.generation_config.eos_token_id = None
        ids = random_ids(1, 6)
        assert torch.equal(model.generate(ids, max_new_tokens=6, **GREEDY), greedy(local, ids, 6))
        assert not any(len(server.kept) for server in swarm.servers.values())


def test_beside_eight_bits(pair_of: PairOf, tmp_path: Path) -> None:
    """The products of the weights are those of the quantized ones, and what is added is as it was."""
    pair = pair_of("llama")
    folder = write_tiny("llama", tmp_path / "model")
    with MemorySwarm(folder, []) as swarm:
        server = swarm.servers[swarm.add(0, 4, quantization="int8")]
        local = adapted(pair.local, tmp_path / "adapter")
        for name, layer in server.span.blocks.named_modules():
            if hasattr(layer, "out_features"):
                local.base_model.model.model.layers.get_submodule(name).base_layer.forward = layer.forward
        model = swarm.model(prompts=tmp_path / "adapter")
        ids = random_ids(2, 9)
        with torch.no_grad():
            found, wanted = model(ids).logits, local(input_ids=ids).logits
        # Numbers that lie between two of 8 bits fall either way.
        assert relative(found, wanted) < 1e-2 < 0.1 < relative(wanted, pair.local(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no half of a linear layer of this model's blocks"),
        ({"r": 64}, "rank 64"),
    ],
)
def test_what_servers_do_not_compute_is_refused(
    pair_of: PairOf, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    pair = pair_of("llama")
    adapted(pair.local, tmp_path, **options)
    with pytest.raises(BundleError, match=sentence):
        pair.model(prompts=tmp_path)


def _renamed(tensors: dict[str, torch.Tensor], number: str) -> dict[str, torch.Tensor]:
    return {name.replace("layers.3.", f"layers.{number}."): one for name, one in tensors.items()}


@pytest.mark.parametrize(
    ("config", "change", "sentence"),
    [
        ({"lora_alpha": math.nan}, None, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, None, "lora_alpha is 1000"),
        ({"alpha_pattern": ["q_proj"]}, None, "alpha_pattern"),
        ({"peft_type": ["LORA"]}, None, "what kind of adapter"),
        ({}, lambda tensors: {name: one * math.inf for name, one in tensors.items()}, "not finite"),
        ({}, lambda tensors: {name: one.double() * 1e300 for name, one in tensors.items()}, "not finite"),
        ({}, lambda tensors: _renamed(tensors, "03"), "no half of a linear layer"),
        ({}, lambda tensors: _renamed(tensors, "9" * 5000), "no half of a linear layer"),
    ],
)
def test_garbled_files_are_refused(
    pair_of: PairOf, config: dict[str, Any], change: Any, sentence: str, tmp_path: Path
) -> None:
    pair = pair_of("llama")
    adapted(pair.local, tmp_path, target_modules=["q_proj"])
    about, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    about.write_text(json.dumps(json.loads(about.read_text()) | config))
    if change is not None:
        weights.write_bytes(save(change(load(weights.read_bytes()))))
    with pytest.raises(BundleError, match=sentence):
        pair.model(prompts=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"use_rslora": True, "r": 3}, marks=NIGHTLY),
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 3, "layers.2.mlp.*": 30},
        },
        pytest.param({"layers_to_transform": [1, 3], "target_modules": ["q_proj", "o_proj"]}, marks=NIGHTLY),
        {"target_modules": r".*\.(0|2)\.mlp\.(gate|up)_proj"},
    ],
)
def test_ranks_scales_and_layers_of_their_own(
    pair_of: PairOf, options: dict[str, Any], tmp_path: Path
) -> None:
    pair = pair_of("llama")
    local = adapted(pair.local, tmp_path / "theirs", **options)
    model = pair.model(prompts=tmp_path / "theirs")
    ids = random_ids(2, 9)
    with torch.no_grad():
        wanted = local(input_ids=ids).logits
        assert (model(ids).logits - wanted).abs().max() < LOGITS
        model.save_pretrained(tmp_path / "ours")
        again = PeftModel.from_pretrained(copy.deepcopy(pair.local), tmp_path / "ours").eval()
        assert (again(input_ids=ids).logits - wanted).abs().max() < LOGITS


@pytest.mark.parametrize(
    ("family", "target"), [("mixtral", "mlp.experts"), ("deepseek_v2", "self_attn.kv_b_proj")]
)
def test_layers_that_do_not_see_each_token_once_are_refused(family: str, target: str) -> None:
    with pytest.raises(UnsupportedFamily, match=target):
        check_adapter(tiny(family), (target,))


# --- training ---------------------------------------------------------------------------------------------------


def training(pair: Pair, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A distributed model with an adapter to be trained, of unlike numbers, and peft's with the same."""
    model = pair.model(tuning_mode="lora", lora_rank=4, lora_alpha=12, **options)
    assert not pieces_of(model, model.prompts.trained)["B"].any()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.prompts.trained.normal_(0, 0.1, generator=generator)
        model.prompts.trained.mul_(model.prompts.scale != 0)
    model.save_pretrained(folder)
    local: Any = PeftModel.from_pretrained(copy.deepcopy(pair.local), folder, is_trainable=True)
    return model, local


def pieces_of(model: Any, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """By peft's names what the parameter, or its gradient, has of each layer; all of A, and of B, besides."""
    twin = LoraAdapter(values.detach(), model.prompts.scale, model.prompts.targets)
    found, _ = peft_files(twin, model.config)
    halves = {
        half: torch.cat([one.flatten() for name, one in found.items() if f"lora_{half}." in name])
        for half in "AB"
    }
    return found | halves


def gradients_of(local: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): one.grad for name, one in local.named_parameters() if one.requires_grad
    }


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(one, marks=NIGHTLY) for one in ("llama", "bloom"))]
)
def test_steps_equal_pefts(pair_of: PairOf, family: str, tmp_path: Path) -> None:
    """Loss, gradient and what AdamW makes of it, from the same start; and what is saved is peft's."""
    pair = pair_of(family)
    model, local = training(pair, tmp_path)
    ids = random_ids(4, 150)  # more than one micro-batch
    mask = torch.ones_like(ids)
    mask[2, 100:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    assert [name for name, one in model.named_parameters() if one.requires_grad] == ["prompts.trained"]
    optimizers = [
        # With the usual `eps` gradients that are nothing but rounding make steps as long as others do.
        torch.optim.AdamW([one for one in each.parameters() if one.requires_grad], lr=1e-2, eps=1e-2)
        for each in (model, local)
    ]
    for step in range(3):
        losses = [each(input_ids=ids, attention_mask=mask, labels=labels).loss for each in (model, local)]
        assert abs(losses[0].item() - losses[1].item()) < LOGITS
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        found, wanted = pieces_of(model, model.prompts.trained.grad), gradients_of(local)
        assert set(wanted) == found.keys() - {"A", "B"}
        for name, gradient in wanted.items():
            assert relative(found[name], gradient) < GRADIENTS * (1 if not step else 3)
        for optimizer in optimizers:
            optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(copy.deepcopy(pair.local), tmp_path / "trained").eval()
    with torch.no_grad():
        assert (again(input_ids=ids).logits - model(ids).logits).abs().max() < LOGITS
        assert (again(input_ids=ids).logits - local(input_ids=ids).logits).abs().max() < 1e-3
    loaded = pair.model(prompts=tmp_path / "trained")
    assert torch.equal(loaded.prompts.trained, model.prompts.trained)
    assert torch.equal(loaded.prompts.scale, model.prompts.scale)


@pytest.mark.parametrize("count", [0, 1])
def test_a_backward_is_done_by_another_server(pair_of: PairOf, count: int, tmp_path: Path) -> None:
    pair = pair_of("llama", ((0, 2), (2, 4), (0, 4)) if not count else TWO)
    options = {"local_blocks": count} if count else {}
    model, local = training(pair, tmp_path, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    ids = random_ids(3, 20)
    loss = model(ids, labels=ids).loss
    if not count:
        used = [peer for peer, server in pair.swarm.servers.items() if server.counters.forward]
        pair.swarm.kill(used[-1])
    loss.backward()
    local(input_ids=ids, labels=ids).loss.backward()
    found = pieces_of(model, model.prompts.trained.grad)
    for name, gradient in gradients_of(local).items():
        assert relative(found[name], gradient) < GRADIENTS


def test_evaluations_name_it(pair_of: PairOf, tmp_path: Path) -> None:
    """What has not changed since a server saw it is not sent again; sessions go on with what they began with."""
    pair = pair_of("llama")
    model, local = training(pair, tmp_path)
    ids, sent = random_ids(1, 6), list[str]()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(KeptVectors, "_limit", lambda self, peer: sent.append(peer))
        for _ in range(3):
            model(ids)
        assert len(sent) == len(pair.swarm.servers)
        with model.inference_session() as session:
            first = model.generate(ids, max_new_tokens=3, **GREEDY)
            wanted = greedy(local, ids, 6)
            model.prompts.trained.mul_(1.5)
            after = model.generate(None, max_new_tokens=3, session=session, **GREEDY)
            assert torch.equal(torch.cat([first, after], 1), wanted)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"target_modules": ["lm_head"]}, "lm_head is none of the linear layers in blocks of llama models"),
        ({"target_modules": []}, "Nothing is none of the linear layers"),
        ({"tuning_mode": "lorra"}, "'prefix' or 'lora'"),
    ],
)
def test_what_cannot_be_trained_is_refused(pair_of: PairOf, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((UsageError, UnsupportedFamily), match=sentence):
        pair_of("llama").model(**({"tuning_mode": "lora"} | options))


def test_all_layers_may_be_asked_for_as_in_peft(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    every = pair.model(tuning_mode="lora", target_modules="all-linear").prompts
    assert every.targets == pair.model(tuning_mode="lora").prompts.targets != ()


def test_pefts_own_wrapper_names_our_mode(pair_of: PairOf) -> None:
    wrapped: Any = get_peft_model(pair_of("llama").model(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UsageError, match="tuning_mode='lora'"):
        wrapped(input_ids=random_ids(1, 4))
