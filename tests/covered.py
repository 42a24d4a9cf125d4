"""What the suites have covered: shown at the end of a run, and kept as JSON lines for docs/reliability.md.

A test notes it by `record_property(NAME, value)` with a name of `FIGURES` and a plain value, which travels between
processes. Invariant: only a run in which nothing failed leaves lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Seconds of one worker that each folder of tests may take of the forty minutes that two workers have together in the
# twenty minutes of `make check test`; the rest is for the set-up, for collecting, and for other releases and CPUs.
SHARES = {
    "api": 120, "benchmarks": 10, "chat": 90, "cli": 150, "client": 400, "data": 40, "e2e": 160, "fuzz": 30,
    "models": 300, "schedules": 60, "server": 110, "strangers": 60, "swarm": 80, "tuning": 110, "wire": 20,
}  # fmt: skip
Values = Sequence[dict[str, Any]]


def _schedules(values: Values) -> dict[str, Any]:
    from tests.schedules.table import total_of

    total, seconds = total_of(values)
    return {"figure": "schedules", "seconds": seconds, **total.as_dict()}


def _shown_schedules(values: Values) -> list[str]:
    from tests.schedules.table import lines_of, total_of

    return lines_of(*total_of(values))


def _strangers(values: Values) -> dict[str, Any]:
    from tests.fuzz.target import LEAST

    return {"figure": "strangers", "least": LEAST, "suites": list(values)}


def _shown_strangers(values: Values) -> list[str]:
    from tests.fuzz.target import in_words

    return [in_words(one) for one in values]


def _crowd(values: Values) -> dict[str, Any]:
    return {"figure": "crowd", "runs": list(values)}


def _shown_crowd(values: Values) -> list[str]:
    return [str(one["words"]) for one in values]


def _liars(values: Values) -> dict[str, Any]:
    return {"figure": "liars", "cases": list(values)}


def _shown_liars(values: Values) -> list[str]:
    lines = []
    for one in values:
        answers = one["answers"]
        counted = f"{sum(answers) / len(answers):.0f} answers on average, {max(answers)} at most"
        runs = f"{len(answers)} clients with a share of {one['share']:g}"
        lines.append(f"{one['lie']}, {one['work']}: found after {counted}; {runs}")
    return lines


def _honest(values: Values) -> dict[str, Any]:
    return {"figure": "honest audits", "cases": list(values)}


def _shown_honest(values: Values) -> list[str]:
    lines = [
        f"{one['family']}: {one['comparisons']} comparisons, no alarm; the largest was "
        f"{max(one['worst'].values()):.2g} of the tolerance"
        for one in values
    ]
    return [*lines, f"{sum(one['comparisons'] for one in values)} comparisons in all"]


# What a test may note -> the heading, the lines at the end of the run, and what is kept.
FIGURES: dict[str, tuple[str, Callable[[Values], list[str]], Callable[[Values], dict[str, Any]]]] = {
    "schedules": ("schedules of faults", _shown_schedules, _schedules),
    "strangers": ("strangers' messages", _shown_strangers, _strangers),
    "crowd": ("a crowd", _shown_crowd, _crowd),
    "liars": ("liars among audited servers", _shown_liars, _liars),
    "honest": ("honest servers that were audited", _shown_honest, _honest),
}


def add_options(parser: pytest.Parser) -> None:
    """Options of a run."""
    group = parser.getgroup("corolla")
    group.addoption(
        "--record", type=Path, metavar="FILE", help="append what was covered to this file of JSON lines"
    )
    group.addoption(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="take the nightly tests X times as large: do they run at all?",
    )


def show(reporter: pytest.TerminalReporter) -> None:
    """Print what was covered, and what it took."""
    for name, (heading, lines, _) in FIGURES.items():
        if values := _noted(reporter, name):
            reporter.section(heading)
            for line in lines(values):
                reporter.write_line(line)
    reporter.section("time by suite")
    for line in _times(reporter):
        reporter.write_line(line)


def _times(reporter: pytest.TerminalReporter) -> Iterator[str]:
    seconds: defaultdict[str, float] = defaultdict(float)
    tests: defaultdict[str, set[str]] = defaultdict(set)
    for report in _reports(reporter):
        suite = report.nodeid.partition("::")[0].removeprefix("tests/").partition("/")[0]
        seconds[suite] += report.duration
        tests[suite].add(report.nodeid)
    for suite in sorted(seconds, key=seconds.__getitem__, reverse=True):
        share = SHARES.get(suite)
        over = ", more than its share" if share is not None and seconds[suite] > share else ""
        of = "" if share is None else f" of {share}"
        yield f"{suite:12} {len(tests[suite]):5} tests {seconds[suite]:7.0f}{of} s of one worker{over}"


def record(reporter: pytest.TerminalReporter, file: Path, *, scale: float, passed: bool) -> None:
    """Append a line for each figure that was noted; those of a run that is not full size do not count."""
    from benchmarks.results import append, conditions

    noted = {name: values for name in FIGURES if (values := _noted(reporter, name))}
    if not noted or not passed:
        reporter.write_line(f"Nothing was added to {file}{'' if passed else ', since something failed'}.")
        return
    found = conditions()
    for name, values in noted.items():
        append(file, FIGURES[name][2](values), found, quick=scale != 1)
    reporter.write_line(f"Added to {file}: {', '.join(noted)}.")


def _reports(reporter: pytest.TerminalReporter) -> Iterator[pytest.TestReport]:
    for reports in reporter.stats.values():
        yield from (one for one in reports if isinstance(one, pytest.TestReport))


def _noted(reporter: pytest.TerminalReporter, wanted: str) -> list[dict[str, Any]]:
    return [
        value
        for report in _reports(reporter)
        if report.when == "call"
        for name, value in report.user_properties
        if name == wanted
    ]
