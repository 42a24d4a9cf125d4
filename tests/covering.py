"""Products of parameters: a few cases in which all values meet run every time, the others every night.

Nearly every mistake that depends on parameters shows with one value, or with two together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import Any

import pytest

Axis = Mapping[str, Any] | Iterable[Any]


def covering(*axes: Axis, together: int = 2) -> list[Any]:
    """The product of `axes`, as cases of a parametrized test.

    In every run, any `together` values of different axes stand together in one of the cases; the other cases are
    `nightly`. An axis is its values, or a mapping of names to values.
    """
    named = [_named(axis) for axis in axes]
    cases = list(product(*named))
    often = _chosen(cases, together)
    return [
        pytest.param(
            *(axis[name] for axis, name in zip(named, case, strict=True)),
            id="-".join(case),
            marks=[] if case in often else [pytest.mark.nightly],
        )
        for case in cases
    ]


def every_time(some: Iterable[Any], of: Iterable[Any]) -> list[Any]:
    """The values `of` a parameter, of which only `some` are tried every time."""
    chosen = list(some)
    return [one if one in chosen else pytest.param(one, marks=pytest.mark.nightly) for one in of]


def _named(axis: Axis) -> dict[str, Any]:
    if isinstance(axis, Mapping):
        return dict(axis)
    return {str(getattr(value, "__name__", value)): value for value in axis}


def _chosen(cases: list[tuple[str, ...]], together: int) -> set[tuple[str, ...]]:
    """The greedy choice: the case that brings most together that has not met, of values that were seldom chosen."""
    groups = {case: set(combinations(enumerate(case), together)) for case in cases}
    missing = set().union(*groups.values())
    used: Counter[tuple[int, str]] = Counter()
    chosen = set()
    while missing:
        best = max(
            cases, key=lambda case: (len(groups[case] & missing), -sum(used[one] for one in enumerate(case)))
        )
        chosen.add(best)
        missing -= groups[best]
        used.update(enumerate(best))
    return chosen
