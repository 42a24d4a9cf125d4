"""What a tuning run is told to do.

Invariant: a `TuneSettings` that exists is one that a run can start with; `to_dict` says everything that the
losses depend on, so that a resumed run can be held to it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from corolla.config import check_kinds
from corolla.data.render import RenderSettings
from corolla.errors import UsageError

# What suits each mode: `benchmarks/rates.py`.
RATES = {"ptune": 1e-2, "deep_ptune": 1e-2, "prefix": 3e-2, "lora": 1e-3}
KEEP = ("best", "last")
EVALUATIONS = 10  # in a run, where nothing else is said
FEWEST_STEPS = 20  # between two of them
MOST = 2**31  # of anything that is counted
REPORTERS = ("none", "wandb", "tensorboard", "trackio")
# What may differ between a run and its continuation, since no loss depends on it.
FREE_ON_RESUME = frozenset({"save_every", "report_to", "allow_empty"})


@dataclass(frozen=True)
class TuneSettings:
    """Training arguments; raises `UsageError` for values that cannot be meant.

    `steps` are optimizer steps of `batch_size` × `accumulate` examples and take precedence over `epochs`.
    `samples` is the number of training examples to draw (None: all), `held_out` the share (below 1) or number
    of conversations kept for evaluation (None: a tenth, at most 32), `held_out_samples` how many examples of
    those are evaluated. The learning rate rises for `warmup` (a share of the steps, or a number of them), then
    falls linearly to 0.
    """

    learning_rate: Annotated[
        float | None, "--lr", "Learning rate at its peak (default: what suits the mode)."
    ] = None
    warmup: Annotated[float, "Steps in which the learning rate rises: a share (below 1) or a number."] = 0.05
    weight_decay: Annotated[float, "AdamW's weight decay."] = 0.0
    max_grad_norm: float = 1.0
    batch_size: Annotated[int, "Examples a batch."] = 8
    accumulate: Annotated[int, "Batches a step."] = 1
    steps: Annotated[int | None, "Optimizer steps; instead of --epochs."] = None
    epochs: Annotated[float, "Passes over the examples."] = 1.0
    samples: Annotated[int | None, "Training examples to draw (default: all)."] = None
    held_out: Annotated[float | None, "Share (below 1) or number of conversations kept for evaluation."] = (
        None
    )
    held_out_samples: int = 64
    allow_empty: Annotated[bool, "--allow-empty", "Let chats with the bundle give empty replies."] = False
    eval_every: Annotated[int | None, "Evaluate every N steps (default: ten times a run)."] = None
    stop_after: Annotated[int | None, "Stop after N evaluations without a lower held-out loss."] = None
    keep: Annotated[str, "The bundle holds the prompt with the best held-out loss, or the last."] = "best"
    save_every: Annotated[int, "Checkpoint every N steps."] = 50
    seed: Annotated[int, "For the split, the order and the prompt."] = 0
    report_to: Annotated[str, "none, wandb, tensorboard or trackio."] = "none"
    rendering: RenderSettings = field(default_factory=lambda: RenderSettings(style="auto"))

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0 <= self.seed < 2**32:  # numpy takes no other
            raise UsageError(f"--seed is {self.seed}; it must be from 0 to {2**32 - 1}.")
        for name in ("learning_rate", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{_option(name)} is {value}; it must be a number above 0.")
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{_option(name)} is {value}; it must be 0 or more.")
        if self.keep not in KEEP:
            raise UsageError(f"--keep is {self.keep!r}; it must be {' or '.join(KEEP)}.")
        for name in (
            "batch_size",
            "accumulate",
            "steps",
            "samples",
            "held_out_samples",
            "eval_every",
            "stop_after",
            "save_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_option(name)} is {value}; it must be at least 1.")
            if value is not None and value >= MOST:
                raise UsageError(f"{_option(name)} is {value}; it must be below {MOST}.")
        if self.held_out is not None and not 0 < self.held_out < MOST:
            raise UsageError(
                f"--held-out is {self.held_out}; give a share below 1, such as 0.1, or a number of conversations."
            )
        check_reporter(self.report_to)

    def for_mode(self, mode: str) -> TuneSettings:
        """These, with the learning rate that suits the mode where none was given."""
        if self.learning_rate is not None:
            return self
        return dataclasses.replace(self, learning_rate=RATES[mode])

    def warmup_steps(self, total: int) -> int:
        """Of a run of `total` steps, at most all but the last."""
        steps = self.warmup * total if self.warmup < 1 else self.warmup
        return min(round(steps), total - 1)

    def evaluation_steps(self, total: int) -> int:
        """After how many steps a run of `total` is evaluated again."""
        return self.eval_every or max(FEWEST_STEPS, math.ceil(total / EVALUATIONS))

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict[str, Any]:
        """Those settings that the losses of a run depend on."""
        return {key: value for key, value in self.to_dict().items() if key not in FREE_ON_RESUME}


@dataclass(frozen=True)
class StudySettings(TuneSettings):
    """The same for a study: how the model asks itself about a text, and then how it learns from its answers.

    `chunk_tokens`, `question_tokens` and `answer_tokens` are the most that a piece of the text, a question and an
    answer may have.
    """

    epochs: Annotated[float, "Passes over the questions."] = 8.0
    questions: Annotated[int, "Questions that the model asks itself about the text."] = 128
    chunk_tokens: Annotated[int, "Tokens of the text that it reads at once."] = 512
    question_tokens: Annotated[int, "Longest question, in tokens."] = 48
    answer_tokens: Annotated[int, "Longest answer, in tokens."] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {
            "questions": 2,
            "chunk_tokens": 16,
            "question_tokens": 1,
            "answer_tokens": 1,
        }.items():
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{_option(name)} is {value}; it must be at least {least}.")

    def asking(self) -> dict[str, Any]:
        """Those that questions and answers depend on, but for their number."""
        names = ("seed", "chunk_tokens", "question_tokens", "answer_tokens", "rendering")
        return {name: value for name, value in self.to_dict().items() if name in names}


def check_reporter(name: str) -> None:
    """Raise `UsageError` for a reporter that is unknown or not installed."""
    if name not in REPORTERS:
        raise UsageError(f"--report-to is {name!r}; it must be one of {', '.join(REPORTERS)}.")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UsageError(f"--report-to {name} needs a package that is not here: pip install {name}")


def _option(name: str) -> str:
    return {"learning_rate": "--lr"}.get(name, "--" + name.replace("_", "-"))
