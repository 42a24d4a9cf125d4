"""Which ways of storing weights a checkpoint's `quantization_config` names.

Invariant: what cannot be read is refused here, in one sentence, before anything is read. Only weights are made
wide again: what a method says of activations and caches is how its own kernels compute, and not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from corolla.errors import CheckpointError
from corolla.models.checkpoints.stored.integers import GPTQ_BITS, awq, gptq, packed
from corolla.models.checkpoints.stored.recipe import Layout
from corolla.models.checkpoints.stored.scaled import (
    COLUMNS,
    MICROSCALED,
    ROWS,
    WHOLE,
    fused_mxfp4,
    nvfp4,
    scaled_layout,
)
from corolla.models.checkpoints.stored.tables import eight_bits, four_bits
from corolla.text import one_line

CONFIG_KEYS = ("quantization_config", "compression_config")  # the latter: compressed-tensors' former name
NESTED = ("text_config", "llm_config")
ACTIVATIONS = (
    "activation_scale",
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "kv_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "k_zero_point",
    "v_zero_point",
)
CHANGED_LAYERS = (".act.scales",)  # AWQ divides what some families' activations give
KNOWN = "fp8, mxfp8, mxfp4, nvfp4, GPTQ, AWQ, compressed-tensors and bitsandbytes"

Config = Mapping[str, Any]
Blocks = list[tuple[int, int]]


class _Refused(Exception):
    """A method, or an option of one, that Corolla does not read; the text is its name."""


@dataclass(frozen=True)
class Method:
    """How a checkpoint's weights are stored."""

    label: str  # for people, such as "GPTQ, 4 bits"
    layouts: tuple[Layout, ...]
    plain_linear: bool = True  # whether what it stores are rows of `nn.Linear`, [out, in]

    @property
    def dropped(self) -> tuple[str, ...]:
        """Ends of keys that no weight is made of."""
        return tuple(f".{one}" for one in ACTIVATIONS)


def method_of(name: str, config: Config) -> Method | None:
    """What the raw config of checkpoint `name` says; None where weights are stored as they are.

    Raises `CheckpointError` for a method that Corolla does not read.
    """
    found = _found(config)
    if not found:
        return None
    try:
        if not isinstance(found, dict):
            raise _Refused("by some method")
        kind = str(found.get("quant_method") or _unnamed(found)).lower()
        make = _METHODS.get(kind)
        if make is None:
            raise _Refused(kind)
        return make(found)
    except (_Refused, TypeError, ValueError, AttributeError, ArithmeticError) as refused:
        said = one_line(refused if isinstance(refused, _Refused) else "in a form of its own", characters=80)
        raise CheckpointError(
            f"{name} is stored quantized ({said}), which Corolla does not read: use one stored as {KNOWN} have it, "
            "or an unquantized one."
        ) from None


def without_method(config: Config) -> dict[str, Any]:
    """The raw config of the model that is left when all weights are wide again."""
    kept = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    for part in NESTED:
        if isinstance(kept.get(part), dict):
            kept[part] = {key: value for key, value in kept[part].items() if key not in CONFIG_KEYS}
    return kept


def _found(config: Config) -> Any:
    for place in (config, *(config[part] for part in NESTED if isinstance(config.get(part), dict))):
        for key in CONFIG_KEYS:
            if place.get(key):
                return place[key]
    return None


def _unnamed(found: Config) -> str:
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in found else "some method"


# --- one function a method ------------------------------------------------------------------------------


def _pair(value: Any) -> Blocks:
    if value is None:
        return []
    high, wide = (int(one) for one in value)
    if high < 1 or wide < 1:
        raise _Refused(f"blocks of {high} by {wide}")
    return [(high, wide)]


def _fp8(found: Config) -> Method:
    blocks = _pair(found.get("weight_block_size"))
    allowed = [*blocks, MICROSCALED] if blocks else [WHOLE, ROWS]
    endings = (
        ("", "_scale_inv", ""),
        (".weight", ".qscale_weight", ".weight"),
        (".weight", ".scale", ".weight"),
    )
    layouts = tuple(
        scaled_layout(allowed, weight=weight, scale=scale, target=target, integers_are_pairs=True)
        for weight, scale, target in endings
    )
    sizes = "".join(f", blocks of {high} by {wide}" for high, wide in blocks)
    return Method(f"{found.get('quant_method', 'fp8')!s}{sizes}", layouts)


def _fbgemm(_found: Config) -> Method:
    return Method("fbgemm_fp8", (scaled_layout([ROWS, COLUMNS], weight="", scale="_scale", target=""),))


def _mxfp4(_found: Config) -> Method:
    return Method("mxfp4", (fused_mxfp4(),))


def _modelopt(found: Config) -> Method:
    kind = str(found.get("quant_algo") or "").upper()
    fp8 = scaled_layout([WHOLE, ROWS, (128, 128)], weight=".weight", scale=".weight_scale", target=".weight")
    match kind:
        case "FP8" | "FP8_PB_WO" | "FP8_PER_CHANNEL_PER_TOKEN":
            return Method("ModelOpt, fp8", (fp8,))
        case "NVFP4":
            four = nvfp4(weight=".weight", scale=".weight_scale", whole=".weight_scale_2", divided=False)
            return Method("ModelOpt, nvfp4", (four, fp8))
    raise _Refused(f"modelopt {kind}".strip())


def _gptq(found: Config) -> Method:
    form = str(found.get("checkpoint_format") or found.get("format") or "gptq")
    if form not in ("gptq", "gptq_v2") or found.get("is_marlin_format"):
        raise _Refused(f"GPTQ in the form {form if form != 'gptq' else 'marlin'}")
    bits = int(_bits(found))
    if bits not in GPTQ_BITS:
        raise _Refused(f"GPTQ, {bits} bits")
    layout = gptq(bits, int(found.get("group_size") or -1), zeros_less_one=form == "gptq")
    return Method(f"GPTQ, {bits} bits", (layout,), plain_linear=False)


def _awq(found: Config) -> Method:
    form = str(found.get("version") or found.get("format") or "gemm").lower()
    if form != "gemm" or int(_bits(found)) != 4:
        raise _Refused(f"AWQ in the form {form}, {_bits(found)} bits")
    return Method("AWQ, 4 bits", (awq(int(found.get("group_size") or -1)),), plain_linear=False)


def _auto_round(found: Config) -> Method:
    form = str(found.get("packing_format") or "")
    if form.endswith("auto_gptq"):
        return _gptq({"bits": found.get("bits"), "group_size": found.get("group_size")})
    if form.endswith("auto_awq"):
        return _awq({"bits": found.get("bits"), "group_size": found.get("group_size")})
    raise _Refused(f"auto-round in the form {form}")


def _bits(found: Config) -> Any:
    return found.get("bits") or found.get("w_bit") or 4


def _bitsandbytes(found: Config) -> Method:
    if found.get("load_in_4bit"):
        kind = str(found.get("bnb_4bit_quant_type") or "nf4")
        return Method(f"bitsandbytes, {kind}", (four_bits("nf4"), four_bits("fp4")), plain_linear=False)
    return Method("bitsandbytes, int8", (eight_bits(),), plain_linear=False)


def _compressed_tensors(found: Config) -> Method:
    if found.get("transform_config"):
        raise _Refused("compressed-tensors with transforms of activations")
    sparse = found.get("sparsity_config") or {}
    if sparse.get("format") not in (None, "dense"):
        raise _Refused(f"compressed-tensors, {sparse.get('format')}")
    groups = [one for one in (found.get("config_groups") or {}).values() if one.get("weights")]
    forms = {str(one.get("format") or found.get("format") or "dense") for one in groups}
    for form in sorted(forms - _FORMS):
        raise _Refused(f"compressed-tensors, {form}")
    weights = [one["weights"] for one in groups]
    blocks = [block for one in weights for block in _blocks(one)]
    bits = sorted({int(one.get("num_bits") or 8) for one in weights})
    if bits and not 1 <= bits[0] <= bits[-1] <= 8:
        raise _Refused(f"compressed-tensors, {bits[-1]} bits")
    small = scaled_layout([MICROSCALED], weight=".weight_packed", scale=".weight_scale", target=".weight")
    layouts = (
        nvfp4(weight=".weight_packed", scale=".weight_scale", whole=".weight_global_scale", divided=True),
        packed(bits, blocks, lambda parts, dtype: small.widen({**parts, "weight": parts["words"]}, dtype)),
        scaled_layout(
            blocks, weight=".weight", scale=".weight_scale", target=".weight", zero=".weight_zero_point"
        ),
    )
    return Method(f"compressed-tensors, {', '.join(sorted(forms))}", layouts)


def _blocks(weights: Config) -> Blocks:
    """Which numbers share a scale, as compressed-tensors says it."""
    size = int(weights.get("group_size") or -1)
    match weights.get("strategy"):
        case "tensor":
            return [WHOLE]
        case "block":
            return _pair(weights.get("block_structure"))
        case "group" | "tensor_group" if size > 0:
            return [(1, size)]
        case "channel" | "group":
            return [ROWS]
    return [(1, size)] if size > 0 else [WHOLE, ROWS]


_FORMS = {
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
}
_METHODS: Mapping[str, Callable[[Config], Method]] = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": lambda found: _modelopt({**found, "quant_algo": "NVFP4"}),
    "nvfp4": lambda found: _modelopt({**found, "quant_algo": "NVFP4"}),
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes,
    "bitsandbytes_4bit": lambda found: _bitsandbytes({**found, "load_in_4bit": True}),
    "bitsandbytes_8bit": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
}
