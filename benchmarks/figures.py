"""What a figure is, and how one is measured.

Invariant: every run of a figure has a run of its baseline beside it, made just before or after, under the
same conditions but for what is compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import Bench, Pair, Values


@dataclass(frozen=True)
class Figure:
    """One line of the table; `target` bounds ours ÷ baseline, from above when `at_most`.

    With AVX-512 it is `newer`, where that is given: there is more to win there.
    """

    name: str
    title: str
    unit: str
    baseline: str
    target: float
    at_most: bool = False
    newer: float | None = None

    def wanted(self, newer: bool) -> float:
        """The bound, on a `newer` processor or on another."""
        return self.newer if newer and self.newer is not None else self.target

    def met(self, ratio: float, newer: bool) -> bool:
        """Whether the ratio is what was aimed at."""
        wanted = self.wanted(newer)
        return ratio <= wanted if self.at_most else ratio >= wanted


@dataclass(frozen=True)
class Line:
    """One measuring that gives one or more figures. `prepare` raises `NotMeasured`."""

    figures: tuple[Figure, ...]
    prepare: Callable[[Bench], Pair]
    quantization: str | None = None  # lines of one swarm are measured one after another


@dataclass(frozen=True)
class Measured:
    """What came of a figure."""

    figure: Figure
    ours: list[float]
    baseline: list[float]
    details: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Ratio of medians."""
        return statistics.median(self.ours) / statistics.median(self.baseline)


def measure(line: Line, bench: Bench, repeats: int) -> list[Measured]:
    """Prepare, warm up, and repeat. Raises `NotMeasured`."""
    pair = line.prepare(bench)
    try:
        if pair.warm_up:
            pair.run()
        runs = [pair.run() for _ in range(repeats)]
    finally:
        pair.clean_up()
    return [
        Measured(figure, _column(runs, 0, index), _column(runs, 1, index), pair.details)
        for index, figure in enumerate(line.figures)
    ]


def _column(runs: Sequence[tuple[Values, Values]], side: int, index: int) -> list[float]:
    return [run[side][index] for run in runs]
