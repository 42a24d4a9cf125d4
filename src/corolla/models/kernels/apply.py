"""Puts faster layers, or quantized ones, where a model has plain frozen ones.

Invariant: only what is exactly a frozen `nn.Linear` with a weight of its own is replaced, one layer (or one
group of siblings) at a time, so that memory never holds more than that twice; the rest is left as it was. A
quantization that this machine cannot do is refused before anything is loaded, never replaced by another one.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corolla.config import QUANTIZATIONS
from corolla.errors import UsageError
from corolla.models.kernels.autotune import Autotuner
from corolla.models.kernels.experts import replace_experts
from corolla.models.kernels.fused import FusedPart, Group
from corolla.models.kernels.int8 import Int8Linear, has_int8
from corolla.models.kernels.linear import FrozenLinear, NarrowLinear, PackedLinear, is_packable
from corolla.models.kernels.narrow import Narrow, as_it_is, narrow_form

Make = Callable[[Tensor, Tensor | None], FrozenLinear]  # of weight and bias
Quantization = Literal["none", "int8"]
# Siblings that the families' code calls with the same tensor, one after the other; one product instead of
# three saves 60 of 150 µs (fp32) and 60 of 115 µs (int8) in a block of SmolLM2 with one row.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)
# A threshold would send outlier columns of a *batch* through float16, so a row would depend on the strangers beside
# it; without one, every row has a scale of its own.
_CUDA_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("Linear8bitLt", {"has_fp16_weights": False, "threshold": 0.0}),
    "nf4": ("Linear4bit", {"quant_type": "nf4"}),
}


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
            f"int8 on a CPU needs a C compiler (or AVX2) and float32 activations, not {dtype}; use "
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


def supported(device: torch.device | str, dtype: torch.dtype, quantization: Quantization = "none") -> bool:
    """Whether `pack_linears` would replace frozen layers of this kind here: float32 on a CPU, nothing else."""
    packable = is_packable(torch.device(device), dtype)
    return packable and (quantization == "none" or has_int8())


def pack_linears(module: nn.Module, *, quantization: Quantization = "none", pieces: int | None = None) -> int:
    """Replace the frozen linear layers, and a mixture's experts, below `module` in place; returns how many.

    Linear layers are torch's, and transformers' `Conv1D`. Subclasses of either, layers with hooks, trainable
    weights, weights that several layers share, and other devices or dtypes are left alone. `pieces` is
    `Int8Linear`'s. Raises `UsageError` when this machine
    has no int8 kernel.
    """
    if quantization not in get_args(Quantization):
        raise UsageError(
            f"Unknown quantization {quantization!r}; use one of {', '.join(get_args(Quantization))}."
        )
    if quantization == "int8" and not has_int8():
        raise UsageError("int8 needs a C compiler, or an x86 CPU with AVX2; run without quantization here.")
    exact = partial(exact_linear, autotuner=Autotuner())
    make: Make = exact if quantization == "none" else partial(Int8Linear, pieces=pieces)
    names = _replaceable(module, lambda weight: is_packable(weight.device, weight.dtype))
    total = len(names) + replace_experts(module, make)
    for parent in sorted({name.rpartition(".")[0] for name in names}):
        for siblings in SIBLINGS:
            group = [f"{parent}.{one}".lstrip(".") for one in siblings]
            if names.issuperset(group) and _fuse(module.get_submodule(parent), siblings, make):
                names.difference_update(group)
    _replace(module, names, make)
    return total


def quantize_on_cuda(module: nn.Module, quantization: Literal["int8", "nf4"]) -> int:
    """As `pack_linears`, by bitsandbytes on a CUDA device. No such device has run it yet: try it before use.

    Raises `UsageError` where there is no CUDA device or no bitsandbytes.
    """
    make = _cuda_linear(quantization)
    names = _replaceable(module, lambda weight: weight.device.type == "cuda")
    _replace(module, names, make)
    return len(names)


def _cuda_linear(quantization: str) -> Callable[[Tensor, Tensor | None], nn.Module]:
    """What makes a layer, on the weight's own device, of a weight [out, in] and a bias [out]."""
    if not torch.cuda.is_available():
        raise UsageError("This quantization needs a CUDA device and there is none; use --device cpu.")
    try:
        library: Any = importlib.import_module("bitsandbytes").nn
    except ImportError as error:
        raise UsageError(
            "Quantized weights on CUDA need bitsandbytes; run pip install bitsandbytes."
        ) from error
    kind, options = _CUDA_LAYERS[quantization]

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        outputs, inputs = weight.shape
        more = options | ({"compute_dtype": weight.dtype} if quantization == "nf4" else {})
        layer = getattr(library, kind)(inputs, outputs, bias is not None, **more)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        made: nn.Module = layer.to(weight.device).requires_grad_(False)  # this is when it is quantized
        return made

    return make


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
        turned = isinstance(layer, Conv1D)
        assert isinstance(layer, nn.Linear | Conv1D)
        made = make(layer.weight.t() if turned else layer.weight, layer.bias)
        if isinstance(made, FrozenLinear):
            made.turned = turned
        module.set_submodule(name, made)
        del layer


def exact_linear(weight: Tensor, bias: Tensor | None, *, autotuner: Autotuner) -> FrozenLinear:
    """The fastest layer with this very float32 weight [out, in], whose memory it may share."""
    return linear_of(narrow_form(weight) or as_it_is(weight), bias, autotuner=autotuner)


def linear_of(narrow: Narrow, bias: Tensor | None, *, autotuner: Autotuner) -> FrozenLinear:
    """The fastest layer with a weight that is kept so."""
    backends = autotuner.backends(narrow)
    return PackedLinear(narrow.values, bias) if backends.packed else NarrowLinear(narrow, bias, backends)


def _fuse(parent: nn.Module, names: tuple[str, ...], make: Make) -> bool:
    """Replace these children of `parent` by parts of one group; False when their shapes do not allow it."""
    layers = [parent.get_submodule(name) for name in names]
    if any(isinstance(layer, Conv1D) for layer in layers):
        return False
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


def _is_replaceable(layer: nn.Module, owners: Counter[int]) -> TypeGuard[nn.Linear | Conv1D]:
    return (
        type(layer) in (nn.Linear, Conv1D)
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
