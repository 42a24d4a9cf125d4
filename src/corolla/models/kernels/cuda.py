"""Frozen layers on a CUDA device in 8 or 4 bits, by bitsandbytes. No such device has run it yet: try it before use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from corolla.errors import UsageError

# A threshold would send outlier columns of a *batch* through float16, so a row would depend on the strangers beside
# it; without one, every row has a scale of its own.
_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("Linear8bitLt", {"has_fp16_weights": False, "threshold": 0.0}),
    "nf4": ("Linear4bit", {"quant_type": "nf4"}),
}


def cuda_linear(quantization: str) -> Callable[[Tensor, Tensor | None], nn.Module]:
    """What makes a layer, on the weight's own device, of a weight [out, in] and a bias [out].

    Raises `UsageError` where there is no CUDA device or no bitsandbytes.
    """
    if not torch.cuda.is_available():
        raise UsageError("This quantization needs a CUDA device and there is none; use --device cpu.")
    try:
        library: Any = importlib.import_module("bitsandbytes").nn
    except ImportError as error:
        raise UsageError(
            "Quantized weights on CUDA need bitsandbytes; run pip install bitsandbytes."
        ) from error
    kind, options = _LAYERS[quantization]

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        outputs, inputs = weight.shape
        more = options | ({"compute_dtype": weight.dtype} if quantization == "nf4" else {})
        layer = getattr(library, kind)(inputs, outputs, bias is not None, **more)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        made: nn.Module = layer.to(weight.device).requires_grad_(False)  # this is when it is quantized
        return made

    return make
