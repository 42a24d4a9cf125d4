"""Rotary embeddings that depend on length: each sequence as if a new model ran it alone, or one sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from corolla.errors import SessionLimit, UsageError
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.rotary import LengthThreshold, length_threshold
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.selfcheck import check_family
from corolla.models.limits import context_limit
from corolla.models.span import Span, load_span

EDGE = 16
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": EDGE,
}
BY_LAYER = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
LONGROPE_16 = LONGROPE | {
    name: [value for one in LONGROPE[name] for value in (one, one + 0.05)]  # type: ignore[attr-defined]
    for name in ("short_factor", "long_factor")
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama dynamic": ("llama", {"max_position_embeddings": EDGE, "rope_parameters": DYNAMIC}),
    "llama longrope": ("llama", {"max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "phi3 longrope": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": EDGE,
            "rope_parameters": LONGROPE,
        },
    ),
    "gemma3 by layer": ("gemma3_text", {"max_position_embeddings": EDGE, "rope_parameters": BY_LAYER}),
    "falcon dynamic": (
        "falcon",
        {"alibi": False, "max_position_embeddings": EDGE, "rope_parameters": DYNAMIC},
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, fields = CONFIGS[request.param]
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("rotary")
    tiny_model(tiny_config(family, **fields)).save_pretrained(path)
    return path


def local(folder: Path) -> Any:
    """A new one: local models remember the longest sequence that they have seen."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def spans_of(folder: Path) -> list[Span]:
    checkpoint = open_checkpoint(str(folder))
    packable = check_family(checkpoint.config)
    return [load_span(checkpoint, *part, dtype=torch.float32, packable=packable) for part in ((0, 2), (2, 4))]


def ids_of(*lengths: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 250, (1, length)) for length in lengths]


def hidden_around(folder: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What enters a new local model's first block, and what leaves its last."""
    model = local(folder)
    seen: list[Tensor] = []
    blocks = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.transformer.h
    blocks[0].register_forward_pre_hook(lambda _block, args: seen.append(args[0].clone()))
    blocks[-1].register_forward_hook(
        lambda _block, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    return seen[0][0], seen[1][0]


@pytest.mark.parametrize(
    ("family", "rope", "threshold"),
    [
        ("llama", DYNAMIC, LengthThreshold(512, gradual=True)),
        ("llama", LONGROPE, LengthThreshold(EDGE, gradual=False)),
        ("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, None),
        ("gemma3_text", BY_LAYER, LengthThreshold(512, gradual=True)),
    ],
)
def test_the_edge_is_found_by_asking(
    family: str, rope: dict[str, Any], threshold: LengthThreshold | None
) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family, rope_parameters=rope))
    before = copy.deepcopy(list(model.named_buffers()))
    assert length_threshold(model) == threshold
    for (name, one), (_, other) in zip(before, model.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def test_sequences_in_one_pass_are_as_if_alone(folder: Path) -> None:
    """Lengths on both sides of the threshold, twice, and a short one after the long ones."""
    spans = spans_of(folder)
    ids = ids_of(EDGE + 9, 5, EDGE + 1, EDGE)
    around = [hidden_around(folder, one) for one in ids]
    if spans[0].packable:
        lengths = [one.shape[1] for one in ids]
        output = torch.cat([entered for entered, _ in around])
        places = torch.cat([torch.arange(length) for length in lengths])
        for span in spans:
            output = span.forward_packed(output, PackedBatch(segments_of(lengths)), positions=places)
        torch.testing.assert_close(output, torch.cat([left for _, left in around]), atol=1e-4, rtol=1e-4)
    for entered, left in around:
        output = entered[None]
        for span in spans:
            output = span.forward(output)
        torch.testing.assert_close(output[0], left, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Any:
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        yield swarm


def test_a_client_is_exact_or_told(folder: Path, swarm: MemorySwarm) -> None:
    model = swarm.model()
    model.generation_config.eos_token_id = None
    long, short = ids_of(EDGE + 5, 7)
    with torch.no_grad():
        for ids in (long, short, long, short):
            wanted = local(folder)(ids, use_cache=False).logits
            torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
    wanted = local(folder).generate(short, max_new_tokens=EDGE - 6, do_sample=False)
    assert torch.equal(model.generate(short, max_new_tokens=EDGE - 6, do_sample=False), wanted)
    counted = swarm.counted()
    with pytest.raises(SessionLimit, match=f"change beyond {EDGE} tokens"):
        model.generate(short, max_new_tokens=EDGE, do_sample=False)
    with pytest.raises(SessionLimit, match=f"change beyond {EDGE} tokens"), torch.no_grad():
        model(long, use_cache=True)
    assert swarm.counted() == counted


def test_training_is_exact_and_rows_on_both_sides_are_refused(folder: Path, swarm: MemorySwarm) -> None:
    model = swarm.model()
    ids = torch.cat(ids_of(EDGE + 4, EDGE + 4))
    gradients = []
    for one in (model, local(folder)):
        embeddings = one.get_input_embeddings()(ids).detach().requires_grad_()
        loss = one(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        gradients += torch.autograd.grad(loss, [embeddings])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with pytest.raises(UsageError, match="rows of unequal lengths one by one"):
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)


def test_a_chat_ends_at_the_edge() -> None:
    fields = CONFIGS["phi3 longrope"][1]
    assert context_limit(tiny_config("phi3", **fields), 4) == EDGE - 4
    assert context_limit(AutoConfig.for_model("llama", max_position_embeddings=100), 4) == 96
