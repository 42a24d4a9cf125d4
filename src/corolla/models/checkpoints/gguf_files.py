"""What a GGUF file holds, and small GGUF files of parts of it, which transformers reads as it does whole ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corolla.errors import CheckpointError
from corolla.models.checkpoints.shards import ReadRange, TensorEntry
from corolla.models.checkpoints.source import Source

FIRST_BYTES = 2**24  # that are looked at for the header; more where that is longer
_BLOCK = re.compile(r"blk\.(\d+)\.")
# What a part's metadata leaves out; how tensors are aligned is the writer's own in each file.
_OTHER = ("GGUF.", "tokenizer.", "split.", "general.alignment")
_ARCHITECTURE = "general.architecture"


class GgufTensor(NamedTuple):
    """One tensor of a file: its type by ggml's number, its shape in torch's order, where it lies."""

    name: str
    type: int
    shape: Sequence[int]
    offset: int
    nbytes: int

    @property
    def block(self) -> int | None:
        """The block that it belongs to, if any."""
        at = _BLOCK.match(self.name)
        return int(at[1]) if at else None


def about(folder: Path, raw: Source, file: str, metadata: Path) -> tuple[Path, list[GgufTensor]]:
    """A copy in `folder` of what `file` of `raw` says of itself, with holes in place of the tensors; and these.

    What is said besides the tokenizer goes into a file without tensors, `metadata`. Raises `CheckpointError`.
    """
    size, known = raw.size(file), FIRST_BYTES
    path = folder / Path(file).with_suffix(".gguf").name  # which transformers wants in lower case
    while True:
        known = min(known, size)
        read = raw.bring({file: [TensorEntry("the header", "", (), 0, known)]})[file]
        with path.open("wb") as copy:
            copy.write(read(0, known))
            copy.truncate(size)
        reader = _opened(path)
        if reader is not None and reader.data_offset <= known:
            break
        if known == size:
            raise _truncated(file)
        known *= 4
    tensors = [_tensor(one) for one in reader.tensors]
    if _ARCHITECTURE not in reader.fields or any(one.offset + one.nbytes > size for one in tensors):
        raise _truncated(file)
    _write(metadata, reader, {}, [], read)
    return path, tensors


def _tensor(one: Any) -> GgufTensor:
    shape = [int(length) for length in reversed(one.shape)]
    return GgufTensor(str(one.name), int(one.tensor_type), shape, int(one.data_offset), int(one.n_bytes))


def _truncated(file: str) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read as a GGUF model; it may be truncated.")


def damaged(made: Path) -> CheckpointError:
    """The error for a file of ours in the folder that was made of a GGUF file."""
    return CheckpointError(f"{made} is damaged: delete {made.parent}, which is then made again.")


def part_file(
    folder: Path, metadata: Path, tensors: Sequence[GgufTensor], read: ReadRange, depth: int, first: int
) -> Path:
    """A GGUF file in `folder` of a model of one block, the `first` of `depth`, and of its tensors these."""
    reader = _opened(metadata) if metadata.is_file() else None
    if reader is None:
        raise damaged(metadata)
    changes: dict[str, Any] = {}
    for key, field in reader.fields.items():
        value = field.contents()
        if key.endswith(".block_count"):
            changes[key] = 1
        elif isinstance(value, list) and len(value) == depth and not key.startswith("general."):
            changes[key] = value[first : first + 1]
    path = folder / "part.gguf"
    _write(path, reader, changes, tensors, read)
    return path


def _opened(path: Path) -> Any | None:
    """A reader of a file's header; None for one that is none, or that is longer than what is there of it."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
        return None


def _write(
    path: Path, metadata: Any, changes: dict[str, Any], tensors: Sequence[GgufTensor], read: ReadRange
) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, metadata.fields[_ARCHITECTURE].contents())
    for key, field in metadata.fields.items():
        if key == _ARCHITECTURE or key.startswith(_OTHER):
            continue
        kind, inner = field.types[0], field.types[-1]
        value = changes.get(key, field.contents())
        if value != []:  # for which the format's own writer has no type
            writer.add_key_value(key, value, kind, inner if kind == GGUFValueType.ARRAY else None)
    for one in tensors:
        content = np.frombuffer(read(one.offset, one.nbytes), dtype=np.uint8)
        name = _BLOCK.sub("blk.0.", one.name)
        writer.add_tensor(
            name, content.reshape(*one.shape[:-1], -1), raw_dtype=GGMLQuantizationType(one.type)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
