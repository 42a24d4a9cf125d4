"""Write the table and the plots of docs/performance.md from the newest JSON lines.

    python -m benchmarks.report [--results FOLDER] [--page FILE]

Invariant: only what stands between the page's markers is changed, and it says nothing that no line says.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.processes import ROOT
from benchmarks.results import RESULTS, chosen, describe, newest

PAGE = ROOT / "docs" / "performance.md"
TABLES = {"bench": True, "bench-avx2": False}  # of newer processors, and of those with AVX2
PLOTS = "growth"  # what the markers are called
Lines = Mapping[str, dict[str, Any]]


def table(figures: Sequence[Figure], lines: Lines, newer: bool) -> str:
    """The figures as a Markdown table, and what they were measured with: on `newer` processors, or on others."""
    rows = [
        "| figure | Corolla | baseline | | ratio | wanted | |",
        "|---|---|---|---|---|---|---|",
        *(_row(figure, lines.get(figure.name), newer) for figure in figures),
    ]
    return "\n".join(rows) + "\n\n" + _sources([lines[f.name] for f in figures if f.name in lines])


def _row(figure: Figure, line: dict[str, Any] | None, newer: bool) -> str:
    wanted = f"{'at most' if figure.at_most else 'at least'} {figure.wanted(newer):g}×"  # noqa: RUF001
    beginning = f"| {figure.title} |"
    if line is None or "not_measured" in line:
        reason = "not measured" if line is None else f"not measured: {line['not_measured']}"
        return f"{beginning} {_cell(reason)} | {figure.baseline} | | | {wanted} | |"
    ratio = float(line["ratio"])
    verdict = "met" if figure.met(ratio, newer) else "**short**"
    ours, theirs = (_value(line[side], figure.unit) for side in ("ours", "baseline"))
    return f"{beginning} {ours} | {figure.baseline} | {theirs} | {ratio:.2f}× | {wanted} | {verdict} |"  # noqa: RUF001


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit == "s":
        return f"{1000 * value:,.0f} ms"
    return f"{value:,.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _sources(lines: Sequence[dict[str, Any]]) -> str:
    """When, of which commits and with what the lines were measured; then how each baseline was run."""
    days: dict[str, list[str]] = {}
    for line in sorted(lines, key=lambda line: str(line["date"])):
        days.setdefault(describe(line), []).append(line["date"][:10])
    runs = [f"Measured {_span(dates)}: {run}." for run, dates in days.items()]
    hows: dict[str, list[str]] = {}
    for line in lines:
        if how := chosen(line):
            hows.setdefault(how, []).append(f"`{line['figure']}`")
    baselines = [f"- {how}: {', '.join(names)}" for how, names in hows.items()]
    if baselines:
        runs.append("How the local baselines were run, whatever was fastest:\n\n" + "\n".join(baselines))
    return "\n\n".join(runs) or "Nothing has been measured yet."


def _span(dates: Sequence[str]) -> str:
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def pictures(lines: Lines, folder: Path) -> str:
    """Draw the plots that there are lines for; gives the Markdown that shows them."""
    from benchmarks.growth import GROWTHS
    from benchmarks.plots import draw

    shown = []
    for item in GROWTHS:
        line = lines.get(item.name)
        if line is None or not line["points"]:
            shown.append(f"{item.title}: not measured yet.")
            continue
        draw(item, line["points"], folder / f"{item.name}.png")
        alone = f"![{item.title}](plots/{item.name}.png)"
        shown.append(f"{alone}\n\n{item.title}; beside it {item.baseline}.")
    return "\n\n".join(shown)


def put(page: str, marker: str, content: str) -> str:
    """The page with `content` between its markers. Raises `ValueError` when they are not there once."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"The page needs the markers {begin} and {end}, once each and in this order.")
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content.strip()}\n{end}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    from benchmarks.run import LINES

    lines = newest(options.results)
    figures = [figure for line in LINES for figure in line.figures]
    page = options.page.read_text()
    for marker, newer in TABLES.items():
        page = put(page, marker, table(figures, newest(options.results, newer), newer))
    page = put(page, PLOTS, pictures(lines, options.page.parent / "plots"))
    options.page.write_text(page)


if __name__ == "__main__":
    main()
