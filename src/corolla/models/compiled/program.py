"""Recorded operators as a program for `native_program.c`, for any number of rows.

Invariant: every size, stride and place is a whole number plus a multiple of the number of rows; that is read off two
recordings, and a pass of which it is not true is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from corolla.models.attention.one_token_rows import LANES, THREADED, kernel_rules
from corolla.models.attention.packing import PackedBatch
from corolla.models.attention.pages import PAGE, PagePool
from corolla.models.compiled.layout import LaidOut
from corolla.models.compiled.record import HIDDEN, POSITIONS, UNKNOWN, NotCompilable, Op, Recording, View
from corolla.models.kernels.linear import FrozenLinear
from corolla.models.kernels.native import Layer, pointer


class Attention(ctypes.Structure):
    """One block's attention, as the kernel is told about it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "sinks", "slopes")),
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "kv_heads", "dim", "width", "page", "window", "table", "threaded")
        ),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )


class Program:
    """The pass of a span's blocks over rows that have one new token each."""

    def __init__(self, recordings: Sequence[Recording], rows: Sequence[int], *, most: int) -> None:
        """From two recordings, of so many rows, for up to `most`. Raises `NotCompilable`."""
        self._first, self._second = recordings
        self._rows = rows
        self._needed = _needed(self._first)
        _check_alike(self._first, self._second, self._needed)
        self._whats: dict[int, Any] = {at: _what(self._first.ops[at]) for at in self._needed}
        self._kept: list[Tensor | None] = []  # sinks and slopes
        self._pool: PagePool | None = None
        self._layouts: dict[int, LaidOut] = {}
        self._most = most
        self._arena = torch.empty(0)  # which all of these share, since one of them runs at a time

    def run(self, hidden: Tensor, positions: Tensor, batch: PackedBatch) -> Tensor:
        """See `Span.forward_packed`; each of the batch's segments is one token that is cached in its pool."""
        pool = batch.pool
        assert pool is not None
        if pool is not self._pool:
            self._use(pool)
        rows = len(hidden)
        if rows not in self._layouts:
            self._layouts[rows] = self._laid_out(rows)
        return self._layouts[rows].run(
            hidden, positions, [batch.rows(at) for at in range(pool.layout.tables)]
        )

    def _use(self, pool: PagePool) -> None:
        """Attention reads and writes this pool."""
        self._kept.clear()
        for at, own in self._whats.items():
            if isinstance(own, Attention):
                self._fill(own, self._first.ops[at], pool)
        self._pool = pool

    def _fill(self, own: Attention, op: Op, pool: PagePool) -> None:
        block, rules = op.what
        own.table, place = pool.layout.place(block, rules.window)
        _, own.heads, _, own.dim = op.inputs[0].sizes
        own.kv_heads = op.inputs[1].sizes[1]
        own.width = op.inputs[2].sizes[3]
        like = [torch.empty(1, own.kv_heads, 1, one) for one in (own.dim, own.width)]
        own.keys, own.values = map(pointer, pool.store(place, *like))
        own.page, own.threaded = PAGE, THREADED
        (own.scale, own.softcap, own.window), *each_head = kernel_rules(rules, own.dim)
        own.sinks, own.slopes = map(pointer, each_head)
        self._kept += each_head

    # --- for one number of rows -----------------------------------------------------------------------------

    def _laid_out(self, rows: int) -> LaidOut:
        assert self._first.output is not None
        assert self._second.output is not None
        ops = [(self._op(at, rows), self._whats[at]) for at in self._needed]
        used = {view.storage for op, _ in ops for view in (op.output, *op.inputs)} | {HIDDEN, POSITIONS}
        both = zip(self._first.lengths, self._second.lengths, strict=True)
        lengths = [self._at(rows, *own) if at in used else 0 for at, own in enumerate(both)]
        output = self._view(self._first.output, self._second.output, rows)
        whole = self._first.whole
        return LaidOut(ops, lengths, whole, self._first.constants, output, partial(self._take, rows))

    def _take(self, rows: int, length: int) -> Tensor:
        """At least `length` numbers for a pass of so many rows; as many as the largest pass will need."""
        if len(self._arena) < length:
            self._arena = torch.empty(-(-length // rows) * max(rows, self._most))
        return self._arena

    def _op(self, at: int, rows: int) -> Op:
        first, second = self._first.ops[at], self._second.ops[at]
        inputs = tuple(self._view(*both, rows) for both in zip(first.inputs, second.inputs, strict=True))
        return Op(first.kind, self._view(first.output, second.output, rows), inputs, first.number, first.what)

    def _view(self, first: View, second: View, rows: int) -> View:
        def each(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(self._at(rows, *both) for both in zip(one, other, strict=True))

        return View(
            first.storage,
            self._at(rows, first.offset, second.offset),
            each(first.sizes, second.sizes),
            each(first.strides, second.strides),
        )

    def _at(self, rows: int, first: int, second: int) -> int:
        """What was `first` and `second` in the recordings, at this number of rows."""
        slope, rest = divmod(second - first, self._rows[1] - self._rows[0])
        value = first + slope * (rows - self._rows[0])
        if rest or value < 0:
            raise NotCompilable("a size that is not in proportion to the rows")
        return value


def _check_alike(first: Recording, second: Recording, needed: Sequence[int]) -> None:
    """What two recordings have to compute may differ in sizes only. Raises `NotCompilable`."""

    def shape(op: Op) -> list[Any]:
        return [op.kind, op.number, *((one.storage, len(one.sizes)) for one in (op.output, *op.inputs))]

    used = {view.storage for at in needed for view in first.ops[at].inputs} & first.constants.keys()
    same = len(first.ops) == len(second.ops) and used <= second.constants.keys()
    same = same and all(shape(first.ops[at]) == shape(second.ops[at]) for at in needed)
    if not same or not all(torch.equal(first.constants[at], second.constants[at]) for at in used):
        raise NotCompilable("what is computed depends on the number of rows")


def _needed(recording: Recording) -> list[int]:
    """The operators on which the result or the cache depends, in order. Raises `NotCompilable`."""
    assert recording.output is not None
    wanted, found = {recording.output.storage}, []
    for at in reversed(range(len(recording.ops))):
        op = recording.ops[at]
        if op.kind == "attend" or op.output.storage in wanted:
            if op.kind == UNKNOWN:
                raise NotCompilable(op.what)
            found.append(at)
            wanted.update(one.storage for one in op.inputs)
    return found[::-1]


def _what(op: Op) -> Any:
    """What the kernel is told about an operator beside its tensors. Raises `NotCompilable`."""
    if op.kind == "attend":
        if any(one.sizes[3] % LANES for one in op.inputs):
            raise NotCompilable("heads of a width that the kernels do not have")
        return Attention()
    if op.kind == "product":
        return _layer(op.what)
    if op.kind == "experts":
        return (Layer * len(op.what))(*map(_layer, op.what))
    return None


def _layer(layer: FrozenLinear) -> Layer:
    found = layer.native()
    if found is None:
        raise NotCompilable("a weight that has no form for the kernels")
    return found
