"""JSON lines of results: one a figure, with every run, and what it was measured with.

Invariant: lines are appended, never changed; of a figure the newest line counts.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Measured
from benchmarks.processes import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("corolla", "torch", "transformers", "peft", "hivemind")
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def conditions() -> dict[str, Any]:
    """Commit, versions, machine and date: the same for all lines of a run."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "cores": os.cpu_count(),
            "cpu": _cpu("model name"),
            "flags": [flag for flag in FLAGS if flag in _cpu("flags").split()],
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
    }


def describe(found: dict[str, Any]) -> str:
    """The conditions in two lines of text, but for the date."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    machine = found["machine"]
    return (
        f"commit {found['commit'] or 'unknown'}{' with changes' if found['dirty'] else ''}; {versions}\n"
        f"{machine['cores']} cores, {machine['cpu']} ({' '.join(machine['flags'])}; torch uses "
        f"{machine['torch']})"
    )


def is_newer(found: dict[str, Any]) -> bool:
    """Whether a run's processor had AVX-512 and was let use it."""
    return str(found["machine"]["torch"]).startswith("AVX512")


def line_of(measured: Measured, newer: bool) -> dict[str, Any]:
    """What of a figure goes into the file; `newer` as in `is_newer`."""
    return {
        "figure": measured.figure.name,
        "unit": measured.figure.unit,
        "ours": statistics.median(measured.ours),
        "baseline": statistics.median(measured.baseline),
        "ratio": measured.ratio,
        "target": measured.figure.wanted(newer),
        "met": measured.figure.met(measured.ratio, newer),
        "runs": {"ours": measured.ours, "baseline": measured.baseline},
        "details": measured.details,
    }


def chosen(line: dict[str, Any]) -> str:
    """How a line's baseline was run: what was fastest, or what it was built for; empty without a choice."""
    about = line.get("details", {}).get("baseline")
    if about is None:
        return ""
    waiting = about["idle threads"]
    best = about[waiting]
    if "llama.cpp" in best:
        how = f"llama-cpp-python {best['llama-cpp-python']}, {' '.join(best['llama.cpp'].split())}"
    else:
        how = f"attention {best['attention']}"
    return f"{how}; idle threads {waiting}"


def of_memory(line: dict[str, Any]) -> str:
    """Which share of what memory gives a line's decoding has reached; empty where that was not measured."""
    about = line.get("details", {}).get("memory")
    if about is None:
        return ""
    read, speed = about["bytes a token"], about["bytes a second"]
    share = line["ours"] * read / speed
    return f"{read / 1e6:.0f} MB a token, {share:.0%} of the {speed / 1e9:.1f} GB/s that memory gives"


def not_measured(figure: Figure, reason: str) -> dict[str, Any]:
    """The same for a figure that could not be measured."""
    return {"figure": figure.name, "not_measured": reason}


def append(file: Path, line: dict[str, Any], found: dict[str, Any], *, quick: bool) -> None:
    """Add a line to the file, with its conditions."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({**line, "quick": quick, **found}) + "\n")


def newest(folder: Path = RESULTS, newer: bool | None = None) -> dict[str, dict[str, Any]]:
    """The newest line of each figure by its name, of all runs or of those where `is_newer` says this; a quick run's
    do not count."""
    found: dict[str, dict[str, Any]] = {}
    for line in sorted(_lines(folder.glob("*.jsonl")), key=lambda line: str(line["date"])):
        if not line["quick"] and newer in (None, is_newer(line)):
            found[line["figure"]] = line
    return found


def _lines(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for file in sorted(files):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            if "figure" in line and "date" in line:  # other benchmarks may write there too
                yield {"quick": False, **line}


def _git(*arguments: str) -> str:
    try:
        return subprocess.check_output(
            ["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
