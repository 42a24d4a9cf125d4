"""Measure, each figure beside its baseline, interleaved in the same run.

    python -m benchmarks.run [--only NAME...] [--repeats 5] [--json FILE] [--quick] [--llama-python PYTHON]

Invariant: what cannot be measured is said so and the run goes on; every result is on disk as soon as there is one.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import generation, growth, memory, sessions, shapes, training
from benchmarks.bench import CLIENT_ENV, Bench, Options
from benchmarks.figures import Line, measure
from benchmarks.growth import Growth
from benchmarks.processes import NotMeasured
from benchmarks.results import (
    RESULTS,
    append,
    chosen,
    conditions,
    describe,
    is_newer,
    line_of,
    not_measured,
    of_memory,
)
from corolla.errors import CorollaError

LINES: list[Line] = [*generation.LINES, *sessions.LINES, *training.LINES, *memory.LINES, *shapes.LINES]
GROWTHS: list[Growth] = growth.GROWTHS
NAMES = [figure.name for line in LINES for figure in line.figures] + [item.name for item in GROWTHS]


class Run:
    """One run: where its lines go (None: nowhere), and what they are measured with."""

    def __init__(self, bench: Bench, file: Path | None) -> None:
        self._bench = bench
        self._file = file
        self._conditions = conditions()
        self._newer = is_newer(self._conditions)

    def head(self) -> None:
        """What everything is measured with."""
        print(f"{self._conditions['date']}, {describe(self._conditions)}")
        threads = f"baselines: {os.cpu_count()} threads, servers and clients stopped meanwhile"
        print(f"{threads}; ours: GOMP_SPINCOUNT {CLIENT_ENV['GOMP_SPINCOUNT']}; baselines: ", end="")
        print("what is faster for the baseline, and the faster attention (see the lines' details)")
        print(f"ratio of medians of {self._bench.options.repeats}\n")
        print(f"{'figure':24} {'ours':>11} {'baseline':>11} {'ratio':>7} {'target':>9}", flush=True)

    def line(self, line: Line) -> None:
        """Measure a line and note its figures."""
        try:
            found = [
                line_of(each, self._newer) for each in measure(line, self._bench, self._bench.options.repeats)
            ]
        except (NotMeasured, CorollaError) as error:
            found = [not_measured(figure, str(error)) for figure in line.figures]
        for figure, result in zip(line.figures, found, strict=True):
            bound = f"{'<=' if figure.at_most else '>='} {figure.wanted(self._newer):g}x"
            self._print(result, bound)
            self._append(result)
        if how := chosen(found[0]):
            print(f"{'':24} baseline: {how}", flush=True)
        if share := of_memory(found[0]):
            print(f"{'':24} {share}", flush=True)

    def growth(self, item: Growth) -> None:
        """Measure a plot's points and note them as one line."""
        points: list[dict[str, Any]] = []
        result: dict[str, Any] = {"figure": item.name, "points": points}
        repeats = min(3, self._bench.options.repeats)
        try:
            for x, pair in item.points(self._bench):
                pair.run()
                runs = [pair.run() for _ in range(repeats)]
                ours, baseline = ([1000 / run[side][0] for run in runs] for side in (0, 1))
                points.append({"x": x, "ours": ours, "baseline": baseline})
                print(
                    f"{item.name + f' {x}':24} {statistics.median(ours):8.1f} ms "
                    f"{statistics.median(baseline):8.1f} ms",
                    flush=True,
                )
        except (NotMeasured, CorollaError) as error:
            result["not_measured"] = str(error)
            self._print(result, "")
        self._append(result)

    def _append(self, result: dict[str, Any]) -> None:
        if self._file is not None:
            append(self._file, result, self._conditions, quick=self._bench.options.quick)

    def _print(self, result: dict[str, Any], bound: str) -> None:
        if "not_measured" in result:
            print(f"{result['figure']:24} not measured: {result['not_measured']}", flush=True)
            return
        said = "" if result["met"] else "  short"
        print(
            f"{result['figure']:24} {result['ours']:11.4g} {result['baseline']:11.4g} "
            f"{result['ratio']:6.2f}x {bound:>9}{said}",
            flush=True,
        )


def main() -> None:
    options = _parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order, as at Ctrl-C
    wanted = set(options.only or NAMES)
    with Bench(Options(options.repeats, options.quick, options.llama_python)) as bench:
        run = Run(bench, options.json or (None if options.quick else RESULTS / "bench.jsonl"))
        run.head()
        # Lines of one swarm follow each other; it is not started twice.
        for line in sorted(LINES, key=lambda line: line.quantization or ""):
            if wanted & {figure.name for figure in line.figures}:
                run.line(line)
        for item in GROWTHS:
            if item.name in wanted:
                run.growth(item)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, help="default: 5; 1 with --quick")
    parser.add_argument(
        "--json",
        type=Path,
        help="where lines are appended (benchmarks/results/bench.jsonl; nowhere with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama_cpp")
    options = parser.parse_args()
    if options.repeats is None:
        options.repeats = 1 if options.quick else 5
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


if __name__ == "__main__":
    main()
