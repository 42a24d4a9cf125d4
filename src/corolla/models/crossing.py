"""What crosses a cut between two blocks, as one tensor [R, T, W] of everything that the blocks behind it need.

Mostly that is a hidden state a token, and nothing is done to it. Some families have several streams of hidden states;
blocks that are given more, made of the tokens before the first one (*sides*); or keys and values that later blocks
take from earlier ones (*handed on*). All of it lies beside the hidden states of its token: so histories, replays,
micro-batches, audits and gradients carry it without knowing, and W depends on the cut alone.

Invariant: nothing is rounded on the way; what a span is given is what the family's own loop would have given its
blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """How a tensor of R rows of T tokens lies: R at one dimension, T at another, what each token has at the rest."""

    rows: int
    tokens: int
    size: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return prod(self.size)

    def flat(self, tensor: Tensor) -> Tensor:
        """Such a tensor as [R, T, width]."""
        turned = tensor.movedim((self.rows, self.tokens), (0, 1))
        return turned.reshape(*turned.shape[:2], self.width)

    def shaped(self, flat: Tensor) -> Tensor:
        """[R, T, width] as such a tensor."""
        apart = flat.reshape(*flat.shape[:2], *self.size)
        return apart.movedim((0, 1), (self.rows, self.tokens))

    def as_rows(self, tensor: Tensor, size: int) -> Tensor:
        """Such a tensor of S streams, each `size` wide, as rows [S × R, T, size]."""
        flat = self.flat(tensor)
        streams = flat.reshape(*flat.shape[:2], self.width // size, size)
        return streams.movedim(2, 0).flatten(0, 1)

    def of_rows(self, rows: Tensor, count: int) -> Tensor:
        """[S × R, T, size] of `count` rows as such a tensor."""
        streams = rows.reshape(-1, count, *rows.shape[1:])
        return self.shaped(streams.movedim(0, 2).flatten(2))


@dataclass(frozen=True)
class Side:
    """An argument of the blocks that is made before the first one, of the tokens."""

    name: str
    place: int  # among the block's arguments, hidden states being 0
    form: Form
    each: bool  # whether each block has its own; else all have the same


@dataclass(frozen=True)
class Handed:
    """A tensor that block `by` puts into the dictionary that all blocks are given; block `until` reads it last."""

    key: Any
    index: int  # of the tuple that stands there
    by: int
    until: int
    form: Form

    def crosses(self, cut: int) -> bool:
        """Whether blocks behind this cut read what a block before it has put there."""
        return self.by < cut <= self.until


@dataclass(frozen=True)
class Crossing:
    """Of a model of `depth` blocks. A cut is the index of the block behind it."""

    hidden: Form
    depth: int
    sides: tuple[Side, ...] = ()
    store: tuple[str, int] | None = None  # name and place of the argument that is the dictionary
    handed: tuple[Handed, ...] = ()

    @cached_property
    def plain(self) -> bool:
        """Whether it is one hidden state a token, and nothing else."""
        return not (self.sides or self.handed) and (self.hidden.rows, self.hidden.tokens) == (0, 1)

    def width(self, cut: int) -> int:
        """W, of what crosses there."""
        return sum(self._widths(cut))

    def _widths(self, cut: int) -> list[int]:
        left = self.depth - cut
        sides = [one.form.width * (left if one.each else 1) for one in self.sides] if left else []
        return [self.hidden.width, *(one.form.width for one in self._handed(cut)), *sides]

    def _handed(self, cut: int) -> list[Handed]:
        return [one for one in self.handed if one.crosses(cut)]

    def leaving(self, entering: Tensor, start: int, end: int) -> Tensor:
        """A tensor of the form that leaves blocks [start, end), given what enters them; of no meaning."""
        if self.width(start) == self.width(end):
            return entering
        return entering[..., :1].expand(*entering.shape[:-1], self.width(end))

    def split(self, crossing: Tensor, cut: int) -> Crossed:
        """[R, T, W] taken apart."""
        hidden, *rest = torch.split(crossing, self._widths(cut), dim=-1)
        handed = self._handed(cut)
        return Crossed(
            self.hidden.shaped(hidden),
            dict(zip(handed, rest[: len(handed)], strict=True)),
            dict(zip(self.sides, rest[len(handed) :], strict=bool(rest[len(handed) :]))),
            cut,
        )

    def join(self, crossed: Crossed, cut: int) -> Tensor:
        """[R, T, W] of what was split at an earlier cut, with what has become of it since."""
        flat = [self.hidden.flat(crossed.hidden)]
        flat += [crossed.handed[one] for one in self._handed(cut)]
        if cut < self.depth:
            flat += [crossed.behind(one, cut) for one in self.sides]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def collect(self, hidden: Tensor, given: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[R, T, W] of what the family's own loop gives its blocks, the first one `hidden`."""
        sides = {}
        for one in self.sides:
            parts = [one.form.flat(each[one.name]) for each in (given if one.each else given[:1])]
            sides[one] = torch.cat(parts, dim=-1)
        return self.join(Crossed(hidden, {}, sides, 0), 0)


@dataclass
class Crossed:
    """What crossed a cut: hidden states in the family's form; the rest flat, [R, T, width]."""

    hidden: Tensor
    handed: dict[Handed, Tensor]
    sides: dict[Side, Tensor]  # those of all blocks behind the cut, side by side
    cut: int

    def of_block(self, block: int) -> Iterator[tuple[Side, Tensor]]:
        """The arguments of one block, in the family's form."""
        for side, values in self.sides.items():
            first = (block - self.cut) * side.form.width if side.each else 0
            yield side, side.form.shaped(values.narrow(-1, first, side.form.width))

    def behind(self, side: Side, cut: int) -> Tensor:
        """What of a side the blocks behind a later cut are given."""
        values = self.sides[side]
        return values[..., (cut - self.cut) * side.form.width :] if side.each else values
