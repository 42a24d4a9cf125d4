"""The C kernels are built, or everything goes on without them."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from corolla.models.kernels import native


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is built yet; the cache. What is built here is not made fast, so it is built sooner."""
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", tuple("-O1" if one == "-O3" else one for one in native.FLAGS))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()
    native.loaded.cache_clear()


def compiler(folder: Path, script: str) -> str:
    path = folder / "some-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_it_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library() is not None
    (built,) = fresh.glob("kernels/*/native.so")
    written = built.stat().st_mtime_ns
    native.library.cache_clear()
    native.loaded.cache_clear()
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.glob("kernels/*/native.so")] == [written]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_its_check_is_in_float32_whatever_torch_makes_tensors_in(
    another_default: AbstractContextManager[None],
) -> None:
    native.library.cache_clear()
    with another_default:
        assert native.library() is not None


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.library() is None


@pytest.mark.parametrize("script", ["exit 1", 'test "$1" = --version || exit 1', "true"])
def test_a_compiler_that_fails_leaves_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, script: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path_factory.mktemp("bin"), script))
    assert native.library() is None
    assert not list(fresh.glob("kernels/*/native.so"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_wrong_results_are_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def mistaken(command: list[str], **arguments: object) -> object:
        if "native.c" in command:
            source = Path(str(arguments["cwd"])) / "native.c"
            source.write_text(source.read_text().replace("parts[o][r] * steps[o][g]", "parts[o][r]"))
        return run(command, **arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", mistaken)
    assert native.library() is None
