"""Frozen linear layers, and the backends that multiply by a weight that lies in memory once.

Invariant: a layer computes what `nn.Linear` computes in float32, to rounding, and holds its weight once: reading
`weight` makes a plain copy for the reader, which nothing here keeps. Backends differ in how long they take, and in
rounding no more than a row does in another batch. Which one is taken depends on the number of rows alone.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corolla.errors import UsageError
from corolla.models.kernels.narrow import Narrow
from corolla.models.kernels.native import Layer, kernels, pointer

# `own`: native.c, which reads the weight as it is kept; the others are given it in float32.
Backend = Literal["own", "torch", "onednn"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
BOUNDS = (1, 7, 31, 127)  # rows of each class at most, but for the last class
# oneDNN adds a row's products up one after the other. Sums that are cut at this length are half as far from
# float64 in SmolLM2 (1,536 long ones), about where the plain product is.
LONGEST_SUM = 1024


@dataclass(frozen=True)
class Backends:
    """What is taken for one shape of weights: for each class of rows, and for the gradient of the input."""

    forward: tuple[Backend, ...]  # one for each class
    backward: Backend
    packed: bool = False  # whether oneDNN's own layout is quicker than all of these: see `PackedLinear`

    def of(self, rows: int) -> Backend:
        """The backend for so many rows."""
        return self.forward[bisect_left(BOUNDS, rows)]

    def __str__(self) -> str:
        if self.packed:
            return "oneDNN, packed"
        bounds = [*(f"up to {bound}" for bound in BOUNDS), "more"]
        parts: list[str] = []
        for at, backend in enumerate(self.forward):  # classes side by side with the same are one
            if at + 1 == len(self.forward) or self.forward[at + 1] != backend:
                parts.append(f"{backend} for {bounds[at]} rows" if len(set(self.forward)) > 1 else backend)
        return f"{', '.join(parts)}; gradients {self.backward}"


def default_backends(own: bool) -> Backends:
    """What is taken where nothing has been tried; `own` says whether native.c takes the weight."""
    few: Backend = "own" if own else "torch"
    return Backends((few, few, few, "torch", "torch"), "torch")


def product(value: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend) -> Tensor:
    """value [..., in] @ weight.T + bias, for a plain float32 weight [out, in]."""
    if backend != "onednn":
        return F.linear(value, weight, bias)
    # Parts of longer rows would be multiplied by the reference code, a hundred times slower.
    return multiply_parts(value, tuple(part.contiguous() for part in cut(weight)), bias)


def product_back(gradient: Tensor, weight: Tensor, backend: Backend) -> Tensor:
    """The gradient of the input [..., in], from that of the output [..., out]."""
    return gradient @ weight if backend != "onednn" else multiply(gradient, weight.t(), None)


def multiply(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """value @ weight.T + bias by oneDNN; `weight` [out, in] is packed, or lies together, or its transpose does."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(value, weight, bias, "none", [], "")
    return found


def cut(weight: Tensor) -> tuple[Tensor, ...]:
    """A weight [out, in] along its sums, none of them longer than `LONGEST_SUM`."""
    return weight.tensor_split(-(-weight.shape[1] // LONGEST_SUM), dim=1)


def multiply_parts(value: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """`multiply` by a weight that is cut, [out, in / n] each."""
    if len(parts) == 1:
        return multiply(value, parts[0], bias)
    values = [one.contiguous() for one in value.tensor_split(len(parts), dim=-1)]
    found = multiply(values[0], parts[0], bias)
    for one, part in zip(values[1:], parts[1:], strict=True):
        found = torch.ops.mkldnn._linear_pointwise.binary(one, found, part, None, "add")
    return found


def is_packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product exists for weights of this kind, on this machine."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and device.type == "cpu" and dtype == torch.float32


class FrozenLinear(nn.Module):
    """What the layers that stand in for a frozen `nn.Linear` share: sizes, bias, and a readable weight."""

    bias: Tensor | None
    turned = False  # whether it stands in for a layer that has its weight as [in, out]

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """A plain float32 copy [out, in] of what the layer multiplies by; made anew at each reading."""
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Memory of weight and bias in bytes."""
        raise NotImplementedError

    def native(self) -> Layer | None:
        """What `run_program` is told of the layer; None where it cannot compute it."""
        return None

    def forward(self, input: Tensor) -> Tensor:
        """float32 [..., in] to [..., out], differentiable. Raises `UsageError` for another dtype or width."""
        self.check_input(input)
        if input.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
            return product
        return self.multiply(input)

    def multiply(self, value: Tensor) -> Tensor:
        """The product without a gradient."""
        raise NotImplementedError

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """The gradient of the input [..., in], from that of the output."""
        return multiply(gradient, self.weight.t(), None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def check_input(self, value: Tensor) -> None:
        """Raises `UsageError` unless `value` is float32 [..., in]."""
        if value.dtype is not torch.float32 or value.shape[-1] != self.in_features:
            raise UsageError(
                f"A packed layer takes float32 [..., {self.in_features}], not "
                f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}; load the model without packing."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        probe = fn(torch.empty(0, dtype=torch.float32))
        if not isinstance(probe, Tensor) or probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise UsageError(
                "A packed layer stays in float32 on the CPU; choose dtype and device before packing."
            )
        return self  # memory that is float32 on the CPU already is where it should be

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # The keys of the layer that was here, so that a saved model is a whole one.
        destination[prefix + "weight"] = self.weight.t().contiguous() if self.turned else self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class _Product(torch.autograd.Function):
    """A frozen layer's product with its gradient for the input; the weight has none."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.multiply_back(gradient), None


class NarrowLinear(FrozenLinear):
    """A frozen float32 linear layer on the CPU whose weight is kept narrow; differentiable in its input."""

    def __init__(self, narrow: Narrow, bias: Tensor | None = None, backends: Backends | None = None) -> None:
        """`bias` float32 [out] is kept as it is; `backends` to multiply, the default ones where nothing was tried."""
        super().__init__(*narrow.shape, bias)
        self.narrow = narrow
        self.backends = default_backends(narrow.has_kernel) if backends is None else backends
        self._described = narrow.described()
        self._kernel = kernels().narrow_product if narrow.has_kernel else None
        for name, tensor in narrow.tensors().items():  # whoever adds up a module's memory finds them
            self.register_buffer(f"narrow_{name}", tensor, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The float32 weight [out, in]; made anew at each reading."""
        wide = self.narrow.widened()
        return wide.clone() if wide is self.narrow.values else wide

    def weight_bytes(self) -> int:
        """Memory of weight and bias in bytes."""
        kept = sum(tensor.nbytes for tensor in self.narrow.tensors().values())
        return kept + (0 if self.bias is None else self.bias.nbytes)

    def multiply(self, value: Tensor) -> Tensor:
        rows = value.numel() // self.in_features
        backend = self.backends.of(rows)
        if backend != "own":
            return product(value, self.narrow.widened(), self.bias, backend)
        value = value.contiguous()
        result = value.new_empty(*value.shape[:-1], self.out_features)
        assert self._kernel is not None
        given = pointer(self.bias), value.data_ptr(), result.data_ptr(), rows, torch.get_num_threads()
        self._kernel(*self._described, *given)
        return result

    def multiply_back(self, gradient: Tensor) -> Tensor:
        return product_back(gradient, self.narrow.widened(), self.backends.backward)

    def __deepcopy__(self, memo: dict[int, Any]) -> NarrowLinear:
        # Nobody changes the weight, and what the kernels are told of it holds for this memory only.
        memo[id(self)] = made = NarrowLinear(self.narrow, self.bias, self.backends)
        return made

    def native(self) -> Layer | None:
        """What `run_program` is told, if it can compute this; it holds as long as this layer does."""
        if not self.narrow.has_kernel:
            return None
        form, values, steps, offsets, halves, shift, columns, rows = self._described
        return Layer(form, halves, shift, columns, rows, values, steps, offsets, pointer(self.bias))


class PackedLinear(FrozenLinear):
    """A frozen float32 linear layer on the CPU; differentiable in its input."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Packs `weight` float32 [out, in], keeping no reference to it; `bias` float32 [out] is kept as it is."""
        super().__init__(int(weight.shape[0]), int(weight.shape[1]), bias)
        # Outside of inference mode, or the buffers could never meet autograd.
        with torch.inference_mode(False), torch.no_grad():
            parts = cut(weight.detach())
            self._count = len(parts)
            for index, part in enumerate(parts):
                packed = torch.ops.mkldnn._reorder_linear_weight(part.contiguous())
                # Buffers, so that whoever adds up a module's memory finds them.
                self.register_buffer(f"packed_{index}", packed, persistent=False)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The packed weight, opaque, in pieces [out, in / n] along the sums."""
        return tuple(self.get_buffer(f"packed_{index}") for index in range(self._count))

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight, float32 [out, in]; made anew at each reading."""
        with torch.no_grad():
            return torch.cat([part.to_dense() for part in self.parts], dim=1)

    def weight_bytes(self) -> int:
        """Memory of weight and bias in bytes."""
        return sum(part.nbytes for part in self.parts) + (0 if self.bias is None else self.bias.nbytes)

    def multiply(self, value: Tensor) -> Tensor:
        return multiply_parts(value, self.parts, self.bias)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        # oneDNN takes the transposed view of the unpacked weight as it is: with 512 rows this costs half of
        # what `gradient @ weight` costs, unpacking included, and no second packed copy has to be kept.
        pieces = [multiply(gradient, part.to_dense().t(), None) for part in self.parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
