"""The ways to multiply by a weight that lies in memory once, and which of them is taken for how many rows.

Invariant: ways differ in how long they take, and in rounding no more than a row does in another batch; which one is
taken depends on the number of rows and on nothing else about them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# `own`: native.c, which reads the weight as it is kept; the others are given it in float32.
Way = Literal["own", "torch", "onednn"]
WAYS: tuple[Way, ...] = get_args(Way)
BOUNDS = (1, 7, 31, 127)  # rows of each class at most, but for the last class
# oneDNN adds a row's products up one after the other. Sums that are cut at this length are half as far from
# float64 in SmolLM2 (1,536 long ones), about where the plain product is.
LONGEST_SUM = 1024


@dataclass(frozen=True)
class Ways:
    """What is taken for one shape of weights: for each class of rows, and for the gradient of the input."""

    forward: tuple[Way, ...]  # one for each class
    backward: Way
    packed: bool = False  # whether oneDNN's own layout is quicker than all of these: see `PackedLinear`

    def of(self, rows: int) -> Way:
        """The way for so many rows."""
        return self.forward[bisect_left(BOUNDS, rows)]

    def __str__(self) -> str:
        if self.packed:
            return "oneDNN, packed"
        bounds = [*(f"up to {bound}" for bound in BOUNDS), "more"]
        parts: list[str] = []
        for at, way in enumerate(self.forward):  # classes side by side that take the same way are one
            if at + 1 == len(self.forward) or self.forward[at + 1] != way:
                parts.append(f"{way} for {bounds[at]} rows" if len(set(self.forward)) > 1 else way)
        return f"{', '.join(parts)}; gradients {self.backward}"


def usual(own: bool) -> Ways:
    """What is taken where nothing has been tried; `own` says whether native.c takes the weight."""
    few: Way = "own" if own else "torch"
    return Ways((few, few, few, "torch", "torch"), "torch")


def product(value: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    """value [..., in] @ weight.T + bias, for a plain float32 weight [out, in]."""
    if way != "onednn":
        return F.linear(value, weight, bias)
    # Parts of longer rows would be multiplied by the reference code, a hundred times slower.
    return multiply_parts(value, tuple(part.contiguous() for part in cut(weight)), bias)


def product_back(gradient: Tensor, weight: Tensor, way: Way) -> Tensor:
    """The gradient of the input [..., in], from that of the output [..., out]."""
    return gradient @ weight if way != "onednn" else multiply(gradient, weight.t(), None)


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
