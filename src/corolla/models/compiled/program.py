"""Recorded operators as a program for `native_program.c`, for any number of rows.

Invariant: every size, stride and place is a whole number plus a multiple of the number of rows; that is read off two
recordings, and a pass of which it is not true is refused.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from corolla.models.attention.one_token_rows import LANES, THREADED, OneTokenRows, kernel_rules
from corolla.models.attention.packing import PackedBatch
from corolla.models.attention.pages import PAGE, PagePool
from corolla.models.attention.stacked import StackedCaches
from corolla.models.compiled.layout import DIMS, PRODUCTS, Pairs, dimensions, places_of, with_copies
from corolla.models.compiled.operators import (
    HIDDEN,
    POSITIONS,
    UNKNOWN,
    NotCompilable,
    Op,
    Recording,
    View,
)
from corolla.models.kernels.linear import FrozenLinear
from corolla.models.kernels.native import Layer, kernels, pointer

KINDS = (
    "product", "attend", "mean", "layer_norm", "from_int", "add", "sub", "mul", "div", "maximum", "minimum", "copy",
    "neg", "abs", "square", "cube", "rsqrt", "sqrt", "reciprocal", "relu", "silu", "sigmoid", "tanh", "gelu_tanh",
    "gelu", "exp", "sin", "cos", "floor", "log", "expm1", "nonzero", "greater", "where", "sum", "softmax", "top",
    "gather", "scatter", "route", "pick", "experts", "combine",
    "softplus", "mul_add", "dot"
)  # fmt: skip  # by their numbers in native_program.c


class Attention(ctypes.Structure):
    """One block's attention, as the kernel is told about it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "beside", "sinks", "slopes")),
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "kv_heads", "dim", "width", "extra", "page", "window", "table", "threaded")
        ),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )


class _NativeOp(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p * 3),
        ("sizes", ctypes.c_int64 * DIMS),
        ("strides", ctypes.c_int64 * DIMS * 4),  # of the output, and of the inputs
        ("number", ctypes.c_double),
        ("what", ctypes.c_void_p),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("most", "room", "total")),
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
        self._sized: dict[int, SizedProgram] = {}
        self._most = most
        # Those of all sizes share it, since one of them runs at a time.
        self._arena = torch.empty(0, dtype=torch.float32)

    def run(self, hidden: Tensor, positions: Tensor, batch: PackedBatch) -> Tensor:
        """See `Span.forward_packed`; each of the batch's segments is one token that is cached in its pool."""
        pool = batch.pool
        assert pool is not None
        if pool is not self._pool:
            self._use(pool)
        tables = [batch.rows(at) for at in range(pool.layout.tables)]
        return self.for_rows(len(hidden)).run(hidden, positions, tables)

    def run_stacked(self, hidden: Tensor, stacked: StackedCaches, *, positions: Tensor) -> Tensor:
        """See `Span.run_stacked`: [R, 1, H] with position ids [R, 1]; the states of `stacked` become the next ones."""
        return self.for_rows(len(hidden)).run(hidden, positions, (), stacked)

    def takes(self, rows: int, states: Sequence[Tensor]) -> bool:
        """Whether it is for so many rows, with states like these."""
        return rows <= self._most and len(states) == len(self._first.states)

    def for_rows(self, rows: int) -> SizedProgram:
        """The program for one number of rows, made when it is first asked for."""
        if rows not in self._sized:
            self._sized[rows] = self._made_for(rows)
        return self._sized[rows]

    def _use(self, pool: PagePool) -> None:
        """Attention reads and writes this pool."""
        self._kept.clear()
        for at, own in self._whats.items():
            if isinstance(own, Attention):
                self._fill(own, self._first.ops[at], pool)
        self._pool = pool

    def _fill(self, own: Attention, op: Op, pool: PagePool) -> None:
        block, rules, latents = op.what
        own.table, place = pool.layout.place(block, None if latents else rules.window)
        query, key, third = (one.sizes for one in op.inputs)
        own.heads, own.kv_heads, own.dim = query[1], key[1], key[3]
        like = [torch.empty(1, own.kv_heads, 1, one[3], dtype=torch.float32) for one in (key, third)]
        keys, others = pool.store(place, *like)
        if latents:  # keys and values at once; what of the keys is rotary lies beside
            own.width, own.extra = own.dim, third[3]
            own.keys, own.values, own.beside = map(pointer, (keys, keys, others))
        else:
            own.width = third[3]
            own.keys, own.values = map(pointer, (keys, others))
        own.page, own.threaded = PAGE, THREADED
        (own.scale, own.softcap, own.window), *each_head = kernel_rules(rules, own.dim + own.extra)
        own.sinks, own.slopes = map(pointer, each_head)
        self._kept += each_head

    # --- for one number of rows -----------------------------------------------------------------------------

    def _made_for(self, rows: int) -> SizedProgram:
        assert self._first.output is not None
        assert self._second.output is not None
        ops = [(self._op(at, rows), self._whats[at]) for at in self._needed]
        used = {view.storage for op, _ in ops for view in (op.output, *op.inputs)} | {HIDDEN, POSITIONS}
        both = zip(self._first.lengths, self._second.lengths, strict=True)
        lengths = [self._at(rows, *own) if at in used else 0 for at, own in enumerate(both)]
        output = self._view(self._first.output, self._second.output, rows)
        whole = self._first.whole
        states, constants = self._first.states, self._first.constants
        return SizedProgram(ops, lengths, whole, constants, states, output, partial(self._take, rows))

    def _take(self, rows: int, length: int) -> Tensor:
        """At least `length` numbers for a pass of so many rows; as many as the largest pass will need."""
        if len(self._arena) < length:
            self._arena = torch.empty(-(-length // rows) * max(rows, self._most), dtype=torch.float32)
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


class SizedProgram:
    """A program for one number of rows: ready to run, over and over."""

    def __init__(
        self,
        ops: Pairs,
        lengths: list[int],
        whole: set[int],
        constants: dict[int, Tensor],
        states: Sequence[int],
        output: View,
        take: Callable[[int], Tensor],
    ) -> None:
        """`ops` with what the kernel is told about each; `lengths` are those of all storages, in elements.

        `whole` are the storages of int64, `states` those that each pass brings with it.

        `take` gives at least so many float32 of memory, which nobody else uses while this runs.
        """
        ops = with_copies(ops, lengths, whole)
        floats = [length * (2 if at in whole else 1) for at, length in enumerate(lengths)]
        places, size = places_of(
            [op for op, _ in ops],
            floats,
            fixed={POSITIONS, *constants, *states},
            kept={HIDDEN, output.storage},
        )
        inputs = [op.inputs[0] for op, _ in ops if op.kind in PRODUCTS]
        widest = max((prod(one.sizes) for one in inputs), default=0)  # activations in 8 bits, one a byte
        rows = max((prod(one.sizes[:-1]) for one in inputs), default=0)
        arena = take(size + -(-widest // 4) + rows)
        self._codes, self._steps = arena[size + rows :], arena[size:]
        self._hidden = arena.narrow(0, places[HIDDEN], lengths[HIDDEN])
        self._positions = torch.empty(lengths[POSITIONS], dtype=torch.int64)
        self._kept = [what for _, what in ops], list(constants.values())
        begins = {storage: arena.data_ptr() + at * arena.itemsize for storage, at in places.items()}
        outside = {POSITIONS: self._positions} | constants
        begins |= {storage: one.untyped_storage().data_ptr() for storage, one in outside.items()}
        begins |= dict.fromkeys(states, 0)
        self._pieces = [_Piece(own, begins, whole, states, arena, places) for own in _pieces(ops)]
        self._result = arena.as_strided(output.sizes, output.strides, places[output.storage] + output.offset)
        heads = [(op.inputs[0].sizes[1], op.inputs[1].sizes[1]) for op, _ in ops if op.kind == "attend"]
        self._sharing = max((own // kv for own, kv in heads), default=0)  # heads with the same keys
        self._run = kernels().run_program

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        tables: Sequence[OneTokenRows],
        stacked: StackedCaches | None = None,
    ) -> Tensor:
        """Hidden states, like `hidden`, behind the last block; `stacked` are caches where blocks have states."""
        self._hidden.copy_(hidden.reshape(-1))
        self._positions.copy_(positions.reshape(-1))
        threads = torch.get_num_threads()
        rows = (_Rows * len(tables))(*(_Rows(*one.described()) for one in tables))
        scores = self._scores(tables, threads)
        scratch = rows, scores.data_ptr(), self._codes.data_ptr(), self._steps.data_ptr(), threads
        states = [] if stacked is None else [one.data_ptr() for one in stacked.states]
        for piece in self._pieces:
            piece.begin_with(states)
            self._run(piece.ops, len(piece.ops), *scratch)
            if piece.attention is not None and stacked is not None:
                piece.attend(stacked)
        return self._result.clone().view(hidden.shape)

    def _scores(self, tables: Sequence[OneTokenRows], threads: int) -> Tensor:
        """Scratch for any block's attention, whichever of the pool's tables it reads."""
        return torch.empty(
            threads * self._sharing * max((one.room for one in tables), default=0), dtype=torch.float32
        )


class _Piece:
    """Operators that are carried out in one call, and attention behind them that is computed cache by cache."""

    def __init__(
        self,
        ops: Pairs,
        begins: dict[int, int],
        whole: set[int],
        states: Sequence[int],
        arena: Tensor,
        places: dict[int, int],
    ) -> None:
        """`begins` is where each storage does, 0 for `states`; those of the attention lie at `places` of `arena`."""
        self.attention = ops[-1][0] if ops and ops[-1][0].kind == "attend_each" else None
        native = ops[:-1] if self.attention is not None else ops
        self.ops = (_NativeOp * len(native))(*(_native(op, what, begins, whole) for op, what in native))
        # Operator, which of its tensors, which state, and where in it.
        self._of_states = [
            (self.ops[number], at, states.index(view.storage), 4 * view.offset)
            for number, (op, _) in enumerate(native)
            for at, view in enumerate((op.output, *op.inputs))
            if view.storage in states
        ]
        views = () if self.attention is None else (self.attention.output, *self.attention.inputs)
        self._views = [
            arena.as_strided(one.sizes, one.strides, places[one.storage] + one.offset) for one in views
        ]

    def begin_with(self, states: Sequence[int]) -> None:
        """States begin there in this pass."""
        for op, at, state, offset in self._of_states:
            if at:
                op.inputs[at - 1] = states[state] + offset
            else:
                op.out = states[state] + offset

    def attend(self, stacked: StackedCaches) -> None:
        """The attention behind the operators, as the family's code would have it."""
        assert self.attention is not None
        output, query, key, value = self._views
        block, rules = self.attention.what
        # Copies, since they are kept.
        kept = stacked.update(key.clone(), value.clone(), block)
        output.copy_(stacked.attend(block, query, *kept, rules))


def _pieces(ops: Pairs) -> list[Pairs]:
    """Cut behind each attention that is computed cache by cache."""
    ends = [at + 1 for at, (op, _) in enumerate(ops) if op.kind == "attend_each"]
    return [ops[begin:end] for begin, end in itertools.pairwise([0, *ends, len(ops)])]


def _native(op: Op, what: Any, begins: dict[int, int], whole: set[int]) -> _NativeOp:
    """An operator for the kernel; `begins` is where each storage does."""

    def place(view: View) -> int:
        width = 8 if view.storage in whole else 4
        return begins[view.storage] + view.offset * width

    native = _NativeOp(KINDS.index(op.kind), place(op.output), number=op.number)
    native.inputs[: len(op.inputs)] = [place(one) for one in op.inputs]
    if what is not None:
        native.what = ctypes.addressof(what)
    sizes, strides = dimensions(op)
    native.sizes[:] = sizes
    for own, one in zip(native.strides, strides, strict=False):
        own[:] = one
    return native


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
    wanted, found = {recording.output.storage, *recording.states}, []
    for at in reversed(range(len(recording.ops))):
        op = recording.ops[at]
        if op.kind in ("attend", "attend_each") or op.output.storage in wanted:
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
