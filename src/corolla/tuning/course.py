"""What keeps a run on its course: it goes back to its best when it diverges, and remembers the best prompt.

Invariant: all of it is in a checkpoint, so a resumed run falls back, stops and ends as one that was never
interrupted; a step whose loss or gradient is not finite never reaches the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from corolla.errors import NonFiniteLoss
from corolla.models.prompts import Prompt
from corolla.tuning.evaluate import Evaluation

ADVICE = "try a lower --lr (such as 1e-3), --prompt-init vocab, and servers and client in float32"
COURSE_FILE = "course.pt"
WEIGHT = 0.8  # of the past in the level of the loss
# Nats above the best: more than batches differ by (their spread comes on top), less than a lost prompt costs.
FAR = 1.0
SPREADS = 3.0
SPREAD = 1.0  # nats; what is taken for the spread until it is known
# Of the past in the spread: longer than in the level, or the best is where it is small by chance.
SPREAD_WEIGHT = 0.95
FAR_HELD_OUT = 0.5  # the held-out examples are always the same
MOST_TIMES = 10  # a thousandth of the rate


@dataclass
class Level:
    """A mean of the latest losses, and how far they lie from it; nats."""

    total: float = 0.0
    norm: float = 0.0
    spread: float = SPREAD  # mean distance of a loss from the mean before it

    @property
    def mean(self) -> float:
        """Without the bias towards its beginning."""
        return self.total / self.norm if self.norm else math.inf

    def after(self, loss: float) -> Level:
        """The level with one more loss."""
        spread = self.spread
        if self.norm:
            spread = SPREAD_WEIGHT * spread + (1 - SPREAD_WEIGHT) * abs(loss - self.mean)
        return Level(WEIGHT * self.total + (1 - WEIGHT) * loss, WEIGHT * self.norm + (1 - WEIGHT), spread)


@dataclass
class Kept:
    """The prompt and the optimizer as they were after so many steps."""

    step: int
    level: Level
    prompt: dict[str, Tensor]
    optimizer: dict[str, Any]


@dataclass
class Best:
    """Where the held-out loss was lowest."""

    kept: Kept
    evaluation: Evaluation

    @property
    def step(self) -> int:
        """After how many steps that was."""
        return self.kept.step


class Course(TrainerCallback):  # type: ignore[misc]
    """Watches losses; `scale` is what the learning rate is multiplied with, halved each time the run falls back."""

    def __init__(self, prompt: Prompt, *, patience: int | None, say: Callable[[str], None]) -> None:
        """`patience` is how many evaluations in a row may bring nothing better (None: any number)."""
        self.scale = 1.0
        self.times = 0
        self.best: Best | None = None
        self._prompt = prompt
        self._patience = patience
        self._say = say
        self._level = Level()
        self._kept: Kept | None = None
        self.loss = 0.0  # of the step that was last decided on
        self._loss = 0.0  # of the step under way
        self._vain = 0  # evaluations since the best one

    @property
    def exhausted(self) -> bool:
        """Whether the run's patience has come to its end."""
        return self._patience is not None and self._vain >= self._patience

    def add(self, loss: float) -> None:
        """A batch's part of the loss of the step under way."""
        self._loss += loss

    def on_pre_optimizer_step(
        self, _args: Any, state: TrainerState, _control: Any, *, optimizer: Any, **_kwargs: Any
    ) -> None:
        """Take the step, or go back and take none. Raises `NonFiniteLoss` where there is nothing to go back to."""
        self.loss, self._loss = self._loss, 0.0
        loss = self.loss
        step = state.global_step + 1
        if not math.isfinite(loss):
            self._go_back(step, f"The loss of step {step} is {loss}", optimizer)
        elif not self._finite_gradients():
            self._go_back(step, f"The gradient of step {step} is not finite", optimizer)
        else:
            self._judge(step, loss, optimizer)

    def _judge(self, step: int, loss: float, optimizer: Any) -> None:
        self._level = level = self._level.after(loss)
        kept = self._kept
        if kept is None or level.mean < kept.level.mean:
            self._kept = self._now(step - 1, optimizer)
        elif level.mean > kept.level.mean + FAR + SPREADS * kept.level.spread:
            why = (
                f"The loss around step {step} is {level.mean:.4g}, far above its best, {kept.level.mean:.4g}"
            )
            self._go_back(step, why, optimizer)

    def _now(self, steps: int, optimizer: Any) -> Kept:
        return Kept(steps, self._level, deepcopy(self._prompt.state_dict()), deepcopy(optimizer.state_dict()))

    def _go_back(self, step: int, why: str, optimizer: Any) -> None:
        kept = self._kept
        if kept is None:
            raise NonFiniteLoss(f"{why}: {ADVICE}.")
        if self.times == MOST_TIMES:
            raise NonFiniteLoss(f"{why}, though the rate was halved {self.times} times: {ADVICE}.")
        self.times += 1
        self.scale /= 2
        self._prompt.load_state_dict(kept.prompt)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": deepcopy(kept.optimizer["state"])})
        for group in optimizer.param_groups:  # the schedule has set it for the step that is next
            group["lr"] /= 2
        self._level = kept.level
        for parameter in self._prompt.parameters():
            parameter.grad = None  # the optimizer passes over what has none
        self._say(
            f"{why}: back to the prompt after step {kept.step}, with {self.scale:.3g} times the learning rate."
        )

    def _finite_gradients(self) -> bool:
        gradients = [one.grad for one in self._prompt.parameters() if one.grad is not None]
        return all(bool(torch.isfinite(one).all()) for one in gradients)

    def evaluated(self, step: int, evaluation: Evaluation, optimizer: Any) -> Evaluation:
        """The prompt after `step` steps has been evaluated; gives the evaluation of the prompt that there is then."""
        loss, best = evaluation.reply_loss, self.best
        lowest = math.nan if best is None else best.evaluation.reply_loss
        if best is None or math.isnan(lowest) or loss < lowest:
            self.best = Best(self._now(step, optimizer), evaluation)
            self._vain = 0
            return evaluation
        self._vain += 1
        if not loss <= lowest + FAR_HELD_OUT:
            self._kept = best.kept
            why = f"The held-out loss after step {step} is {loss:.4g}, far above its best, {lowest:.4g}"
            self._go_back(step, why, optimizer)
            return best.evaluation
        return evaluation

    def use_best(self) -> None:
        """Give the prompt the values with which the held-out loss was lowest."""
        if self.best is not None:
            self._prompt.load_state_dict(self.best.kept.prompt)

    # --- in a checkpoint --------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write all that a resumed run has to know. Raises `OSError`, `RuntimeError`."""
        content = {
            "scale": self.scale,
            "times": self.times,
            "vain": self._vain,
            "level": asdict(self._level),
            "kept": None if self._kept is None else asdict(self._kept),
            "best": None if self.best is None else asdict(self.best),
        }
        torch.save(content, folder / COURSE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; a checkpoint of an earlier version has nothing of it."""
        if not (folder / COURSE_FILE).is_file():
            return
        content = torch.load(folder / COURSE_FILE, map_location="cpu", weights_only=True)
        self.scale, self.times, self._vain = content["scale"], content["times"], content["vain"]
        self._level = Level(**content["level"])
        self._kept = _kept_of(content["kept"])
        if content["best"] is not None:
            kept = _kept_of(content["best"]["kept"])
            assert kept is not None
            self.best = Best(kept, Evaluation(**content["best"]["evaluation"]))


def _kept_of(content: dict[str, Any] | None) -> Kept | None:
    return None if content is None else Kept(**{**content, "level": Level(**content["level"])})


def rate_factor(step: int, total: int, warmup: int) -> float:
    """What part of the learning rate step `step` (from 0) of `total` is taken with: up, then linearly to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total - step) / max(1, total - warmup))
