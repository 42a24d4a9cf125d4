"""`corolla doctor`: what a machine computes, beside transformers; and what it says where that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import write_tiny
from typer.testing import CliRunner

from corolla.cli.checkup import beside_transformers
from corolla.cli.main import app
from corolla.errors import CorollaError, UsageError
from corolla.models.span import Span

FAMILY = "stablelm"  # which nothing else in this process has looked at


def doctor(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)
    return done.output


def test_a_family_that_comes_out_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Span.forward

    def wrong(self: Span, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return right(self, hidden, **arguments) * 1.001

    with monkeypatch.context() as planted:
        planted.setattr(Span, "forward", wrong)
        with pytest.raises(CorollaError, match=f"{FAMILY}. Do not serve"):
            doctor("--family", FAMILY, "--model", "none")
    assert "the same, packed" in doctor("--family", FAMILY, "--model", "none")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "abacus"], "--device abacus is not available"),
        (["--family", "lama"], "transformers knows no family lama"),
        (["--family", "lama", "--dtype", "float7"], "Unknown dtype 'float7'"),
    ],
)
def test_what_there_is_not_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        doctor(*arguments)


@pytest.mark.nightly
def test_speed_is_measured_through_a_server(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "model", max_position_embeddings=1024)
    logits, *speeds = beside_transformers(str(folder), torch.device("cpu"), "float32")
    assert logits.good
    assert [one.name.split(",")[0] for one in speeds] == ["decode", "decode", "prefill", "training step"]
    assert all("tokens/s, transformers" in one.said for one in speeds)
