"""Configs that nobody has published are exact through a swarm, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models.drawn import drawn
from tests.models.every_family import OwnFailure, compare

from corolla.errors import UnsupportedFamily
from corolla.models.checks.selfcheck import check_family

FAMILIES = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_linear", "qwen3_next", "qwen3_5_text",
    "qwen3_5_moe_text", "gemma3n_text", "gemma4_text", "llama4_text", "minimax", "mimo_v2_flash", "lfm2", "falcon_h1",
    "jamba", "nemotron_h", "bamba", "granitemoehybrid", "minicpm3", "youtu", "olmo", "mpt", "gptj", "codegen",
    "gpt_neo", "gpt_bigcode", "xglm", "biogpt", "mistral4", "cohere2", "gpt_oss", "phimoe", "ernie4_5_moe",
    "mamba", "mamba2", "falcon_mamba",
)  # fmt: skip
SEEDS = 3


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawn_config_is_exact_or_refused(family: str, seed: int, tmp_path: Path) -> None:
    try:
        config = drawn(family, seed)
        check_family(config)
        compare(config, tmp_path)
    except OwnFailure as failure:
        pytest.skip(str(failure))
    except UnsupportedFamily as error:
        refusal = str(error)
    else:
        return
    assert "\n" not in refusal.strip()
