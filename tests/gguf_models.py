"""Tiny GGUF files, with the names and layouts that llama.cpp's converter gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

WORDS, WIDTH, HEADS, OWN_HEADS, EXPERTS = 40, 64, 3, 1, 3
HEAD, INNER = 128, 768  # whatever a file says, transformers builds heads, and experts, so wide


def write_gguf(
    path: Path,
    *,
    experts: bool = False,
    layers: int = 3,
    lacking: str = "",
    seed: int = 0,
    alignment: int = 32,
) -> Path:
    """A file of a qwen3 or qwen3_moe model with random weights: 16 and 8 bits, norms in 32."""
    kind = "qwen3moe" if experts else "qwen3"
    writer = gguf.GGUFWriter(path, kind)
    writer.add_custom_alignment(alignment)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(OWN_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if experts:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(INNER)
    _add_tokenizer(writer)
    random = torch.Generator().manual_seed(seed)

    def add(name: str, *shape: int, stored: Kind = Kind.F16) -> None:
        if name == lacking:
            return
        values = torch.randn(shape, generator=random).numpy() / shape[-1] ** 0.5
        if stored == Kind.F32:
            values = 1.0 + values
        content = gguf.quants.quantize(values.astype(np.float32), stored)
        writer.add_tensor(name, content, raw_dtype=stored)

    add("token_embd.weight", WORDS, WIDTH)
    add("output.weight", WORDS, WIDTH, stored=Kind.Q8_0)
    add("output_norm.weight", WIDTH, stored=Kind.F32)
    for index in range(layers):
        _add_block(add, f"blk.{index}", experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_block(add: Any, block: str, experts: bool) -> None:
    add(f"{block}.attn_norm.weight", WIDTH, stored=Kind.F32)
    add(f"{block}.ffn_norm.weight", WIDTH, stored=Kind.F32)
    add(f"{block}.attn_q.weight", HEADS * HEAD, WIDTH, stored=Kind.Q8_0)
    add(f"{block}.attn_k.weight", OWN_HEADS * HEAD, WIDTH)
    add(f"{block}.attn_v.weight", OWN_HEADS * HEAD, WIDTH, stored=Kind.Q8_0)
    add(f"{block}.attn_q_norm.weight", HEAD, stored=Kind.F32)
    add(f"{block}.attn_k_norm.weight", HEAD, stored=Kind.F32)
    add(f"{block}.attn_output.weight", WIDTH, HEADS * HEAD)
    of_experts, many = ("_exps", (EXPERTS,)) if experts else ("", ())
    if experts:
        add(f"{block}.ffn_gate_inp.weight", EXPERTS, WIDTH, stored=Kind.F32)
    add(f"{block}.ffn_gate{of_experts}.weight", *many, INNER, WIDTH, stored=Kind.Q8_0)
    add(f"{block}.ffn_up{of_experts}.weight", *many, INNER, WIDTH, stored=Kind.Q8_0)
    add(f"{block}.ffn_down{of_experts}.weight", *many, WIDTH, INNER, stored=Kind.Q8_0)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    letters = [chr(ord("a") + index) for index in range(26)]
    words = ["<|endoftext|>", "Ġ", "Ċ", *letters, "ab", "cd"]
    words += [f"<unused{index}>" for index in range(WORDS - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (WORDS - 1)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
