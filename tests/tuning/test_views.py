"""What a run shows: lines, a bar, a picture."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console
from tests.tuning.tiny_setup import ABOUT, conversations, local_model, settings

from corolla.tuning.batches import prepare
from corolla.tuning.bundle import draw_curve
from corolla.tuning.described import smoothed
from corolla.tuning.tune import tune


def shown(tiny_folder: Path, tokenizer: Any, out: Path, *, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    chosen = settings(steps=20, eval_every=10, save_every=50)
    prepared = prepare(tokenizer, chosen, conversations())
    tune(local_model(tiny_folder), chosen, prepared, out, ABOUT, console=console)
    return text.getvalue()


def test_without_a_terminal_a_run_is_a_few_plain_lines(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    lines = shown(tiny_folder, tokenizer, tmp_path / "out", terminal=False).splitlines()
    evaluations = [line for line in lines if "held-out loss" in line]
    steps = [line for line in lines if line.startswith("step") and "/20:" in line]
    assert [line.split(":")[0] for line in evaluations] == ["step 0", "step 10", "step 20"]
    assert len(steps) == 10
    assert [line for line in lines if "will take about" in line] == [lines[1]]
    assert len(lines) == 14
    assert re.fullmatch(r"step 20/20: loss \d\.\d{3}  [\d,]+ tokens/s  0:00 left", steps[-1])


def test_on_a_terminal_a_run_is_a_bar(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    text = shown(tiny_folder, tokenizer, tmp_path / "out", terminal=True)
    assert "━" in text
    assert "tokens/s" in text
    assert "20/20" in text
    assert "held-out loss" in text


def test_smoothing_follows_without_a_bias_towards_the_beginning() -> None:
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    line = smoothed([4.0] + [0.0] * 20)
    assert line[0] == 4.0
    assert sorted(line, reverse=True) == line
    assert line[-1] < 0.1


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 0, "eval_loss": 3.0}],
        [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.9}, {"step": 1, "eval_loss": 2.8}],
    ],
)
def test_a_curve_is_drawn_of_however_little_there_is(history: list[dict[str, float]], tmp_path: Path) -> None:
    draw_curve(history, tmp_path / "loss.png", title="tiny")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (540, 900)
    coloured = (picture[..., :3].max(axis=-1) - picture[..., :3].min(axis=-1)) > 0.2
    assert coloured.any() == bool(history)
