"""A run that diverges goes back and goes on, stops when nothing gets better, and ends with its best prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.covering import every_time
from tests.tuning.test_resume import At, Killed, die
from tests.tuning.tiny_setup import ABOUT, conversations, local_model, prompt_for, settings

from corolla.errors import NonFiniteLoss
from corolla.models.checkpoints.prompt_files import load_prompt
from corolla.models.prompts import SoftPrompt
from corolla.tuning.batches import prepare
from corolla.tuning.bundle import load_bundle
from corolla.tuning.course import MOST_TIMES, Course, rate_factor
from corolla.tuning.evaluate import Evaluation, evaluate
from corolla.tuning.settings import TuneSettings
from corolla.tuning.tune import TuneResult, tune

ABSURD = 40.0  # a rate at which every run is lost within a step or two


def fragile(folder: Path) -> Any:
    """A model whose losses grow with the prompt's way from its start.

    In a tiny model nothing else comes of any rate: its norms take the size of a prompt away, and it knows nothing
    that it could lose.
    """
    model = local_model(folder)
    start = model.prompts.input.detach().clone()

    def scaled(_head: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * (model.prompts.input - start).abs().mean().exp()

    model.lm_head.register_forward_hook(scaled)
    return model


def run(folder: Path, tokenizer: Any, out: Path, *, model: Any = None, **options: Any) -> TuneResult:
    """A run with its lines in `out`.txt."""
    changes = {name: options.pop(name) for name in list(options) if name in TuneSettings.__dataclass_fields__}
    chosen = settings(**changes)
    with out.with_suffix(".txt").open("a") as lines:
        result = tune(
            model or fragile(folder),
            chosen,
            prepare(tokenizer, chosen, conversations()),
            out,
            ABOUT,
            console=Console(file=lines, width=200),
            **options,
        )
    assert isinstance(result, TuneResult)
    return result


def said(out: Path) -> str:
    return out.with_suffix(".txt").read_text()


# --- by itself -------------------------------------------------------------------------------------------------


class Steps:
    """A prompt of one number under AdamW, whose gradient is always 1, and its course."""

    def __init__(self, patience: int | None = None) -> None:
        self.prompt = SoftPrompt(torch.zeros(1, 1))
        self.optimizer = torch.optim.AdamW(self.prompt.parameters(), lr=0.1, weight_decay=0.0)
        self.lines: list[str] = []
        self.course = Course(self.prompt, patience=patience, say=self.lines.append)
        self.global_step = 0

    def take(self, loss: float, gradient: float = 1.0) -> float:
        """One step; gives the number after it."""
        self.prompt.input.grad = torch.full((1, 1), gradient)
        self.course.add(loss)
        self.course.on_pre_optimizer_step(None, self, None, optimizer=self.optimizer)  # type: ignore[arg-type]
        self.optimizer.step()
        self.global_step += 1
        return self.prompt.input.item()


@pytest.mark.parametrize(
    ("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (30.0, 1.0)]
)
def test_a_bad_step_is_not_taken_and_the_run_goes_back_to_its_best(loss: float, gradient: float) -> None:
    steps = Steps()
    numbers = [steps.take(one) for one in (3.0, 2.0, 2.5)]
    moments = [one["exp_avg"].clone() for one in steps.optimizer.state.values()]
    assert steps.take(loss, gradient) == numbers[0]  # as it was when the loss was 2.0
    assert steps.course.scale == 0.5
    (line,) = steps.lines
    assert "step 4" in line
    assert "back to the prompt after step 1, with 0.5 times the learning rate" in line
    (state,) = steps.optimizer.state.values()
    assert state["step"] == 1
    assert state["exp_avg"].item() == pytest.approx(0.1)
    assert state["exp_avg"].item() < moments[0].item()
    assert steps.take(2.0) < numbers[0]  # and on it goes


@pytest.mark.parametrize("first", [4.0, 2.0], ids=["usual", "an easy first batch"])
@pytest.mark.parametrize("spread", [0.05, 0.5, 1.0])
def test_losses_that_only_differ_from_batch_to_batch_are_no_divergence(spread: float, first: float) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        steps = Steps()
        for loss in (first, *(4 + spread * torch.randn(300, generator=generator)).tolist()):
            steps.take(loss)
        assert steps.lines == []


def test_a_run_that_diverges_again_and_again_ends_in_one_sentence() -> None:
    steps = Steps()
    steps.take(2.0)
    for _ in range(MOST_TIMES):
        steps.take(math.inf)
    assert steps.course.scale == 0.5**MOST_TIMES
    with pytest.raises(NonFiniteLoss, match="halved 10 times: try a lower --lr"):
        steps.take(math.inf)


def test_the_rate_rises_and_falls_and_every_step_has_one() -> None:
    assert [rate_factor(step, 6, 2) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert [rate_factor(step, 4, 0) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    for total in range(1, 40):
        for share in (0.0, 0.05, 0.99, 3, 1000):
            warmup = TuneSettings(warmup=share).warmup_steps(total)
            factors = [rate_factor(step, total, warmup) for step in range(total)]
            assert min(factors) > 0
            assert max(factors) == 1


def test_held_out_losses_say_which_prompt_is_best_and_when_to_stop() -> None:
    steps = Steps(patience=2)

    def evaluated(loss: float) -> None:
        found = Evaluation({"reply": {"one": (loss, 1)}, "marker": {}})
        steps.course.evaluated(steps.global_step, found, steps.optimizer)

    evaluated(3.0)
    steps.take(3.0)
    evaluated(2.9)
    best = steps.take(3.0)
    evaluated(2.8)
    steps.take(3.0)
    evaluated(2.85)
    assert not steps.course.exhausted
    steps.take(3.0)
    evaluated(2.81)
    assert steps.course.exhausted
    assert steps.course.best is not None
    assert steps.course.best.step == 2
    steps.course.use_best()
    assert steps.prompt.input.item() == best
    assert steps.lines == []
    evaluated(3.5)  # far above
    assert "held-out loss after step 4 is 3.5, far above its best, 2.8" in steps.lines[0]
    assert steps.optimizer.param_groups[0]["lr"] == 0.05, "the next step is already taken with half the rate"


def test_any_held_out_loss_is_better_than_none() -> None:
    steps = Steps(patience=2)
    for loss in (math.nan, 3.0, 2.0, math.nan):
        tokens = {} if math.isnan(loss) else {"one": (loss, 1)}
        steps.course.evaluated(
            steps.global_step, Evaluation({"reply": tokens, "marker": {}}), steps.optimizer
        )
        steps.take(3.0)
    assert steps.course.best is not None
    assert steps.course.best.evaluation.reply_loss == 2.0
    assert steps.course.best.step == 2


# --- in a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(one, marks=pytest.mark.nightly) for one in (1, 2))])
@pytest.mark.parametrize("rate", every_time([1e-1, ABSURD], of=[1e-3, 1e-2, 1e-1, ABSURD]))
def test_no_run_diverges_whatever_its_rate(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, rate: float, seed: int
) -> None:
    out = tmp_path / "out"
    result = run(tiny_folder, tokenizer, out, steps=14, learning_rate=rate, seed=seed, keep="best")
    assert all(map(math.isfinite, result.losses))
    assert result.after.reply_loss <= result.before.reply_loss
    assert result.losses[-1] < result.losses[0] + (3.0 if rate == ABSURD else 1.0)
    assert ("back to the prompt" in said(out)) or rate < ABSURD


def test_the_last_prompt_is_the_one_that_was_evaluated_where_the_last_evaluation_went_back(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(tiny_folder, tokenizer, out, steps=1, learning_rate=ABSURD, keep="last")
    assert "held-out loss after step 1" in said(out)
    model = fragile(tiny_folder)
    model.prompts.load_state_dict(
        load_prompt(out, model_name="tiny", identity=ABOUT.identity).state_dict()
    )  # in place: losses grow with its way from the start
    prepared = prepare(tokenizer, settings(), conversations())
    again = evaluate(model, prepared.held_out, prepared.batches, 3)
    assert result.after.reply_loss == pytest.approx(again.reply_loss, abs=1e-6)


def test_a_batch_whose_loss_is_no_number_is_missing_in_the_log_and_no_other_is(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder)
    seen: list[int] = []

    def spoil(_head: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.extend([0] if logits.requires_grad else [])
        return logits * (math.nan if len(seen) == 4 and logits.requires_grad else 1.0)

    model.lm_head.register_forward_hook(spoil)
    out = tmp_path / "out"
    result = run(tiny_folder, tokenizer, out, model=model)
    assert "The loss of step 4 is nan: back to the prompt after step" in said(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 5, 6]
    assert all(0 < one < 10 for one in result.losses)


def test_a_run_that_has_gone_back_resumes_as_if_never_interrupted(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"learning_rate": ABSURD, "steps": 12, "eval_every": 2, "keep": "best"}
    whole = run(tiny_folder, tokenizer, tmp_path / "whole", **options)
    assert load_bundle(whole.bundle).metrics["fell_back"] > 1
    with pytest.raises(Killed):
        run(tiny_folder, tokenizer, tmp_path / "out", callbacks=[At(9, die)], **options)
    model = fragile(tiny_folder)
    with torch.no_grad():
        model.prompts.input.zero_()
    resumed = run(tiny_folder, tokenizer, tmp_path / "out", model=model, resume=True, **options)
    assert resumed.losses == whole.losses
    assert resumed.after == whole.after
    bundles = [load_bundle(one.bundle) for one in (whole, resumed)]
    assert bundles[0].metrics == bundles[1].metrics
    prompts = [
        load_prompt(one.bundle, model_name="tiny", identity=ABOUT.identity) for one in (whole, resumed)
    ]
    assert torch.equal(prompts[0].input, prompts[1].input)


def test_the_bundle_holds_the_prompt_that_was_best_on_held_out_conversations(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """At this rate the loss goes up again."""
    out = tmp_path / "out"
    result = run(tiny_folder, tokenizer, out, steps=12, learning_rate=0.3, eval_every=2, keep="best")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert sorted(curve) == list(range(0, 13, 2))
    best = min(curve, key=curve.__getitem__)
    assert 0 < best < 12
    assert result.best_step == best == load_bundle(out).metrics["step"]
    assert f"The bundle holds the prompt of step {best}" in said(out)
    model = fragile(tiny_folder)
    model.prompts = load_prompt(out, model_name="tiny", identity=ABOUT.identity)
    prepared = prepare(tokenizer, settings(), conversations())
    again = evaluate(model, prepared.held_out, prepared.batches, 3)
    assert again.reply_loss == pytest.approx(curve[best], abs=1e-6)
    assert result.after.reply_loss == pytest.approx(curve[best], abs=1e-9)


def test_a_run_whose_patience_has_ended_stops_and_so_does_its_continuation(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "steps": 40,
        "learning_rate": 1.0,
        "eval_every": 2,
        "stop_after": 2,
        "keep": "best",
        "save_every": 1,
    }
    whole = run(tiny_folder, tokenizer, tmp_path / "whole", **options)
    assert whole.steps == whole.best_step + 4 < 40
    with pytest.raises(Killed):
        # Its last evaluation is in the last checkpoint.
        run(tiny_folder, tokenizer, tmp_path / "out", callbacks=[Ends()], **options)
    resumed = run(tiny_folder, tokenizer, tmp_path / "out", resume=True, **options)
    assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
    assert resumed.losses == whole.losses
    assert resumed.after == whole.after


class Ends(At):
    def __init__(self) -> None:
        super().__init__(-1, die)

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        raise Killed


def test_a_batch_whose_gradient_is_no_number_costs_a_step_and_leaves_no_trace(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder)
    seen: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(len(seen))
        return gradient * (math.nan if len(seen) == 4 else 1.0)

    model.prompts.input.register_hook(spoil)
    out = tmp_path / "out"
    result = run(tiny_folder, tokenizer, out, model=model)
    assert len(result.losses) == 6
    assert "The gradient of step 4 is not finite: back to the prompt after step" in said(out)
    text = (out / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert [json.loads(line).get("grad_norm") is None for line in text.splitlines() if '"loss"' in line] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_held_out_losses_that_are_no_numbers_leave_a_bundle_that_is_json_with_the_last_prompt(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder)
    model.lm_head.register_forward_hook(
        lambda _head, _inputs, logits: logits if logits.requires_grad else logits * math.nan
    )
    out = tmp_path / "out"
    result = run(tiny_folder, tokenizer, out, model=model, steps=3, keep="best")
    assert result.best_step == 3

    def odd(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    metrics = json.loads((out / "bundle.json").read_text(), parse_constant=odd)["metrics"]
    assert metrics["after"] == {}
    assert metrics["difference"] == {"mean": None, "low": None, "high": None}


def test_each_mode_has_a_rate_of_its_own_unless_one_is_given(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder, prompt_for(local_model(tiny_folder)))
    run(tiny_folder, tokenizer, tmp_path / "out", model=model, learning_rate=None, steps=2)
    expected = TuneSettings().for_mode("ptune").learning_rate
    assert load_bundle(tmp_path / "out").training["learning_rate"] == expected
    assert TuneSettings(learning_rate=0.5).for_mode("ptune").learning_rate == 0.5
