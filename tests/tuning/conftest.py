from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tuning.tiny_setup import byte_tokenizer, write_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")
