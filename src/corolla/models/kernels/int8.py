"""A frozen linear layer in 8-bit integers: weights per output channel, activations per row.

Invariant: a row's result has the same bits whoever it is batched with. fbgemm's dynamic kernel gives the
whole batch one scale; here every row is divided by a step of its own first, the kernel then rounds to whole
numbers, and sums of integers are exact in any order.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from corolla.errors import UsageError
from corolla.models.kernels.native import library, pointer
from corolla.models.kernels.packed import FrozenLinear, multiply

WEIGHT_LEVELS = 127  # symmetric: -127 … 127
TINY = 1e-30  # below any real activation; keeps a row of zeros a row of zeros
FEW_ROWS = 64  # with more, torch's operators cost little beside the product


@lru_cache(maxsize=1)
def activation_levels() -> int:
    """Steps of an activation on either side of zero: 127, 63 where sums saturate, 0 where there is no kernel.

    Without AVX-512 VNNI the kernel adds pairs of products in 16 bits: 2 x 255 x 127 does not fit, 2 x 127 x
    127 does, so activations lose one bit there (torch's `reduce_range`). The kernel itself is asked, since
    flags do not tell which of its variants it picks: 64 products of 1 x 1 must add up to 64.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return 0
    try:
        with torch.no_grad():
            packed = _pack(torch.ones(16, 64))
            for levels in (127, 63):
                if torch.allclose(
                    _multiply_rows(torch.ones(1, 64), packed, None, levels, 1), torch.tensor(64.0)
                ):
                    return levels
    except (RuntimeError, AttributeError):  # the operators left torch, or were not built for this machine
        return 0
    return 0


def has_int8() -> bool:
    """Whether this machine and this torch have an exact int8 kernel (x86 with AVX2)."""
    return activation_levels() > 0


class Int8Linear(FrozenLinear):
    """A frozen linear layer on an x86 CPU; takes and gives float32, differentiable in its input."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pieces: int | None = None) -> None:
        """Quantizes `weight` float32 [out, in], keeping no reference to it; `bias` float32 [out] is kept.

        An activation is one 8-bit number, or two (`pieces`): itself, and what rounding left of it. Two make
        the activations' error vanish, for 5 µs with one row and twice the arithmetic with many. Left out: one,
        but two where sums would saturate, since one of 7 bits costs 0.1 nats.

        Raises `UsageError` where torch has no such kernel.
        """
        levels = activation_levels()
        if not levels:
            raise UsageError("int8 needs an x86 CPU with AVX2; run without quantization here.")
        super().__init__(int(weight.shape[0]), int(weight.shape[1]), bias)
        self.levels = levels
        self.pieces = pieces or (1 if levels == 127 else 2)
        self.packed = _pack(weight.detach())

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 [out, in]; made anew at each reading."""
        return _dequantized(self.packed)

    def weight_bytes(self) -> int:
        """Memory of weight and bias in bytes: one a weight; scale, zero point and sum for every channel."""
        return self.out_features * (self.in_features + 12 + (0 if self.bias is None else 4))

    def forward(self, input: Tensor) -> Tensor:
        """float32 [..., in] to [..., out]. Raises `UsageError` for another dtype or width."""
        self.check_input(input)
        if input.requires_grad and torch.is_grad_enabled():
            arguments = (input, self.packed, self.bias, self.levels, self.pieces)
            product: Tensor = _Int8Product.apply(*arguments)  # type: ignore[no-untyped-call]
            return product
        return _multiply_rows(input, self.packed, self.bias, self.levels, self.pieces)


class _Int8Product(torch.autograd.Function):
    """The product, whose gradient for the input is that of the dequantized weight (straight through)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, packed: Any, bias: Tensor | None, levels: int, pieces: int
    ) -> Tensor:
        ctx.packed = packed
        return _multiply_rows(value, packed, bias, levels, pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return multiply(gradient, _dequantized(ctx.packed).t(), None), None, None, None, None


def _pack(weight: Tensor) -> Any:
    """fbgemm's packed form of a float32 weight [out, in], each row with its own scale."""
    scales = weight.abs().amax(dim=1).clamp_min(TINY) / WEIGHT_LEVELS
    integers = torch.round(weight / scales[:, None]).to(torch.int8)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        # fbgemm packs from a quantized tensor only, and torch says that those will go one day.
        warnings.filterwarnings(
            "ignore", message=".*quantized tensor creation functions", category=UserWarning
        )
        quantized = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _dequantized(packed: Any) -> Tensor:
    with torch.no_grad():
        weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0].dequantize()
    return weight


def _multiply_rows(value: Tensor, packed: Any, bias: Tensor | None, levels: int, pieces: int) -> Tensor:
    """value @ weight.T + bias with every row of `value` quantized by its own largest entry."""
    rows = value.reshape(-1, value.shape[-1])
    scaled, step = _scaled(rows, levels)
    if pieces == 1:
        product = _integer_product(scaled, packed, levels)
    else:
        near = scaled.round()
        left = scaled.sub_(near).mul_(2 * levels)  # at most half a step, brought to the full range
        both = _integer_product(torch.cat((near, left)), packed, levels)
        product = both[: len(rows)].add_(both[len(rows) :], alpha=0.5 / levels)
    product.mul_(step)
    if bias is not None:
        product.add_(bias)
    return product.view(*value.shape[:-1], product.shape[-1])


def _scaled(rows: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Rows divided by steps of their own, within -levels … levels, and the steps [n, 1]."""
    kernels = library()
    if kernels is None or len(rows) > FEW_ROWS:
        step = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(TINY).div_(levels)
        return rows / step, step
    rows = rows.contiguous()
    scaled, step = torch.empty_like(rows), rows.new_empty(len(rows), 1)
    kernels.scale_rows(pointer(rows), pointer(scaled), pointer(step), *rows.shape, levels, TINY)
    return scaled, step


def _integer_product(rows: Tensor, packed: Any, levels: int) -> Tensor:
    """rows @ weight.T, float32, for `rows` [n, in] within -levels … levels, rounded to whole numbers."""
    product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        rows, 1.0, levels + 1, packed
    )
    return product
