"""The training runs in the folder of bundles, as the page shows them: those that go on, and those that have ended.

Invariant: it only looks, at files that `corolla tune` keeps by itself; so a run knows nothing of the page and
survives it. What has not changed is not read again, however many look. What a file says is bounded here, and text
to the page.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from corolla.api.starting import Starter
from corolla.errors import CorollaError
from corolla.json_files import JsonError, load_object, parse_object
from corolla.text import one_line, printable
from corolla.tuning.bundle import BUNDLE_FILE, METRICS_FILE, load_bundle
from corolla.tuning.checkpoints import RUN_FILE, RunFolder

Stamp = tuple[int, ...]
ENDED = ("finished", "unreadable")
QUIET_SECONDS = 60.0  # after which a run whose process is not known is said to have stopped
MOST_RUNS = 200
MOST_POINTS = 400
MOST_SAMPLES = 5
MOST_BYTES = 32 * 2**20  # of one file
REPORT_FILE = "report.html"


class Runs:
    """All in a folder. For any thread."""

    def __init__(self, folder: Path | None, starter: Starter | None = None) -> None:
        """`starter` knows those that were started here."""
        self._folder, self._starter = folder, starter
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[Stamp, dict[str, Any]]] = {}  # what is not changed is not read again

    def all(self) -> list[dict[str, Any]]:
        """What there is to say of each, the latest first."""
        if self._folder is None:
            return []
        try:
            paths = sorted(self._folder.iterdir(), key=_changed, reverse=True)
        except OSError:  # not made yet, or not there just now
            return []
        with self._lock:
            found = {path: about for path in paths[: 4 * MOST_RUNS] if (about := self._about(path))}
            self._read = {path: self._read[path] for path in found}
        return self._with_started([_now(about) for _, about in found.values()][:MOST_RUNS])

    def _about(self, path: Path) -> tuple[Stamp, dict[str, Any]] | None:
        if path.name.startswith("."):
            return None
        if (path / RUN_FILE).is_file():
            run = RunFolder(path.with_name(path.name.removesuffix(".run")))
            latest = run.latest()
            stamp, read = _stamp(run.live, latest), partial(_unfinished, run, latest)
        elif (path / BUNDLE_FILE).is_file():
            files = (path / name for name in (BUNDLE_FILE, METRICS_FILE, REPORT_FILE))
            stamp, read = _stamp(*files), partial(_finished, path)
        else:
            return None
        known = self._read.get(path)
        if known is None or known[0] != stamp:
            self._read[path] = known = (stamp, read())
        return known

    def _with_started(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same with what is known of those that were started here; none of them is changed in place."""
        if self._starter is None:
            return found
        # A bundle may have the name of a run that is to replace it.
        ended = [about for about in found if about["state"] in ENDED]
        by_name = {about["name"]: about for about in found if about["state"] not in ENDED}
        for name in self._starter.names():
            known = by_name.get(name)
            if known is None and any(about["name"] == name for about in ended):
                continue
            running = self._starter.running(name)
            more: dict[str, Any] = {"started_here": True, "state": "running" if running else "stopped"}
            if known is None:
                known = {"name": one_line(name), "step": None, "steps": None, **_curves(())}
                more["state"] = "starting" if running else "stopped"
            if not running or known["step"] is None:
                more["why"] = self._starter.last_words(name)
            by_name[name] = known | more
        mine = [about for about in by_name.values() if about.get("started_here")]
        others = [by_name[one["name"]] if one["state"] not in ENDED else one for one in found]
        return mine + [about for about in others if not about.get("started_here")]

    def report(self, name: str) -> bytes | None:
        """A finished run's report, if it has one."""
        folder = None if self._folder is None else self._folder / name
        if folder is None or not (folder / BUNDLE_FILE).is_file():
            return None
        path = folder / REPORT_FILE
        return path.read_bytes() if path.is_file() and path.stat().st_size < MOST_BYTES else None


def _now(about: dict[str, Any]) -> dict[str, Any]:
    """A run that has noted something just now goes on, whoever has started it."""
    fresh = "seconds_left" in about and time.time() - about["saved"] < QUIET_SECONDS
    return about | {"state": "running"} if fresh else about


def _stamp(*paths: Path | None) -> Stamp:
    """What changes when one of these does."""
    found: list[int] = []
    for path in paths:
        try:
            about = None if path is None else path.stat()
        except OSError:
            about = None
        found += [0, 0, 0] if about is None else [about.st_mtime_ns, about.st_size, about.st_ino]
    return tuple(found)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unfinished(run: RunFolder, latest: Path | None) -> dict[str, Any]:
    """From what it has noted by now, else from its newest checkpoint."""
    about: dict[str, Any] = {"name": one_line(run.out.name), "state": "unfinished"}
    lines = _as_it_went(_lines(run.live))
    if lines:
        last = {key: lines[-1].get(key) for key in ("step", "steps")}
        pace = next((line for line in reversed(lines) if "loss" in line), lines[-1])
        last |= {key: pace.get(key) for key in ("tokens_per_second", "seconds_left")}
        numbers = {key: _number(value) for key, value in last.items()}
        return about | numbers | {"saved": _changed(run.live)} | _curves(lines)
    try:  # of an older release
        state = {} if latest is None else load_object(latest / "trainer_state.json")
    except (OSError, JsonError):
        state = {}  # a checkpoint that was just replaced
    log = state.get("log_history")
    lines = [line for line in log if isinstance(line, Mapping)] if isinstance(log, list) else []
    done, total = _number(state.get("global_step")), _number(state.get("max_steps"))
    return about | {"step": done, "steps": total, "saved": _changed(latest or run.path)} | _curves(lines)


def _as_it_went(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without the steps that were taken again when the run was resumed."""
    kept: dict[tuple[float, bool], Mapping[str, Any]] = {}
    last = 0.0
    for line in lines:
        step = _number(line.get("step"))
        if step is None:
            continue
        if step < last:
            kept = {key: one for key, one in kept.items() if key[0] <= step}
        kept[step, "loss" in line] = line
        last = step
    return list(kept.values())


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
