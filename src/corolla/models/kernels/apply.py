"""Puts faster layers where a model has plain frozen ones.

Invariant: only what is exactly a frozen `nn.Linear` with a weight of its own is replaced, one layer (or one
group of siblings) at a time, so that memory never holds more than that twice; the rest is left as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from corolla.errors import UsageError
from corolla.models.kernels.cuda import cuda_linear
from corolla.models.kernels.fused import FusedPart, Group
from corolla.models.kernels.int8 import Int8Linear, has_int8
from corolla.models.kernels.narrow import NarrowLinear, narrow_form
from corolla.models.kernels.packed import FrozenLinear, PackedLinear, is_packable

Make = Callable[[Tensor, Tensor | None], FrozenLinear]  # of weight and bias
Quantization = Literal["none", "int8"]
# Siblings that the families' code calls with the same tensor, one after the other; one product instead of
# three saves 60 of 150 µs (fp32) and 60 of 115 µs (int8) in a block of SmolLM2 with one row.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def supported(device: torch.device | str, dtype: torch.dtype, quantization: Quantization = "none") -> bool:
    """Whether `pack_linears` would replace frozen layers of this kind here: float32 on a CPU, nothing else."""
    packable = is_packable(torch.device(device), dtype)
    return packable and (quantization == "none" or has_int8())


def pack_linears(module: nn.Module, *, quantization: Quantization = "none", pieces: int | None = None) -> int:
    """Replace the frozen linear layers below `module` in place; returns how many.

    Subclasses of `nn.Linear`, layers with hooks, trainable weights, weights that several layers share, and
    other devices or dtypes are left alone. `pieces` is `Int8Linear`'s. Raises `UsageError` when this machine
    has no int8 kernel.
    """
    if quantization not in get_args(Quantization):
        raise UsageError(
            f"Unknown quantization {quantization!r}; use one of {', '.join(get_args(Quantization))}."
        )
    if quantization == "int8" and not has_int8():
        raise UsageError("int8 needs an x86 CPU with AVX2; run without quantization here.")
    make: Make = exact_linear if quantization == "none" else partial(Int8Linear, pieces=pieces)
    names = _replaceable(module, lambda weight: is_packable(weight.device, weight.dtype))
    total = len(names)
    for parent in sorted({name.rpartition(".")[0] for name in names}):
        for siblings in SIBLINGS:
            group = [f"{parent}.{one}".lstrip(".") for one in siblings]
            if names.issuperset(group) and _fuse(module.get_submodule(parent), siblings, make):
                names.difference_update(group)
    _replace(module, names, make)
    return total


def quantize_on_cuda(module: nn.Module, quantization: Literal["int8", "nf4"]) -> int:
    """As `pack_linears`, for layers on a CUDA device in float16 or bfloat16. Raises `UsageError` as `cuda_linear`."""
    make, names = cuda_linear(quantization), _replaceable(module, lambda weight: weight.device.type == "cuda")
    _replace(module, names, make)
    return len(names)


def _replaceable(module: nn.Module, here: Callable[[Tensor], bool]) -> set[str]:
    """The frozen layers whose weight, on a device `here`, is their own.

    Names, not modules: a list of the layers would keep every plain weight alive until the end.
    """
    owners = Counter(id(one) for _, one in module.named_parameters(remove_duplicate=False))
    return {
        name
        for name, child in module.named_modules()
        if name and _is_replaceable(child, owners) and here(child.weight)
    }


def _replace(module: nn.Module, names: set[str], make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    for name in sorted(names):
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, make(layer.weight, layer.bias))
        del layer


def exact_linear(weight: Tensor, bias: Tensor | None) -> FrozenLinear:
    """The fastest layer with this very weight: narrow where it has such a form, else packed as it is."""
    narrow = narrow_form(weight)
    return PackedLinear(weight, bias) if narrow is None else NarrowLinear(narrow, bias)


def _fuse(parent: nn.Module, names: tuple[str, ...], make: Make) -> bool:
    """Replace these children of `parent` by parts of one group; False when their shapes do not allow it."""
    layers = [parent.get_submodule(name) for name in names]
    widths = {layer.in_features for layer in layers}
    if len(widths) > 1 or len({layer.bias is None for layer in layers}) > 1:
        return False
    sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
    weight = torch.cat([layer.weight for layer in layers])  # type: ignore[misc]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])  # type: ignore[misc]
    for name in names:  # free the plain weights before there is a third copy
        setattr(parent, name, None)
    layers.clear()
    group = Group(make(weight, bias), sizes)
    for index, name in enumerate(names):
        setattr(parent, name, FusedPart(group, index))
    return True


def _is_replaceable(layer: nn.Module, owners: Counter[int]) -> TypeGuard[nn.Linear]:
    return (
        type(layer) is nn.Linear
        and not any(one.requires_grad or owners[id(one)] > 1 for one in layer.parameters())
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


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
