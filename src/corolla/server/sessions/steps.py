"""Generation steps on their way through the engine: packed with others', or by themselves.

Invariant: a step's outputs depend on its own session only. One that fails in company is computed again
alone, so an error reaches the client whose step it was and nobody else. Padding is neither computed nor
cached: rows are told apart by the mask, and their padding's outputs are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from corolla.models.attention.packing import PackedBatch, Segment
from corolla.models.attention.pages import PagePool
from corolla.models.layered import LayeredRow
from corolla.models.prompts import DeepRows
from corolla.server.scheduler.engine import Kind
from corolla.server.sessions.sessions import CachedSession

DECODE_TOKENS = 8  # a step of so few tokens a row is generation (speculation included), not a prompt


def kind_of(tokens: int) -> Kind:
    """The class of a step of so many tokens a row."""
    return Kind.DECODE if tokens <= DECODE_TOKENS else Kind.PREFILL


class PackedStep:
    """One `Step` of a session whose family can be packed; computed in one or more passes."""

    def __init__(
        self,
        session: CachedSession,
        hidden: Tensor,
        *,
        position: int,
        order: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        room: int,
    ) -> None:
        """`hidden` [R, T, H] stands at column `position`; `mask` bool [R, position + T], `positions` [R, T].

        `room` is how many tokens a row may reach in the present call.
        """
        self.session: Any = session
        self.group: Any = session.span
        self.kind = kind_of(int(hidden.shape[1]))
        self._hidden = hidden
        self._position = position
        self._order = order
        self._mask = mask
        self._room = room
        self._started = False
        rows, count, size = hidden.shape
        self._rows, self._count = int(rows), int(count)
        real = None if mask is None else mask[:, position:].reshape(-1)
        # Where each packed token stands in the flattened [R × T]; None when there is no padding.
        self._places = None if real is None or bool(real.all()) else real.nonzero().flatten()
        columns = torch.arange(position, position + count).repeat(rows) if positions is None else positions
        self._ids = self._real(columns.reshape(-1))
        self._inputs = self._real(hidden.reshape(-1, size))
        self._outputs = torch.empty_like(self._inputs)
        self._ends = self._row_ends(real)
        self.tokens_left = int(self._inputs.shape[0])
        self.segments: list[Segment] = []

    def _real(self, flat: Tensor) -> Tensor:
        return flat if self._places is None else flat[self._places]

    def _row_ends(self, real: Tensor | None) -> list[int]:
        """The packed token behind each row's last one."""
        if self._places is None or real is None:
            return [self._count * (row + 1) for row in range(self._rows)]
        ends: list[int] = real.reshape(self._rows, -1).sum(1).cumsum(0).tolist()
        return ends

    @property
    def _at(self) -> int:
        return int(self._inputs.shape[0]) - self.tokens_left

    def load(self, count: int, begin: int) -> tuple[list[Segment], Tensor, Tensor]:
        """The next `count` tokens as segments from packed token `begin` on, their inputs [n, H] and ids [n]."""
        if not self._started:
            self.session.rearrange(self._rows, self._position, self._order)
            self._started = True
        first, last = self._at, self._at + count
        self.segments = []
        for row, end in enumerate(self._ends):
            start = max(first, 0 if row == 0 else self._ends[row - 1])
            stop = min(last, end)
            if start < stop:
                place = begin + start - first
                cached = self.session.cached[row]
                self.segments.append(Segment(place, stop - start, cached, self._room))
        return self.segments, self._inputs[first:last], self._ids[first:last]

    def undo(self) -> None:
        """Take back what a pass that failed has cached."""
        for one in self.segments:
            if one.prepared and one.row is not None:
                one.row.truncate(one.past)

    def store(self, output: Tensor) -> None:
        """The pass's outputs [n, H] for the tokens loaded last."""
        count = int(output.shape[0])
        self._outputs[self._at : self._at + count] = output
        self.tokens_left -= count
        for one in self.segments:
            if isinstance(one.row, LayeredRow):
                one.row.trim()

    def result(self) -> Tensor:
        """Outputs [R, T, H] on the CPU, in the dtype of the inputs; the session has taken the step."""
        if not self._started:  # nothing but padding
            self.session.rearrange(self._rows, self._position, self._order)
        session = self.session
        session.rows, session.length = self._rows, self._position + self._count
        session.mask = None if self._mask is None or bool(self._mask.all()) else self._mask
        if self._places is None:
            return self._outputs.view(self._hidden.shape)
        whole = self._hidden.new_zeros(self._rows * self._count, self._hidden.shape[2])
        whole[self._places] = self._outputs
        return whole.view(self._hidden.shape)


def run_pass(pool: PagePool, parts: list[tuple[PackedStep, int]]) -> list[BaseException | None]:
    """Take the next tokens of steps of one span through it together; the error of each, or None."""
    try:
        _run(pool, parts)
    except Exception as error:
        for step, _ in parts:
            step.undo()
        if len(parts) == 1:
            return [error]
        return [run_pass(pool, [part])[0] for part in parts]
    return [None] * len(parts)


def _run(pool: PagePool, parts: list[tuple[PackedStep, int]]) -> None:
    loaded, begin = [], 0
    for step, count in parts:
        loaded.append(step.load(count, begin))
        begin += count
    if not begin:
        return
    span = parts[0][0].session.span
    segments = [one for own, _, _ in loaded for one in own]
    hidden = torch.cat([inputs for _, inputs, _ in loaded]) if len(loaded) > 1 else loaded[0][1]
    ids = torch.cat([own for _, _, own in loaded]) if len(loaded) > 1 else loaded[0][2]
    with torch.inference_mode():
        batch = PackedBatch(segments, pool)
        output = span.forward_packed(
            hidden.to(span.device, span.dtype),
            batch,
            positions=ids.to(span.device),
            deep=_deep_rows(parts),
        ).to("cpu", hidden.dtype)
    begin = 0
    for step, count in parts:
        step.store(output[begin : begin + count])
        begin += count


def _deep_rows(parts: list[tuple[PackedStep, int]]) -> DeepRows | None:
    """The deep prompts of those sessions that have some. A prompt is never padding: it counts real tokens."""
    places, prompts = [], []
    for step, _ in parts:
        own = step.session.prompts
        if own is not None:
            for one in step.segments:
                places.append((one.begin, one.past, one.count))
                prompts.append(own)
    return DeepRows.of(places, prompts) if places else None


def pieces(
    session: CachedSession,
    hidden: Tensor,
    *,
    position: int,
    order: Tensor | None,
    mask: Tensor | None,
    positions: Tensor | None,
    width: int,
) -> Iterator[Callable[[], Tensor]]:
    """For a family that cannot be packed: a step cut into computations of at most `width` tokens a row.

    Each gives its outputs [R, T', H] on the CPU, in the dtype of the inputs; to be run one after the other.
    """
    device, dtype = session.span.device, session.span.dtype
    rows, count = int(hidden.shape[0]), int(hidden.shape[1])

    def piece(begin: int, end: int) -> Tensor:
        if begin == 0:
            session.rearrange(rows, position, None if order is None else order.to(device))
        with torch.inference_mode():
            output = session.span.forward(
                hidden[:, begin:end].to(device, dtype),
                mask=None if mask is None else mask[:, : position + end].to(device),
                positions=None if positions is None else positions[:, begin:end].to(device),
                cache=session.plain,
                prompts=session.prompts,
            )
        if end == count:
            session.rows, session.length = rows, position + count
            session.mask = None if mask is None or bool(mask.all()) else mask
        return output.to("cpu", hidden.dtype)

    for begin in range(0, count, width):
        yield partial(piece, begin, min(begin + width, count))
