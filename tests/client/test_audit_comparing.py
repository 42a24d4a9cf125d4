"""How two answers are compared, and what honest servers may differ by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from corolla.client.audits.audit import TOLERANCES, Answer, deviation, tolerance_of
from corolla.swarm.directory.routing import Hop


def answer_of(given: Tensor) -> Answer:
    return Answer(Hop("a", 0, 1), "forward", {"hidden": given}, {})


def test_deviations_are_parts_of_what_the_blocks_did() -> None:
    given = torch.randn(1, 50, 64)
    change = torch.randn(1, 50, 64)
    true = given * 100 + change
    off = deviation(answer_of(given * 100), {"hidden": true + 0.01 * change}, {"hidden": true})
    assert 0.001 < off.typical < 0.01  # the change, and a part of the token's own size
    one = true.clone()
    one[0, 7] += change[0, 7]
    off = deviation(answer_of(given * 100), {"hidden": one}, {"hidden": true})
    assert off.worst > 5 * off.typical


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_within_a_tolerance(value: float) -> None:
    true = torch.randn(1, 4, 8)
    told = true.clone()
    told[0, 1, 2] = value
    off = deviation(answer_of(torch.zeros(1, 4, 8)), {"hidden": told}, {"hidden": true})
    assert not off.within(TOLERANCES["4 bits"].output)
    assert deviation(answer_of(torch.zeros(1, 4, 8)), {"hidden": told}, {"hidden": told}).worst == 0


def test_an_answer_where_nothing_was_due() -> None:
    nothing = torch.zeros(1, 3, 8)
    answer = answer_of(nothing)
    assert deviation(answer, {"hidden": nothing}, {"hidden": nothing}).worst == 0
    assert deviation(answer, {"hidden": nothing + 1e-9}, {"hidden": nothing}).worst > 1e9


@pytest.mark.parametrize(
    ("kinds", "wire", "expected"),
    [
        (("float32", "float32"), "compute", "float32"),
        (("float32", "bfloat16"), "compute", "half"),
        (("float32", "float32+int8"), "compute", "8 bits"),
        (("bfloat16+nf4", "float32"), "compute", "4 bits"),
        (("float32", "float32"), "float16", "half"),
        (("float32", "float32"), "int8", "8 bits"),
        (("made up", "float64"), "compute", "half"),
    ],
)
def test_the_coarsest_arithmetic_sets_the_tolerance(kinds: Any, wire: Any, expected: str) -> None:
    assert tolerance_of(kinds, gradient=False, wire=wire) is TOLERANCES[expected].output
    assert tolerance_of(kinds, gradient=True, wire=wire) is TOLERANCES[expected].gradient
