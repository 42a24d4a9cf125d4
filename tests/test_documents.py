"""A file that a document names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    str(path.relative_to(ROOT))
    for folder in ("src", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix in (".py", ".c", ".h")
}
NAMED = re.compile(r"`([\w/]+\.(?:py|c|h))\b")
DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "tests" / "README.md"]


def missing(text: str) -> set[str]:
    """The files that a text names, in whole or by the end of their path, and that are nowhere."""
    return {name for name in NAMED.findall(text) if not any(f"/{one}".endswith(f"/{name}") for one in FILES)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_are_there(path: Path) -> None:
    assert not missing(path.read_text(encoding="utf-8"))


def test_a_file_that_is_gone_is_noticed() -> None:
    assert missing("see `client/nowhere.py: Something` and `client/retry.py`") == {"client/nowhere.py"}
