"""The C kernels of `native*.c`, built on the machine that runs them.

Invariant: what is loaded here gave right results on this machine; where it cannot be built (no compiler, say),
`library()` is None and everything is computed by torch alone. Built once into Corolla's cache, for exactly this
source, compiler, CPU and instruction set (`isa.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from corolla.errors import CorollaError
from corolla.files import made_once
from corolla.models.kernels import isa
from corolla.places import cache_root
from corolla.text import get_logger

log = get_logger(__name__)

NAME = "native.so"
DIGEST = f"{NAME}.sha256"  # beside it: a library that was cut off would end the process that loads it
SOURCES = (
    "lanes.h", "threads.h", "native.h", "native.c", "native_attention.c", "native_int8.c", "native_program.c"
)  # fmt: skip
# Results are the same for any number of threads, so sums must not be reordered by the compiler: no -ffast-math.
FLAGS = (
    "-O3", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"
)  # fmt: skip
BUILD_SECONDS = 120
FORMS = {
    "bfloat16": 0,
    "float16": 1,
    "bytes": 2,
    "nibbles": 3,
    "int8": 4,
    "float32": 5,
    "float8": 6,
}  # of weights, as in native.h

# Arguments: p(ointer), i(nt), l(ong), f(loat).
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}
_WEIGHT = "ipppiill"
_SIGNATURES = {
    "narrow_product": _WEIGHT + "pppli",
    "narrow_widen": _WEIGHT + "pi",
    "begin_team": "i",
    "end_team": "",
    "int8_product": "ppppllppppl" + "ffi",
    "attend_rows": "pll" * 4 + "ppppp" + "llllllll" + "ffl" + "pp" + "plp" + "i",
    "attend_stretch": "pllppplllllllffl" + "pp" + "pi",
    "run_program": "plpppp" + "i",
}


class Layer(ctypes.Structure):
    """A frozen layer as `run_program` is told about it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("form", "half_steps", "shift", "columns", "outputs")),
        *((name, ctypes.c_void_p) for name in ("values", "steps", "offsets", "bias")),
        *((name, ctypes.c_double) for name in ("levels", "least")),  # of activations in 8 bits
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element stands; the caller keeps the tensor alive while it is used."""
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The functions of the C files, or None. Building takes seconds when it is asked for the first time.

    Raises `UsageError` where `COROLLA_ISA` names no instruction set.
    """
    limit = isa.limit()
    try:
        found = loaded(_compiler(), cache_root(), limit)
    except (CorollaError, OSError, subprocess.SubprocessError) as error:
        log.info("The C kernels are not used: %s", error)
        return None
    if found is None:
        log.warning("The C kernels compute wrong results on this machine, so they are not used.")
    return found


def kernels() -> ctypes.CDLL:
    """`library()`, for those who know that it is there."""
    found = library()
    assert found is not None
    return found


@lru_cache(maxsize=8)
def loaded(compiler: tuple[str, ...], cache: Path, limit: str) -> ctypes.CDLL | None:
    """The same for the newest instruction set within a limit, built by `compiler`; None if its results are wrong.

    Raises `OSError`, `subprocess.SubprocessError` and `CorollaError` where it cannot be built or kept in `cache`.
    """
    found = _load(_built(compiler, cache, limit))
    return found if _computes(found) else None


def instruction_set() -> str | None:
    """For which `library()` is built; None where it is not."""
    return None if library() is None else isa.runnable(isa.described(_compiler()), isa.limit())[-1].name


def instruction_sets() -> tuple[str, ...]:
    """All for which it can be built and run here within the limit, the newest last."""
    try:
        return tuple(one.name for one in isa.runnable(isa.described(_compiler()), isa.limit()))
    except (OSError, subprocess.SubprocessError):
        return ()


def _compiler() -> tuple[str, ...]:
    """The program, and what `CC` says is to be given to it first: `ccache gcc`, `gcc -m64`."""
    try:
        program, *arguments = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError:
        raise FileNotFoundError("CC cannot be read as a command; look at its quotes") from None
    found = shutil.which(program)
    if found is None:
        raise FileNotFoundError("there is no C compiler; install gcc to have them")
    return found, *arguments


def _built(compiler: tuple[str, ...], cache: Path, limit: str) -> Path:
    """The shared library, built if it is not in the cache."""
    described = isa.described(compiler)
    chosen = isa.runnable(described, limit)[-1]
    sources = {name: files(__package__).joinpath(name).read_bytes() for name in SOURCES}
    program, *first = compiler
    flags = [*first, *FLAGS, *isa.TUNED, *chosen.flags, macro(chosen)]
    # A cache may be shared between machines, and what the compiler makes depends on the CPU too.
    parts = (" ".join(flags), described, cpu(), torch.__version__)
    name = hashlib.sha256(b"\0".join([*sources.values(), *(one.encode() for one in parts)])).hexdigest()[:16]

    def make(folder: Path) -> None:
        for file, source in sources.items():
            (folder / file).write_bytes(source)
        units = [file for file in SOURCES if file.endswith(".c")]
        command = [program, *flags, "-o", NAME, *units, "-lm"]
        subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=BUILD_SECONDS)
        (folder / DIGEST).write_text(_digest(folder))

    return made_once(cache / "kernels" / name, make, whole=_whole) / NAME


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()


def _whole(folder: Path) -> bool:
    """Whether the library that was built is there as it was built."""
    try:
        return (folder / DIGEST).read_bytes() == _digest(folder).encode()
    except OSError:
        return False


def macro(chosen: isa.InstructionSet) -> str:
    """How `lanes.h` is told which of its sets to use."""
    return f"-DISA_{chosen.name.upper().replace('-', '_')}"


def cpu() -> str:
    """Which CPU this is, and what it can do: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    about = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join(sorted(about)) or platform.processor()


def version() -> str:
    """Of which source, compiler and CPU `library()` is; nothing where there is none."""
    found = library()
    return "" if found is None else Path(found._name).parent.name


def _load(path: Path) -> ctypes.CDLL:
    # torch has loaded its OpenMP by now, under the name that the library asks for: both use one pool of threads.
    found = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        function = getattr(found, name, None)
        if function is None:
            raise CorollaError(f"the compiler left {name} out")
        function.argtypes, function.restype = [_TYPES[one] for one in signature], None
    return found


def _computes(found: ctypes.CDLL) -> bool:
    """Whether a product comes out right: a compiler, a CPU or a cache may be broken in ways that nobody foresees."""
    values = torch.arange(-128, 128, dtype=torch.int8).repeat(2).view(8, 64)
    steps = torch.tensor([0.5, 0.25], dtype=torch.float32).repeat(8, 1)
    wanted = values.float() * steps.repeat_interleave(32, dim=1)
    weight = (FORMS["bytes"], pointer(values), pointer(steps), None, 0, 5, 64, 8)
    for rows in (1, 3):  # the weight is read in two ways
        given = torch.linspace(-1, 1, rows * 64, dtype=torch.float32).view(rows, 64)
        result = torch.empty(rows, 8, dtype=torch.float32)
        found.narrow_product(*weight, None, pointer(given), pointer(result), rows, 2)
        if not torch.allclose(result, given @ wanted.T, atol=1e-3):
            return False
    return _multiplies_bytes(found)


def _multiplies_bytes(found: ctypes.CDLL) -> bool:
    """The same of a product in 8 bits: 48 outputs of 16 columns, all whole numbers."""
    weight = (torch.arange(48 * 16) % 255 - 127).to(torch.int8).view(48, 16)
    laid = weight.view(3, 16, 4, 4).transpose(1, 2).contiguous()
    steps, sums = torch.ones(48, dtype=torch.float32), weight.sum(1, dtype=torch.int32) * 128
    given = torch.arange(9 * 16).remainder(255).sub(127).float().view(9, 16)
    given[:, 0] = 127.0
    codes = torch.empty(9, 16, dtype=torch.uint8)
    scratch, result = (torch.empty(*shape, dtype=torch.float32) for shape in ((9,), (9, 48)))
    arguments = (pointer(laid), pointer(steps), pointer(sums), None, 16, 48, pointer(given), pointer(codes))
    found.int8_product(*arguments, pointer(scratch), pointer(result), 9, 127.0, 1e-30, 2)
    return torch.equal(result, given @ weight.float().T)
