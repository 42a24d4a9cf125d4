"""The set that kernels are built for is the newest that a CPU has within the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from corolla.errors import UsageError
from corolla.models.kernels import isa, native
from corolla.models.kernels.isa import SETS, runnable

NEWEST = isa.NAMES[-1]
_AVX2 = "AVX2", "FMA", "F16C"
_AVX512 = "AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL"
CPUS = {  # what they have, and what a compiler for them says of it
    "Core 2": (("SSE2",), ["plain"]),
    "Haswell, Zen 3": (_AVX2, ["plain", "avx2"]),
    "AVX2 without FMA": (("AVX2",), ["plain"]),
    "Alder Lake": ((*_AVX2, "AVXVNNI"), ["plain", "avx2", "avx-vnni"]),
    "Skylake-X, without VNNI": ((*_AVX2, *_AVX512), ["plain", "avx2"]),
    "Zen 4, without AVX-VNNI": ((*_AVX2, *_AVX512, "AVX512VNNI"), ["plain", "avx2", "avx512"]),
    "Raspberry Pi 4": (("ARM_NEON",), ["plain"]),
    "Apple M1": (("ARM_NEON", "ARM_FEATURE_DOTPROD"), ["plain", "neon"]),
}


def said_of(cpu: str) -> str:
    macros = [f"__{one}" if one.startswith("ARM_") else f"__{one}__" for one in CPUS[cpu][0]]
    return "".join(f"#define {one} 1\n" for one in ["__VERSION__ ", *macros])


@pytest.mark.parametrize("cpu", CPUS)
def test_sets_of_a_cpu(cpu: str) -> None:
    assert [one.name for one in runnable(said_of(cpu), NEWEST)] == CPUS[cpu][1]


def test_odd_lines_say_nothing() -> None:
    said = "#define \n#define\n\n# 1 \ufffd\n" + said_of("Apple M1")
    assert [one.name for one in runnable(said, NEWEST)] == CPUS["Apple M1"][1]


def test_what_a_compiler_says_need_not_be_utf_8(tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text("printf '#define \\377 1\\n#define __AVX2__ 1\\n'\n")
    assert isa.described(("sh", str(script))) == "#define \ufffd 1\n#define __AVX2__ 1\n"


@pytest.mark.parametrize("limit", isa.NAMES)
@pytest.mark.parametrize("cpu", CPUS)
def test_a_limit_only_takes_away(cpu: str, limit: str) -> None:
    wanted = [name for name in CPUS[cpu][1] if isa.NAMES.index(name) <= isa.NAMES.index(limit)]
    assert [one.name for one in runnable(said_of(cpu), limit)] == wanted
    assert wanted


def test_the_limit_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    assert isa.limit() == NEWEST
    monkeypatch.setenv(isa.VARIABLE, "")
    assert isa.limit() == NEWEST
    monkeypatch.setenv(isa.VARIABLE, "avx2")
    assert isa.limit() == "avx2"


def test_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.VARIABLE, "avx3")
    native.library.cache_clear()
    try:
        with pytest.raises(UsageError, match="no instruction set 'avx3'; set COROLLA_ISA to one of plain, "):
            native.library()
    finally:
        native.library.cache_clear()


def test_sets_are_in_the_order_in_which_they_contain_each_other() -> None:
    for at, newer in enumerate(SETS):
        for older in SETS[:at]:
            assert not newer.macros < older.macros
