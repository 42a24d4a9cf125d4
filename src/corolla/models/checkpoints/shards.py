"""Reading safetensors files by plain reads: the headers, and the tensors that are wanted.

Invariant: no file is ever mapped into memory. A mapped checkpoint that someone truncates kills the process
(SIGBUS), and a mapped shard counts whole against a process's memory limit; a plain read of a truncated file
is a short read, which becomes one sentence.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from corolla.errors import CheckpointError
from corolla.json_files import parse_object

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

PLAIN = frozenset(
    {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
)  # whole by themselves
PIECE = 2**24  # bytes that are read at a time

ReadRange = Callable[[int, int], bytes]  # (offset, size) -> exactly that many bytes


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: where it lies (bytes from the file's start) and what it is."""

    name: str
    dtype: str  # the format's own name, e.g. "BF16"
    shape: tuple[int, ...]
    offset: int
    size: int


def read_entries(read: ReadRange, file: str) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file declares, by name.

    `file` is for messages only. Raises `CheckpointError` when the header is not one.
    """
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} is not a safetensors file: its header would be {length} bytes long.")
    try:
        header = parse_object(read(8, length))
        header.pop("__metadata__", None)
        return {name: _entry(name, fields, 8 + length) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header cannot be read.") from error


def _entry(name: str, fields: dict[str, object], data_start: int) -> TensorEntry:
    begin, end = (int(number) for number in fields["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(number) for number in fields["shape"])  # type: ignore[attr-defined]
    if begin < 0 or end < begin or any(number < 0 for number in shape):
        raise ValueError(f"impossible extent of {name}")
    return TensorEntry(name, str(fields["dtype"]), shape, data_start + begin, end - begin)


def local_reader(path: Path) -> ReadRange:
    """Reads of a local file; a file that ends too early is a `CheckpointError`."""

    def read(offset: int, size: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if len(data) != size:
            raise CheckpointError(f"{path} is truncated; download or copy it again.")
        return data

    return read


def read_tensor(read: ReadRange, entry: TensorEntry, file: str) -> Tensor:
    """One tensor, in memory of its own. `file` is for messages only. Raises `CheckpointError`."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{file} holds {entry.name} as {entry.dtype}, which Corolla does not read; use an unquantized "
            "checkpoint (float32, float16 or bfloat16)."
        )
    due = prod(entry.shape) * dtype.itemsize
    if due != entry.size:
        raise CheckpointError(f"{file} says {entry.name} takes {entry.size} bytes, but {due} are due.")
    tensor = torch.empty(entry.shape, dtype=dtype)
    target = tensor.reshape(-1).view(torch.uint8).numpy().data  # a view of the tensor's own memory
    for first in range(0, entry.size, PIECE):
        size = min(PIECE, entry.size - first)
        target[first : first + size] = read(entry.offset + first, size)
    return tensor


def widened(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor narrower than `dtype` in that; a wider one is left for the model's loader, which knows what
    must stay wide."""
    if dtype is not None and tensor.is_floating_point() and tensor.itemsize < dtype.itemsize:
        return tensor.to(dtype)
    return tensor
