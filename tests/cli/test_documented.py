"""What `--help` says, docs/commands.md says too, and the documents name no flag that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli.documented import commands_page
from typer.main import get_command
from typer.testing import CliRunner

from corolla.cli.main import app

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PROGRAMS = re.compile(r"\b(pip|hf download|pytest|benchmarks\.\w+|lm_eval)\b")


def shown(name: str) -> str:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split())


def test_the_page_is_as_the_commands_are() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == commands_page(), (
        "write it anew with: python -m tests.cli.documented > docs/commands.md"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_all_that_is_written_for_it(name: str) -> None:
    """Also what stands in brackets, which markup would take away."""
    text = shown(name)
    for parameter in COMMANDS[name].params:
        if not getattr(parameter, "hidden", False) and parameter.help:
            assert " ".join(parameter.help.split()) in text, parameter.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_flags_that_exist(path: Path) -> None:
    parameters = [one for command in COMMANDS.values() for one in command.params]
    known = {flag for one in parameters for flag in (*one.opts, *one.secondary_opts)}
    known |= {"--help", "--version", "--verbose"}
    lines = [line for line in path.read_text().splitlines() if not OTHER_PROGRAMS.search(line)]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    assert named <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_commands_that_exist(path: Path) -> None:
    named = set(re.findall(r"`corolla ([a-z]+)\b", path.read_text())) | set(
        re.findall(r"^corolla ([a-z]+)\b", path.read_text(), re.MULTILINE)
    )
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("name", ["tune", "serve", "chat"])
def test_all_flags_of_a_command_are_shown_with_it(name: str) -> None:
    section = commands_page().split(f"\n## corolla {name}\n")[1].split("\n## ")[0]
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert f"`{parameter.opts[0]}" in section
