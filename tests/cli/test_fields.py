"""The fields of a dataclass are options of a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from corolla.cli.fields import Fields, with_fields


@dataclass(frozen=True)
class Settings:
    learning_rate: Annotated[float, "--lr", "How fast"] = 0.5
    steps: Annotated[int | None, "How long"] = None
    loud: Annotated[bool, "--loud", "Whether to speak"] = False
    hidden: int = 3


SEEN: list[dict[str, Any]] = []


@with_fields
def every(*, name: str, settings: Annotated[dict[str, Any], Fields(Settings)]) -> None:
    SEEN.append({"name": name, **settings})


@with_fields
def given(*, settings: Annotated[dict[str, Any], Fields(Settings, only_given=True)]) -> None:
    SEEN.append(settings)


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(every)
    app.command()(given)
    SEEN.clear()
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["every", "x"], {"name": "x", "learning_rate": 0.5, "steps": None, "loud": False}),
        (
            ["every", "x", "--lr", "2", "--loud"],
            {"name": "x", "learning_rate": 2.0, "steps": None, "loud": True},
        ),
        (["given"], {}),
        (["given", "--lr", "0", "--steps", "4"], {"learning_rate": 0.0, "steps": 4}),
    ],
)
def test_a_command_is_given_what_was_typed(arguments: list[str], expected: dict[str, Any]) -> None:
    run(*arguments)
    assert [expected] == SEEN


def test_help_tells_what_is_not_a_default_of_the_command_itself() -> None:
    said = run("given", "--help")
    assert "How fast (default: 0.5)." in said
    assert "How long." in said
    assert "Whether to speak (default: no)." in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chat", "--wire", "zip"], "--wire is 'zip'; it must be one of compute, float16, int8."),
        (["tune", "--wire", "zip"], "--wire is 'zip'; it must be one of compute, float16, int8."),
        (["chat", "--patience", "-1"], "--patience is -1; give seconds, such as 600."),
        (
            ["chat", "--quantization", "zip"],
            "--quantization is 'zip'; it must be one of none, bfloat16, int8.",
        ),
        (
            ["chat", "smollm2", "--local-blocks", "30"],
            "--local-blocks is 30; this model has 30 blocks, of which",
        ),
        (
            ["tune", "smollm2", "--local-blocks", "-1"],
            "--local-blocks is -1; this model has 30 blocks, of which",
        ),
        (
            ["serve", "smollm2", "--quantization", "zip"],
            "--quantization is 'zip'; it must be one of none, int8",
        ),
    ],
)
def test_who_types_an_option_reads_it_in_the_sentence(
    arguments: list[str], expected: str, refused: Callable[..., str]
) -> None:
    assert refused(*arguments).startswith(f"error: {expected}")


@pytest.mark.parametrize("typed", [["--lr", "2.0", "--loud"], ["--steps", "7"], []])
def test_values_as_they_are_typed(typed: list[str]) -> None:
    run("every", "x", *typed)
    (found,) = SEEN
    assert Fields(Settings).words(found) == typed
