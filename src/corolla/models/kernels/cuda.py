"""Quantized weights on a CUDA device, by bitsandbytes. UNTESTED: no such device has run it yet.

Invariant: what is replaced is what `apply.pack_linears` would replace on a CPU: exactly frozen `nn.Linear`s with
weights of their own. bitsandbytes quantizes when its layers are moved to the device, one layer at a time here.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import torch
from torch import nn

from corolla.errors import UsageError

QUANTIZATIONS = ("nf4", "int8")


def quantize_linears(module: nn.Module, quantization: str) -> int:
    """Replace the frozen linear layers below `module` (on a CUDA device, float16 or bfloat16); returns how many.

    Raises `UsageError` for an unknown name, and where there is no CUDA device or no bitsandbytes.
    """
    if quantization not in QUANTIZATIONS:
        raise UsageError(f"Unknown quantization {quantization!r}; on CUDA use {' or '.join(QUANTIZATIONS)}.")
    library = _bitsandbytes()
    owners = Counter(id(one) for _, one in module.named_parameters(remove_duplicate=False))
    names = [name for name, child in module.named_modules() if name and _is_replaceable(child, owners)]
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, _quantized(library, layer, quantization))
        del layer
    return len(names)


def _bitsandbytes() -> Any:
    if not torch.cuda.is_available():
        raise UsageError("This quantization needs a CUDA device and there is none; use --device cpu.")
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UsageError(
            "Quantized weights on CUDA need bitsandbytes; run pip install bitsandbytes."
        ) from error


def _is_replaceable(layer: nn.Module, owners: Counter[int]) -> bool:
    return (
        type(layer) is nn.Linear
        and not any(one.requires_grad or owners[id(one)] > 1 for one in layer.parameters())
        and layer.weight.device.type == "cuda"
    )


def _quantized(library: Any, layer: nn.Linear, quantization: str) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    device, weight = layer.weight.device, layer.weight.detach().cpu()
    if quantization == "nf4":
        made = library.nn.Linear4bit(
            *sizes, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta"
        )
        made.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    else:
        # A threshold sends outlier columns of a *batch* through float16, so a row would depend on the
        # strangers beside it; without one, every row has a scale of its own.
        made = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0, device="meta")
        made.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    result: nn.Module = made.to(device).requires_grad_(False)
    return result
