"""Rows as they were found, good or bad.

Invariant: what cannot be read as a row at all is still one row, so that the numbers of the others are right
and it is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOO_DEEP = "it is nested too deeply"
MOST_SHOWN = 200  # characters of what could not be read


@dataclass(frozen=True)
class Unreadable:
    """A row that is none, with the reason."""

    reason: str
    detail: str
    shown: str


@dataclass(frozen=True)
class Found:
    """What a source holds: numbers from 1 with rows; the numbers are of lines where there are any."""

    rows: list[tuple[int, Any]]
    unit: str = "row"  # or "line"


def unreadable(reason: str, text: str, detail: str = "") -> Unreadable:
    """A row that is none; the beginning of `text` is kept to be shown, `detail` for where no row is any."""
    return Unreadable(reason, detail or reason, text[:MOST_SHOWN].strip())


def listed(items: list[Any]) -> Found:
    """Items by their place in a list."""
    return Found(list(enumerate(items, start=1)))
