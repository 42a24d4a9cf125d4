"""One folder of tiny checkpoints a process, and no progress bars between the lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this process's checkpoints lie."""
    return tmp_path_factory.mktemp("schedules")


@pytest.fixture(autouse=True)
def _quiet() -> object:
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    yield
    if shown:
        enable_progress_bar()
