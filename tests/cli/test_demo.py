"""`corolla demo` replaces its own earlier bundle and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from corolla.cli.main import run as main


def test_a_folder_that_is_no_bundle_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo-run").mkdir()
    (tmp_path / "demo-run" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["corolla", "demo"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "give another --out" in capsys.readouterr().err
    assert (tmp_path / "demo-run" / "thesis.txt").read_text() == "years of work"
