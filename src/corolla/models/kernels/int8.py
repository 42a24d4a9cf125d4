"""A frozen linear layer in 8-bit integers: weights per output channel, activations per row.

Invariant: a row's result has the same bits whoever it is batched with: every row is divided by a step of its own
and rounded to whole numbers, and sums of integers are exact in any order. They are added up by native_int8.c, with the
same bits on every CPU; where there is no C compiler by fbgemm, whose dynamic kernel alone would give the whole batch
one step.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from corolla.errors import UsageError
from corolla.models.kernels.linear import FrozenLinear
from corolla.models.kernels.native import FORMS, Layer, kernels, library, pointer

WEIGHT_LEVELS = 127  # symmetric: -127 … 127
TINY = 1e-30  # below any real activation; keeps a row of zeros a row of zeros
ZERO = 128  # what native_int8.c adds to an activation where the CPU wants it without a sign
BLOCK = 16  # of which a weight for native_int8.c has whole multiples on both sides
MOST_COLUMNS = 2**16  # 255 times 127 of them fit into 32 bits


@lru_cache(maxsize=1)
def activation_levels() -> int:
    """Steps of an activation of fbgemm's on either side of zero: 127, 63 where sums saturate, 0 where it is missing.

    Without AVX-512 VNNI the kernel adds pairs of products in 16 bits: 2 x 255 x 127 does not fit, 2 x 127 x
    127 does, so activations lose one bit there (torch's `reduce_range`). The kernel itself is asked, since
    flags do not tell which of its variants it picks: 64 products of 1 x 1 must add up to 64.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return 0
    try:
        with torch.no_grad():
            packed = _pack(torch.ones(16, 64, dtype=torch.float32))
            for levels in (127, 63):
                if torch.allclose(
                    _multiply_rows(torch.ones(1, 64, dtype=torch.float32), packed, None, levels, 1),
                    torch.tensor(64.0, dtype=torch.float32),
                ):
                    return levels
    except (RuntimeError, AttributeError):  # the operators left torch, or were not built for this machine
        return 0
    return 0


def has_int8() -> bool:
    """Whether this machine has an exact int8 kernel: with a C compiler, or on an x86 CPU with AVX2."""
    return library() is not None or activation_levels() > 0


class Int8Linear(FrozenLinear):
    """A frozen linear layer on a CPU; its gradient is that of the dequantized weight (straight through)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pieces: int | None = None) -> None:
        """Quantizes `weight` float32 [out, in], keeping no reference to it; `bias` float32 [out] is kept.

        An activation is one 8-bit number, or two (`pieces`): itself, and what rounding left of it. Two make
        the activations' error vanish, for twice the arithmetic. Left out: one, but two where fbgemm's sums would
        saturate, since one of 7 bits costs 0.1 nats.

        Raises `UsageError` where there is no such kernel.
        """
        if not has_int8():
            raise UsageError(
                "int8 needs a C compiler, or an x86 CPU with AVX2; install gcc, or run without quantization here."
            )
        super().__init__(int(weight.shape[0]), int(weight.shape[1]), bias)
        weight, own = weight.detach(), pieces in (None, 1) and _Native.takes(weight)
        self.kept: _Native | _Fbgemm = _Native(weight) if own else _Fbgemm(weight, pieces)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 [out, in]; made anew at each reading."""
        return self.kept.widened()

    def weight_bytes(self) -> int:
        """Memory of weight and bias in bytes: one a weight; scale, zero point and sum for every channel."""
        return self.out_features * (self.in_features + 12 + (0 if self.bias is None else 4))

    def native(self) -> Layer | None:
        """What `run_program` is told, if it can compute this; it holds as long as this layer does."""
        return self.kept.native(self.bias) if isinstance(self.kept, _Native) else None

    def multiply(self, value: Tensor) -> Tensor:
        product = self.kept.multiply(value.reshape(-1, value.shape[-1]), self.bias)
        return product.view(*value.shape[:-1], product.shape[-1])


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers int8 [out, in] and their steps float32 [out], of which each output has its own."""
    steps = weight.abs().amax(dim=1).clamp_min(TINY) / WEIGHT_LEVELS
    return torch.round(weight / steps[:, None]).to(torch.int8), steps


class _Native:
    """A weight for `int8_product` of native_int8.c, filled up with zeros to whole blocks."""

    def __init__(self, weight: Tensor) -> None:
        whole, self._steps = _quantized(weight)
        self._shape = whole.shape
        missing = [-size % BLOCK for size in self._shape]
        whole = F.pad(whole, (0, missing[1], 0, missing[0]))
        self._steps = F.pad(self._steps, (0, missing[0]))
        self._sums = whole.sum(1, dtype=torch.int32) * ZERO
        blocks = whole.view(-1, BLOCK, whole.shape[1] // 4, 4)
        self._values = blocks.transpose(1, 2).contiguous()
        self._described = tuple(pointer(one) for one in (self._values, self._steps, self._sums))
        self._padded = any(missing)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether there is a kernel for it here."""
        return library() is not None and weight.shape[1] <= MOST_COLUMNS

    def native(self, bias: Tensor | None) -> Layer | None:
        """See `Int8Linear.native`."""
        if self._padded:
            return None
        (values, steps, sums), (outputs, columns) = self._described, self._shape
        return Layer(
            FORMS["int8"], 0, 0, columns, outputs, values, steps, sums, pointer(bias), WEIGHT_LEVELS, TINY
        )

    def multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[n, in] to [n, out]."""
        blocks, quarters, outputs, _ = self._values.shape
        columns, outputs = 4 * quarters, blocks * outputs
        if self._padded:
            rows = F.pad(rows, (0, columns - rows.shape[1]))
            bias = None if bias is None else F.pad(bias, (0, outputs - len(bias)))
        rows, count = rows.contiguous(), len(rows)
        codes, steps = torch.empty(count, columns, dtype=torch.uint8), rows.new_empty(count)
        product = rows.new_empty(count, outputs)
        kernels().int8_product(
            *self._described,
            *(pointer(bias), columns, outputs, pointer(rows), pointer(codes), pointer(steps)),
            *(pointer(product), count, WEIGHT_LEVELS, TINY, torch.get_num_threads()),
        )
        return product[:, : self._shape[0]].contiguous() if self._padded else product

    def widened(self) -> Tensor:
        """float32 [out, in]."""
        whole = self._values.transpose(1, 2).reshape(len(self._steps), -1) * self._steps[:, None]
        return whole[: self._shape[0], : self._shape[1]].contiguous() if self._padded else whole


class _Fbgemm:
    """A weight for torch's own kernel."""

    def __init__(self, weight: Tensor, pieces: int | None) -> None:
        self._levels = activation_levels()
        self._pieces = pieces or (1 if self._levels == WEIGHT_LEVELS else 2)
        self._packed = _pack(weight)

    def multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[n, in] to [n, out]."""
        return _multiply_rows(rows, self._packed, bias, self._levels, self._pieces)

    def widened(self) -> Tensor:
        """float32 [out, in]."""
        with torch.no_grad():
            weight: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].dequantize()
        return weight


def _pack(weight: Tensor) -> Any:
    """fbgemm's packed form of a float32 weight [out, in], each row with its own scale."""
    integers, scales = _quantized(weight)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        # fbgemm packs from a quantized tensor only, and torch says that those will go one day.
        warnings.filterwarnings(
            "ignore", message=".*quantized tensor creation functions", category=UserWarning
        )
        quantized = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _multiply_rows(rows: Tensor, packed: Any, bias: Tensor | None, levels: int, pieces: int) -> Tensor:
    """rows @ weight.T + bias with every row of `rows` [n, in] quantized by its own largest entry."""
    step = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(TINY).div_(levels)
    scaled = rows / step
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
    return product


def _integer_product(rows: Tensor, packed: Any, levels: int) -> Tensor:
    """rows @ weight.T, float32, for `rows` [n, in] within -levels … levels, rounded to whole numbers."""
    product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        rows, 1.0, levels + 1, packed
    )
    return product
