"""Earlier states of a sequence's blocks, so that it can go back without being computed anew from its beginning.

Invariant: what has been through the blocks since the oldest snapshot is kept as well, so a sequence reaches any token
behind that: it takes the state of the last snapshot before it, and the few tokens after are computed again. Keys and
values are in no snapshot, since they can be cut off.

A snapshot is taken where somebody may go back to (a turn's beginning) and every `SPACING` tokens; few are kept, since
states may be as large as the keys and values of hundreds of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corolla.models.attention.passes import lengths_of

SPACING = 64  # tokens between snapshots while a reply is generated
TURNS, OTHERS = 2, 2  # snapshots of either kind that are kept
SNAPSHOTS = TURNS + OTHERS


@dataclass(frozen=True, eq=False)
class Passed:
    """Tokens that went through the blocks in one pass, [R, T, W]; position ids [R, T] if these were given."""

    hidden: Tensor
    positions: Tensor | None
    start: int
    order: Tensor | None = None  # the rows of today, as rows of then

    @property
    def end(self) -> int:
        """The position behind them."""
        return self.start + int(self.hidden.shape[1])

    def select_rows(self, rows: Tensor) -> Passed:
        """Today's rows are now those that int64 [R'] names."""
        return replace(self, order=_composed(self.order, rows))

    def part(self, start: int, end: int) -> Passed:
        """Of these, the tokens at positions [start, end)."""
        here = slice(max(0, start - self.start), max(0, end - self.start))
        positions = None if self.positions is None else self.positions[:, here]
        return replace(self, hidden=self.hidden[:, here], positions=positions, start=max(start, self.start))

    def of_today(self) -> tuple[Tensor, Tensor]:
        """Of today's rows: inputs [R', T, W] and position ids int64 [R', T]."""
        rows, count = self.hidden.shape[:2]
        ids = self.positions
        if ids is None:
            ids = torch.arange(self.start, self.start + count, device=self.hidden.device)[None]
        ids = ids.expand(rows, -1)
        return (self.hidden, ids) if self.order is None else (self.hidden[self.order], ids[self.order])


def _composed(order: Tensor | None, rows: Tensor) -> Tensor:
    return rows if order is None else order[rows]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What layers kept when `length` tokens had been through them, but for keys and values."""

    length: int
    turn: bool
    states: list[Any]
    order: Tensor | None = None  # the rows of today, as rows of then

    def select_rows(self, rows: Tensor) -> Snapshot:
        """Today's rows are now those that int64 [R'] names."""
        return replace(self, order=_composed(self.order, rows))


@dataclass
class Snapshots:
    """Of one sequence, oldest first."""

    taken: list[Snapshot] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)  # since the oldest

    @property
    def nbytes(self) -> int:
        """Memory of what has passed; that of the states is counted with the cache's own."""
        return sum(one.hidden.nbytes for one in self.passed)

    def is_due(self, length: int, *, turn: bool) -> bool:
        """Whether one is to be taken, of a sequence of so many tokens."""
        last = self.taken[-1].length if self.taken else -SPACING
        return length > max(last, 0) and (turn or length - last >= SPACING)

    def add(self, snapshot: Snapshot) -> None:
        """Keep it, and let older ones go."""
        self.taken.append(snapshot)
        for turn, most in ((True, TURNS), (False, OTHERS)):
            alike = [one for one in self.taken if one.turn == turn]
            for old in alike[: max(0, len(alike) - most)]:
                self.taken.remove(old)
        first = self.taken[0].length
        self.passed = [one.part(first, one.end) for one in self.passed if one.end > first]

    def record(self, hidden: Tensor, positions: Tensor | None, start: int) -> None:
        """These tokens have been through the blocks."""
        if self.taken:
            self.passed.append(Passed(hidden.detach(), positions, start))

    def before(self, length: int, *, steps_differ: bool) -> Snapshot | None:
        """The last one from which a sequence of so many tokens is reached.

        Where a token by itself is computed otherwise, not one from which one token of several would be left.
        """
        return next(
            (
                one
                for one in reversed(self.taken)
                if one.length <= length and not (steps_differ and self._leaves_one(one.length, length))
            ),
            None,
        )

    def _leaves_one(self, start: int, length: int) -> bool:
        return start + 1 == length and any(one.start <= start and one.end > length for one in self.passed)

    def go_back(self, length: int, last: Snapshot) -> tuple[Tensor, Tensor, list[int]] | None:
        """Forget what is behind `length` tokens; gives inputs [R, T, W] and position ids of what is to be computed
        again from `last`, which is before it, and in passes of how many tokens that came."""
        self.taken = [one for one in self.taken if one.length <= length]
        touched = [one for one in self.passed if last.length < one.end and one.start < length]
        again = [one.part(last.length, length) for one in touched]
        lengths = lengths_of(
            (one.end - one.start, one.end < whole.end) for one, whole in zip(again, touched, strict=True)
        )
        self.passed = [one.part(0, last.length) for one in self.passed if one.start < last.length]
        if not again:
            return None
        hidden, ids = zip(*(one.of_today() for one in again), strict=True)
        return torch.cat(hidden, 1), torch.cat(ids, 1), lengths

    def select_rows(self, rows: Tensor) -> None:
        """The rows are now those that int64 [R'] names."""
        self.taken = [one.select_rows(rows) for one in self.taken]
        self.passed = [one.select_rows(rows) for one in self.passed]

    def copy(self) -> Snapshots:
        """For a sequence that goes on from the same: nothing that is kept is ever written to."""
        return Snapshots(list(self.taken), list(self.passed))


def copied(value: Any, order: Tensor | None = None) -> Any:
    """A copy of tensors in lists and dictionaries, their rows in another order."""
    if isinstance(value, Tensor):
        return value.clone() if order is None else value.index_select(0, order.to(value.device))
    if isinstance(value, dict):
        return {key: copied(one, order) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [copied(one, order) for one in value]
    return value
