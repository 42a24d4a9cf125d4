"""The sizes that figures are measured at, which need no library to be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MODEL = "smollm2"
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class DemoSizes:
    """What `corolla demo` trains with (see `corolla/cli/demo.py`)."""

    steps: int = 28
    batch: int = 6
    max_length: int = 256  # tokens of an example, as where nothing is asked for; the demo cuts them shorter
    held_out: int = 32  # conversations


DEMO = DemoSizes()


@dataclass(frozen=True)
class Shape:
    """A model with random weights: `name` says of what, `kind` is transformers' own name of the family."""

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "gemma3": Shape(
        "Gemma-3-270M",
        "gemma3_text",
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262_144,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": Shape(
        "Qwen3-0.6B, its first 12 blocks",
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
    "moe": Shape(
        "a mixture of 8 experts, 200 M numbers",
        "mixtral",
        {
            "hidden_size": 768,
            "intermediate_size": 640,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
    ),
    "mla": Shape(
        "multi-head latent attention, 100 M numbers",
        "deepseek_v3",
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "first_k_dense_replace": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": 384,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
    ),
    "hybrid": Shape(
        "three recurrent layers to one of attention, 100 M numbers",
        "qwen3_5_text",
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "linear_num_key_heads": 6,
            "linear_num_value_heads": 12,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
    ),
}
