"""What a run of schedules covered, as a table."""

from __future__ import annotations

from tests.faults import KINDS
from tests.schedules.run import Outcome


def lines_of(outcome: Outcome, seconds: float) -> list[str]:
    """Faults that hit and recoveries, by kind."""
    counted = outcome.schedules - outcome.missed
    lines = [
        f"{counted} schedules in {seconds:.0f} s of one core; {outcome.missed} more that no fault hit do not "
        f"count; {outcome.gave_up} clients rightly gave up",
        f"{'fault':16} {'hit':>6} {'recovered':>10}",
    ]
    kinds = (*KINDS, "two at once", "during recovery")
    return lines + [f"{kind:16} {outcome.hits[kind]:6} {outcome.recovered[kind]:10}" for kind in kinds]
