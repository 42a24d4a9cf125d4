"""A family's model in small: the same kinds of layers, a few of them, and narrow.

Invariant: what a config says about the kind of its layers, and about the ratios of their sizes, its miniature
says too; so what holds for the one's code holds for the other's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from itertools import cycle, islice, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from corolla.models.checkpoints.identity import canonical_config
from corolla.models.families import (
    depth_of,
    largest,
    layer_overrides,
    slice_config,
    structure,
    tied_weights,
)

LAYERS = 6
EDGE = 9  # tokens a sequence, after which the miniature's rotary embeddings change, if they do

TOLERANCE = 1e-4  # of the largest value, where a row is computed in another arrangement (cached steps)

# The miniature's sizes, for those of these attributes that a config has.
SMALL: dict[str, int] = {
    "hidden_size": 64,
    "attention_hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "word_embed_proj_dim": 64,
    "vocab_size": 64,
    "unpadded_vocab_size": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "rotary_dim": 8,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "n_group": 1,
    "topk_group": 1,
    "shared_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 48,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 8,
    "router_hidden_size": 32,
    "lru_width": 64,
    "adapter_rank": 16,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 2,
    "time_step_rank": 8,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "n_input_layers": 2,
    "n_recurrent_layers": 2,
    "n_output_layers": 2,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "zero_expert_num": 2,
    "hc_lowrank": 32,
    "heads_per_ngram": 4,
    "ple_embed_dim": 240,  # which many numbers of heads divide
    "indexer_n_heads": 16,
    "indexer_head_dim": 32,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
# Of those, what is left as it is where it is smaller: few heads of an indexer give many equal scores.
AT_MOST = ("num_experts_per_tok", "index_n_heads", "indexer_n_heads", "indexer_compress_ratio", "moe_top_k")
# How many tokens something reaches, by whatever name a family has for it: the check's sequences go beyond.
REACH = re.compile(r"(^|_)(window|window_size|chunk_size|block_size|local_attention|extent)$")
REACHED = 4
# Lists of layers that have something of their own, by their numbers, from 1.
NUMBERED = re.compile(r"(^|_)layer_ids$")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
# Heads of recurrences and their width; together they are `expand` times as wide as the hidden states.
RECURRENT = {
    "mamba_n_heads": "mamba_d_head",
    "mamba_num_heads": "mamba_head_dim",
    "n_mamba_heads": "mamba_headdim",
}
# Of the kinds of rotary embeddings, those that change with the length of a sequence.
BY_LENGTH = ("dynamic", "longrope")

_made: dict[tuple[type[PretrainedConfig], bytes, str | None], PretrainedConfig] = {}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within the block models are made on the CPU in float32, with random numbers of their own, and have gradients.

    Whatever is set around it: a model that is just being loaded sets another device and another dtype, and a user may
    load one under `torch.no_grad`, `torch.inference_mode` or `torch.autocast`.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            _on_the_cpu(),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def _on_the_cpu() -> AbstractContextManager[object]:
    """Nothing, where tensors are made there anyway: every operation takes longer within."""
    cpu = torch.device("cpu")
    return nullcontext() if torch.empty(0).device == cpu else cpu


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """The same family with few and narrow layers that keep the original's kinds of layers and ratios.

    Made once a process and config, as each check asks for it anew; the caller's is a copy.
    """
    key = type(config), canonical_config(config.to_dict()), config._attn_implementation
    if key not in _made:
        _made[key] = _in_small(config)
    return copy.deepcopy(_made[key])


def _in_small(config: PretrainedConfig) -> PretrainedConfig:
    small = _shrunk_to(config, 1)
    if _has_one_key(small) and not _has_one_key(config) and not _can_be_made(small):
        return _shrunk_to(config, 2)  # a family's code may pair heads of keys and values
    return small


def _has_one_key(config: PretrainedConfig) -> bool:
    return any(largest(config, name) == 1 for name in KEY_HEADS)


def _can_be_made(small: PretrainedConfig) -> bool:
    try:
        with torch.device("meta"):
            structure(small).causal_lm(copy.deepcopy(small))
    except ValueError:  # a family's own word that a size does not fit; whatever else goes wrong shows later
        return False
    return True


def _shrunk_to(config: PretrainedConfig, least_keys: int) -> PretrainedConfig:
    """With so many heads of keys and values at least."""
    depth = min(LAYERS, depth_of(config))
    first = _most_varied_stretch(config, depth)
    small = slice_config(config, first, first + depth)
    for name, numbers in _numbered(config).items():
        setattr(small, name, [one - first for one in numbers if first < one <= first + depth])
    overrides = _by_kind(config, small)
    if overrides:
        small.per_layer_config = None
        config = copy.deepcopy(config)
        config.per_layer_config = None
    ratio = _heads_per_key(config)
    for whole, part in [(config, small), *_parts(config, small)]:
        for name, size in SMALL.items():
            if _is_size(whole, name):
                setattr(part, name, min(size, getattr(whole, name)) if name in AT_MOST else size)
        for name in KEY_HEADS:
            if getattr(whole, name, None) is not None:
                setattr(part, name, max(least_keys, small.num_attention_heads // ratio))
    for name in vars(config):
        if REACH.search(name) and _is_size(config, name):
            setattr(small, name, min(REACHED, getattr(config, name)))
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        small.word_embed_proj_dim = SMALL["word_embed_proj_dim"] // 2
    if isinstance(sizes := getattr(small, "intermediate_size", None), list):
        small.intermediate_size = [SMALL["intermediate_size"] * one // max(sizes) for one in sizes]
    small.pad_token_id, small.bos_token_id, small.eos_token_id = 0, 1, 2
    _fit_heads(config, small)
    _fit_recurrent(config, small)
    _fit_rotary(config, small)
    if overrides:
        small.per_layer_config = {at: _shrunk(config, small, own) for at, own in overrides.items()}
    small.dtype = torch.float32
    _compute_again(small)
    return small


def _compute_again(small: PretrainedConfig) -> None:
    """Lists that a config's class makes of the values that it is given: indices of layers."""
    given = {one.name for one in fields(cast(Any, type(small)))}
    made = [name for name, value in vars(small).items() if isinstance(value, list) and name not in given]
    if not (made := [name for name in made if not name.startswith("_")]):
        return
    try:
        again = type(small)(**{name: value for name, value in small.to_dict().items() if name in given})
    except Exception:  # some classes take nothing but what they have made themselves
        return
    for name in made:
        setattr(small, name, vars(again).get(name))


def _shrunk(config: PretrainedConfig, small: PretrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """What a layer has of its own, in the ratio to what the others have."""
    found = dict(own)
    for name, value in own.items():
        whole, part = getattr(config, name, None), getattr(small, name, None)
        if all(isinstance(one, int) and not isinstance(one, bool) for one in (value, whole, part)) and whole:
            found[name] = max(1, part * value // whole)
    return found


def _by_kind(config: PretrainedConfig, small: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """What the miniature's layers have of their own.

    Where layers have that by their kind, or the last ones take keys and values from earlier ones, or some have weights
    in common, the kinds of layers take turns in the miniature, so that each is among those that share and among the
    others.
    """
    own, shared = layer_overrides(config), getattr(config, "num_kv_shared_layers", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or not (own or shared or tied_weights(config)):
        return layer_overrides(small)
    of_kind = {kind: own.get(at, {}) for at, kind in enumerate(kinds)}
    if any(own.get(at, {}) != of_kind[kind] for at, kind in enumerate(kinds)):
        return layer_overrides(small)
    depth, last_first = small.num_hidden_layers, list(dict.fromkeys(reversed(kinds)))
    small.layer_types = list(islice(cycle(last_first), depth))[::-1]
    if shared:
        part = max(1, shared * depth // config.num_hidden_layers)
        small.num_kv_shared_layers = min(part, depth - len(last_first))
    return {at: of_kind[kind] for at, kind in enumerate(small.layer_types) if of_kind[kind]}


def _parts(config: PretrainedConfig, small: PretrainedConfig) -> list[tuple[Any, Any]]:
    """Configs inside of both, some of which describe parts of blocks."""
    pairs = [(getattr(config, name, None), getattr(small, name, None)) for name in type(config).sub_configs]
    return [pair for pair in pairs if isinstance(pair[1], PretrainedConfig)]


def _is_size(config: PretrainedConfig, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int) and not isinstance(value, bool) and not _is_computed(config, name)


def _is_computed(config: PretrainedConfig, name: str) -> bool:
    return isinstance(getattr(type(config), name, None), property)


def _heads_per_key(config: PretrainedConfig) -> int:
    if not hasattr(config, "num_attention_heads"):
        return 1
    keys = (
        getattr(config, "num_key_value_heads", None)
        or getattr(config, "num_kv_heads", None)
        or config.num_attention_heads
    )
    return max(1, int(config.num_attention_heads // keys))


def _fit_recurrent(config: PretrainedConfig, small: PretrainedConfig) -> None:
    inner = SMALL["hidden_size"] * int(
        getattr(config, "mamba_expand", None) or getattr(config, "expand", None) or 1
    )
    for heads, width in RECURRENT.items():
        if _is_size(config, heads):
            setattr(small, heads, inner // 16)
            setattr(small, width, 16)
    if not hasattr(config, "num_attention_heads") and _is_size(config, "num_heads"):
        small.num_heads, small.head_dim = inner // 16, 16
    if _is_size(config, "mamba_d_ssm"):
        small.mamba_d_ssm = inner
    if _is_size(config, "qk_head_dim"):
        small.qk_head_dim = small.qk_nope_head_dim + small.qk_rope_head_dim


def _most_varied_stretch(config: PretrainedConfig, length: int) -> int:
    """Where `length` layers start that are of most kinds (`layer_types`), and change them most often."""
    # Those that are computed begin with the first layer.
    kinds = vars(config).get("layer_types") or vars(config).get("layers_block_type")
    if not kinds:
        return 0

    numbered = _numbered(config).values()
    kinds = [(kind, *(at in numbers for numbers in numbered)) for at, kind in enumerate(kinds, 1)]

    def variety(start: int) -> tuple[int, int]:
        own = kinds[start : start + length]
        return len(set(own)), sum(one != other for one, other in pairwise(own))

    return max(range(len(kinds) - length + 1), key=variety)


def _numbered(config: PretrainedConfig) -> dict[str, list[int]]:
    return {name: value for name, value in vars(config).items() if NUMBERED.search(name) and value}


def _fit_heads(config: PretrainedConfig, small: PretrainedConfig) -> None:
    """Heads together are as wide as the hidden states only where they are so in the original."""
    if (rotated := getattr(config, "qk_rope_head_dim", None)) is not None:
        if _is_size(config, "qk_nope_head_dim"):
            # Even, as some code views what is rotated behind it as complex numbers.
            pairs = small.qk_rope_head_dim * config.qk_nope_head_dim // (2 * rotated)
            small.qk_nope_head_dim = 2 * max(1, pairs)
        # The width that rotary tables are made for, of which they take all or a part.
        wide = getattr(config, "head_dim", None)
        shares = [_rotary_share(part) for part in rotary_parts(config).values()] or [1.0]
        if rotated in {int(share * (wide or 0)) for share in shares}:
            small.head_dim = small.qk_rope_head_dim * wide // rotated
    elif not hasattr(config, "num_attention_heads"):
        return
    elif isinstance(getattr(small, "head_dim", None), int) and not _is_computed(config, "head_dim"):
        together = config.head_dim * config.num_attention_heads == config.hidden_size
        small.head_dim = SMALL["head_dim"] * (1 if together else 2)


def rotary_parts(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Parameters of rotary embeddings by the kind of layers that have them, by no name where they are of all; none
    without any."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return {}
    if all(one is None or isinstance(one, dict) for one in rope.values()):
        return {kind: part for kind, part in rope.items() if part is not None}
    return {"": rope}


def _rotary_share(part: dict[str, Any]) -> float:
    """Of a head's width, how much is rotated."""
    return float(part.get("partial_rotary_factor") or 1.0)


def _fit_rotary(config: PretrainedConfig, small: PretrainedConfig) -> None:
    """As many factors as the miniature has frequencies; and the edge where they change, at `EDGE`."""
    small.rope_parameters = copy.deepcopy(getattr(config, "rope_parameters", None))
    if not (parts := rotary_parts(small)):
        return
    width = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
    for part in parts.values():
        keep = int(width * _rotary_share(part)) // 2
        part |= {
            name: (value * keep)[:keep]
            for name, value in part.items()
            if name.endswith("_factor") and isinstance(value, list)
        }
        if part.get("rope_type") in BY_LENGTH:
            if "original_max_position_embeddings" in part:
                part["original_max_position_embeddings"] = EDGE
            if hasattr(config, "original_max_position_embeddings"):
                small.original_max_position_embeddings = EDGE
            small.max_position_embeddings = EDGE if part["rope_type"] == "dynamic" else 4 * EDGE


def random_model(causal_lm: Callable[[Any], PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """With every parameter drawn anew, from the generator's present state, and every table of whole numbers that only
    a checkpoint fills (which experts a token is given, by its id)."""
    model = causal_lm(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape) * scale)
        stored = model.state_dict()
        for name, table in model.named_buffers():
            empty = table.dtype == torch.long and table.ndim > 1 and name in stored and not bool(table.any())
            if empty:
                table.copy_(torch.randint(2, table.shape))
    return model.eval().requires_grad_(False)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same but for rounding; never where one is not finite."""
    return bool((one - other).abs().max() <= TOLERANCE * (1 + other.abs().max()))
