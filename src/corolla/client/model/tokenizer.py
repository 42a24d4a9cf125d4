"""A model's tokenizer, by the name that the model is loaded by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corolla.models.checkpoints import pretrained
from corolla.models.checkpoints.checkpoint import open_checkpoint


def load_tokenizer(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """The tokenizer of whatever `from_pretrained` takes: a hub name, a local folder, a .gguf file or `smollm2`.

    Raises `UnknownModel`, `UnsupportedFamily`, or `CheckpointError` where there is no tokenizer that can be read.
    """
    return pretrained.load_tokenizer(
        open_checkpoint(str(name), revision=revision, token=token, cache_dir=cache_dir)
    )
