"""A frozen linear layer whose only copy of the weight lies in oneDNN's packed layout.

Invariant: the layer computes what `nn.Linear` computes in float32 (to rounding) and holds the weight once.
Reading `weight` makes a plain copy for the reader; nothing here keeps that copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corolla.errors import UsageError
from corolla.models.kernels.native import Layer
from corolla.models.kernels.ways import cut, multiply, multiply_parts


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
        probe = fn(torch.empty(0))
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
