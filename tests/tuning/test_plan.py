"""What a run says of its length before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerState

from corolla.data.render import Example
from corolla.tuning.progress import ProgressReport, forecast, in_words, planned_steps, step_seconds
from corolla.tuning.settings import TuneSettings


def example(tokens: int) -> Example:
    return Example([1] * tokens, [1] * tokens, ["reply"] * tokens, "c")


@pytest.mark.parametrize(
    ("steps", "seconds", "said"),
    [
        (2066, 9.0, "2,066 steps will take about 5.2 h; --steps 100 would take about 15 min."),
        (30, 2.0, "30 steps will take about 60 s."),
        (1, 0.1, "1 step will take about 1 s."),
        (12, 3600.0, "12 steps will take about 12 h; --steps 10 would take about 10 h."),
        (9, 3600.0, "9 steps will take about 9.0 h."),
        (10**6, 1.0, "1,000,000 steps will take about 12 days; --steps 900 would take about 15 min."),
    ],
)
def test_the_sentence(steps: int, seconds: float, said: str) -> None:
    assert forecast(steps, seconds) == said


def test_words_for_times() -> None:
    assert [in_words(s) for s in (0.2, 99, 100, 5999, 6000, 40000)] == [
        "1 s",
        "99 s",
        "2 min",
        "100 min",
        "1.7 h",
        "11 h",
    ]


def test_a_step_is_guessed_from_the_tokens() -> None:
    settings = TuneSettings(batch_size=4, accumulate=2)
    train, evaluated = [example(10), example(30)] * 10, [example(40)] * 4
    assert step_seconds(settings, train, evaluated, seconds=2.0) == pytest.approx(3 * 2.0 * 160 / 160)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (TuneSettings(batch_size=8), 3),
        (TuneSettings(batch_size=8, accumulate=2), 2),
        (TuneSettings(batch_size=8, epochs=2.5), 8),
        (TuneSettings(batch_size=8, steps=5), 5),
    ],
)
def test_the_steps(settings: TuneSettings, steps: int) -> None:
    assert planned_steps(settings, 20) == steps


def test_each_step_leaves_a_line_for_who_watches(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    report = ProgressReport(Console(quiet=True), live=path)
    state = TrainerState(max_steps=2)
    report.on_train_begin(None, state, None)
    report.on_log(None, state, None, logs={"eval_loss": 4.0, "eval_perplexity": 54.6})
    state.global_step, state.num_input_tokens_seen = 1, 100
    report.on_log(None, state, None, logs={"loss": 3.0})
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"step": 0, "steps": 2, "eval_loss": 4.0}
    assert (second["step"], second["steps"], second["loss"]) == (1, 2, 3.0)
    assert second["tokens_per_second"] > 0
    assert second["seconds_left"] > 0
    path.unlink()
    path.mkdir()
    report.on_log(None, state, None, logs={"loss": 3.0})  # what cannot be noted ends nothing
