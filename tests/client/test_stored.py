"""Quantized checkpoints through a swarm give what transformers gives for the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference import local_model, random_ids
from tests.stored_models import write_stored
from tests.swarm_fixture import MemorySwarm
from transformers import AutoModelForCausalLM

from corolla.errors import MissingBlocks
from corolla.models.checkpoints.checkpoint import open_checkpoint

TWO = [(0, 1), (1, 3)]


def same(folder: Path, local: Any) -> None:
    """Logits and tokens through two servers are those of the local model."""
    ids = random_ids(2, 7)
    with MemorySwarm(folder, TWO) as swarm:
        model = swarm.model()
        with torch.no_grad():
            assert (model(ids).logits - local(ids).logits).abs().max() < 1e-4
        found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, local.generate(ids, max_new_tokens=8, do_sample=False))
    assert len(set(found[0, 7:].tolist())) > 2


@pytest.mark.parametrize(
    ("form", "family"),
    [
        ("gptq-shuffled", "llama"),
        ("awq", "qwen2"),
        ("ct-4-zeros", "llama"),
        ("ct-nvfp4", "gemma2"),
        ("nf4-double", "llama"),
        ("fp8-cut", "qwen3_moe"),
        pytest.param("fp8-cut", "phi3", marks=pytest.mark.nightly),
        pytest.param("gptq", "mixtral", marks=pytest.mark.nightly),
        pytest.param("ct-fp8", "mixtral", marks=pytest.mark.nightly),
        pytest.param("ct-4", "qwen3_moe", marks=pytest.mark.nightly),
        pytest.param("bnb-int8", "bloom", marks=pytest.mark.nightly),
        pytest.param("modelopt-nvfp4", "olmo2", marks=pytest.mark.nightly),
    ],
)
def test_a_swarm_of_it_is_the_model_that_is_meant(tmp_path: Path, form: str, family: str) -> None:
    stored, plain = write_stored(form, tmp_path, family=family, layers=3, files=2)
    same(stored, local_model(plain))


@pytest.mark.parametrize(("form", "family"), [("fp8", "llama"), ("fp8", "qwen3_moe"), ("mxfp4", "gpt_oss")])
def test_transformers_reads_it_as_the_same(tmp_path: Path, form: str, family: str) -> None:
    """Where transformers itself makes the weights wide on a CPU."""
    stored, _ = write_stored(form, tmp_path, family=family, layers=3)
    same(stored, AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32).eval())


def test_the_original_is_another_model(tmp_path: Path) -> None:
    stored, plain = write_stored("gptq", tmp_path, layers=3)
    assert open_checkpoint(str(stored)).identity != open_checkpoint(str(plain)).identity
    again, _ = write_stored("gptq", tmp_path / "again", layers=3, files=3)
    assert open_checkpoint(str(again)).identity == open_checkpoint(str(stored)).identity
    with MemorySwarm(stored, [(0, 3)]) as swarm:
        swarm.checkpoint = open_checkpoint(str(plain))
        with pytest.raises(MissingBlocks):
            swarm.model(patience=0.5)(random_ids(1, 4))


def test_half_a_swarm_of_each_serves_neither(tmp_path: Path) -> None:
    stored, plain = write_stored("fp8", tmp_path, layers=3)
    with MemorySwarm(stored, [(0, 2)]) as swarm:
        swarm.checkpoint = open_checkpoint(str(plain))
        swarm.add(2, 3)
        with pytest.raises(MissingBlocks):
            swarm.model(patience=0.5)(random_ids(1, 4))
