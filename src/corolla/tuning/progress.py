"""How long a run will take, and how it shows itself: a bar on a terminal, a few lines elsewhere, a file for pages.

Invariant: it only looks; a run with and without it gives the same losses. The steps are those that the Trainer will
take; seconds are a guess from the first evaluation, which ran the same model over the same swarm.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerState

from corolla.data.render import Example
from corolla.tuning.settings import TuneSettings

T = TypeVar("T")
BACKWARD = 2.0  # a training step takes a forward pass and about twice that for the way back
LONG = 15 * 60.0  # seconds; for a longer run a shorter one is offered
QUIET_LINES = 10  # about so many in a run
WEIGHT = 0.8  # of the past in the loss that is shown


class ProgressReport(TrainerCallback):  # type: ignore[misc]
    """A Trainer's callback that shows step, smoothed loss, tokens a second and the time left."""

    def __init__(
        self,
        console: Console,
        step_seconds: Callable[[float], float] | None = None,
        live: Path | None = None,
    ) -> None:
        """`step_seconds` says, of the seconds that the first evaluation took, how long a step will take; `live` is a
        file that gets a line of JSON for each step and evaluation, for whoever watches from another process."""
        self._console = console
        self._live = live
        self._step_seconds = step_seconds
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0
        self._first_step = 0
        self._first_tokens = 0.0
        self._loss: float | None = None

    def on_train_begin(self, _args: Any, state: TrainerState, _control: Any, **_kwargs: Any) -> None:
        self._started = time.monotonic()
        self._first_step = state.global_step
        self._first_tokens = float(state.num_input_tokens_seen)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn())
            self._bar = Progress(
                *columns, TextColumn("{task.fields[about]}", markup=False), console=self._console
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=state.max_steps, about="first step …")
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, _args: Any, state: TrainerState, _control: Any, logs: dict[str, float], **_kwargs: Any
    ) -> None:
        if "eval_loss" in logs:
            self._note(state, eval_loss=logs["eval_loss"])
            self._print(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"perplexity {logs['eval_perplexity']:.2f}"
            )
            if state.global_step == self._first_step:
                if self._step_seconds is not None and state.global_step < state.max_steps:
                    seconds = self._step_seconds(time.monotonic() - self._started)
                    self._print(forecast(state.max_steps - state.global_step, seconds))
                self._started = time.monotonic()  # the evaluation before training is no step's time
        if "loss" in logs:
            self._show_step(state, logs["loss"])

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_step(self, state: TrainerState, loss: float) -> None:
        self._loss = loss if self._loss is None else WEIGHT * self._loss + (1 - WEIGHT) * loss
        elapsed = time.monotonic() - self._started
        done = state.global_step - self._first_step
        speed = (float(state.num_input_tokens_seen) - self._first_tokens) / max(elapsed, 1e-9)
        left = elapsed / max(done, 1) * (state.max_steps - state.global_step)
        self._note(state, loss=loss, tokens_per_second=speed, seconds_left=left)
        about = f"loss {self._loss:.3f}  {speed:,.0f} tokens/s  {_clock(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, about=about)
        elif state.global_step % max(1, state.max_steps // QUIET_LINES) == 0:
            self._print(f"step {state.global_step}/{state.max_steps}: {about}")

    def _note(self, state: TrainerState, **figures: float) -> None:
        if self._live is None:
            return
        line = {"step": state.global_step, "steps": state.max_steps, **figures}
        with contextlib.suppress(OSError), self._live.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")  # a disk that is full ends no run

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def counted(found: Iterable[T], console: Console, what: str, *, done: int, total: int) -> Iterator[T]:
    """Passes on what is found, and shows how many of `total` there are and the time left."""
    first, started = done, time.monotonic()
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        if console.is_terminal:
            left = TextColumn("{task.fields[about]}", markup=False)
            bar = stack.enter_context(
                Progress(TextColumn(what), BarColumn(30), MofNCompleteColumn(), left, console=console)
            )
            bar.add_task(what, total=total, completed=done, about="the first ones …")
        for one in found:
            yield one
            done += 1
            seconds = (time.monotonic() - started) / (done - first) * (total - done)
            about = f"{_clock(seconds)} left"
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done, about=about)
            elif done % max(1, total // QUIET_LINES) == 0:
                console.print(f"{what} {done}/{total}: {about}", highlight=False, markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- the forecast ------------------------------------------------------------------------------------------


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
