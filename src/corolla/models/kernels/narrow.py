"""Weights kept in as few bits as give back the same float32 numbers.

Invariant: nothing is rounded that was not rounded before. A weight that was published in bfloat16 or float16 is
kept so, to the bit; one that was made from a quantized file (GGUF) is whole numbers with a step and an offset for
every group of columns, and is kept as these when they give each number back to float32's own rounding of it (where
there is an offset, of that too: a number near zero is the difference of two larger ones); one that was stored in
8-bit floats (E4M3) with scales is kept as these, to the bit. Any other weight is kept as it is. Products are float32
throughout: what is saved is memory, and the time to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from corolla.models.kernels.native import FORMS, kernels, library, pointer

OUTPUTS = 4  # whose number has to be a multiple of this
MOST_COLUMNS = 2**16  # four rows of so many lie on a thread's stack
GROUPS = (32, 16)  # columns that share a step in the formats of GGUF
ROUNDING = 2.0**-22  # of a weight and of its offset: what float32 itself may have rounded
LOST = 2.0**-8  # of a weight: more than this is never put down to the rounding of an offset
SMALL = 2.0**-14  # of an offset: most weights of a group are larger or 0, or sums of products would lose them
SAME = 2.0**-18  # of a group's largest weight: weights that lie closer give no step to be tried
STEP_BITS = 18  # of a step in GGUF at most: a float16 number times one of 7 bits
DIVISORS = range(1, 9)  # the smallest gap between two weights of a group may be several steps
SAMPLED_ROWS = 16  # most weights are no lattice, and that shows in a few rows
CHUNK = 2**22  # weights that are looked at together
FLOAT8 = torch.float8_e4m3fn
SCALED = (128, 32)  # columns that share a step in files of 8-bit floats, or a part of them
# The largest 8-bit float with each fraction: of what the largest weight of a group may be the product.
TOPS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)


@dataclass(frozen=True)
class Narrow:
    """A weight [out, in]: its `values`, and for whole numbers a step and an offset for each group of columns."""

    form: Literal["float32", "bfloat16", "float16", "float8", "bytes", "nibbles"]
    values: Tensor  # of these dtypes or int8 [out, in]; uint8 [out, in / 2], two whole numbers each
    steps: Tensor | None = None  # float16 or float32 [out, in / group]
    offsets: Tensor | None = None  # the same; None when all are 0

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        rows, columns = self.values.shape
        return rows, columns * 2 if self.form == "nibbles" else columns

    @property
    def has_kernel(self) -> bool:
        """Whether native.c multiplies by it on this machine."""
        return library() is not None and _fits(*self.shape)

    def beginning(self, outputs: int) -> Narrow:
        """The weight of the first outputs alone, of which 4 or a multiple are asked for; no copy."""
        return Narrow(self.form, *(None if one is None else one[:outputs] for one in self._tensors))  # type: ignore[arg-type]

    @property
    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.values, self.steps, self.offsets

    def described(self) -> tuple[Any, ...]:
        """The first arguments of the kernels."""
        rows, columns = self.shape
        shift, halves = 0, False
        if self.steps is not None:
            shift = (columns // self.steps.shape[1]).bit_length() - 1
            halves = self.steps.dtype == torch.float16
        tensors = map(pointer, self._tensors)
        return (FORMS[self.form], *tensors, int(halves), shift, columns, rows)

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        named = zip(("values", "steps", "offsets"), self._tensors, strict=True)
        return {name: tensor for name, tensor in named if tensor is not None}

    def widened(self) -> Tensor:
        """The weight, float32 [out, in]: made anew, but for one that is kept as it is."""
        if self.form == "float32":
            return self.values
        wide = torch.empty(self.shape, dtype=torch.float32)
        kernels().narrow_widen(*self.described(), pointer(wide), torch.get_num_threads())
        return wide


def _fits(rows: int, columns: int) -> bool:
    """Whether native.c takes weights of this shape."""
    return rows % OUTPUTS == 0 and columns % GROUPS[0] == 0 and columns <= MOST_COLUMNS


def as_it_is(weight: Tensor) -> Narrow:
    """A float32 weight [out, in] that is kept so; its memory, where it lies together."""
    return Narrow("float32", weight.detach().contiguous())


def narrow_form(weight: Tensor) -> Narrow | None:
    """The narrow form of a float32 weight [out, in], or None where there is none or no kernel for it."""
    rows, columns = weight.shape
    if library() is None or not _fits(rows, columns):
        return None
    if not bool(weight.isfinite().all()):
        return None
    weight = weight.detach().contiguous()
    sample = weight[:: -(-rows // SAMPLED_ROWS)].contiguous()
    for dtype, form in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        if all(torch.equal(one.to(dtype).float(), one) for one in (sample, weight)):
            return _scaled(weight, sample) or Narrow(form, weight.to(dtype))  # type: ignore[arg-type]
    for group in GROUPS:
        if not _has_steps(sample[0].view(-1, group)):
            continue
        for fit in (_around_zero, _by_ends, _by_gaps):
            if _affine(sample, group, fit) is not None:
                return _affine(weight, group, fit)
    return _scaled(weight, sample)


@dataclass(frozen=True)
class _Lattice:
    """Groups [n, group] as `values` times `step` plus `offset`, and for which of them that is true."""

    values: Tensor  # whole numbers, float32 [n, group]
    step: Tensor  # [n, 1]
    offset: Tensor  # [n, 1]
    right: Tensor  # bool [n]

    def replace(self, places: Tensor, other: _Lattice) -> None:
        """Take over what `other` says of the groups at `places` int64 [m], in place."""
        for own, theirs in zip(self._parts(), other._parts(), strict=True):
            own[places] = theirs

    def _parts(self) -> tuple[Tensor, ...]:
        return self.values, self.step, self.offset, self.right


Fit = Callable[[Tensor], _Lattice]


def _affine(weight: Tensor, group: int, fit: Fit) -> Narrow | None:
    """Whole numbers as `fit` finds them, if they are right for every group."""
    rows, columns = weight.shape
    found = []
    for part in torch.split(weight.view(-1, group), CHUNK // group):
        lattice = fit(part)
        if not bool(lattice.right.all()):
            return None
        found.append((lattice.values.to(torch.int8), lattice.step, lattice.offset))
    values, steps, offsets = (torch.cat(parts) for parts in zip(*found, strict=True))
    first, greatest = _first_nibbles(values), values.amax(1, keepdim=True)
    moved = first * steps  # must be exact, but for one weight alone it is no less than any product
    exact = (moved.double() == first.double() * steps) | (greatest == first)
    few = group == 32 and bool((exact & (greatest.short() - first <= 15)).all())
    if few:
        offsets = offsets + moved
        values -= first
        values = values[:, :16] | values[:, 16:] << 4
    shape = (rows, columns // group)
    steps, offsets = _halved(steps.view(shape), offsets.view(shape))
    return Narrow(
        "nibbles" if few else "bytes",
        values.view(torch.uint8).view(rows, -1) if few else values.view(rows, columns),
        steps,
        offsets if bool(offsets.any()) else None,
    )


def _first_nibbles(values: Tensor) -> Tensor:
    """Which of the whole numbers int8 [n, group] is kept as 0, [n, 1]: one whose product with the step is exact."""
    least, greatest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    first = torch.where((least >= -8) & (greatest <= 7), -8, least)
    return torch.where((least >= 0) & (greatest <= 15), 0, first)


def _halved(steps: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float16 where that is what they are, as in GGUF."""
    halves = steps.half(), offsets.half()
    same = all(torch.equal(half.float(), one) for half, one in zip(halves, (steps, offsets), strict=True))
    return halves if same else (steps, offsets)


def _has_steps(groups: Tensor) -> bool:
    """Whether for each of a few groups any of the steps that are tried is right: all are, in one go."""
    gap = _smallest_gap(groups)
    steps = torch.stack([_part_of_largest(groups), _part_of_span(groups), *(gap / one for one in DIVISORS)])
    every = groups.expand(len(steps), -1, -1).reshape(-1, groups.shape[-1])
    return bool(_fitted(every, steps.view(-1, 1)).right.view(len(steps), -1).any(0).all())


def _around_zero(groups: Tensor) -> _Lattice:
    """Steps of which the largest weight is 127 (Q8_0)."""
    return _fitted(groups, _part_of_largest(groups))


def _part_of_largest(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1, keepdim=True) / 127


def _by_ends(groups: Tensor) -> _Lattice:
    """Steps of which a group's weights span 15 (Q4_1)."""
    return _fitted(groups, _part_of_span(groups))


def _part_of_span(groups: Tensor) -> Tensor:
    return (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15


def _smallest_gap(groups: Tensor) -> Tensor:
    """Between two weights of each group that are not the same."""
    gaps = groups.sort(-1).values.diff()
    largest = groups.abs().amax(-1, keepdim=True)
    gap = gaps.masked_fill_(gaps <= SAME * largest, torch.inf).amin(-1, keepdim=True)
    return torch.where(gap.isinf(), largest, gap)  # all the same


def _by_gaps(groups: Tensor) -> _Lattice:
    """Steps found from the smallest gap between a group's weights (the other formats of fewer bits)."""
    gap = _smallest_gap(groups)
    found = _fitted(groups, gap)
    for divisor in DIVISORS[1:]:
        wrong = (~found.right).nonzero().squeeze(-1)
        if not len(wrong):
            break
        found.replace(wrong, _fitted(groups[wrong], gap[wrong] / divisor))
    return found


def _fitted(groups: Tensor, step: Tensor) -> _Lattice:
    """The lattice of about this step [n, 1] that reaches from each group's least to its greatest weight."""
    least, greatest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    span = greatest - least
    step = step.clamp_min(torch.finfo(torch.float32).tiny)
    count = (span / step).round()
    ends = torch.cat((least, greatest), -1)
    codes = (least / step).round() + torch.cat((torch.zeros_like(count), count), -1)
    largest = ends.abs().argmax(-1, keepdim=True)
    through = ends.gather(-1, largest) / codes.gather(-1, largest)  # the step, if there is no offset
    is_through = _near(codes * through, ends, torch.zeros_like(ends)) & (codes >= -128) & (codes <= 127)
    is_through = is_through.all(-1, keepdim=True)
    between = torch.where(count > 0, span / count.clamp_min(1), step)
    begin = torch.where(count <= 127, 0.0, -(count / 2).round())
    found = _lattice(
        groups, torch.where(is_through, through, between), torch.where(is_through, torch.nan, begin)
    )
    # Where there is an offset the ends were rounded, and the step between them is not all of what it was.
    wrong = (~found.right & (~is_through & (count <= 255)).squeeze(-1)).nonzero().squeeze(-1)
    if len(wrong):
        found.replace(wrong, _lattice(groups[wrong], _of_few_bits(between[wrong]), begin[wrong]))
    return found


def _lattice(groups: Tensor, step: Tensor, first: Tensor) -> _Lattice:
    """The lattice of this very step whose number `first` is the least weight; without an offset where that is nan."""
    offset = (groups.amin(-1, keepdim=True) - first * step).nan_to_num(0.0)
    values = (groups - offset).div_(step).round_()
    back = (values * step).add_(offset)
    right = (values.amin(-1) >= -128) & (values.amax(-1) <= 127)
    inexact = (right & ~(back == groups).all(-1)).nonzero().squeeze(-1)  # few where the step is right
    if len(inexact):
        right[inexact] = _is_rounding(*(one[inexact] for one in (groups, back, values, offset)))
    if bool(offset.any()):
        size = groups.abs()
        right &= ((size < SMALL * offset.abs()) & (size > 0)).sum(-1) <= groups.shape[-1] // 2
    return _Lattice(values, step, offset, right)


def _near(back: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Whether `back` differs from `weight` by rounding alone; what is not 0 never becomes 0."""
    size = weight.abs()
    return (back - weight).abs() <= torch.minimum(ROUNDING * (size + offset.abs()), LOST * size)


def _is_rounding(groups: Tensor, back: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    """Whether that is all, and a whole number stands for one weight only, as it does in a file; bool [n]."""
    near = _near(back, groups, offset).all(-1)
    several = (near & (offset != 0).squeeze(-1)).nonzero().squeeze(-1)
    if len(several):
        ordered, order = groups[several].sort(-1)
        taken = values[several].gather(-1, order)
        near[several] = ~((ordered.diff() != 0) & (taken.diff() == 0)).any(-1)
    return near


def _of_few_bits(step: Tensor) -> Tensor:
    """The nearest number of `STEP_BITS` bits."""
    mantissa, exponent = torch.frexp(step)
    return torch.ldexp((mantissa * 2**STEP_BITS).round(), exponent - STEP_BITS)


def _scaled(weight: Tensor, sample: Tensor | None = None) -> Narrow | None:
    """8-bit floats with a step for every group of columns, if their products are the very weights."""
    if sample is not None and _scaled(sample) is None:
        return None
    rows, columns = weight.shape
    group = next(one for one in SCALED if columns % one == 0)
    values = torch.empty(rows, columns, dtype=FLOAT8)
    steps = torch.empty(rows, columns // group, dtype=torch.float32)
    for first in range(0, rows, SCALED[0]):
        part = weight[first : first + SCALED[0]].reshape(-1, columns // group, group)
        step = _steps_of(part)
        if step is None:
            return None
        values[first : first + SCALED[0]] = (part / step).to(FLOAT8).view(-1, columns)
        steps[first : first + SCALED[0]] = step.squeeze(-1)
    return Narrow("float8", values, steps)


def _steps_of(part: Tensor) -> Tensor | None:
    """The steps [rows, n, 1] of groups [rows, n, group]: mostly all rows share theirs, or all groups of a row."""
    largest = part.abs().amax(-1)
    step = _searched(part[largest.argmax(0), torch.arange(part.shape[1])]).expand(len(part), -1, -1)
    wrong = ~_in_float8(part, step)
    if bool(wrong.any()):
        by_row = _searched(part[torch.arange(len(part)), largest.argmax(1)])
        step = torch.where(wrong[..., None], by_row[:, None], step)
        wrong = ~_in_float8(part, step)
    if bool(wrong.any()):
        step[wrong] = _searched(part[wrong])
        wrong = ~_in_float8(part, step)
    return None if bool(wrong.any()) else step


def _searched(groups: Tensor) -> Tensor:
    """A step [n, 1] for each of groups [n, group], found by its largest weight; 1 where none is right."""
    exact = groups.abs().amax(-1, keepdim=True) / torch.tensor(TOPS, dtype=torch.float32)
    found = torch.ones(len(groups), 1, dtype=torch.float32)
    for beside in (0, 1, -1):  # float32 numbers, since the weights were rounded
        steps = (exact.view(torch.int32) + beside).view(torch.float32)
        right = _in_float8(groups[:, None], steps[..., None])
        last = (right * torch.arange(len(TOPS))).amax(1, keepdim=True)
        found = torch.where(right.any(1, keepdim=True), steps.gather(1, last), found)
    return found


def _in_float8(groups: Tensor, step: Tensor) -> Tensor:
    """Of which groups [..., group] all weights are the products of 8-bit floats with its step [..., 1]; bool [...]."""
    return ((groups / step).to(FLOAT8).float() * step == groups).all(-1)
