"""The kernels give on an ARM CPU what plain C gives here: built by a cross compiler, run by an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from corolla.models.kernels import isa, native

DRIVER = Path(__file__).with_name("every_kernel.c")
CROSS = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SECONDS = 200
EXACT = ("bytes-", "widen-0", "widen-1")  # sums of whole numbers, and copies


def results(folder: Path, compiler: str, name: str, run: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """What every kernel computes with an instruction set, by kernel."""
    chosen = isa.SETS[isa.NAMES.index(name)]
    sources = [str(files(native.__package__).joinpath(one)) for one in native.SOURCES if one.endswith(".c")]
    own = [one for one in native.FLAGS if one not in ("-shared", "-fPIC")]
    program = folder / f"{Path(compiler).name}-{name}"
    include = f"-I{Path(sources[0]).parent}"
    command = [compiler, *own, *chosen.flags, native.macro(chosen), include, "-static", "-o", str(program)]
    subprocess.run([*command, str(DRIVER), *sources, "-lm"], check=True, timeout=SECONDS)
    said = subprocess.run(
        [*run, str(program)], check=True, capture_output=True, text=True, timeout=SECONDS
    ).stdout
    found: dict[str, list[float]] = {}
    for line in said.splitlines():
        what, number = line.split()
        found.setdefault(what, []).append(float(number))
    return found


def check(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert found.keys() == wanted.keys()
    assert len(wanted) > 40
    for what, numbers in wanted.items():
        exact = what.startswith(EXACT)
        largest = max(map(abs, numbers))
        assert largest > 0, what
        assert found[what] == pytest.approx(numbers, rel=0, abs=0 if exact else 2e-6 * largest), what


@pytest.mark.nightly
@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="no gcc-aarch64-linux-gnu or no qemu-user")
@pytest.mark.parametrize("name", ["plain", "neon"])
def test_arm(tmp_path: Path, name: str) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None
    assert CROSS is not None
    assert EMULATOR is not None
    check(results(tmp_path, CROSS, name, (EMULATOR, "-cpu", "max")), results(tmp_path, compiler, "plain"))


@pytest.mark.nightly
@pytest.mark.skipif(not native.instruction_sets(), reason="no C compiler")
@pytest.mark.parametrize("name", native.instruction_sets()[1:])
def test_this_cpu(tmp_path: Path, name: str) -> None:
    """So that a mistake of the driver's own is not taken for ARM's; `platform.machine()` says what this is."""
    compiler = shutil.which("cc")
    assert compiler is not None, platform.machine()
    check(results(tmp_path, compiler, name), results(tmp_path, compiler, "plain"))
