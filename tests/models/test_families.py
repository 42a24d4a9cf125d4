"""What is read off a family's classes is right, and what cannot be split is refused."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import FAMILIES, tiny_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    PretrainedConfig,
    T5Config,
    XGLMConfig,
)

from corolla.errors import UnsupportedFamily
from corolla.models import families
from corolla.models.checks.forms import values_returned
from corolla.models.checks.miniature import miniature
from corolla.models.families import (
    block_key_pattern,
    blocks_prefix,
    depth_of,
    slice_config,
    structure,
)

PREFIXES = {
    "bloom": "transformer.h",
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_blocks_live(family: str) -> None:
    config = tiny_config(family)
    prefix = PREFIXES.get(family, "model.layers")
    assert blocks_prefix(config) == prefix
    pattern = block_key_pattern(config)
    match = pattern.match(f"{prefix}.12.attn.weight")
    assert match is not None
    assert (match["index"], match["rest"]) == ("12", "attn.weight")
    assert pattern.match(f"{prefix.partition('.')[2]}.3.attn.weight")  # a base model's own checkpoint
    assert not pattern.match(f"other.{prefix}.3.attn.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_whether_layers_return_tuples(family: str) -> None:
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config)
    outputs = []
    block = model.get_submodule(blocks_prefix(config))[0]
    block.register_forward_hook(lambda _block, _arguments, output: outputs.append(output))
    model(torch.tensor([[3, 4, 5]]))
    assert isinstance(outputs[0], tuple) == bool(values_returned(config))


def test_a_list_that_is_as_long_as_the_blocks_by_chance_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(families, "_inspected", {})
    config = AutoConfig.for_model("gemma3n_text", altup_num_inputs=2)
    assert structure(config).prefix == "model.layers"


def test_slicing_a_config_cuts_its_lists() -> None:
    config = tiny_config("smollm3")
    sliced = slice_config(config, 1, 3)
    assert sliced.num_hidden_layers == 2
    assert sliced.no_rope_layers == config.no_rope_layers[1:3]
    assert sliced.layer_types == config.layer_types[1:3]
    assert config.num_hidden_layers == 4  # the original is untouched
    assert len(config.no_rope_layers) == 4


def test_a_block_may_be_several_of_the_layers_that_a_config_counts() -> None:
    config = AutoConfig.for_model("longcat_flash", num_layers=5)
    assert (config.num_hidden_layers, depth_of(config)) == (10, 5)
    sliced = slice_config(config, 1, 3)
    assert (sliced.num_hidden_layers, sliced.num_layers, depth_of(sliced)) == (4, 2, 2)
    assert (
        depth_of(AutoConfig.for_model("nemotron_h")) == AutoConfig.for_model("nemotron_h").num_hidden_layers
    )


def test_layers_that_are_named_by_their_numbers_are_in_the_miniature() -> None:
    given = {"indexer_head_dim": 256, "indexer_kv_heads": 1, "indexer_n_heads": 4, "eos_token_id": 2}
    sizes = {"indexer_budget": 64, "indexer_compress_ratio": 4}
    config = AutoConfig.for_model("qwen4_exp_text", ple_layer_ids=[21], **given, **sizes)
    small = miniature(config)
    assert [small.layer_types[at - 1] for at in small.ple_layer_ids] == ["linear_attention"]
    assert "indexed_attention" in small.layer_types
    type(small)(**small.to_dict())


@pytest.mark.parametrize("config", [T5Config(), Gemma3Config()], ids=lambda config: config.model_type)
def test_what_is_no_causal_text_model_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(UnsupportedFamily, match=f"type {config.model_type} "):
        structure(config)


def test_blocks_that_no_model_runs_are_refused() -> None:
    with pytest.raises(UnsupportedFamily, match="run by a part of the model"):
        structure(BertConfig(is_decoder=True))


def test_a_config_that_describes_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedFamily, match=r"describes no model .*divisible") as error:
        structure(XGLMConfig(d_model=1000, attention_heads=7))
    assert "\n" not in str(error.value)
