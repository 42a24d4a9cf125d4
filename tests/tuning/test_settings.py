"""Settings say no at once, and say what to change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corolla.errors import UsageError
from corolla.tuning.settings import TuneSettings


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("learning_rate", 0.0, "--lr"),
        ("learning_rate", float("nan"), "--lr"),
        ("epochs", -1.0, "--epochs"),
        ("weight_decay", -0.1, "--weight-decay"),
        ("batch_size", 0, "--batch-size"),
        ("accumulate", 0, "--accumulate"),
        ("steps", 0, "--steps"),
        ("samples", 0, "--samples"),
        ("eval_every", 0, "--eval-every"),
        ("save_every", 0, "--save-every"),
        ("held_out", 0, "--held-out"),
        ("held_out", float("nan"), "--held-out"),
        ("held_out", float("inf"), "--held-out"),
        ("batch_size", 2**31, "--batch-size is 2147483648; it must be below 2147483648"),
        ("report_to", "email", "--report-to"),
        ("seed", -1, "--seed"),
        ("batch_size", "8", "batch_size is '8'; it must be a whole number"),
        ("learning_rate", "1e-3", "learning_rate is '1e-3'; it must be a number or None"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_option(name: str, value: Any, option: str) -> None:
    with pytest.raises(UsageError, match=option):
        TuneSettings(**{name: value})


def test_a_reporter_that_is_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])  # nothing can be found
    with pytest.raises(UsageError, match="pip install wandb"):
        TuneSettings(report_to="wandb")


def test_everything_decisive_is_json_and_the_rest_is_left_out() -> None:
    settings = TuneSettings(steps=3, save_every=7)
    assert json.loads(json.dumps(settings.to_dict()))["save_every"] == 7
    assert settings.decisive()["steps"] == 3
    assert "save_every" not in settings.decisive()
