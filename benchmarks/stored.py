"""`python -m benchmarks.stored`: memory of a quantized checkpoint's blocks beside that of the same ones in bfloat16.

Invariant: all are random weights of one shape, written in this run, and each is loaded by a process of its own, as
`corolla serve` does it. Kept: what the blocks' weights take in the end. Most: by how much the process grew over what
it was before it read, at any moment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.processes import ROOT

HIDDEN, INNER, HEADS, WORDS, GROUP = 2048, 5632, 16, 1024, 128
Stored = dict[str, Tensor]


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def scales(*shape: int) -> Tensor:
    return (torch.rand(*shape) * 0.005 + 0.002).half()


def gptq(outputs: int, inputs: int) -> Stored:
    groups = inputs // GROUP
    return {
        ".qweight": words(inputs // 8, outputs),
        ".qzeros": words(groups, outputs // 8),
        ".scales": scales(groups, outputs),
        ".g_idx": (torch.arange(inputs) // GROUP).int(),
    }


def awq(outputs: int, inputs: int) -> Stored:
    groups = inputs // GROUP
    return {
        ".qweight": words(inputs, outputs // 8),
        ".qzeros": words(groups, outputs // 8),
        ".scales": scales(groups, outputs),
    }


def fp8(outputs: int, inputs: int) -> Stored:
    grid = (-(-outputs // 128), -(-inputs // 128))
    numbers = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    return {".weight": numbers, ".weight_scale_inv": torch.rand(grid) * 0.01 + 0.01}


def mxfp4(outputs: int, inputs: int) -> Stored:
    pairs = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    powers = torch.randint(119, 122, (outputs, inputs // 32), dtype=torch.uint8)
    return {".weight_packed": pairs, ".weight_scale": powers}


def bfloat16(outputs: int, inputs: int) -> Stored:
    return {".weight": (torch.randn(outputs, inputs) * 0.02).bfloat16()}


def compressed(form: str, **weights: object) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"strategy": "group", **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


FORMS: dict[str, tuple[dict[str, object] | None, Callable[[int, int], Stored]]] = {
    "bfloat16": (None, bfloat16),
    "GPTQ, 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq),
    "AWQ, 4 bits": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "fp8, blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8),
    "mxfp4": (compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), mxfp4),
}


def write(folder: Path, form: str, layers: int) -> int:
    """A checkpoint of this form; gives the size of its file."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        num_hidden_layers=layers,
        vocab_size=WORDS,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    quantization, store = FORMS[form]
    raw = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization}))
    head = HIDDEN // HEADS
    sizes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (head * HEADS // 4, HIDDEN),
        "self_attn.v_proj": (head * HEADS // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    table = (torch.randn(WORDS, HIDDEN) * 0.02).bfloat16()
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    for layer in range(layers):
        base = f"model.layers.{layer}."
        for name, size in sizes.items():
            tensors |= {base + name + end: part for end, part in store(*size).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--dtype", default="float32")
    chosen = options.parse_args()
    print(
        f"{chosen.layers} blocks of width {HIDDEN}, computing in {chosen.dtype}; MiB, and as a share of bfloat16's"
    )
    print(f"{'stored as':14} {'file':>6} {'kept':>14} {'most':>14} {'load s':>7}")
    first: dict[str, float] = {}
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            size = write(Path(folder), form, chosen.layers)
            command = [
                sys.executable,
                "-m",
                "benchmarks.workers.stored",
                folder,
                chosen.dtype,
            ]
            found = json.loads(subprocess.check_output(command, cwd=ROOT).splitlines()[-1])
        first = first or found
        kept, most = (found[key] / first[key] for key in ("kept", "most"))
        print(
            f"{form:14} {size / 2**20:6.0f} {found['kept'] / 2**20:6.0f} ({kept:.2f}x) {found['most'] / 2**20:6.0f} "
            f"({most:.2f}x) {found['seconds']:7.1f}"
        )


if __name__ == "__main__":
    main()
