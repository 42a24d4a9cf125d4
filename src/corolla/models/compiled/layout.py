"""Where a program's tensors lie in memory, and the loops of its operators, for one number of rows.

Invariant: an operator's tensors lie where no other operator writes before the last that reads them is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from corolla.models.compiled.operators import HIDDEN, NotCompilable, Op, View

# Operators over whole lines, a tensor's last dimension; and those that give a line.
BY_LINE, LINES = (
    ("mean", "sum", "softmax", "top", "layer_norm", "gather"),
    ("softmax", "top", "layer_norm", "gather"),
)
PRODUCTS = ("product", "experts")
BY_ROWS = (*PRODUCTS, "route", "pick", "combine")  # whose tensors all lie together
DIMS = 4  # of an operator, once neighbours that lie together are one
ALIGNED = 16  # floats
LONGEST = 2**12  # a line, where it can be cut

Pairs = Sequence[tuple[Op, Any]]


def with_copies(ops: Pairs, lengths: list[int], whole: set[int]) -> Pairs:
    """The same, with copies of what products and attention cannot read as it lies; `lengths` grows by theirs."""
    found: list[tuple[Op, Any]] = []
    for op, what in ops:
        inputs = list(op.inputs)
        for at, view in enumerate(inputs if op.kind in (*BY_ROWS, "attend") else ()):
            if _is_contiguous(view) if op.kind in BY_ROWS else view.strides[-1] == 1:
                continue
            if view.storage in whole:
                raise NotCompilable("whole numbers that do not lie together")
            inputs[at] = _contiguous(len(lengths), view.sizes)
            lengths.append(prod(view.sizes))
            found.append((Op("copy", inputs[at], (view,)), None))
        if op.kind in (*BY_ROWS, "attend") and not _is_contiguous(op.output):
            raise NotCompilable("a product that does not lie together")
        found.append((replace(op, inputs=tuple(inputs)), what))
    return found


def _is_contiguous(view: View) -> bool:
    plain = _contiguous(view.storage, view.sizes).strides
    return all(
        size == 1 or own == one for size, own, one in zip(view.sizes, view.strides, plain, strict=True)
    )


def _contiguous(storage: int, sizes: tuple[int, ...]) -> View:
    strides = tuple(prod(sizes[at + 1 :]) for at in range(len(sizes)))
    return View(storage, 0, sizes, strides)


def places_of(
    ops: Sequence[Op], lengths: Sequence[int], *, fixed: set[int], kept: set[int]
) -> tuple[dict[int, int], int]:
    """Where in one piece of memory each storage lies, and how much is needed, in elements.

    `fixed` lie elsewhere; the places of those that are `kept` are nobody else's.
    """
    last = {one.storage: at for at, op in enumerate(ops) for one in (op.output, *op.inputs)}
    last |= dict.fromkeys(kept, len(ops))
    places: dict[int, int] = {HIDDEN: 0}
    free: list[tuple[int, int]] = []  # length, place
    size = _rounded(lengths[HIDDEN])
    for at, op in enumerate(ops):
        own = op.output.storage
        if own not in places and own not in fixed:
            length = _rounded(lengths[own])
            fitting = min((one for one in free if one[0] >= length), default=None)
            if fitting is None:
                places[own], size = size, size + length
            else:
                free.remove(fitting)
                places[own] = fitting[1]
                if fitting[0] > length:
                    free.append((fitting[0] - length, fitting[1] + length))
        used = {one.storage for one in (op.output, *op.inputs)} & places.keys()
        free += [(_rounded(lengths[one]), places[one]) for one in used if last[one] == at]
    return places, size


def _rounded(length: int) -> int:
    return -(-length // ALIGNED) * ALIGNED


# --- sizes and strides ----------------------------------------------------------------------------------


def dimensions(op: Op) -> tuple[list[int], list[list[int]]]:
    """An operator's loop: sizes, and the strides of the output and the inputs."""
    if op.kind == "product":
        return [prod(op.inputs[0].sizes[:-1]), 0, 0, 0], []
    if op.kind == "attend":
        both = [
            [stride for one in pair for stride in one.strides[1:3]] for pair in (op.inputs[:2], op.inputs[2:])
        ]
        return [op.inputs[0].sizes[2], 0, 0, 0], [both[0], [*both[1], 0, 0]]
    if op.kind in BY_ROWS:
        return _pairs(op), []
    if op.kind in BY_LINE:
        return _lines(op)
    if op.kind == "dot":
        return _sums(op)
    if op.kind == "scatter":
        sizes = op.inputs[1].sizes
        strides = [op.output.strides, [0] * len(sizes), op.inputs[1].strides]
        outer, joined = _joined(sizes[:-1], [one[:-1] for one in strides], DIMS - 1)
        return [*outer, sizes[-1]], [[*own, one[-1]] for own, one in zip(joined, strides, strict=True)]
    views = [op.output, *op.inputs]
    return _joined(op.output.sizes, [_spread(one, op.output.sizes) for one in views], DIMS)


def _pairs(op: Op) -> list[int]:
    """Pairs of a token and an expert, experts, numbers of a token, and experts of each token."""
    pairs = prod(op.inputs[0].sizes) if op.kind == "route" else op.inputs[1].sizes[0] - int(op.number) - 1
    tokens = prod((op.inputs[0] if op.kind == "pick" else op.output).sizes[:-1])
    return [pairs, int(op.number), op.output.sizes[-1], pairs // tokens]


def _sums(op: Op) -> tuple[list[int], list[list[int]]]:
    """The last two dimensions are sums that stand side by side, which best lie together, and what each adds up."""
    sizes, count = op.output.sizes, op.inputs[0].sizes[-1]
    strides = [list(op.output.strides), *(_spread(one, (*sizes, count)) for one in op.inputs)]
    beside = max(range(len(sizes)), key=lambda at: (strides[0][at] == strides[1][at] == 1, sizes[at]))
    outer = [at for at in range(len(sizes)) if at != beside]
    loop, joined = _joined(
        [sizes[at] for at in outer], [[one[at] for at in outer] for one in strides], DIMS - 2
    )
    last = [[strides[0][beside], 0], *([one[beside], one[-1]] for one in strides[1:])]
    return [*loop, sizes[beside], count], [[*one, *own] for one, own in zip(joined, last, strict=True)]


def _lines(op: Op) -> tuple[list[int], list[list[int]]]:
    given, output = op.inputs[0], op.output
    others = (output, *op.inputs[1:2]) if op.kind == "gather" else (output,)
    last = [
        one.strides[-1] if one.sizes[-1] > 1 else 1 for one in (given, *(others if op.kind in LINES else ()))
    ]
    if any(one != 1 for one in last):
        raise NotCompilable(f"a {op.kind} of what does not lie together")
    outer = given.sizes[:-1]
    views = (output, given, *others[1:])
    sizes, joined = _joined(outer, [one.strides[: len(outer)] for one in views], DIMS - 1)
    count = (output if op.kind == "gather" else given).sizes[-1]
    return [*sizes, count], [[*one, 1] for one in joined]


def _spread(view: View, sizes: tuple[int, ...]) -> list[int]:
    """Strides of a view that is repeated to these sizes."""
    missing = len(sizes) - len(view.sizes)
    return [0] * missing + [
        0 if own == 1 else stride for own, stride in zip(view.sizes, view.strides, strict=True)
    ]


def _joined(
    sizes: Sequence[int], strides: Sequence[Sequence[int]], dims: int
) -> tuple[list[int], list[list[int]]]:
    """The same loop with `dims` dimensions. Raises `NotCompilable` when it takes more."""
    loop: list[tuple[int, list[int]]] = []
    for at, size in enumerate(sizes):
        own = [one[at] for one in strides]
        if size == 1:
            continue
        if loop and all(before == size * now for before, now in zip(loop[-1][1], own, strict=True)):
            loop[-1] = (loop[-1][0] * size, own)
        else:
            loop.append((size, own))
    if len(loop) > dims:
        raise NotCompilable(f"a tensor of more than {dims} dimensions that do not lie together")
    if len(loop) < dims and loop and loop[-1][0] > LONGEST and not loop[-1][0] % LONGEST:
        size, own = loop.pop()  # threads share lines
        loop += [(size // LONGEST, [one * LONGEST for one in own]), (LONGEST, own)]
    loop = [(1, [0] * len(strides))] * (dims - len(loop)) + loop
    return [size for size, _ in loop], [[own[at] for _, own in loop] for at in range(len(strides))]
