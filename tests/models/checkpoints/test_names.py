"""Tensors by the names that they have in the causal model; nothing but text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.every_family import tiny
from tests.swarm_fixture import MemorySwarm
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from corolla.errors import UsageError
from corolla.models.checkpoints.names import names_of, text_part
from corolla.models.checks.miniature import random_model

# As on the hub, and as transformers saves them.
NAMES: dict[str, dict[str, str | None]] = {
    "gemma3": {
        "language_model.model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight": None,
    },
    "dots3_note": {  # whose text part is called as the model of text alone
        "model.layers.3.self_attn.o_proj.weight": "model.layers.3.self_attn.o_proj.weight",
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "vision_encoder.patch_embed.proj.weight": None,
        "audio_encoder.layers.3.fc1.weight": None,
    },
    "exaone": {"transformer.h.3.attn.attention.q_proj.weight": "model.layers.3.self_attn.q_proj.weight"},
    "mixtral": {"model.layers.1.block_sparse_moe.gate.weight": "model.layers.1.mlp.gate.weight"},
    "deepseek_v4": {
        "model.norm.weight": "model.norm.weight",  # one of its renamings would take it for that of a block
        "model.layers.1.attn.norm.weight": "model.layers.1.self_attn.kv_norm.weight",
        "head.weight": "lm_head.weight",
    },
    "llama": {"model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"},
}


@pytest.mark.parametrize("family", [family for family in NAMES if family in CONFIG_MAPPING])
def test_names(family: str) -> None:
    name_of = names_of(AutoConfig.for_model(family))
    assert {key: name_of(key) for key in NAMES[family]} == NAMES[family]


@pytest.mark.parametrize("family", ["moshi", "blt", "musicgen"])
def test_what_is_not_an_image_text_model_has_no_text_part(family: str) -> None:
    config = AutoConfig.for_model(family)
    assert text_part(config) is config


def test_images_are_refused(tmp_path: Path) -> None:
    config = tiny("gemma3")
    random_model(AutoModelForImageTextToText.from_config, config).save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    with MemorySwarm(tmp_path, [(0, 5)]) as swarm:
        model = swarm.model()
        with pytest.raises(UsageError, match="pixel_values is no text"):
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28))
