"""The C kernels are built, or everything goes on without them."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from corolla.models.kernels import isa, native


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
def test_what_is_not_whole_in_the_cache_is_built_once_more(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a library that was cut off would end this process."""
    built = native._built(native._compiler(), fresh, isa.limit())
    content, digest = built.read_bytes(), built.with_name(native.DIGEST).read_bytes()

    def again() -> None:
        assert native._built(native._compiler(), fresh, isa.limit()) == built
        assert built.with_name(native.DIGEST).read_bytes() == digest
        assert built.read_bytes() == content

    damages: list[Callable[[], object]] = [
        lambda: os.truncate(built, 4096),
        lambda: os.truncate(built, 0),
        lambda: built.write_bytes(content[:-4096] + bytes(4096)),  # as long as it was
        lambda: built.unlink(),
        lambda: os.truncate(built.with_name(native.DIGEST), 0),
        lambda: shutil.rmtree(built.parent),
    ]
    made = copies(monkeypatch, content)
    for number, damage in enumerate(damages, 1):
        damage()
        again()
        again()
        assert len(made) == number
    assert native.library() is not None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_its_check_is_in_float32_whatever_torch_makes_tensors_in(
    another_default: AbstractContextManager[None],
) -> None:
    native.library.cache_clear()
    with another_default:
        assert native.library() is not None


def copies(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Path]:
    """Building is to copy what was built before, which is sooner; where that was done."""
    made: list[Path] = []
    run = subprocess.run

    def copied(command: list[str], **arguments: Any) -> Any:
        if native.NAME not in command:
            return run(command, **arguments)
        made.append(Path(arguments["cwd"]))
        return (made[-1] / native.NAME).write_bytes(content)

    monkeypatch.setattr(subprocess, "run", copied)
    return made


def fallen_back(caplog: pytest.LogCaptureFixture) -> str:
    """Why there is no library; in one line."""
    with caplog.at_level(logging.INFO, logger=native.log.name):
        assert native.library() is None
    (said,) = caplog.messages
    assert "\n" not in said
    return said.removeprefix("The C kernels are not used: ")


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert fallen_back(caplog) == "there is no C compiler; install gcc to have them"
    assert native.instruction_sets() == ()


def test_a_command_that_does_not_end(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "gcc '-m64")
    assert fallen_back(caplog) == "CC cannot be read as a command; look at its quotes"
    assert native.instruction_sets() == ()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_compiler_may_be_a_command_of_several_words(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Such as `ccache gcc`."""
    first = compiler(tmp_path_factory.mktemp("two words"), 'exec "$@"')
    monkeypatch.setenv("CC", f"'{first}' cc -DOF_THE_USERS_OWN=1")
    assert native.library() is not None
    assert native.instruction_set() in native.instruction_sets()
    named = native.version()
    monkeypatch.setenv("CC", " ")
    assert native._compiler() == (shutil.which("cc"),)
    copies(monkeypatch, b"")
    assert native._built(native._compiler(), fresh, isa.limit()).parent.name != named


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_that_lacks_a_function(
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = f'case "$*" in *{native.NAME}*) exec cc -shared -o {native.NAME} -x c {os.devnull};; esac'
    monkeypatch.setenv("CC", compiler(tmp_path_factory.mktemp("bin"), script))
    assert fallen_back(caplog) == "the compiler left narrow_product out"


@pytest.mark.parametrize(
    "script", ["exit 1", 'test "$1" = --version || exit 1', "true", "printf '\\377'", "echo '#define '"]
)
def test_a_compiler_that_fails_leaves_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, script: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path_factory.mktemp("bin"), script))
    assert native.library() is None
    assert not list(fresh.glob("kernels/*/"))


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
