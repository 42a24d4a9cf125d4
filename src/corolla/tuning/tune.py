"""One training run, from prepared examples to a bundle.

Invariant: the run ends in a bundle at `out`, or in a run folder from which `resume` goes on with the losses
that an uninterrupted run would have had, or in an error that says in one sentence what to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, TrainerCallback

from corolla.errors import UsageError
from corolla.models.prompts import LoraAdapter, Prompt
from corolla.tuning.batches import Prepared
from corolla.tuning.bundle import (
    CARD_FILE,
    CURVE_FILE,
    SAMPLING,
    Bundle,
    ModelInfo,
    clear_leftovers,
    save_bundle,
)
from corolla.tuning.card import model_card
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.course import Best
from corolla.tuning.evaluate import Difference, Evaluation, compare
from corolla.tuning.progress import ProgressReport, step_seconds
from corolla.tuning.report import REPORT_FILE, report_page
from corolla.tuning.samples import Samples, sample_replies
from corolla.tuning.settings import TuneSettings
from corolla.tuning.trainer import PromptTrainer, StopOnInterrupt

# As chats with the bundle choose, but for a reply's length.
CHOICE = {name: value for name, value in SAMPLING.items() if name != "max_new_tokens"}
# What a line of metrics.jsonl may hold.
FIGURES = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "num_input_tokens_seen",
    "eval_loss",
    "eval_perplexity",
    "eval_marker_loss",
)


@dataclass(frozen=True)
class TuneResult:
    """What a finished run has to show."""

    bundle: Path
    curve: Path
    before: Evaluation
    after: Evaluation
    difference: Difference
    losses: list[float]  # of each step, but where it was no number; from the first one on even when resumed
    steps: int
    best_step: int  # whose prompt the bundle holds; 0 where training has made nothing better
    seconds: float  # of this call
    samples: Samples | None = None  # what the tuned model says to held-out conversations


@dataclass(frozen=True)
class TuneStopped:
    """A run that was interrupted and saved; `resume=True` goes on from there."""

    step: int
    total: int
    checkpoint: Path


def tune(
    model: Any,
    settings: TuneSettings,
    prepared: Prepared,
    out: str | Path,
    about: ModelInfo | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    further: Callable[[], dict[str, Any]] = dict,
) -> TuneResult | TuneStopped:
    """Train `model.prompts` on `prepared` and write the bundle `out`.

    `about` is what the bundle calls the model (None: what it was loaded as); `notes` are further facts for the
    bundle (which data, how the prompt was started); `console` is where progress goes (None: nowhere); `further`
    measures what else the bundle is to say of its worth, as JSON values, with the prompt that it will hold.
    Raises `UsageError` when `out` or the run folder is in the way,
    `NonFiniteLoss`, `BundleError` when something cannot be written.
    """
    started = time.monotonic()
    out, about = Path(out), about or loaded_as(model)
    settings = _for_prompt(model, settings)
    console = console or Console(quiet=True)
    trained = _what_is_trained(model, settings, prepared, about)
    folder = RunFolder(out)
    folder.check(resume=resume, overwrite=overwrite)
    with folder.locked():
        clear_leftovers(out)
        checkpoint = folder.begin(trained, resume=resume, overwrite=overwrite)
        trainer = _train(model, settings, prepared, folder, about, checkpoint, console, callbacks)
        state, course = trainer.state, trainer.course
        if state.global_step < state.max_steps and not course.exhausted:
            return TuneStopped(state.global_step, state.max_steps, folder.all()[-1])
        before, after = _before_and_after(trainer, folder)
        best_step = state.global_step
        if settings.keep == "best" and course.best is not None and course.best.step != best_step:
            _printer(console)(_which_is_kept(best_step, after, course.best))
            course.use_best()
            best_step, after = course.best.step, course.best.evaluation
        difference = compare(before, after, seed=settings.seed)
        renderer = prepared.renderer
        samples = sample_replies(model, renderer, prepared.talks, **CHOICE)
        for line in [] if samples is None else samples.lines():
            _printer(console)(line)
        history = _history(state.log_history)
        bundle = Bundle(
            model=about,
            mode=model.prompts.mode,
            prompt_tokens=model.prompts.length,
            rendering=renderer.settings,
            # For programs that read the bundle without our renderer.
            stop={"ids": list(renderer.stop_ids), "text": renderer.tokenizer.decode(renderer.stop_ids)},
            training={
                **_as_chosen(settings, prepared).to_dict(),
                **(notes or {}),
                **_rank(model.prompts),
                "steps": state.global_step,
            },
            metrics=metrics_of(before, after, difference, samples)
            | {"step": best_step, "fell_back": course.times}
            | further(),
            sampling={**SAMPLING, "allow_empty": settings.allow_empty},
        )
        replacing = overwrite or folder.has_ended()
        folder.note_end(bundle.to_dict())
        pages = {
            REPORT_FILE: report_page(bundle, history, str(out)),
            CARD_FILE: model_card(bundle, model.config._name_or_path or about.name),
        }
        save_bundle(
            out, bundle, model.prompts, config=model.config, history=history, overwrite=replacing, pages=pages
        )
        folder.finish()
    return TuneResult(
        bundle=out,
        curve=out / CURVE_FILE,
        before=before,
        after=after,
        difference=difference,
        losses=[line["loss"] for line in history if "loss" in line],
        steps=state.global_step,
        best_step=best_step,
        seconds=time.monotonic() - started,
        samples=samples,
    )


def loaded_as(model: Any) -> ModelInfo:
    """What a distributed model calls itself."""
    view = model.blocks.connection.view
    return ModelInfo(view.model_name, view.model, model._revision)


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def _train(
    model: Any,
    settings: TuneSettings,
    prepared: Prepared,
    folder: RunFolder,
    about: ModelInfo,
    checkpoint: Path | None,
    console: Console,
    callbacks: Sequence[TrainerCallback],
) -> PromptTrainer:
    """Train until the last step or Ctrl-C; the trainer's state says which."""
    progress = ProgressReport(
        console, partial(step_seconds, settings, prepared.train, prepared.held_out), folder.live
    )
    interrupt = StopOnInterrupt(_printer(console))
    trainer = PromptTrainer(
        model, settings, prepared, folder, about, [progress, interrupt, *callbacks], _printer(console)
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log line as a dictionary
    try:
        with interrupt:
            trainer.go_on(checkpoint)
    finally:
        progress.close()
        model.eval()
    return trainer


def _what_is_trained(
    model: Any, settings: TuneSettings, prepared: Prepared, about: ModelInfo
) -> dict[str, Any]:
    """Everything that the losses depend on, but for the prompt's first values."""
    return {
        **_as_chosen(settings, prepared).decisive(),
        "model": about.identity,
        "mode": model.prompts.mode,
        "prompt_tokens": model.prompts.length,
        "data": prepared.fingerprint(),
        **_rank(model.prompts),
    }


def _rank(prompt: Prompt) -> dict[str, int]:
    return {"rank": prompt.rank} if isinstance(prompt, LoraAdapter) else {}


def _for_prompt(model: Any, settings: TuneSettings) -> TuneSettings:
    if model.prompts is None:
        raise UsageError(
            "The model has no prompt to train: load it with tuning_mode='ptune', 'deep_ptune', 'prefix' or 'lora'."
        )
    return settings.for_mode(model.prompts.mode)


def _which_is_kept(last: int, after: Evaluation, best: Best) -> str:
    where = f"of step {best.step}" if best.step else "from before training"
    return (
        f"The bundle holds the prompt {where}, whose held-out loss, {best.evaluation.reply_loss:.4f}, is the lowest "
        f"(after the last step, {last}: {after.reply_loss:.4f})."
    )


def _as_chosen(settings: TuneSettings, prepared: Prepared) -> TuneSettings:
    """The settings with the style that was chosen for this tokenizer."""
    return replace(settings, rendering=prepared.renderer.settings)


def _before_and_after(trainer: PromptTrainer, folder: RunFolder) -> tuple[Evaluation, Evaluation]:
    """The first and the last evaluation; the last is made anew when the run was resumed at its very end."""
    last = trainer.state.global_step
    if last not in trainer.evaluations:
        trainer.evaluate()
    before = folder.before()
    assert before is not None  # no step comes before it
    return before, trainer.evaluations[last]


def _history(log: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The Trainer's log without its bookkeeping, and without what a run resumed at its end measured again."""
    lines = [{key: line[key] for key in FIGURES if key in line} for line in log]
    return [
        line
        for index, line in enumerate(lines)
        if ("loss" in line or "eval_loss" in line) and line not in lines[:index]
    ]


def metrics_of(
    before: Evaluation, after: Evaluation, difference: Difference, samples: Samples | None
) -> dict[str, Any]:
    """What a bundle says of its worth, as JSON values: what is no number is null, or left out."""
    change = {"mean": difference.mean, "low": difference.low, "high": difference.high}
    return {
        **({} if samples is None else {"samples": samples.metrics()}),
        "before": before.metrics(),
        "after": after.metrics(),
        "difference": {
            name: one if one is not None and math.isfinite(one) else None for name, one in change.items()
        },
        "held_out_conversations": before.conversations,
    }
