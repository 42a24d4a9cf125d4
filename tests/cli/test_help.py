"""Asking for help loads nothing heavy, so that it is there at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.e2e.processes import corolla

# What takes long to import; and what of ours could only be there to bring such things in.
HEAVY = (
    "torch",
    "transformers",
    "hivemind",
    "numpy",
    "scipy",
    "datasets",
    "peft",
    "accelerate",
    "matplotlib",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "pandas",
    "pyarrow",
    "corolla.models",
    "corolla.client",
    "corolla.server",
    "corolla.tuning.tune",
    "corolla.tuning.trainer",
    "corolla.chat.engine",
    "corolla.chat.repl",
)
COMMANDS = ("bootstrap", "serve", "status", "tune", "chat", "demo")

PROGRAM = f"""
import sys
from corolla.cli.main import main
try:
    main()
except SystemExit as end:
    code = end.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print("loaded:", *loaded, file=sys.stderr)
sys.exit(code)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = run(PROGRAM, *arguments, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    assert done.stderr.split("loaded:")[-1].split() == []


def test_the_version_imports_nothing_heavy() -> None:
    done = run(PROGRAM, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("corolla ")
    assert done.stderr.split("loaded:")[-1].split() == []


def test_an_import_would_be_seen() -> None:
    done = run("import corolla.models.prompts\n" + PROGRAM, "--help")
    assert {"torch", "corolla.models"} <= set(done.stderr.split("loaded:")[-1].split())


def test_the_log_is_shown_wherever_the_command_line_asks_for_it() -> None:
    """Before the command or behind it, as `corolla serve -v`."""
    arguments = ["invite", "--identity", "/nowhere/at/all"]
    for place in (None, 0, 1, 3):
        asking = [] if place is None else ["-v"]
        ended = corolla(*arguments[:place], *asking, *arguments[len(arguments) if place is None else place :])
        assert ended.returncode == 2
        assert ("The error came from here" in ended.stderr) is (place is not None)
