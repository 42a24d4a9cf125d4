"""A machine that has run out of something: one sentence, a non-zero exit, no traceback."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.e2e.processes import COROLLA, environment
from tests.tiny_models import write_tiny

from corolla.cli import main as command_line
from corolla.cli.machine import unusable
from corolla.errors import CheckpointError
from corolla.files import made_once


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    return folder


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_a_path_that_cannot_be_used_is_named() -> None:
    assert "/proc/x cannot be used" in str(unusable(PermissionError(13, "Permission denied", "/proc/x")))
    assert unusable(OSError("no")) is None


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/big"), "The disk is full where /big", 1),
        (caused(CheckpointError("It may be truncated."), OSError(errno.EMFILE, "x")), "No more files", 1),
        (
            caused(
                CheckpointError("Not saved (No space left on device)."),
                OSError(errno.ENOSPC, "No space left on device"),
            ),
            "Not saved",
            2,
        ),
        (CheckpointError("It is truncated."), "It is truncated.", 2),
    ],
)
def test_the_command_line_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    sentence: str,
    code: int,
) -> None:
    def fails(_arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(command_line, "app", fails)
    with pytest.raises(SystemExit) as ended:
        command_line.run()
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert said.startswith(f"error: {sentence}")
    assert said.count("\n") == 1


def test_what_is_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_arguments: list[str]) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(command_line, "app", fails)
    with pytest.raises(ValueError, match="ours"):
        command_line.run()


# --- the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc/corolla", "file/below"])
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the place of a folder")
    with pytest.raises(CheckpointError, match=r"cannot be written.*--cache-dir or COROLLA_CACHE"):
        made_once(tmp_path / place / "model", lambda work: None)


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = "import os, sys, pathlib; from corolla.files import made_once; "
    killed += "made_once(pathlib.Path(sys.argv[1]), lambda work: os.kill(os.getpid(), 9))"
    folder = tmp_path / "model"
    ended = subprocess.run([sys.executable, "-c", killed, str(folder)], check=False, timeout=120)
    assert ended.returncode == -9
    assert [path for path in tmp_path.iterdir() if path.is_dir()]
    made_once(folder, lambda work: None)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


# --- real processes --------------------------------------------------------------------------------------------


def limited(kind: int, amount: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COROLLA, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},  # else its cut-off bytecode is kept
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(kind, (amount, amount)),
    )


def test_a_file_that_the_disk_does_not_take_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    """The transcript's header; nothing half is left."""
    place = tmp_path / "chat.jsonl"
    ended = limited(
        resource.RLIMIT_FSIZE, 20, "chat", str(tiny), "--style", "delimiter", "--transcript", str(place)
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert os.strerror(errno.EFBIG) in ended.stderr
    assert list(tmp_path.iterdir()) == []
