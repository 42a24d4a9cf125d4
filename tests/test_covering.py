"""Cases that run every time bring all values together; the nightly ones are all others."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from tests.covering import covering

AXES = ("abcd", {"one": 1, "two": 2}, (True, False), range(3))


def without_marks(cases: list[Any]) -> list[tuple[Any, ...]]:
    return [case.values for case in cases if not case.marks]


@pytest.mark.parametrize("together", [1, 2, 3])
def test_values_meet(together: int) -> None:
    cases = covering(*AXES, together=together)
    met, wanted = (
        {group for one in each for group in combinations(enumerate(one), together)}
        for each in (without_marks(cases), [case.values for case in cases])
    )
    assert met == wanted
    assert len(cases) == len({case.id for case in cases}) == 4 * 2 * 2 * 3


def test_they_are_few_and_in_turn() -> None:
    assert len(without_marks(covering(*AXES))) <= 14
    pairs = without_marks(covering(range(19), "ab", together=1))
    assert len(pairs) == 19
    assert 9 <= sum(letter == "a" for _, letter in pairs) <= 10
