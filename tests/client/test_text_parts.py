"""The text part of models that also take images, from checkpoints as they lie on the hub: in shards, tied or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.every_family import tiny
from tests.stored_models import write_stored
from tests.swarm_fixture import MemorySwarm
from transformers import AutoModelForImageTextToText

from corolla.errors import UsageError
from corolla.models.checkpoints.names import text_part
from corolla.models.checks.miniature import random_model

FAMILIES = ["gemma3", "gemma4", "qwen3_5", "qwen3_5_moe", "llama4", "mistral3"]
TIED, UNTIED = True, False


def write_images(family: str, folder: Path, *, tied: bool, shard: int | str = "1GB") -> Path:
    """A tiny model with a part for images."""
    config = tiny(family)
    config.tie_word_embeddings = text_part(config).tie_word_embeddings = tied
    torch.manual_seed(3)
    random_model(AutoModelForImageTextToText.from_config, config).save_pretrained(
        folder, max_shard_size=shard
    )
    return folder


def text_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """By the whole model, but for llama4: in transformers 5.24 that cannot be called without images."""
    local: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = (local.language_model if "llama4" in type(local).__name__.lower() else local)(
            ids
        ).logits
    return found


def same(stored: Path, plain: Path) -> None:
    """Through two servers, the logits of the whole model."""
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with MemorySwarm(stored, [(0, 2), (2, 5)]) as swarm:
        model = swarm.model()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, text_logits(plain, ids), atol=1e-4, rtol=1e-4)
        with pytest.raises(UsageError, match="pixel_values is no text"):
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(family, tied, marks=[] if (family, tied) == ("mistral3", TIED) else pytest.mark.nightly)
        for family in FAMILIES
        for tied in (TIED, UNTIED)
    ],
)
def test_in_shards(tmp_path: Path, family: str, tied: bool) -> None:
    folder = write_images(family, tmp_path, tied=tied, shard=30_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 10
    assert tied != any(key.endswith("lm_head.weight") for key in index)
    same(folder, folder)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("gemma3", "ct-fp8"),
        pytest.param("mistral3", "fp8", marks=pytest.mark.nightly),
        pytest.param("qwen3_5", "fp8-cut", marks=pytest.mark.nightly),
    ],
)
def test_stored_quantized(tmp_path: Path, family: str, form: str) -> None:
    plain = write_images(family, tmp_path / "plain", tied=UNTIED)
    stored, _ = write_stored(form, tmp_path, plain=plain)
    same(stored, plain)
