"""What a recording is made of: operators, and how their tensors lie.

Invariant: sizes, strides and offsets are in elements, whatever the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

UNKNOWN = "unknown"  # an operator that is not understood; `what` says why
HIDDEN, POSITIONS = 0, 1  # storages of what goes in


class NotCompilable(Exception):
    """The blocks do something that cannot be recorded; they are run by the family's code alone."""


@dataclass(frozen=True)
class View:
    """A tensor as it lies in a storage, in elements."""

    storage: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operator. `number` and `what` are its own: an epsilon, a frozen layer or several, a block and its rules."""

    kind: str
    output: View
    inputs: tuple[View, ...]
    number: float = 0.0
    what: Any = None


@dataclass
class Recording:
    """The operators of one pass over some rows."""

    ops: list[Op] = field(default_factory=list)
    # By storage: weights, and what came of them alone.
    constants: dict[int, Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # of each storage, in elements
    whole: set[int] = field(default_factory=set)  # storages of int64; all others are float32
    output: View | None = None
    states: list[int] = field(default_factory=list)  # storages that go in and come out
