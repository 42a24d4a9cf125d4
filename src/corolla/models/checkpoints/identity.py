"""What makes two copies of a checkpoint the same model.

Invariant: the identity is a function of the config and the weights alone. Two fine-tunes differ, though
their configs, indexes and headers are equal; the same weights cut into other shards, or read by a peer that
needs only some of them, do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corolla.models.checkpoints.shards import TensorEntry

SAMPLED_TENSORS = 512  # at most; bounds the reads from a hub where a model has tens of thousands of tensors
SAMPLE_BYTES = 512  # from the middle of each sampled tensor

# What differs between copies of one model without changing what it computes.
VOLATILE_CONFIG_KEYS = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "_attn_implementation_autoset",
    }
)


@dataclass(frozen=True)
class Sample:
    """A few bytes of one tensor, `offset` counted from the start of its file."""

    entry: TensorEntry
    offset: int
    size: int


def sample_plan(entries: Iterable[TensorEntry]) -> list[Sample]:
    """Which bytes to read; depends on names and sizes alone, so every reader asks for the same."""
    chosen = sorted(entries, key=_lot)[:SAMPLED_TENSORS]
    sizes = [min(SAMPLE_BYTES, entry.size) for entry in chosen]
    return [
        Sample(entry, entry.offset + (entry.size - size) // 2, size)
        for entry, size in zip(chosen, sizes, strict=True)
    ]


def model_identity(config: dict[str, Any], entries: Iterable[TensorEntry], samples: Iterable[bytes]) -> str:
    """32 hexadecimal digits for a raw config (as in `config.json`), a checkpoint's tensors and what
    `sample_plan` for these tensors told to read, in its order.
    """
    digest = hashlib.sha256(canonical_config(config))
    for entry in sorted(entries, key=lambda entry: entry.name):
        digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode())
    for sample in samples:
        digest.update(sample)
    return digest.hexdigest()[:32]


def canonical_config(config: dict[str, Any]) -> bytes:
    """The config's meaning as bytes: sorted, without what merely describes the file."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG_KEYS}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _lot(entry: TensorEntry) -> bytes:
    return hashlib.sha256(entry.name.encode()).digest()
