"""How long a run will take, said before it begins.

Invariant: the steps are those that the Trainer will take; seconds are a guess from the first evaluation, which ran
the same model over the same swarm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from corolla.data.render import Example
from corolla.tuning.settings import TuneSettings

BACKWARD = 2.0  # a training step takes a forward pass and about twice that for the way back
LONG = 15 * 60.0  # seconds; for a longer run a shorter one is offered


def planned_steps(settings: TuneSettings, examples: int) -> int:
    """Optimizer steps of a whole run over so many training examples."""
    if settings.steps is not None:
        return settings.steps
    batches = math.ceil(examples / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulate))


def tokens_of(examples: Sequence[Example]) -> int:
    """All their tokens together."""
    return sum(len(example.input_ids) for example in examples)


def step_seconds(
    settings: TuneSettings, train: Sequence[Example], evaluated: Sequence[Example], seconds: float
) -> float:
    """About how long a step takes where evaluating `evaluated` took `seconds`."""
    mean = tokens_of(train) / len(train)
    tokens = mean * min(settings.batch_size * settings.accumulate, len(train))
    return (1 + BACKWARD) * seconds * tokens / max(tokens_of(evaluated), 1)


def forecast(steps: int, seconds_a_step: float) -> str:
    """`2,066 steps will take about 5 h; --steps 200 would take about 30 min.`"""
    whole = f"{steps:,} step{'' if steps == 1 else 's'} will take about {in_words(steps * seconds_a_step)}"
    fewer = _fewer(steps, seconds_a_step)
    if fewer is None:
        return f"{whole}."
    return f"{whole}; --steps {fewer} would take about {in_words(fewer * seconds_a_step)}."


def _fewer(steps: int, seconds_a_step: float) -> int | None:
    """A round number of steps that takes less than `LONG`; None where all do."""
    if steps * seconds_a_step <= LONG:
        return None
    fit = max(10.0, LONG / seconds_a_step)
    digits = 10 ** math.floor(math.log10(fit))
    fewer = int(fit // digits * digits)
    return fewer if fewer < steps else None


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `5 h`, `1.5 h`, `3 days`: as exact as a guess deserves."""
    if seconds < 100:
        return f"{max(1, round(seconds)):d} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60):d} min"
    if seconds < 48 * 3600:
        hours = seconds / 3600
        return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
    return f"{seconds / 86400:.0f} days"
