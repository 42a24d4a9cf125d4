"""Tokenizers for the tests of data: the embedded model's, and a small one that adds a BOS token."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.tokenizers_made import with_bos
from transformers import AutoTokenizer

from corolla.models.checkpoints.checkpoint import open_checkpoint


@pytest.fixture(scope="session")
def smol() -> Any:
    """SmolLM2's tokenizer: no BOS added, a ChatML template that puts a system turn of its own in front."""
    return AutoTokenizer.from_pretrained(open_checkpoint("smollm2").source.location)


@pytest.fixture(scope="session")
def bos() -> Any:
    """Bytes as tokens, BOS in front, no chat template."""
    return with_bos()
