"""Weights stored as small numbers with a scale for each block of them: 8-bit and 4-bit floats, 8-bit integers.

Published definitions: OCP 8-bit floating point (E4M3, E5M2), OCP microscaling formats (E2M1 with E8M0 scales a 32
numbers), NVIDIA's NVFP4 (E2M1 with E4M3 scales a 16 numbers and one of all).

Invariant: products are taken in float32 and rounded once, to the dtype asked for; never more than a piece of a
weight is held in float32 beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from corolla.models.checkpoints.stored.recipe import Entries, Layout, Parts, Unfit

PIECE = 2**22  # numbers that are widened at a time
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPONENT_BIAS = 127  # of E8M0

Shape = tuple[int, ...]
Blocks = Sequence[
    tuple[int, int]
]  # sizes [rows, columns] that the config names; they may be cut at the borders
Decode = Callable[[Tensor], Tensor]  # stored rows [n, stored columns] to float32 [n, columns]

WHOLE, ROWS, COLUMNS, MICROSCALED = (0, 0), (1, 0), (0, 1), (1, 32)
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")


def as_scales(scale: Tensor) -> Tensor:
    """Scales as float32; bytes are E8M0, powers of two of which the last is no number."""
    if scale.dtype == torch.uint8:
        powers = [*(2.0 ** (byte - EXPONENT_BIAS) for byte in range(255)), float("nan")]
        return torch.tensor(powers, dtype=torch.float32)[scale.int()]
    return scale.float()


def from_nibbles(stored: Tensor) -> Tensor:
    """E2M1 numbers, two a byte, the low half first: bytes [n, columns / 2] to float32 [n, columns]."""
    one = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32)
    pairs = torch.stack([one.repeat(16), one.repeat_interleave(16)], dim=-1)
    return pairs[stored.contiguous().view(torch.uint8).int()].flatten(-2)


def block_of(shape: Shape, scales: Shape, blocks: Blocks) -> tuple[int, int]:
    """The size of the blocks of a weight [..., rows, columns] that share a scale. Raises `Unfit`."""
    rows, columns = shape[-2:]
    if scales == ():
        return rows, columns
    grid = scales[-2:] if len(scales) > 1 else (scales[0], 1)
    if prod(scales[:-2]) == 1 or scales[:-2] == shape[:-2]:
        for high, wide in blocks:
            high, wide = high or max(rows, 1), wide or max(columns, 1)
            if (-(-rows // high), -(-columns // wide)) == grid:
                return high, wide
    raise Unfit(f"has shape {list(shape)} and scales of shape {list(scales)}, which fit no blocks of it")


def scaled(
    stored: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    blocks: Blocks,
    *,
    decode: Decode = Tensor.float,
    per_byte: int = 1,
    zeros: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """`stored` [..., rows, columns / per_byte], decoded, less `zeros`, times `scales`, in `dtype`.

    `zeros` has the shape of `scales`; the result goes `into` that tensor where one is given. Raises `Unfit`.
    """
    shape = (*stored.shape[:-1], stored.shape[-1] * per_byte)
    high, wide = block_of(shape, tuple(scales.shape), blocks)
    rows, columns = shape[-2:]
    result = torch.empty(shape, dtype=dtype) if into is None else into
    grid = (-1, -(-rows // high), -(-columns // wide))
    factors, shifts = as_scales(scales).reshape(grid), None if zeros is None else zeros.float().reshape(grid)
    matrices = stored.reshape(-1, *stored.shape[-2:])
    targets = result if result.ndim == 3 else result.view(-1, rows, columns)
    step = max(1, PIECE // columns)
    for index, (matrix, target) in enumerate(zip(matrices, targets, strict=True)):
        own = index if len(factors) > 1 else 0
        for first in range(0, rows, step):
            places = torch.arange(first, min(first + step, rows)) // high
            piece = decode(matrix[first : first + step])
            if shifts is not None:
                piece = piece - shifts[own][places].repeat_interleave(wide, 1)[:, :columns]
            factor = factors[own][places].repeat_interleave(wide, 1)[:, :columns]
            target[first : first + step] = piece * factor
    return result


def scaled_layout(
    blocks: Blocks,
    *,
    weight: str,
    scale: str,
    target: str,
    zero: str | None = None,
    integers_are_pairs: bool = False,
) -> Layout:
    """A weight of 8-bit numbers, or of 4-bit floats two a byte, with scales; the names are ends of names.

    `integers_are_pairs`: 8-bit integers of which 16 share a scale are 32 4-bit floats (DeepSeek's experts).
    """

    def per_byte(stored: Shape, scales: Shape, *, is_byte: bool, is_integer: bool) -> int:
        grouped = len(scales) > 1 and scales[-1] > 1 and stored[-1] == scales[-1] * 16
        return 2 if is_byte or (is_integer and integers_are_pairs and grouped) else 1

    def shape(entries: Entries) -> Shape:
        own, scales = entries["weight"], entries["scale"].shape
        if own.dtype not in (*EIGHT_BITS, "U8") or len(own.shape) < 2:
            raise Unfit(
                f"is stored as {own.dtype} {list(own.shape)}, though it has scales of quantized numbers"
            )
        packed = per_byte(own.shape, scales, is_byte=own.dtype == "U8", is_integer=own.dtype == "I8")
        wide = (*own.shape[:-1], own.shape[-1] * packed)
        block_of(wide, scales, blocks)
        if "zero" in entries and entries["zero"].shape != scales:
            raise Unfit(
                f"has zeros of shape {list(entries['zero'].shape)} and scales of shape {list(scales)}"
            )
        return wide

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        stored, scales = parts["weight"], parts["scale"]
        kinds = {"is_byte": stored.dtype == torch.uint8, "is_integer": stored.dtype == torch.int8}
        if per_byte(tuple(stored.shape), tuple(scales.shape), **kinds) == 2:
            return scaled(stored, scales, dtype, blocks, decode=from_nibbles, per_byte=2)
        return scaled(stored, scales, dtype, blocks, zeros=parts.get("zero"))

    names = {"weight": weight, "scale": scale} | ({} if zero is None else {"zero": zero})
    return Layout(names, "scale", target, shape, widen, optional=frozenset({"zero"}), main="weight")


def fused_mxfp4() -> Layout:
    """Experts [E, in, out] as gpt-oss has them, stored [E, out, in / 32, 16] with scales [E, out, in / 32]."""

    def shape(entries: Entries) -> Shape:
        blocks, scales = entries["blocks"].shape, entries["scales"].shape
        in_bytes = all(entry.dtype == "U8" for entry in entries.values())
        if len(blocks) != 4 or blocks[-1] != 16 or blocks[:-1] != scales or not in_bytes:
            raise Unfit(
                f"has blocks of shape {list(blocks)} and scales of shape {list(scales)}, which do not fit"
            )
        return blocks[0], blocks[2] * blocks[3] * 2, blocks[1]

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        blocks = parts["blocks"]
        experts, outputs, groups, size = blocks.shape
        result = torch.empty(experts, groups * size * 2, outputs, dtype=dtype)
        scaled(
            blocks.reshape(experts, outputs, groups * size),
            parts["scales"],
            dtype,
            [MICROSCALED],
            decode=from_nibbles,
            per_byte=2,
            into=result.transpose(1, 2),
        )
        return result

    return Layout({"blocks": "_blocks", "scales": "_scales"}, "blocks", "", shape, widen)


def nvfp4(*, weight: str, scale: str, whole: str, divided: bool) -> Layout:
    """A weight [out, in] stored as pairs [out, in / 2], scales [out, in / 16] and one scale of the whole.

    `divided`: the one of the whole is a divisor (compressed-tensors), not a factor (ModelOpt).
    """

    def shape(entries: Entries) -> Shape:
        own = entries["weight"]
        if own.dtype != "U8" or len(own.shape) != 2 or prod(entries["whole"].shape) != 1:
            raise Unfit(f"is stored as {own.dtype} {list(own.shape)}, which is not NVFP4")
        wide = (own.shape[0], own.shape[1] * 2)
        block_of(wide, entries["scale"].shape, [(1, 16)])
        return wide

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        whole_scale = parts["whole"].float().reshape(())
        factors = parts["scale"].float()
        factors = factors / whole_scale if divided else factors * whole_scale
        return scaled(parts["weight"], factors, dtype, [(1, 16)], decode=from_nibbles, per_byte=2)

    names = {"weight": weight, "scale": scale, "whole": whole}
    return Layout(names, "whole", ".weight", shape, widen, main="weight")
