"""What a server has been given in one session, kept so that any replacement can be given the same.

Invariant: `inputs()` equals what the span's cache was computed from, or will be once its server has heard of the next
step: rolled-back tokens are gone and rows stand in the order of the latest reorder. Reordering costs nothing until
a replay needs the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Segment:
    """The inputs of one step, as they were sent; `rows` says which of them the cached rows continue."""

    hidden: Tensor  # [r, T, H]
    positions: Tensor | None  # int64 [r, T]
    rows: Tensor | None = None  # int64 [R]

    @property
    def length(self) -> int:
        return int(self.hidden.shape[1])

    def first(self, count: int) -> _Segment:
        positions = None if self.positions is None else self.positions[:, :count]
        return replace(self, hidden=self.hidden[:, :count], positions=positions)

    def select(self, rows: Tensor) -> _Segment:
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def tensors(self, start: int) -> tuple[Tensor, Tensor]:
        """Inputs [R, T, H] and position ids [R, T] in the present order of rows."""
        hidden, positions = self.hidden, self.positions
        if positions is None:
            positions = torch.arange(start, start + self.length).expand(hidden.shape[0], -1)
        if self.rows is not None:
            hidden, positions = hidden[self.rows], positions[self.rows]
        return hidden, positions


class History:
    """The inputs of one span's session, in order, and how far its server is behind them."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self.length = 0  # tokens a row
        self.rows = 0  # sequences; 0 before the first step
        self.held = 0  # tokens a row that the server holds; more than `length` until it hears of a rollback
        # How the server is to reorder its rows, int64 [R], with the next step.
        self.order: Tensor | None = None
        self.epoch = 0  # steps that took something back or reordered it, as the server counts them

    @property
    def nbytes(self) -> int:
        """Memory of the inputs."""
        return sum(segment.hidden.nbytes for segment in self._segments)

    def copy(self, length: int) -> History:
        """Another history of the first `length` tokens; tensors are shared, they never change.

        The order is still to be told to whoever begins with what this one's server holds.
        """
        twin = History()
        twin._segments, twin.length = list(self._segments), self.length
        twin.rows, twin.order = self.rows, self.order
        twin.truncate(length)
        return twin

    def append(self, hidden: Tensor, positions: Tensor | None, known: int = 0) -> None:
        """A step has been taken, its inputs are [R, T, H]; `positions` None means that they follow on from `length`.

        The server held the first `known` of its tokens already.
        """
        self.epoch += self.held > 0 and (self.length + known < self.held or self.order is not None)
        self._segments.append(_Segment(hidden, positions))
        self.length += int(hidden.shape[1])
        self.rows, self.held, self.order = int(hidden.shape[0]), self.length, None

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        while self.length > length:
            last = self._segments.pop()
            self.length -= last.length
            if self.length < length:
                kept = last.first(length - self.length)
                self._segments.append(kept)
                self.length += kept.length

    def select_rows(self, rows: Tensor) -> None:
        """Rows now continue the former rows that int64 [R] names."""
        self._segments = [segment.select(rows) for segment in self._segments]
        self.order = rows if self.order is None else self.order[rows]
        self.rows = len(rows)

    def inputs(self) -> tuple[Tensor, Tensor] | None:
        """Inputs [R, length, H] and position ids [R, length]; None when there are none."""
        parts, start = [], 0
        for segment in self._segments:
            parts.append(segment.tensors(start))
            start += segment.length
        if not parts:
            return None
        return torch.cat([hidden for hidden, _ in parts], 1), torch.cat([ids for _, ids in parts], 1)
