"""Tiny checkpoints as they are stored quantized, beside the same model with the weights that they stand for.

Everything here is written from the formats' published definitions, without a line of Corolla's: numbers and scales
are drawn first, and what they mean is computed from them before they are packed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import write_tiny

Stored = dict[str, Tensor]  # by the end of the key, after the module's name
Array = np.ndarray[Any, Any]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
NF4 = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.39491749,
    -0.28444138,
    -0.18477343,
    -0.09105003,
    0.0,
    0.0795803,
    0.1609302,
]
NF4 += [0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1.0]
FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 += [-one for one in FP4]


@dataclass(frozen=True)
class Form:
    """One way to store a model's weights."""

    config: dict[str, Any]  # its `quantization_config`
    store: Callable[
        [Array, np.random.Generator], tuple[Stored, Array]
    ]  # of a weight [out, in]; with what it means


def _blocks(weight: Array, high: int, wide: int) -> Array:
    """The largest absolute value of each block, [rows / high, columns / wide] rounded up."""
    rows, columns = weight.shape
    grid = np.zeros((-(-rows // high), -(-columns // wide)), dtype=np.float32)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            part = weight[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            grid[row, column] = np.abs(part).max()
    return grid


def _spread(grid: Array, weight: Array, high: int, wide: int) -> Array:
    """Each number's own block's value, one at a time."""
    rows, columns = weight.shape
    return np.array([[grid[row // high, column // wide] for column in range(columns)] for row in range(rows)])


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _powers(grid: Array) -> tuple[Array, Array]:
    """Powers of two at least as large, and their E8M0 bytes."""
    exponents = np.ceil(np.log2(grid)).astype(np.int32)
    return np.exp2(exponents.astype(np.float32)), (exponents + 127).astype(np.uint8)


def _fp8(weight: Array, scales: Array) -> tuple[Tensor, Array]:
    numbers = _tensor(weight / scales).to(torch.float8_e4m3fn)
    return numbers, numbers.float().numpy() * scales


def _fp4(weight: Array, scales: Array) -> tuple[Tensor, Array]:
    """Pairs in bytes, the first in the low half."""
    wanted = weight / scales
    places = np.abs(np.abs(wanted)[..., None] - E2M1).argmin(-1)
    negative = wanted < 0
    codes = (places + 8 * negative).astype(np.uint8)
    return _tensor(codes[:, 0::2] | codes[:, 1::2] << 4), np.where(
        negative, -E2M1[places], E2M1[places]
    ) * scales


def fp8_blocks(high: int, wide: int, name: str = ".weight_scale_inv") -> Form:
    def store(weight: Array, _random: np.random.Generator) -> tuple[Stored, Array]:
        grid = _blocks(weight, high, wide) / 448
        numbers, meant = _fp8(weight, _spread(grid, weight, high, wide))
        return {".weight": numbers, name: _tensor(grid)}, meant

    config = {
        "quant_method": "fp8",
        "weight_block_size": [high, wide],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    return Form(config, store)


def fp8_whole() -> Form:
    def store(weight: Array, _random: np.random.Generator) -> tuple[Stored, Array]:
        scale = np.float32(np.abs(weight).max() / 448)
        numbers, meant = _fp8(weight, np.full_like(weight, scale))
        extra = torch.tensor(0.5)
        return {
            ".weight": numbers,
            ".weight_scale_inv": torch.tensor(scale),
            ".activation_scale": extra,
        }, meant

    return Form({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, store)


def mxfp8() -> Form:
    def store(weight: Array, _random: np.random.Generator) -> tuple[Stored, Array]:
        grid, exponents = _powers(_blocks(weight, 1, 32) / 448)
        numbers, meant = _fp8(weight, _spread(grid, weight, 1, 32))
        return {".weight": numbers, ".weight_scale_inv": _tensor(exponents)}, meant

    return Form({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, store)


def rows_fp8(config: dict[str, Any], scale: str = ".weight_scale") -> Form:
    def store(weight: Array, _random: np.random.Generator) -> tuple[Stored, Array]:
        grid = np.abs(weight).max(1, keepdims=True) / 448
        numbers, meant = _fp8(weight, np.broadcast_to(grid, weight.shape))
        return {".weight": numbers, scale: _tensor(grid)}, meant

    return Form(config, store)


def nvfp4(config: dict[str, Any], *, divided: bool) -> Form:
    """ModelOpt's names, or compressed-tensors', where the scale of the whole is a divisor."""

    def store(weight: Array, _random: np.random.Generator) -> tuple[Stored, Array]:
        whole = np.float32(np.abs(weight).max() / (6 * 448))
        grid = _tensor(_blocks(weight, 1, 16) / 6 / whole).to(torch.float8_e4m3fn)
        factors = _spread(grid.float().numpy(), weight, 1, 16) * whole
        pairs, meant = _fp4(weight, factors)
        if divided:
            names = (".weight_packed", ".weight_scale", ".weight_global_scale")
            return dict(zip(names, (pairs, grid, torch.tensor([1 / whole])), strict=True)), meant
        names = (".weight", ".weight_scale", ".weight_scale_2")
        return dict(zip(names, (pairs, grid, torch.tensor(whole)), strict=True)), meant

    return Form(config, store)


def _packed(numbers: Array, bits: int) -> Array:
    """Whole numbers [n, count] in a row of bits each, cut into words of 32, the lowest bit first."""
    rows, count = numbers.shape
    stream = (numbers[..., None].astype(np.uint32) >> np.arange(bits)) & 1
    stream = stream.reshape(rows, count * bits)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32))).reshape(rows, -1, 32).astype(np.uint64)
    words = (padded << np.arange(32, dtype=np.uint64)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def _whole_numbers(
    weight: Array, bits: int, group: int, random: np.random.Generator, *, least: int, symmetric: bool
) -> tuple[Array, Array, Array]:
    """Numbers from `least` on, zeros and float16 scales [out, groups] about the weight."""
    groups = -(-weight.shape[1] // group)
    scales = (_blocks(weight, 1, group) / (1 << bits - 1) * 1.1).astype(np.float16).astype(np.float32)
    middle = least + (1 << bits - 1)
    spread = 0 if symmetric else max(1, (1 << bits) >> 3)
    zeros = (
        middle + random.integers(-spread, spread + 1, (len(weight), groups))
        if spread
        else np.full(scales.shape, middle)
    )
    numbers = np.round(weight / _spread(scales, weight, 1, group)) + _spread(zeros, weight, 1, group)
    return np.clip(numbers, least, least + (1 << bits) - 1).astype(np.int64), zeros, scales


def gptq(bits: int, group: int, form: str = "gptq", *, shuffled: bool = False) -> Form:
    def store(weight: Array, random: np.random.Generator) -> tuple[Stored, Array]:
        inputs = weight.shape[1]
        size = inputs if group < 0 else group
        order = random.permutation(inputs) if shuffled else np.arange(inputs)
        belongs = np.empty(inputs, dtype=np.int32)
        belongs[order] = np.arange(inputs) // size
        numbers, zeros, scales = _whole_numbers(
            weight[:, order], bits, size, random, least=0, symmetric=False
        )
        meant = np.empty_like(weight)
        meant[:, order] = (numbers - _spread(zeros, weight, 1, size)) * _spread(scales, weight, 1, size)
        as_stored = np.empty_like(numbers)
        as_stored[:, order] = numbers
        noted = zeros - 1 if form == "gptq" else zeros
        return {
            ".qweight": _tensor(_packed(as_stored, bits).T),
            ".qzeros": _tensor(_packed(noted.T, bits)),
            ".scales": _tensor(scales.T.astype(np.float16)),
            ".g_idx": _tensor(belongs),
        }, meant.astype(np.float32)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": False}
    return Form(config | {"checkpoint_format": form}, store)


def awq(group: int) -> Form:
    def store(weight: Array, random: np.random.Generator) -> tuple[Stored, Array]:
        numbers, zeros, scales = _whole_numbers(weight, 4, group, random, least=0, symmetric=False)
        meant = (numbers - _spread(zeros, weight, 1, group)) * _spread(scales, weight, 1, group)
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # which outputs a word holds, from its lowest bits on

        def words(table: Array) -> Tensor:
            return _tensor(_packed(table.reshape(len(table), -1, 8)[..., order].reshape(len(table), -1), 4))

        stored = {".qweight": words(numbers.T), ".qzeros": words(zeros.T)}
        return stored | {".scales": _tensor(scales.T.astype(np.float16))}, meant.astype(np.float32)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Form(config | {"modules_to_not_convert": ["lm_head"]}, store)


def _group_config(form: str, **weights: Any) -> dict[str, Any]:
    whole = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": None,
    } | weights
    scheme = {"targets": ["Linear"], "weights": whole, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def packed(bits: int, group: int, *, symmetric: bool) -> Form:
    def store(weight: Array, random: np.random.Generator) -> tuple[Stored, Array]:
        least = -(1 << bits - 1)
        numbers, zeros, scales = _whole_numbers(weight, bits, group, random, least=least, symmetric=symmetric)
        meant = (numbers - _spread(zeros, weight, 1, group)) * _spread(scales, weight, 1, group)
        stored = {
            ".weight_packed": _tensor(_packed(numbers - least, bits)),
            ".weight_scale": _tensor(scales),
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored[".weight_zero_point"] = _tensor(_packed((zeros - least).T, bits).T)
        return stored, meant.astype(np.float32)

    return Form(_group_config("pack-quantized", num_bits=bits, symmetric=symmetric, group_size=group), store)


def eight_bits(*, symmetric: bool) -> Form:
    """compressed-tensors' int-quantized, a scale a row."""

    def store(weight: Array, random: np.random.Generator) -> tuple[Stored, Array]:
        wide = weight.shape[1]
        numbers, zeros, scales = _whole_numbers(weight, 8, wide, random, least=-128, symmetric=symmetric)
        stored = {".weight": _tensor(numbers.astype(np.int8)), ".weight_scale": _tensor(scales)}
        if not symmetric:
            stored[".weight_zero_point"] = _tensor(zeros.astype(np.int8))
        return stored, ((numbers - zeros) * scales).astype(np.float32)

    return Form(_group_config("int-quantized", num_bits=8, symmetric=symmetric, strategy="channel"), store)


def ct_mxfp4() -> Form:
    def store(weight: Array, _random: np.random.Generator) -> tuple[Stored, Array]:
        grid, exponents = _powers(_blocks(weight, 1, 32) / 6)
        pairs, meant = _fp4(weight, _spread(grid, weight, 1, 32))
        return {".weight_packed": pairs, ".weight_scale": _tensor(exponents)}, meant

    config = _group_config("mxfp4-pack-quantized", type="float", group_size=32) | {}
    return Form(config, store)


def bnb4(kind: str, *, double: bool) -> Form:
    def store(weight: Array, random: np.random.Generator) -> tuple[Stored, Array]:
        table = np.array(NF4 if kind == "nf4" else FP4, dtype=np.float32)
        flat = weight.reshape(-1, 64)
        largest = np.abs(flat).max(1)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": list(weight.shape),
        }
        stored: Stored = {}
        if double:
            outer_table = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
            mean = largest.mean()
            blocks = np.array_split(largest - mean, range(256, len(largest), 256))
            outer = np.array([np.abs(one).max() + 1e-6 for one in blocks], dtype=np.float32)
            own = np.repeat(outer, 256)[: len(largest)]
            places = np.abs(((largest - mean) / own)[:, None] - outer_table).argmin(1)
            largest = outer_table[places] * own + np.float32(mean)
            state |= {
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": float(np.float32(mean)),
            }
            stored |= {
                ".weight.nested_absmax": _tensor(outer),
                ".weight.nested_quant_map": _tensor(outer_table),
            }
        codes = np.abs((flat / largest[:, None])[..., None] - table).argmin(-1).astype(np.uint8)
        meant = (table[codes] * largest[:, None]).reshape(weight.shape).astype(np.float32)
        codes = codes.reshape(-1)
        noted = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy()
        return stored | {
            ".weight": _tensor(codes[0::2] << 4 | codes[1::2])[:, None],
            ".weight.absmax": _tensor(places.astype(np.uint8) if double else largest),
            ".weight.quant_map": _tensor(table),
            f".weight.quant_state.bitsandbytes__{kind}": _tensor(noted),
        }, meant

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Form(config | {"bnb_4bit_use_double_quant": double}, store)


def bnb8() -> Form:
    def store(weight: Array, _random: np.random.Generator) -> tuple[Stored, Array]:
        largest = np.abs(weight).max(1)
        numbers = np.round(weight * 127 / largest[:, None]).astype(np.int8)
        stored = {
            ".weight": _tensor(numbers),
            ".SCB": _tensor(largest),
            ".weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return stored, numbers * (largest[:, None] / 127).astype(np.float32)

    return Form({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, store)


CT_ROWS = _group_config("float-quantized", num_bits=8, type="float", strategy="channel")
CT_NVFP4 = _group_config("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)

FORMS: dict[str, Form] = {
    "fp8": fp8_blocks(16, 16),
    "fp8-cut": fp8_blocks(24, 20),  # blocks that are cut at the borders
    "fp8-scale": fp8_blocks(24, 20, ".scale"),
    "fp8-whole": fp8_whole(),
    "mxfp8": mxfp8(),
    "fbgemm": rows_fp8({"quant_method": "fbgemm_fp8"}),
    "modelopt-fp8": rows_fp8({"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt-nvfp4": nvfp4({"quant_method": "modelopt", "quant_algo": "NVFP4"}, divided=False),
    "gptq": gptq(4, 16),
    "gptq-shuffled": gptq(4, 16, shuffled=True),
    "gptq-v2": gptq(4, -1, "gptq_v2"),
    "gptq-2": gptq(2, 32),
    "gptq-3": gptq(3, 32),
    "gptq-8": gptq(8, 16),
    "awq": awq(16),
    "ct-4": packed(4, 16, symmetric=True),
    "ct-4-zeros": packed(4, 16, symmetric=False),
    "ct-3": packed(3, 32, symmetric=True),
    "ct-8": packed(8, 32, symmetric=False),
    "ct-int8": eight_bits(symmetric=True),
    "ct-int8-zeros": eight_bits(symmetric=False),
    "ct-fp8": rows_fp8(CT_ROWS),
    "ct-nvfp4": nvfp4(CT_NVFP4, divided=True),
    "ct-mxfp4": ct_mxfp4(),
    "nf4": bnb4("nf4", double=False),
    "nf4-double": bnb4("nf4", double=True),
    "fp4": bnb4("fp4", double=False),
    "bnb-int8": bnb8(),
}


def fused_mxfp4(weight: Array) -> tuple[Stored, Array]:
    """gpt-oss's experts [E, in, out], stored with the inputs last, 32 of them a scale."""
    experts, inputs, outputs = weight.shape
    rows = weight.transpose(0, 2, 1).reshape(-1, inputs)
    grid, exponents = _powers(_blocks(rows, 1, 32) / 6)
    pairs, meant = _fp4(rows, _spread(grid, rows, 1, 32))
    shape = (experts, outputs, inputs // 32)
    stored = {"_blocks": pairs.reshape(*shape, 16), "_scales": _tensor(exponents).reshape(shape)}
    return stored, meant.reshape(experts, outputs, inputs).transpose(0, 2, 1)


MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
}


def write_stored(
    form: str,
    folder: Path,
    *,
    family: str = "llama",
    files: int = 1,
    plain: Path | None = None,
    **changes: Any,
) -> tuple[Path, Path]:
    """A tiny model stored as `form` has it ("mxfp4" or one of `FORMS`), and the same with the weights that are meant.

    Scales stand in other files than their weights, where there are several. `plain` is a folder with another model's
    one file, which is changed to what is meant.
    """
    plain = plain or write_tiny(family, folder / "plain", **changes)
    stored = folder / form
    shutil.copytree(plain, stored)
    tensors, meant, random = load_file(plain / "model.safetensors"), {}, np.random.default_rng(0)
    found: Stored = {}
    for key, tensor in sorted(tensors.items()):
        meant[key] = tensor
        parts: Stored = {"": tensor}
        if form == "mxfp4" and tensor.ndim == 3:
            parts, array = fused_mxfp4(tensor.float().numpy())
            meant[key] = _tensor(array)
        elif form != "mxfp4" and _is_linear(key, tensor):
            parts, array = FORMS[form].store(tensor.float().numpy(), random)
            meant[key], key = _tensor(array), key.removesuffix(".weight")
        found |= {key + end: part.contiguous() for end, part in parts.items()}
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    (stored / "model.safetensors").unlink()
    keys = sorted(found)
    names = ["model.safetensors"] if files == 1 else [f"model-{index}.safetensors" for index in range(files)]
    for index, name in enumerate(names):
        save_file({key: found[key] for key in keys[index::files]}, stored / name, metadata={"format": "pt"})
    if files > 1:
        places = {key: names[index % files] for index, key in enumerate(keys)}
        (stored / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = MXFP4 if form == "mxfp4" else FORMS[form].config
    (stored / "config.json").write_text(json.dumps(config))
    return stored, plain


def _is_linear(key: str, tensor: Tensor) -> bool:
    router = key.endswith((".gate.weight", ".router.weight"))
    return ".layers." in key and key.endswith(".weight") and tensor.ndim == 2 and not router
