"""Puts faster layers where a model has plain frozen ones.

Invariant: only what is exactly a frozen `nn.Linear` with a weight of its own is replaced, one layer at a time,
so that memory never holds more than one weight twice; everything else is left as it was.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

import torch
from torch import nn

from corolla.errors import UsageError
from corolla.models.kernels.int8 import Int8Linear, has_int8
from corolla.models.kernels.packed import FrozenLinear, PackedLinear, is_packable

Quantization = Literal["none", "int8"]


def supported(device: torch.device | str, dtype: torch.dtype, quantization: Quantization = "none") -> bool:
    """Whether `pack_linears` would replace frozen layers of this kind here: float32 on a CPU, nothing else."""
    packable = is_packable(torch.device(device), dtype)
    return packable and (quantization == "none" or has_int8())


def pack_linears(module: nn.Module, *, quantization: Quantization = "none") -> int:
    """Replace the frozen linear layers below `module` in place; returns how many.

    Subclasses of `nn.Linear`, layers with hooks, trainable weights, weights that several layers share, and
    other devices or dtypes are left alone. Raises `UsageError` when int8 is asked for and this machine or the
    model's dtype cannot do it.
    """
    if quantization not in get_args(Quantization):
        raise UsageError(
            f"Unknown quantization {quantization!r}; use one of {', '.join(get_args(Quantization))}."
        )
    owners = Counter(id(one) for _, one in module.named_parameters(remove_duplicate=False))
    # Names, not modules: a list of the layers would keep every plain weight alive until the end.
    names = [name for name, child in module.named_modules() if name and _is_replaceable(child, owners)]
    for name in names:
        module.set_submodule(name, _packed(module.get_submodule(name), quantization))
    return len(names)


def _is_replaceable(layer: nn.Module, owners: Counter[int]) -> bool:
    return (
        type(layer) is nn.Linear
        and not any(one.requires_grad or owners[id(one)] > 1 for one in layer.parameters())
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and is_packable(layer.weight.device, layer.weight.dtype)
    )


def _packed(layer: nn.Module, quantization: Quantization) -> FrozenLinear:
    assert isinstance(layer, nn.Linear)
    made = PackedLinear if quantization == "none" else Int8Linear
    return made(layer.weight, layer.bias)


def weight_bytes(module: nn.Module) -> int:
    """Memory of all weights and buffers below `module` in bytes, packed ones included."""
    plain = {id(one): one.nbytes for one in module.parameters()}
    packed = 0
    for one in module.modules():
        if isinstance(one, FrozenLinear):
            packed += one.weight_bytes()
        else:
            plain |= {id(buffer): buffer.nbytes for buffer in one.buffers(recurse=False)}
    return sum(plain.values()) + packed
