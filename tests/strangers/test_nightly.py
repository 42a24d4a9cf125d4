"""`make nightly` takes what strangers do at ten times the size: each file of these tests says which."""

from __future__ import annotations

from pathlib import Path

import pytest

# Where nothing is there that could be more: a wait, a file, a request of the greatest size.
SIZELESS = {"test_nightly.py", "test_waiting.py", "test_files.py", "test_long_jobs.py"}
FILES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path.name not in SIZELESS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_grows_at_night(path: Path) -> None:
    assert "pytest.mark.nightly" in path.read_text(), "mark the tenfold size with pytest.mark.nightly"
