"""Write the tables of docs/reliability.md from the newest JSON lines.

    python -m benchmarks.reliability [--results FOLDER] [--page FILE]

The lines come from the tests that covered something (`make nightly`, or any run of pytest with `--record FILE`), from
`python -m benchmarks.audit` and from `python -m benchmarks.failures`.

Invariant: only what stands between the page's markers is changed, and it says nothing that no line says.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT
from benchmarks.report import put
from benchmarks.results import RESULTS, describe, newest

PAGE = ROOT / "docs" / "reliability.md"
Line = Mapping[str, Any]
Lines = Mapping[str, Line]
NOTHING = "Nothing has been measured yet."
TOGETHER = ("two at once", "during recovery")  # counted besides the faults' own kinds
STAGES = {
    "framed": "passed the framing",
    "decoded": "the decoder",
    "reached the table": "reached the session table",
    "answered with work": "answered with work",
}
AUDITS = "audits of "


def schedules(lines: Lines) -> str:
    """Faults by kind, and whose work they disturbed."""
    line = lines.get("schedules")
    if line is None:
        return NOTHING
    kinds = [*sorted(kind for kind in line["hits"] if kind not in TOGETHER), *TOGETHER]
    rows = [
        [kind, *(f"{line[counter].get(kind, 0):,}" for counter in ("hits", "felt", "recovered"))]
        for kind in kinds
    ]
    counted = line["schedules"] - line["missed"]
    said = (
        f"{counted:,} schedules that count, none failed, in {line['seconds'] / 60:.0f} minutes of one core; "
        f"{line['missed']:,} more in which no client felt anything; {line['gave_up']} clients rightly gave up."
    )
    works = _table(
        ["work that was disturbed", "without prompts", "ptune", "deep_ptune", "prefix"], _works(line)
    )
    return f"{said}\n\n{_table(['fault', 'hit', 'felt by a client', 'recovered'], rows)}\n\n{works}\n\n{_source(line)}"


def _works(line: Line) -> list[list[str]]:
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in sorted(line["works"])))
    modes = ("no prompts", "ptune", "deep_ptune", "prefix")
    return [[name, *(f"{line['works'].get(f'{name}, {mode}', 0):,}" for mode in modes)] for name in names]


def strangers(lines: Lines) -> str:
    """How far messages came."""
    line = lines.get("strangers")
    if line is None:
        return NOTHING
    rows = [["asserted at least", "", *(f"{line['least'][stage]:.0%}" for stage in STAGES)]]
    notes = []
    for suite in sorted(line["suites"], key=lambda one: str(one["suite"])):
        sent = suite["stages"]["sent"]
        shares = [f"{suite['stages'].get(stage, 0) / sent:.0%}" for stage in STAGES]
        rows.append([suite["suite"], f"{sent:,}", *shares])
        if "bytes grown" in suite:
            notes.append(
                f"From the first half of the run to the second, after a third of warming up, the process grew by "
                f"{suite['bytes grown'] / 2**20:.1f} MiB on average."
            )
    return "\n\n".join([_table(["", "messages", *STAGES.values()], rows), *notes, _source(line)])


def crowd(lines: Lines) -> str:
    """Chats and tuning clients while servers are killed."""
    line = lines.get("crowd")
    if line is None:
        return NOTHING
    parts = []
    for run in line["runs"]:
        rows = [
            ["chats, all tokens compared", f"{run['chats']}, {run['tokens']:,} tokens"],
            ["of these, ties of the local model's two best", f"{run['ties']}"],
            ["tuning steps, all losses and gradients compared", _counted(run["steps"])],
            ["servers killed", f"{run['kills']}"],
            ["errors that a user saw", "0"],
            ["slowest chat, of the median", f"{run['slowest']:.2f}"],
            ["longest wait for a reply of 12 tokens", f"{run['longest_wait']:.1f} s"],
            ["memory, MB a minute", _slopes(run["slopes"])],
        ]
        parts.append(_table([f"{run['seconds'] / 60:.0f} minutes", ""], rows))
    return "\n\n".join([*parts, _source(line)])


def _counted(steps: Mapping[str, int]) -> str:
    return ", ".join(f"{mode} {count:,}" for mode, count in sorted(steps.items()))


def _slopes(slopes: Mapping[str, float]) -> str:
    return (
        ", ".join(f"{name} {slope:+.2f}" for name, slope in sorted(slopes.items()))
        or "nobody lived long enough"
    )


def audits(lines: Lines) -> str:
    """What honest servers differ by, what was found of each lie, and how many answers that took."""
    parts = []
    classes = [line for name, line in sorted(lines.items()) if name.startswith(AUDITS)]
    if classes:
        parts += [_differences(classes), _lies(classes), _source(classes[-1])]
    if (line := lines.get("honest audits")) is not None:
        parts += [_alarms(line), _source(line)]
    if (line := lines.get("liars")) is not None:
        parts += [_answers(line), _source(line)]
    return "\n\n".join(parts) or NOTHING


def _differences(classes: Sequence[Line]) -> str:
    heads = ["honest servers of this arithmetic", "blocks", "comparisons", "outputs", "gradients", "margin"]
    rows = []
    for line in classes:
        kinds = line["honest"]
        largest = [max(kinds[what][part][2] for what in whats) for whats, part in LARGEST]
        margin = min(one[f"{part} margin"] for one in kinds.values() for part in ("typical", "worst"))
        shown = ["-".join(map(str, line["span"])), f"{sum(one['comparisons'] for one in kinds.values()):,}"]
        pairs = [f"{typical:.1e}, {worst:.1e}" for typical, worst in (largest[:2], largest[2:])]
        rows.append([line["class"], *shown, *pairs, f"{margin:.3g}×" if margin < 1e6 else "over a million"])  # noqa: RUF001
    what = (
        "The largest differences in parts of what the blocks do, over all tokens and of one token, and how many times "
        "they fit into the tolerance."
    )
    return f"{_table(heads, rows)}\n\n{what}"


# Of outputs (steps too) and of gradients, over all tokens and of the worst one.
LARGEST = [(whats, part) for whats in (("forward", "step"), ("backward",)) for part in ("typical", "worst")]


def _lies(classes: Sequence[Line]) -> str:
    lies = list(dict.fromkeys(name.partition(": ")[2] for name in classes[0]["lies"]))
    rows = []
    for line in classes:
        found = [_found(line["lies"], lie) for lie in lies]
        rows.append([line["class"], "-".join(map(str, line["span"])), *found])
    what = "Of one audited answer each, the share of lies that were found; a lie that is told again is found later."
    return f"{_table(['found among answers with', 'blocks', *lies], rows)}\n\n{what}"


def _found(told: Mapping[str, Mapping[str, Any]], lie: str) -> str:
    ours = [one for name, one in told.items() if name.partition(": ")[2] == lie]
    return f"{sum(one['found'] for one in ours) / sum(one['of'] for one in ours):.0%}"


def _alarms(line: Line) -> str:
    cases, total = line["cases"], sum(one["comparisons"] for one in line["cases"])
    rows = [
        [one["family"], f"{one['comparisons']:,}", "0", f"{max(one['worst'].values()):.2f}"]
        for one in sorted(cases, key=lambda one: str(one["family"]))
    ]
    table = _table(
        ["honest servers of a tiny", "audited answers", "alarms", "largest, of the tolerance"], rows
    )
    return f"{total:,} answers of honest servers were audited.\n\n{table}"


def _answers(line: Line) -> str:
    rows = [
        [
            f"{one['lie']}, {'tuning' if one['work'] == 'train' else 'chat'}",
            f"{len(one['answers'])}",
            f"{statistics.mean(one['answers']):.0f}",
            f"{max(one['answers'])}",
        ]
        for one in sorted(line["cases"], key=lambda one: (str(one["lie"]), str(one["work"])))
    ]
    share = line["cases"][0]["share"]
    heads = [
        f"a server that lies is found, with `--audit {share:g}`",
        "clients",
        "after answers, mean",
        "at most",
    ]
    return _table(heads, rows)


def failures(lines: Lines) -> str:
    """Standing still and the published experiment, as `benchmarks.failures` writes them."""
    from benchmarks.failures import page

    return page(dict(lines))


SECTIONS: dict[str, Callable[[Lines], str]] = {
    "schedules": schedules,
    "strangers": strangers,
    "crowd": crowd,
    "audits": audits,
    "failures": failures,
}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _source(line: Line) -> str:
    return f"Measured {line['date'][:10]}: {describe(dict(line))}."


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Fill every section. Raises `ValueError` for a page without its markers."""
    lines, text = newest(results), page.read_text()
    for marker, section in SECTIONS.items():
        text = put(text, marker, section(lines))
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    write_page(options.page, options.results)


if __name__ == "__main__":
    main()
