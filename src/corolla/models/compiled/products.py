"""Products of numbers that are added up at once: the terms need not be written down.

Invariant: an operator takes the place of those before it only where it reads what they read; where somebody else needs
what they gave, they are carried out as well (`program.py` leaves out what nobody needs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from corolla.models.compiled.operators import Op, View

Found = tuple[Op, Tensor | None]  # the operator, and what is to be added to its sums


class Look(Protocol):
    """How tensors lie (`record.py`)."""

    def view(self, tensor: Tensor) -> View: ...

    def made(self, tensor: Tensor) -> View: ...


def sum_of_products(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, look: Look, ops: Sequence[Op]
) -> Found | None:
    """What stands for an operator of torch that adds up products, with `ops` before it; None for all others."""
    if kwargs or not isinstance(result, Tensor) or result.dtype != torch.float32:
        return None
    if name == "convolution":
        return _convolution(args, result, look)
    if name == "bmm":
        return _matrices(args[0], args[1], result, look)
    if name not in ("add", "sum") or not ops or ops[-1].kind != "mul":
        return None
    product = ops[-1]
    if any(one.storage == product.output.storage for one in product.inputs):
        return None  # it has written to what it read
    if name == "add":
        return _added(product, args, result, look)
    if isinstance(args[0], Tensor) and look.view(args[0]) == product.output and len(args) > 1:
        return _summed(product, args[1], result, look)
    return None


def _added(product: Op, args: tuple[Any, ...], result: Tensor, look: Look) -> Found | None:
    """Something and a product."""
    if len(args) != 2 or not all(isinstance(one, Tensor) and one.dtype == torch.float32 for one in args):
        return None
    for one, other in (args, args[::-1]):
        if look.view(one) == product.output:
            return Op("mul_add", look.made(result), (*product.inputs, look.view(other))), None
    return None


def _summed(product: Op, dims: Any, result: Tensor, look: Look) -> Found | None:
    """The sum of a product over one dimension; the last has an operator, for what lies together."""
    sizes = product.output.sizes
    dim = dims[0] % len(sizes) if isinstance(dims, list) and len(dims) == 1 else len(sizes) - 1
    if dim == len(sizes) - 1 and product.output.strides[-1] == 1:
        return None
    output = look.made(result)
    if len(output.sizes) == len(sizes):  # the dimension is kept, with one place
        output = _without(output, dim)
    return Op("dot", output, tuple(_turned(_spread(one, sizes), dim) for one in product.inputs)), None


def _convolution(args: tuple[Any, ...], result: Tensor, look: Look) -> Found | None:
    """Of each channel by itself, over what is there and nothing else: a sum over a window that moves."""
    value, weight, bias, stride, padding, dilation, transposed, _, groups = args
    plain = value.dim() == 3 and weight.shape[:2] == (groups, 1) and value.shape[1] == groups
    if not plain or transposed or [*stride, *padding, *dilation] != [1, 0, 1] or value.dtype != result.dtype:
        return None
    given, own, output = look.view(value), look.view(weight), look.made(result)
    count = own.sizes[2]
    windows = View(given.storage, given.offset, (*output.sizes, count), (*given.strides, given.strides[2]))
    each = View(own.storage, own.offset, (1, groups, 1, count), (0, own.strides[0], 0, own.strides[2]))
    return Op("dot", output, (windows, each)), None if bias is None else bias.view(-1, 1)


def _matrices(one: Tensor, other: Tensor, result: Tensor, look: Look) -> Found | None:
    """Matrices by matrices."""
    if one.dtype != result.dtype or other.dtype != result.dtype:
        return None
    left, right = look.view(one), look.view(other)
    batch, lines, count = left.sizes
    each, down, along = left.strides
    lefts = View(left.storage, left.offset, (batch, lines, 1, count), (each, down, 0, along))
    each, down, along = right.strides
    rights = View(right.storage, right.offset, (batch, 1, right.sizes[2], count), (each, 0, along, down))
    return Op("dot", look.made(result), (rights, lefts)), None


def _spread(view: View, sizes: tuple[int, ...]) -> View:
    """A view that is repeated to these sizes."""
    missing = len(sizes) - len(view.sizes)
    strides = [0 if own == 1 else one for own, one in zip(view.sizes, view.strides, strict=True)]
    return View(view.storage, view.offset, sizes, (*[0] * missing, *strides))


def _turned(view: View, dim: int) -> View:
    """The same with that dimension as its last."""
    rest = _without(view, dim)
    return View(view.storage, view.offset, (*rest.sizes, view.sizes[dim]), (*rest.strides, view.strides[dim]))


def _without(view: View, dim: int) -> View:
    sizes, strides = list(view.sizes), list(view.strides)
    del sizes[dim], strides[dim]
    return View(view.storage, view.offset, tuple(sizes), tuple(strides))
