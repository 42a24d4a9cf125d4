"""What a run of schedules covered, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.faults import KINDS
from tests.schedules.run import Outcome
from tests.schedules.workloads import MODES, WORKLOADS

COUNTED = (*KINDS, "two at once", "during recovery")


def lines_of(outcome: Outcome, seconds: float) -> list[str]:
    """Faults that hit, were felt by a client and recovered from, by kind; and whose work they disturbed."""
    lines = [
        f"{outcome.counted} schedules in {seconds:.0f} s of one core; {outcome.missed} more whose faults no client "
        f"felt do not count; {outcome.gave_up} clients rightly gave up",
        f"{'fault':16} {'hit':>6} {'felt':>6} {'recovered':>10}",
    ]
    lines += [
        f"{kind:16} {outcome.hits[kind]:6} {outcome.felt[kind]:6} {outcome.recovered[kind]:10}"
        for kind in COUNTED
    ]
    return [*lines, "clients that were disturbed: " + "; ".join(disturbed(outcome))]


def disturbed(outcome: Outcome) -> list[str]:
    """How many clients at each kind of work, without prompts, and with each kind."""
    counts = [[outcome.works[f"{kind}, {mode or 'no prompts'}"] for mode in MODES] for kind in WORKLOADS]
    return [f"{kind} {' / '.join(map(str, each))}" for kind, each in zip(WORKLOADS, counts, strict=True)]


def total_of(covered: Sequence[dict[str, Any]]) -> tuple[Outcome, float]:
    """Several runs together, each as `Outcome.as_dict` with its `seconds` of one core."""
    total = Outcome()
    for one in covered:
        total.add(Outcome.of_dict(one))
    return total, sum(one["seconds"] for one in covered)
