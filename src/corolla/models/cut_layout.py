"""What crosses a cut between two blocks, as one tensor [R, T, W] of everything that the blocks behind it need.

Mostly that is a hidden state a token, and nothing is done to it. Some families have several streams of hidden states;
or side inputs, made of the tokens before the first block, or the token ids themselves; or tensors that blocks share,
such as keys and values that later ones take from an earlier one, and what a block returns for the next one beside
hidden states. All of it lies beside the hidden states of its token: so histories, replays, micro-batches, audits and
gradients carry it without knowing, and W depends on the cut alone.

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
class TokenLayout:
    """How a tensor of R rows of T tokens lies: R at one dimension, T at another, what each token has at the rest."""

    rows: int
    tokens: int
    size: tuple[int, ...]
    below: int = 0  # of whole numbers: what all of them are less than; 0 for numbers with a point

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return prod(self.size) * max(1, self._digits)

    @property
    def _digits(self) -> int:
        """Of a whole number, to the base of 256: any arithmetic has all of these, but not all larger ones."""
        return -(-max(1, self.below - 1).bit_length() // 8) if self.below else 0

    def flat(self, tensor: Tensor) -> Tensor:
        """Such a tensor as [R, T, width]."""
        turned = tensor.movedim((self.rows, self.tokens), (0, 1))
        if self.below:
            turned = torch.stack([turned >> 8 * at & 255 for at in range(self._digits)], -1).to(torch.uint8)
        return turned.reshape(*turned.shape[:2], self.width)

    def shaped(self, flat: Tensor) -> Tensor:
        """[R, T, width] as such a tensor. Whatever a peer has sent, whole numbers are such that there can be."""
        if self.below:
            digits = flat.nan_to_num().clamp(0, 255).round().long()
            digits = digits.reshape(*flat.shape[:-1], -1, self._digits)
            places = torch.tensor([256**at for at in range(self._digits)], device=flat.device)
            flat = (digits * places).sum(-1).clamp(max=self.below - 1)
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
class SideInput:
    """An argument of the blocks that is made before the first one, of the tokens, or is their ids."""

    name: str
    place: int  # among the block's arguments, hidden states being 0
    layout: TokenLayout
    each: bool  # whether each block has its own; else all have the same


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that one block puts into the dictionary that all blocks are given, and later blocks read."""

    key: Any
    index: int  # of the tuple that stands there
    made_by: int
    last_read_by: int
    layout: TokenLayout

    def crosses(self, cut: int) -> bool:
        """Whether blocks behind this cut read what a block before it has put there."""
        return self.made_by < cut <= self.last_read_by


@dataclass(frozen=True)
class PassedOn:
    """An argument of the blocks that is what the one before has returned beside hidden states.

    Whole numbers are the places of tokens that were chosen for a token, in any order. Where there is less to choose
    from, its own place stands for what is missing, as it does for places behind it, which it does not see: where one
    of these was chosen, all that it sees were.
    """

    name: str
    place: int  # among the block's arguments, hidden states being 0
    index: int  # of the tuple that blocks return
    depth: int
    layout: TokenLayout

    def crosses(self, cut: int) -> bool:
        """Whether there are blocks on both sides of this cut."""
        return 0 < cut < self.depth

    def flat(self, value: Tensor, past: int) -> Tensor:
        """Such an argument as [R, T, width], of tokens behind `past` others."""
        if self.layout.below:
            own = _places(value, past)
            missing = self.layout.size[0] - value.shape[-1]
            value = (
                torch.cat([value.minimum(own), own.expand(*value.shape[:-1], missing)], -1).sort(-1).values
            )
        return self.layout.flat(value)

    def shaped(self, flat: Tensor, past: int) -> Tensor:
        """[R, T, width] as such an argument; whatever a peer has sent, places are such that there are."""
        value = self.layout.shaped(flat)
        return value.minimum(_places(value, past)) if self.layout.below else value


def _places(value: Tensor, past: int) -> Tensor:
    """Those of the tokens of [R, T, …] behind `past` others, [T, 1]."""
    return torch.arange(past, past + value.shape[1], dtype=value.dtype, device=value.device)[:, None]


@dataclass(frozen=True)
class CutLayout:
    """Of a model of `depth` blocks. A cut is the index of the block behind it."""

    hidden: TokenLayout
    depth: int
    sides: tuple[SideInput, ...] = ()
    store: tuple[str, int] | None = None  # name and place of the argument that is the dictionary
    shared: tuple[SharedTensor, ...] = ()
    passed: tuple[PassedOn, ...] = ()
    counted: tuple[str, int] | None = None  # name and place of the argument that is the block's own index
    streams: int = 1  # of hidden states a token

    @cached_property
    def plain(self) -> bool:
        """Whether it is one hidden state a token, and nothing else."""
        more = self.sides or self.shared or self.passed
        return not more and self.streams == 1 and (self.hidden.rows, self.hidden.tokens) == (0, 1)

    @property
    def has_whole_numbers(self) -> bool:
        """Whether some of it is nothing any more where it is rounded."""
        return any(one.layout.below for one in self.sides) or any(one.layout.below for one in self.passed)

    @property
    def handed(self) -> tuple[SharedTensor | PassedOn, ...]:
        """What blocks hand to others behind them."""
        return (*self.shared, *self.passed)

    def width(self, cut: int) -> int:
        """W, of what crosses there."""
        return sum(self._widths(cut))

    def _widths(self, cut: int) -> list[int]:
        left = self.depth - cut
        sides = [one.layout.width * (left if one.each else 1) for one in self.sides] if left else []
        return [self.hidden.width, *(one.layout.width for one in self._handed_at(cut)), *sides]

    def _handed_at(self, cut: int) -> list[SharedTensor | PassedOn]:
        return [one for one in self.handed if one.crosses(cut)]

    def leaving(self, entering: Tensor, start: int, end: int) -> Tensor:
        """A tensor of the form that leaves blocks [start, end), given what enters them; of no meaning."""
        if self.width(start) == self.width(end):
            return entering
        return entering[..., :1].expand(*entering.shape[:-1], self.width(end))

    def split(self, tensor: Tensor, cut: int) -> CutTensors:
        """[R, T, W] taken apart."""
        hidden, *rest = torch.split(tensor, self._widths(cut), dim=-1)
        handed = self._handed_at(cut)
        return CutTensors(
            self.hidden.shaped(hidden),
            dict(zip(handed, rest[: len(handed)], strict=True)),
            dict(zip(self.sides, rest[len(handed) :], strict=bool(rest[len(handed) :]))),
            cut,
        )

    def join(self, crossed: CutTensors, cut: int) -> Tensor:
        """[R, T, W] of what was split at an earlier cut, with what has become of it since."""
        flat = [self.hidden.flat(crossed.hidden)]
        flat += [crossed.handed[one] for one in self._handed_at(cut)]
        if cut < self.depth:
            flat += [crossed.behind(one, cut) for one in self.sides]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def collect(self, hidden: Tensor, given: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[R, T, W] of what the family's own loop gives its blocks, the first one `hidden`."""
        sides = {}
        for one in self.sides:
            parts = [one.layout.flat(each[one.name]) for each in (given if one.each else given[:1])]
            sides[one] = torch.cat(parts, dim=-1)
        return self.join(CutTensors(hidden, {}, sides, 0), 0)


@dataclass
class CutTensors:
    """What crossed a cut: hidden states in the family's form; the rest flat, [R, T, width]."""

    hidden: Tensor
    handed: dict[SharedTensor | PassedOn, Tensor]  # by blocks before the cut to those behind it
    sides: dict[SideInput, Tensor]  # those of all blocks behind the cut, side by side
    cut: int

    def of_block(self, block: int) -> Iterator[tuple[SideInput, Tensor]]:
        """The arguments of one block, in the family's form."""
        for side, values in self.sides.items():
            first = (block - self.cut) * side.layout.width if side.each else 0
            yield side, side.layout.shaped(values.narrow(-1, first, side.layout.width))

    def behind(self, side: SideInput, cut: int) -> Tensor:
        """What of a side the blocks behind a later cut are given."""
        values = self.sides[side]
        return values[..., (cut - self.cut) * side.layout.width :] if side.each else values
