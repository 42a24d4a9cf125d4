"""The miniature tells families that can be split from those that cannot."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.covering import every_time
from tests.models.every_family import tiny
from tests.mutants import Mistakes
from tests.tiny_models import FAMILIES, tiny_config
from torch import Tensor
from transformers import AutoConfig, OlmoForCausalLM
from transformers.cache_utils import LinearAttentionLayer

from corolla.errors import UnsupportedFamily
from corolla.models.attention import packing
from corolla.models.attention.one_sequence import TableSegment, attend_one
from corolla.models.attention.one_token_rows import Rules
from corolla.models.blocks_pass import WideBlocksPass
from corolla.models.checkpoints import block_tensors
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks import selfcheck, together
from corolla.models.checks.miniature import EDGE, LAYERS, miniature, random_model
from corolla.models.checks.selfcheck import check_family
from corolla.models.cut_layout import CutLayout, CutTensors
from corolla.models.families import tied_weights
from corolla.models.kernels.apply import supported, use_kernels
from corolla.models.span import load_span

UNPACKABLE = {"falcon"}  # its own attention code asks nobody for an attention function


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str) -> None:
    torch.set_num_threads(1)
    before = torch.random.get_rng_state()
    assert check_family(tiny_config(family)) == (family not in UNPACKABLE)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", every_time(("bloom", "falcon", "gpt_oss", "qwen3_moe"), FAMILIES))
def test_the_size_that_it_is_published_in_passes_and_the_answer_is_kept(family: str) -> None:
    assert [check_family(AutoConfig.for_model(family)) for _ in range(2)] == [family not in UNPACKABLE] * 2


def blind(one: TableSegment, window: int | None, device: torch.device) -> Tensor:
    return torch.ones(one.count, one.past + one.count, dtype=torch.bool, device=device)


def unslid(query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules) -> Tensor:
    return attend_one(query, keys, values, one, dataclasses.replace(rules, window=None))


def unscaled(query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules) -> Tensor:
    return attend_one(query, keys, values, one, dataclasses.replace(rules, scale=0.1))


def sinkless(query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules) -> Tensor:
    return attend_one(query, keys, values, one, dataclasses.replace(rules, sinks=None))


def forgetful(query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules) -> Tensor:
    alone = dataclasses.replace(one, table=None, past=0)
    keys, values = keys[:, :, one.past :], values[:, :, one.past :]
    return attend_one(query, keys, values, alone, rules)


@pytest.mark.parametrize(
    ("family", "place", "mistake"),
    [
        ("bloom", (TableSegment, "visible"), blind),
        ("mistral", (packing, "attend_one"), unslid),
        ("granite", (packing, "attend_one"), unscaled),
        ("gpt_oss", (packing, "attend_one"), sinkless),
        ("llama", (packing, "attend_one"), forgetful),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_family_that_packs_wrongly_is_not_packed(
    family: str,
    place: tuple[Any, str],
    mistake: Any,
    monkeypatch: pytest.MonkeyPatch,
    mistakes: Mistakes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The family is served all the same, one request at a time."""
    monkeypatch.setattr(selfcheck, "_passed", {})
    caplog.set_level(logging.INFO, logger=together.log.name)
    mistakes.setattr(*place, mistake)
    assert check_family(tiny_config(family)) is False
    assert "Packed passes are not" not in caplog.text  # it has run, and given something else


def test_the_miniature_keeps_the_kinds_of_layers() -> None:
    kinds = ["sliding_attention"] * 9 + ["full_attention"] + ["sliding_attention"] * 2
    small = miniature(tiny_config("gemma3_text", layers=12, layer_types=kinds))
    assert len(small.layer_types) == small.num_hidden_layers == LAYERS
    assert set(small.layer_types) == set(kinds)
    dense_and_sparse = miniature(
        AutoConfig.for_model("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=48)
    )
    assert dense_and_sparse.decoder_sparse_step == 2
    for whole, small in ((32, 4), (8, 1), (1, 1)):
        kept = miniature(AutoConfig.for_model("llama", num_key_value_heads=whole))
        assert kept.num_key_value_heads == small


def test_families_whose_blocks_keep_a_state_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("qwen3_next")
    assert not check_family(config)
    monkeypatch.setattr(selfcheck, "_passed", {})
    monkeypatch.setattr(LinearAttentionLayer, "update_recurrent_state", lambda _self, states, *_more: states)
    with pytest.raises(UnsupportedFamily, match="in cached steps"):
        check_family(config)


@pytest.mark.parametrize(
    ("family", "reach"),
    [("llama4_text", "attention_chunk_size"), ("minimax", "block_size"), ("gpt_neo", "window_size")],
)
def test_the_checks_sequences_go_beyond_what_blocks_reach(family: str, reach: str) -> None:
    config = AutoConfig.for_model(family)
    assert getattr(config, reach) > getattr(miniature(config), reach)
    assert getattr(miniature(config), reach) < EDGE


def test_attention_in_chunks_is_not_packed_however_long_they_are() -> None:
    config = tiny("llama4_text")
    config.attention_chunk_size = 8192
    assert not check_family(config)


def ids_of_the_token_before(crossed: CutTensors, block: int) -> Any:
    return ((side, value.roll(1, 1)) for side, value in of_block(crossed, block))


def what_another_token_returned(one_pass: WideBlocksPass, one: Any) -> Tensor:
    return handed(one_pass, one).roll(1, 1)


def index_in_the_span(cuts: CutLayout) -> None:
    return None


def of_another_layer(config: Any) -> dict[str, str]:
    ties = tied_weights(config)
    return {name: source.replace("gate_proj", "up_proj") for name, source in ties.items()}


of_block, handed = CutTensors.of_block, WideBlocksPass._handed


@pytest.mark.parametrize(
    ("family", "place", "mistake"),
    [
        ("deepseek_v4", (CutTensors, "of_block"), ids_of_the_token_before),
        ("zamba", (CutTensors, "of_block"), ids_of_the_token_before),
        ("zaya", (WideBlocksPass, "_handed"), what_another_token_returned),
        ("zamba", (block_tensors, "tied_weights"), of_another_layer),
    ],
)
def test_what_crosses_a_cut_wrongly_is_noticed(
    family: str, place: tuple[Any, str], mistake: Any, monkeypatch: pytest.MonkeyPatch, mistakes: Mistakes
) -> None:
    monkeypatch.setattr(selfcheck, "_passed", {})
    mistakes.setattr(*place, mistake)
    with pytest.raises(UnsupportedFamily, match="computes something else than whole"):
        check_family(tiny(family))


def test_blocks_that_count_from_their_span_s_beginning_are_refused(
    monkeypatch: pytest.MonkeyPatch, mistakes: Mistakes
) -> None:
    """Kinds of blocks alternate, so that one with keys and values takes the cache of one without."""
    monkeypatch.setattr(selfcheck, "_passed", {})
    mistakes.setattr(CutLayout, "counted", property(index_in_the_span))
    with pytest.raises(UnsupportedFamily, match=r"AttributeError: .* object has no attribute 'update'"):
        check_family(tiny("zamba"))


def test_only_what_pairs_heads_of_keys_keeps_two_of_them() -> None:
    """One head of keys and values is what tells a snapshot of the wrong token from the right one (qwen3_next)."""
    assert [miniature(tiny(family)).num_key_value_heads for family in ("diffllama", "qwen3_next")] == [2, 1]


def test_few_heads_of_an_indexer_stay_few() -> None:
    config = tiny("deepseek_v32")
    assert miniature(config).index_n_heads == 16
    config.index_n_heads = 2
    with pytest.raises(UnsupportedFamily, match="choose among tokens with equal scores"):
        check_family(config)
    config.index_n_heads = 4  # not every row shows it
    with pytest.raises(UnsupportedFamily, match="choose among tokens with equal scores"):
        check_family(config)


def test_widths_whose_ratio_is_no_whole_number() -> None:
    config = tiny("deepseek_v2")
    config.qk_rope_head_dim = config.head_dim = 12
    config.qk_nope_head_dim = 16
    assert check_family(config)


def test_a_span_without_states_in_a_family_that_has_some() -> None:
    """Positions are counted as the whole model's code wants it, in cached steps of its attention too."""
    config = tiny("bamba")
    config.attn_layer_indices = [0, 3]
    assert not check_family(config)


def test_families_that_cannot_be_split_at_all_are_refused() -> None:
    with pytest.raises(UnsupportedFamily) as error:
        check_family(AutoConfig.for_model("openai-gpt"))
    assert "Models of type openai-gpt cannot be" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_blocks_without_parameters_have_a_device_and_a_dtype(quantization: str, tmp_path: Path) -> None:
    """olmo's norms have no weights, and frozen layers have no parameters."""
    if not supported(torch.device("cpu"), torch.float32, quantization):
        pytest.skip("no kernels here")
    random_model(OlmoForCausalLM, miniature(AutoConfig.for_model("olmo"))).save_pretrained(tmp_path)
    span = load_span(open_checkpoint(str(tmp_path)), 0, 2, dtype=torch.float32)
    use_kernels(span.model, quantization, span.device)
    assert not list(span.blocks.parameters())
    for one in (span, span.view(0, 1)):
        assert (one.device.type, one.dtype, one.model.dtype) == ("cpu", torch.float32, torch.float32)
        assert one.forward(torch.ones(1, 3, span.hidden_size)).isfinite().all()


VARIANTS = {
    "falcon-7b": ("falcon", {"num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}),
    "falcon-40b": (
        "falcon",
        {
            "num_attention_heads": 128,
            "hidden_size": 8192,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
        },
    ),
    "falcon-rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt-350m": (
        "opt",
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
    ),
    "bloom residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "pythia residual": ("gpt_neox", {"use_parallel_residual": False}),
    "llama-3.1": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "phi-3 long": (
        "phi3",
        {
            "hidden_size": 3072,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + at / 50 for at in range(48)],
                "long_factor": [1.0 + at / 5 for at in range(48)],
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "dense layers first": ("qwen3_moe", {"mlp_only_layers": [0, 1], "num_hidden_layers": 12}),
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "clipped": ("olmoe", {"clip_qkv": 0.5}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants_pass(name: str) -> None:
    family, fields = VARIANTS[name]
    check_family(AutoConfig.for_model(family, **fields))
