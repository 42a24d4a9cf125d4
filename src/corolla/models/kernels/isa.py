"""Which instruction set the C kernels are built for: the newest that this CPU and its compiler have, or an older one.

Invariant: a machine that is limited to a set (`COROLLA_ISA`) runs the very kernels of a machine that has nothing
newer. The limit holds for Corolla's own C; torch, oneDNN, MKL and fbgemm have variables of their own, which
`make test-avx2` sets together with it.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache

from corolla.errors import UsageError

VARIABLE = "COROLLA_ISA"
ASK_SECONDS = 30
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
# How a compiler is asked for the CPU that it runs on, and how it is told to arrange instructions for it.
NATIVE, TUNED = ("-march=native", ("-mtune=native",)) if X86 else ("-mcpu=native", ())


@dataclass(frozen=True)
class InstructionSet:
    """One for which `lanes.h` has primitives."""

    name: str
    macros: frozenset[str] = frozenset()  # a compiler for a CPU that has the set defines all of these
    flags: tuple[str, ...] = ()  # that let a compiler use it


_AVX2 = InstructionSet("avx2", frozenset({"__AVX2__", "__FMA__", "__F16C__"}), ("-mavx2", "-mfma", "-mf16c"))
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
SETS = (  # from the oldest to the newest
    InstructionSet("plain"),
    InstructionSet("neon", frozenset({"__ARM_NEON", "__ARM_FEATURE_DOTPROD"}), ("-march=armv8.2-a+dotprod",)),
    _AVX2,
    InstructionSet("avx-vnni", _AVX2.macros | {"__AVXVNNI__"}, (*_AVX2.flags, "-mavxvnni")),
    InstructionSet(
        "avx512",
        _AVX2.macros | {f"__{one.upper()}__" for one in _AVX512},
        (*_AVX2.flags, *(f"-m{one}" for one in _AVX512)),
    ),
)
NAMES = tuple(one.name for one in SETS)


def limit() -> str:
    """The newest set that may be used: what `COROLLA_ISA` names, else the newest of all.

    Raises `UsageError` for a name that there is not.
    """
    asked = os.environ.get(VARIABLE) or NAMES[-1]
    if asked not in NAMES:
        raise UsageError(
            f"There is no instruction set {asked!r}; set {VARIABLE} to one of {', '.join(NAMES)}."
        )
    return asked


@lru_cache(maxsize=8)
def described(compiler: tuple[str, ...]) -> str:
    """What a compiler says of itself and of this CPU, as macros.

    Raises `OSError` and `subprocess.SubprocessError`, whatever it is that was taken for a compiler.
    """
    command = [*compiler, NATIVE, "-dM", "-E", "-x", "c", os.devnull]
    said = subprocess.run(command, capture_output=True, check=True, timeout=ASK_SECONDS).stdout
    return said.decode(errors="replace")


def runnable(described: str, limit: str) -> tuple[InstructionSet, ...]:
    """The sets within a limit that kernels can be built for and run with here, the newest last; never empty."""
    lines = (line.split() for line in described.splitlines() if line.startswith("#define "))
    macros = {word for line in lines for word in line[1:2]}
    return tuple(one for one in SETS[: NAMES.index(limit) + 1] if one.macros <= macros)
