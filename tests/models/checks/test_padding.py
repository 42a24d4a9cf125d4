"""Where padding changes a row in a family's own code is seen, and the family is served all the same."""

from __future__ import annotations

import pytest
from tests.models.every_family import tiny
from transformers import PretrainedConfig

from corolla.models.checks.padding import generates_with_padding, padding_changes_rows
from corolla.models.checks.selfcheck import check_family


def with_biases(family: str) -> PretrainedConfig:
    config = tiny(family)
    for name in ("conv_bias", "mamba_proj_bias"):
        if hasattr(config, name):
            setattr(config, name, True)
    return config


@pytest.mark.parametrize("family", ["lfm2", "bamba"])
def test_biases_before_a_convolution(family: str) -> None:
    check_family(with_biases(family))
    assert padding_changes_rows(with_biases(family), before=True, between=False)
    assert not padding_changes_rows(tiny(family), before=True, between=False)


@pytest.mark.parametrize(("family", "changed"), [("lfm2", True), ("llama4_text", True), ("llama", False)])
def test_padding_between_a_prompt_and_a_text(family: str, changed: bool) -> None:
    assert padding_changes_rows(tiny(family), before=False, between=True) == changed


@pytest.mark.parametrize("length", [2, 3, 4, 100])
def test_padding_as_long_as_chunks_are(length: int) -> None:
    config = tiny("llama4_text")
    config.attention_chunk_size = length
    config.layer_types = ["chunked_attention"] * config.num_hidden_layers
    assert padding_changes_rows(config, before=False, between=True)


def test_a_cache_that_does_not_know_its_length() -> None:
    config = tiny("minimax")
    assert generates_with_padding(config)
    config.layer_types = config.layer_types[1:] + config.layer_types[:1]
    assert config.layer_types[0] == "linear_attention"
    assert not generates_with_padding(config)
