"""Commands that are refused, within this process, and a model to be talked with."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.tiny_models import write_tiny

from corolla.cli.main import run as main

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer that has a chat template."""
    folder = write_tiny("llama", tmp_path_factory.mktemp("chat") / "model", vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run a command that has to end with a sentence; gives it. On stdin everything is agreed to."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        monkeypatch.setattr(sys, "argv", ["corolla", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        # A model that was not converted before is first, with a bar.
        said = "\n".join(line for line in lines if "it/s]" not in line)
        assert said.startswith("error: ")
        assert "\n" not in said
        assert "Traceback" not in said
        assert said[-1] != "\\"
        return said

    return run
