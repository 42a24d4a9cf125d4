"""The table says what the lines say, and the newest line counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.bench import Pair
from benchmarks.figures import Figure, Line, Measured, measure
from benchmarks.report import put
from benchmarks.results import line_of, newest, not_measured
from benchmarks.run import GROWTHS, LINES, NAMES
from benchmarks.sizes import DEMO

from benchmarks import report
from corolla.cli import demo
from corolla.data.render import RenderSettings

FAST = Figure("fast", "fast | things", "tokens/s", "the local model", 1.5)
BOTH = Figure("both", "both", "tokens/s", "the local model", 1.5, newer=2.0)
SMALL = Figure("small", "a small thing", "bytes", "budget", 1.25, at_most=True)
CONDITIONS = {
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "abc1234",
    "dirty": False,
    "quick": False,
    "versions": {"torch": "2"},
    "machine": {"cores": 2, "cpu": "some", "flags": ["avx2"], "torch": "AVX2"},
}


def line(figure: Figure, ours: list[float], baseline: list[float], **more: Any) -> dict[str, Any]:
    return {**line_of(Measured(figure, ours, baseline, {}), newer=False), **CONDITIONS, **more}


def table(figures: list[Figure], lines: dict[str, dict[str, Any]]) -> str:
    return report.table(figures, lines, newer=False)


def write(file: Path, *lines: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_ratio_is_of_medians() -> None:
    found = line(FAST, [30.0, 1.0, 20.0], [10.0, 1000.0, 9.0])
    assert found["ratio"] == 2.0
    assert found["met"]


@pytest.mark.parametrize(("ratio", "verdict"), [(1.2, "met"), (1.25, "met"), (1.3, "**short**")])
def test_at_most_is_an_upper_bound(ratio: float, verdict: str) -> None:
    (row,) = [
        row
        for row in table([SMALL], {"small": line(SMALL, [ratio * 8e6], [8e6])}).splitlines()
        if "a small thing" in row
    ]
    assert row.endswith(f"at most 1.25× | {verdict} |")  # noqa: RUF001
    assert "8 MB" in row


@pytest.mark.parametrize(("ratio", "verdict"), [(1.4, "**short**"), (1.5, "met")])
def test_at_least_is_a_lower_bound(ratio: float, verdict: str) -> None:
    assert f"at least 1.5× | {verdict} |" in table([FAST], {"fast": line(FAST, [ratio], [1.0])})  # noqa: RUF001


def test_what_was_not_measured_says_why() -> None:
    text = table([FAST, SMALL], {"fast": {**not_measured(FAST, "no | option"), **CONDITIONS}})
    assert "not measured: no / option" in text
    assert text.count("not measured") == 2
    assert "commit abc1234" in text


def test_each_run_is_named_once() -> None:
    lines = {"fast": line(FAST, [1.0], [1.0]), "small": line(SMALL, [1.0], [1.0], commit="def5678")}
    text = table([FAST, SMALL], lines)
    assert text.count("Measured ") == 2
    assert "def5678" in text


def test_one_paragraph_for_equal_conditions_and_one_line_for_equal_baselines() -> None:
    about = {"idle threads": "sleep", "sleep": {"attention": "sdpa"}, "spin": {"attention": "eager"}}
    later = line(SMALL, [1.0], [1.0], date="2026-01-03T00:00:00+00:00", details={"baseline": about})
    text = table([FAST, SMALL], {"fast": line(FAST, [1.0], [1.0], details=later["details"]), "small": later})
    assert text.count("Measured ") == 1
    assert "2026-01-01 to 2026-01-03" in text
    assert "- attention sdpa; idle threads sleep: `fast`, `small`" in text


def test_newest_line_counts_whatever_file_it_is_in(tmp_path: Path) -> None:
    later = {"date": "2026-02-01T00:00:00+00:00"}
    write(tmp_path / "a.jsonl", line(FAST, [2.0], [1.0], **later), line(SMALL, [1.0], [1.0]))
    write(
        tmp_path / "b.jsonl",
        line(FAST, [1.0], [1.0]),
        line(FAST, [3.0], [1.0], date="2026-03-01T00:00:00+00:00", quick=True),
        {"another": "benchmark's"},
    )
    found = newest(tmp_path)
    assert found["fast"]["ratio"] == 2.0
    assert found["small"]["ratio"] == 1.0
    assert len(found) == 2


def test_a_newer_processor_has_its_own_lines_and_bound(tmp_path: Path) -> None:
    newer = {"machine": {**CONDITIONS["machine"], "torch": "AVX512"}}
    write(tmp_path / "a.jsonl", line(BOTH, [1.6], [1.0]), line(BOTH, [1.7], [1.0], **newer))
    older, other = (newest(tmp_path, newer) for newer in (False, True))
    assert "1.60× | at least 1.5× | met |" in report.table([BOTH], older, newer=False)  # noqa: RUF001
    assert "1.70× | at least 2× | **short** |" in report.table([BOTH], other, newer=True)  # noqa: RUF001


def test_only_what_is_between_the_markers_changes() -> None:
    page = "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter \\1\n"
    once = put(page, "bench", "new \\1\n")
    assert once == "before\n<!-- bench:begin -->\nnew \\1\n<!-- bench:end -->\nafter \\1\n"
    assert put(once, "bench", "new \\1") == once


@pytest.mark.parametrize("page", ["", "<!-- bench:end --><!-- bench:begin -->", "<!-- bench:begin -->"])
def test_a_page_without_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        put(page, "bench", "new")


def test_every_run_has_its_baseline_beside_it() -> None:
    order: list[str] = []

    def once() -> tuple[tuple[float, ...], tuple[float, ...]]:
        order.append("run")
        return (float(len(order)), 10.0), (1.0, 5.0)

    first, second = measure(Line((FAST, SMALL), lambda bench: Pair(once)), None, 3)  # type: ignore[arg-type]
    assert first.ours == [2.0, 3.0, 4.0]  # the first run only warms up
    assert first.baseline == [1.0] * 3
    assert second.ratio == 2.0


def test_figures_have_names_of_their_own() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert len(LINES) == 33
    assert [item.name for item in GROWTHS] == ["growth_sessions", "growth_context", "growth_blocks"]


def test_demo_is_measured_at_its_own_sizes() -> None:
    assert (DEMO.steps, DEMO.batch) == (demo.STEPS, demo.BATCH)
    assert DEMO.max_length == RenderSettings().max_length
    assert DEMO.held_out == demo.HELD_OUT
