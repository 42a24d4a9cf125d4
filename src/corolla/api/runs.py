"""The training runs in the folder of bundles, as the page shows them: those that go on, and those that have ended.

Invariant: it only looks, at files that `corolla tune` keeps whole by itself; so a run knows nothing of the page and
survives it. What a file says is bounded here, and text to the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from corolla.errors import CorollaError
from corolla.json_files import JsonError, load_object, parse_object
from corolla.text import one_line, printable
from corolla.tuning.bundle import BUNDLE_FILE, METRICS_FILE, load_bundle
from corolla.tuning.checkpoints import RUN_FILE, RunFolder

MOST_RUNS = 200
MOST_POINTS = 400
MOST_SAMPLES = 5
MOST_BYTES = 32 * 2**20  # of one file
REPORT_FILE = "report.html"


class Runs:
    """All in a folder. For any thread."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def all(self) -> list[dict[str, Any]]:
        """What there is to say of each, the latest first."""
        if self._folder is None:
            return []
        found = []
        try:
            paths = sorted(self._folder.iterdir(), key=_changed, reverse=True)
        except OSError:  # not made yet, or not there just now
            return []
        for path in paths[: 4 * MOST_RUNS]:
            if path.name.startswith("."):
                continue
            if (path / RUN_FILE).is_file():
                found.append(_unfinished(path))
            elif (path / BUNDLE_FILE).is_file():
                found.append(_finished(path))
        return found[:MOST_RUNS]

    def report(self, name: str) -> bytes | None:
        """A finished run's report, if it has one."""
        folder = None if self._folder is None else self._folder / name
        if folder is None or not (folder / BUNDLE_FILE).is_file():
            return None
        path = folder / REPORT_FILE
        return path.read_bytes() if path.is_file() and path.stat().st_size < MOST_BYTES else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unfinished(path: Path) -> dict[str, Any]:
    """From its newest checkpoint: what has been reached by then."""
    about: dict[str, Any] = {"name": one_line(path.name.removesuffix(".run")), "state": "unfinished"}
    latest = RunFolder(path.with_name(path.name.removesuffix(".run"))).latest()
    try:
        state = {} if latest is None else load_object(latest / "trainer_state.json")
    except (OSError, JsonError):
        state = {}  # a checkpoint that was just replaced
    log = state.get("log_history")
    lines = [line for line in log if isinstance(line, Mapping)] if isinstance(log, list) else []
    done, total = _number(state.get("global_step")), _number(state.get("max_steps"))
    return about | {"step": done, "steps": total, "saved": _changed(latest or path)} | _curves(lines)


def _finished(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = {"name": one_line(path.name), "state": "finished"}
    try:
        bundle, lines = load_bundle(path), list(_lines(path / METRICS_FILE))
    except (OSError, CorollaError) as error:
        return about | {"state": "unreadable", "why": one_line(error, characters=300)} | _curves(())
    steps = _number(bundle.training.get("steps"))
    samples = bundle.metrics.get("samples")
    exchanges = samples.get("replies") if isinstance(samples, Mapping) else None
    shown = [
        {
            "said": printable(str(one.get("said", "")))[:500],
            "reply": printable(str(one.get("reply", "")))[:500],
        }
        for one in (exchanges if isinstance(exchanges, list) else [])[:MOST_SAMPLES]
        if isinstance(one, Mapping)
    ]
    more = {"report": (path / REPORT_FILE).is_file(), "samples": shown, "saved": _changed(path)}
    return about | {"step": steps, "steps": steps} | more | _curves(lines)


def _lines(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield parse_object(line)
        except JsonError:
            continue


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps with their losses, of the training and of what is held out."""
    lines = list(lines)
    return {name: _points(lines, key) for name, key in (("loss", "loss"), ("held_out", "eval_loss"))}


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> list[list[float]]:
    pairs = [(_number(line.get("step")), _number(line.get(key))) for line in lines if key in line]
    points = [[step, loss] for step, loss in pairs if step is not None and loss is not None]
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[::stride] + (points[-1:] if points and (len(points) - 1) % stride else [])


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12
    return value if good else None
