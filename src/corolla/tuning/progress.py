"""How a run shows itself: a bar on a terminal, a few quiet lines elsewhere.

Invariant: it only looks; a run with and without it gives the same losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from corolla.tuning.plan import forecast

QUIET_LINES = 10  # about so many in a run
WEIGHT = 0.8  # of the past in the loss that is shown


class ProgressReport(TrainerCallback):  # type: ignore[misc]
    """A Trainer's callback that shows step, smoothed loss, tokens a second and the time left."""

    def __init__(self, console: Console, step_seconds: Callable[[float], float] | None = None) -> None:
        """`step_seconds` says, of the seconds that the first evaluation took, how long a step will take."""
        self._console = console
        self._step_seconds = step_seconds
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0
        self._first_step = 0
        self._first_tokens = 0.0
        self._loss: float | None = None

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Start the clock, and the bar if someone can watch it."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        self._first_tokens = float(state.num_input_tokens_seen)
        if self._console.is_terminal:
            self._bar = _new_bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=state.max_steps, about="first step …")
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Show a step, or the held-out loss."""
        logs = logs or {}
        if "eval_loss" in logs:
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

    def on_train_end(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Take the bar away."""
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
        about = f"loss {self._loss:.3f}  {speed:,.0f} tokens/s  {_clock(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, about=about)
        elif state.global_step % max(1, state.max_steps // QUIET_LINES) == 0:
            self._print(f"step {state.global_step}/{state.max_steps}: {about}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _new_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[about]}"),
        console=console,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
