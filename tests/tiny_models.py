"""Tiny random checkpoints of every family that Corolla is tested on.

Their weights are drawn wide enough that greedy decoding gives diverse tokens: a model that repeats one token
would hide mistakes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 256
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_SLIDING = {"sliding_window": 6}
# These repeat one token for ever when a random head is tied to a random embedding.
_UNTIED = frozenset({"bloom", "gemma2", "gemma3_text", "gpt2"})


def _layer_types(layers: int) -> list[str]:
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]


def _arguments(family: str, layers: int) -> dict[str, Any]:
    pattern = {"layer_types": _layer_types(layers), **_SLIDING}
    special: dict[str, dict[str, Any]] = {
        "bloom": {"hidden_size": 32, "n_head": 4},
        "llama": {**_LLAMA_LIKE},
        "mistral": {**_LLAMA_LIKE, **_SLIDING},
        "qwen2": {**_LLAMA_LIKE, "use_sliding_window": True, "max_window_layers": 1, **pattern},
        "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
        "gemma2": {**_LLAMA_LIKE, "head_dim": 16, **pattern},
        "gemma3_text": {**_LLAMA_LIKE, "head_dim": 16, **pattern},
        "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        "phi3": {**_LLAMA_LIKE},
        "gpt_neox": {**_LLAMA_LIKE, "num_key_value_heads": None},
        "gpt2": {
            "n_embd": 32,
            "n_head": 4,
            "n_positions": 512,
            "embd_pdrop": 0.0,
        },  # at the client, in training
        "falcon": {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "alibi": True,
            "new_decoder_architecture": False,
        },
        "olmo2": {**_LLAMA_LIKE},
        "cohere": {**_LLAMA_LIKE, "logit_scale": 1.0},
        "opt": {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 512,
        },
        "gpt_oss": {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            **pattern,
        },
        "granite": {
            **_LLAMA_LIKE,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
        "smollm3": {**_LLAMA_LIKE, "no_rope_layer_interval": 2},
    }
    return {key: value for key, value in special[family].items() if value is not None}


# The 19 families by their `model_type`.
FAMILIES: tuple[str, ...] = (
    "bloom",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
    "phi3",
    "gpt_neox",
    "gpt2",
    "falcon",
    "olmo2",
    "cohere",
    "opt",
    "gpt_oss",
    "granite",
    "smollm3",
)


def tiny_config(family: str, *, layers: int = 4, **changes: Any) -> PretrainedConfig:
    """A config of a few thousand parameters; `changes` override its fields."""
    arguments = {**_TOKENS, "vocab_size": VOCABULARY, **_arguments(family, layers)}
    if family in _UNTIED:
        arguments["tie_word_embeddings"] = False
    arguments |= changes
    return AutoConfig.for_model(family, num_hidden_layers=layers, **arguments)


def tiny_model(
    config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The family's own model with every parameter drawn anew, norms and biases too."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is embedding:
                parameter.copy_(noise * 0.1)  # narrow, so that a tied head does not merely repeat its input
            elif parameter.ndim >= 2:
                parameter.copy_(noise * 2.0 / math.sqrt(parameter.shape[-1]))
            elif name.endswith("weight"):
                parameter.add_(noise * 0.1)  # a norm's scale: its own neutral value, disturbed
            else:
                parameter.copy_(noise * 0.1)
    return model.to(dtype).eval()


def write_tiny(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **changes: Any,
) -> Path:
    """Write a tiny random checkpoint of `family` into `folder`, which is returned.

    With `shards` > 1 the weights are cut into about that many safetensors files with an index.
    """
    model = tiny_model(tiny_config(family, layers=layers, **changes), seed=seed, dtype=dtype)
    total = sum(parameter.nbytes for parameter in model.parameters())
    limit = total + 2**20 if shards == 1 else total // shards + 1
    model.save_pretrained(folder, max_shard_size=limit)
    return folder
