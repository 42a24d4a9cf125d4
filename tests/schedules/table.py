"""What a run of schedules covered, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.faults import KINDS
from tests.schedules.run import Outcome


def lines_of(outcome: Outcome, seconds: float) -> list[str]:
    """Faults that hit and recoveries, by kind."""
    lines = [
        f"{outcome.counted} schedules in {seconds:.0f} s of one core; {outcome.missed} more that no fault hit do not "
        f"count; {outcome.gave_up} clients rightly gave up",
        f"{'fault':16} {'hit':>6} {'recovered':>10}",
    ]
    kinds = (*KINDS, "two at once", "during recovery")
    return lines + [f"{kind:16} {outcome.hits[kind]:6} {outcome.recovered[kind]:10}" for kind in kinds]


def lines_of_all(covered: Sequence[dict[str, Any]]) -> list[str]:
    """The same for several runs together, each as `Outcome.as_dict` with its `seconds`."""
    total, seconds = Outcome(), 0.0
    for one in covered:
        counters = {name: Counter(one[name]) for name in ("hits", "recovered")}
        plain = {name: one[name] for name in ("schedules", "missed", "gave_up")}
        total.add(Outcome(**plain, **counters))
        seconds += one["seconds"]
    return lines_of(total, seconds)
