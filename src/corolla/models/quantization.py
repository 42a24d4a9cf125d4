"""How a machine keeps and multiplies frozen weights.

Invariant: what was asked for is what runs: a quantization that this machine cannot do is refused before
anything is loaded, never replaced by another one. Without quantization the faster kernels give the plain
products up to rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from corolla.config import QUANTIZATIONS
from corolla.errors import UsageError
from corolla.models.kernels.apply import pack_linears, quantize_on_cuda, supported


def check_quantization(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises `UsageError` unless weights can be kept that way here."""
    if name not in QUANTIZATIONS:
        raise UsageError(f"Unknown quantization {name!r}; use one of {', '.join(QUANTIZATIONS)}.")
    if name == "none":
        return
    if name == "nf4" and device.type != "cuda":
        raise UsageError("nf4 needs a CUDA device; use int8 or none on a CPU.")
    if device.type == "cpu" and not supported(device, dtype, "int8"):
        raise UsageError(
            f"int8 on a CPU needs an x86 machine with AVX2 and float32 activations, not {dtype}; use "
            "--dtype float32, or no quantization."
        )


def use_kernels(model: nn.Module, name: str, device: torch.device) -> None:
    """Replace the frozen linear layers below `model` by what is fastest here, or by quantized ones."""
    if device.type == "cuda":
        if name != "none":
            quantize_on_cuda(model, "nf4" if name == "nf4" else "int8")
        return
    dtype = next(model.parameters()).dtype
    if supported(device, dtype):
        pack_linears(model, quantization="int8" if name == "int8" else "none")
