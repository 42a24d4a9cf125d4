"""The miniature tells families that can be split from those that cannot."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import FAMILIES, tiny_config
from transformers import AutoConfig

from corolla.errors import UnsupportedFamily
from corolla.models.selfcheck import LAYERS, check_family, miniature


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str) -> None:
    torch.set_num_threads(1)
    before = torch.random.get_rng_state()
    check_family(tiny_config(family))
    check_family(AutoConfig.for_model(family))  # the size that the family is published in
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_miniature_keeps_the_kinds_of_layers() -> None:
    kinds = ["sliding_attention"] * 9 + ["full_attention"] + ["sliding_attention"] * 2
    small = miniature(tiny_config("gemma3_text", layers=12, layer_types=kinds))
    assert len(small.layer_types) == small.num_hidden_layers == LAYERS
    assert set(small.layer_types) == set(kinds)
    dense_and_sparse = miniature(
        AutoConfig.for_model("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=48)
    )
    assert dense_and_sparse.decoder_sparse_step == 2
    assert miniature(AutoConfig.for_model("llama", num_key_value_heads=8)).num_key_value_heads == 1


@pytest.mark.parametrize("family", ["ctrl", "recurrent_gemma"])
def test_families_that_split_wrongly_are_refused(family: str) -> None:
    """Both do something to the hidden states before their blocks, which every server would do again."""
    with pytest.raises(UnsupportedFamily) as error:
        check_family(AutoConfig.for_model(family))
    assert f"Models of type {family} cannot be served" in str(error.value)
    assert "computes something else than whole" in str(error.value)


def test_families_that_cannot_be_split_at_all_are_refused() -> None:
    with pytest.raises(UnsupportedFamily) as error:
        check_family(AutoConfig.for_model("mamba"))
    assert "Models of type mamba cannot be" in str(error.value)
    assert "\n" not in str(error.value)
