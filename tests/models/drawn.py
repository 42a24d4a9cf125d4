"""Configs that nobody has published: a family's sizes, kinds of layers and switches drawn at random.

A draw that the family's own code cannot run with padding is drawn anew.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from tests.models.every_family import GIVEN, LAYERS, overrides
from transformers import AutoConfig, PretrainedConfig

from corolla.errors import UnsupportedFamily
from corolla.models.families import is_per_layer, layer_overrides, structure

DRAWS = 60
# Of each attribute that is a number; None only where a family has no value for it.
SIZES: dict[str, tuple[int | None, ...]] = {
    "hidden_size": (32, 40, 48, 56, 64, 72, 96),
    "num_attention_heads": (2, 3, 4, 6, 8),
    "head_dim": (8, 10, 12, 16, 20, 24),
    "intermediate_size": (40, 56, 80, 100),
    "ffn_dim": (40, 80),
    "n_inner": (None, 40, 80),
    "moe_intermediate_size": (24, 40),
    "shared_expert_intermediate_size": (24, 56),
    "shared_intermediate_size": (24, 56),
    "moe_shared_expert_intermediate_size": (24, 56),
    "intermediate_size_mlp": (56, 72),
    "vocab_size": (70, 96, 131),
    "hidden_size_per_layer_input": (5, 7, 8),
    "laurel_rank": (3, 5),
    "num_local_experts": (3, 4, 5, 8),
    "num_experts": (3, 4, 6, 8),
    "n_routed_experts": (4, 6, 8),
    "num_experts_per_tok": (1, 2, 3),
    "n_shared_experts": (1, 2),
    "sliding_window": (3, 4, 6),
    "window_size": (3, 4, 6),
    "attention_chunk_size": (3, 4, 6, 16),
    "q_lora_rank": (None, 20, 28),
    "kv_lora_rank": (12, 20, 24),
    "qk_rope_head_dim": (4, 8, 12),
    "qk_nope_head_dim": (6, 12, 16),
    "v_head_dim": (6, 10, 16),
    "index_n_heads": (2, 16),
    "index_head_dim": (16, 24),
    "index_topk": (3, 5, 64),
    "linear_num_heads": (2, 3),
    "linear_head_dim": (8, 12),
    "linear_num_key_heads": (2, 3),
    "linear_num_value_heads": (2, 3, 4, 6),
    "linear_key_head_dim": (8, 12),
    "linear_value_head_dim": (6, 10, 12),
    "linear_conv_kernel_dim": (2, 3, 4),
    "conv_kernel": (2, 3, 4),
    "conv_L_cache": (2, 3, 4),
    "mamba_d_conv": (2, 4),
    "mamba_n_heads": (4, 6, 8),
    "mamba_d_head": (8, 12, 16),
    "mamba_num_heads": (4, 6, 8),
    "mamba_head_dim": (8, 12, 16),
    "mamba_d_ssm": (48, 64, 96),
    "mamba_d_state": (8, 14),
    "ssm_state_size": (8, 14),
    "state_size": (8, 14),
    "n_groups": (1, 2),
    "mamba_n_groups": (1, 2),
    "mamba_expand": (1, 2, 3),
    "mamba_dt_rank": (3, 6),
    "mamba_chunk_size": (3, 4, 8),
    "chunk_size": (3, 4, 8),
    "rotary_dim": (2, 4, 6),
    "num_kv_shared_layers": (0, 1, 2, 3),
    "first_k_dense_replace": (0, 1, 2, 3),
    "decoder_sparse_step": (1, 2),
    "interleave_moe_layer_step": (1, 2),
    "attn_layer_period": (2, 3),
    "attn_layer_offset": (0, 1),
    "expert_layer_period": (1, 2),
    "expert_layer_offset": (0, 1),
    "altup_num_inputs": (2, 3, 4),
    "swa_num_attention_heads": (2, 4, 6),
    "swa_head_dim": (8, 12, 16),
    "dim_model_base": (16, 32),
}
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Switches that say nothing about the model, and numbers that are no scale.
FIXED = (
    "use_cache",
    "return_dict",
    "decoder",
    "output_",
    "cross_attention",
    "kernels",
    "heterogeneous",
    "torchscript",
    "rescale_prenorm",  # with which transformers itself changes weights that it loads
)
NO_SCALES = (
    "drop",
    "eps",
    "init",
    "theta",
    "time_step",
    "jitter",
    "aux",
    "coef",
    "limit",
    "sparsity",
    "min",
    "max",
)
EDGE = (
    24  # tokens, more than are tried: behind it, sessions end where rotary embeddings change with the length
)
ROTARY: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "original_max_position_embeddings": EDGE},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)


def drawn(family: str, seed: int) -> PretrainedConfig:
    """A config that the family's own code can run; always the same of a seed. Raises what the last draw raised."""
    draw, last = random.Random(f"{family}-{seed}"), Exception("no draw")
    for _ in range(DRAWS):
        try:
            config = _draw(AutoConfig.for_model(family, **GIVEN.get(family, {})), draw)
            model: Any = structure(config).causal_lm(config)
            with torch.no_grad():
                mask = torch.tensor([[0, 1, 1, 1, 1]])
                model(torch.tensor([[3, 4, 5, 6, 7]]), attention_mask=mask, use_cache=False)
            return config
        except UnsupportedFamily as error:
            if "describes no model" not in str(error):
                raise
            last = error
        except Exception as error:  # whatever the family's own code makes of such ratios
            last = error
    raise last


def _draw(config: PretrainedConfig, draw: random.Random) -> PretrainedConfig:
    given, plain = config.to_dict(), copy.deepcopy(config)
    if layer_overrides(config):
        plain.per_layer_config = given["per_layer_config"] = None
    _draw_sizes(plain, given, draw)
    _draw_heads(plain, given, draw)
    for name, value in list(given.items()):
        if name.startswith("_") or any(word in name for word in FIXED):
            continue
        if isinstance(value, bool) and draw.random() < 0.3:
            given[name] = not value
        elif isinstance(value, float) and not any(word in name for word in NO_SCALES):
            given[name] = value * draw.choice([1.0, draw.uniform(0.7, 1.4)])
        elif name in SOFTCAPS:
            given[name] = draw.choice([None, 3.0, 15.0])
        elif is_per_layer(config, name, value):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value
            given[name] = [draw.choice(kinds) for _ in range(LAYERS)]
    _draw_rotary(given, draw)
    given[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = LAYERS
    if layer_overrides(config):
        given["per_layer_config"] = overrides(config, given)
    given |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"}
    return type(config)(**given)


def _draw_sizes(config: PretrainedConfig, given: dict[str, Any], draw: random.Random) -> None:
    for name, sizes in SIZES.items():
        known, value = config.attribute_map.get(name, name), getattr(config, name, None)
        if known not in given or isinstance(value, bool):
            continue
        if isinstance(value, int) or (value is None and None in sizes):
            given[known] = draw.choice(sizes)


def _draw_heads(config: PretrainedConfig, given: dict[str, Any], draw: random.Random) -> None:
    """What has to divide another, or to be as wide."""
    heads = given.get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
    for name, whole in (
        ("num_key_value_heads", heads),
        ("num_kv_heads", heads),
        ("swa_num_key_value_heads", given.get("swa_num_attention_heads")),
    ):
        if given.get(name) is not None and isinstance(whole, int):
            given[name] = draw.choice([part for part in range(1, whole + 1) if whole % part == 0])
    rotated = getattr(config, "qk_rope_head_dim", None)
    if rotated is not None and getattr(config, "head_dim", None) == rotated and "head_dim" in given:
        given["head_dim"] = given["qk_rope_head_dim"]
    experts = given.get("n_routed_experts")
    if isinstance(experts, int) and isinstance(given.get("n_group"), int):
        given["n_group"] = draw.choice([one for one in (1, 2, 3) if experts % one == 0 and experts > one])
        given["topk_group"] = draw.randint(1, given["n_group"])
    times = given.get("expand") or given.get("mamba_expand") or 1
    inner = given.get("mamba_d_ssm") or times * given.get("hidden_size", 0)
    for count, width in (("num_heads", "head_dim"), ("mamba_n_heads", "mamba_d_head")):
        if inner and isinstance(given.get(count), int) and isinstance(given.get(width), int):
            given[width] = draw.choice([one for one in (4, 6, 8, 12, 16) if inner % one == 0])
            given[count] = inner // given[width]
    if "attn_layer_indices" in given:
        given["attn_layer_indices"] = sorted(draw.sample(range(LAYERS), 2))


def _draw_rotary(given: dict[str, Any], draw: random.Random) -> None:
    rope = given.get("rope_parameters")
    parts = rope.values() if isinstance(rope, dict) else ()
    for part in [one for one in parts if isinstance(one, dict)] or ([rope] if rope else []):
        if "partial_rotary_factor" in part:
            part["partial_rotary_factor"] = draw.choice([0.25, 0.5, 1.0])
        if part.get("rope_type", "default") == "default":
            part.update(draw.choice(ROTARY))
        if part["rope_type"] in ("dynamic", "longrope") and "max_position_embeddings" in given:
            given["max_position_embeddings"] = EDGE if part["rope_type"] == "dynamic" else 4 * EDGE
        if part["rope_type"] == "longrope":
            count = int(_rotated(given) * (part.get("partial_rotary_factor") or 1.0)) // 2
            for name, least in (("short_factor", 1.0), ("long_factor", 2.0)):
                part[name] = [draw.uniform(least, 2 * least) for _ in range(count)]


def _rotated(given: dict[str, Any]) -> int:
    """How wide what is rotated is, where the whole head is."""
    width = given.get("qk_rope_head_dim") or given.get("head_dim")
    return int(width or given["hidden_size"] // given["num_attention_heads"])
