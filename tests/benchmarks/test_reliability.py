"""The page of reliability says what the lines of the tests and benchmarks say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.reliability import NOTHING, PAGE, SECTIONS, write_page
from tests import covered
from tests.benchmarks.test_report import CONDITIONS
from tests.e2e.load import Seen
from tests.schedules.run import Outcome

STAGES = {"sent": 200, "framed": 180, "decoded": 100, "reached the table": 90, "answered with work": 70}
NOTED: dict[str, list[dict[str, Any]]] = {
    "schedules": [
        Outcome(5, 1, 2, **{name: {"kill": 3} for name in ("hits", "felt")}).as_dict() | {"seconds": 60.0},
        {**Outcome(1, 0, 0).as_dict(), "hits": {"kill": 1, "two at once": 7}, "seconds": 60.0},
    ],
    "strangers": [{"suite": "guided", "stages": STAGES, "codes": {"malformed": 3}, "bytes grown": 3 * 2**20}],
    "crowd": [Seen(900.0, 14, [10, 20, 20], {"ptune": 5}, slopes={"client 0": 0.25}).as_dict()],
    "liars": [{"lie": "noise", "work": "train", "share": 0.05, "answers": [10, 30]}],
    "honest": [{"family": "llama", "comparisons": 6000, "worst": {"step": 0.03}}],
}
SAID = {
    "schedules": [
        "5 schedules that count",
        "| kill | 4 | 3 | 0 |",
        "| two at once | 7 | 0 | 0 |",
        "2 minutes",
    ],
    "strangers": ["| guided | 200 | 90% | 50% | 45% | 35% |", "3.0 MiB"],
    "crowd": ["3, 50 tokens", "| servers killed | 14 |", "| 0.50 |", "client 0 +0.25"],
    "audits": ["6,000 answers of honest servers", "| noise, tuning | 2 | 20 | 30 |"],
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text("\n".join(f"<!-- {name}:begin -->old\n<!-- {name}:end -->" for name in SECTIONS))
    return file


def write(file: Path, **changes: Any) -> None:
    lines = [covered.FIGURES[name][2](values) | CONDITIONS | changes for name, values in NOTED.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_tests_noted_is_on_the_page(page: Path, tmp_path: Path) -> None:
    write(tmp_path / "nightly.jsonl")
    write_page(page, tmp_path)
    for name, texts in SAID.items():
        section = page.read_text().partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0]
        assert [text for text in [*texts, "commit abc1234"] if text not in section] == []


def test_a_run_of_another_size_does_not_count(page: Path, tmp_path: Path) -> None:
    write(tmp_path / "nightly.jsonl", quick=True)
    write_page(page, tmp_path)
    assert page.read_text().count(NOTHING) == len(SECTIONS)


def test_the_page_has_every_section_and_is_what_the_lines_in_the_tree_say(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text())
    write_page(copy)
    assert copy.read_text() == PAGE.read_text()


def test_the_lines_at_the_end_of_a_run() -> None:
    for name, values in NOTED.items():
        assert covered.FIGURES[name][1](values)
