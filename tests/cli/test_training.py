"""What is said of a run that did not come to its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from corolla.cli.training import stopped_by_ctrl_c
from corolla.errors import BundleError, SwarmUnavailable, UsageError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SwarmUnavailable("Nobody serves blocks 0:2."), "--resume"),
        (OSError("gone"), "--resume"),
        (BundleError("The disk is full."), "--resume"),
        (KeyboardInterrupt(), "--resume"),
        (UsageError("The run was started with learning_rate=0.1, not 0.2."), ""),  # as it would be once more
    ],
)
def test_the_way_on_is_told_where_there_is_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    said: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["corolla", "tune", "--lr", "0.2"])
    (tmp_path / "bundle.run" / "checkpoint-2").mkdir(parents=True)
    wanted = typer.Exit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(wanted), stopped_by_ctrl_c(tmp_path / "bundle"):
        raise error
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert ("checkpoint-2 is kept" in shown.replace("- ", "-")) == bool(said)
