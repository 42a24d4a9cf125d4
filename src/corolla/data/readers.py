"""Rows from files and from the hub, whatever is in them, packed and encoded as they may be.

Invariant: only a source that gives no rows raises; what is wrong with one row is for that row to say. So a byte
that is no text costs the row that it is in: it becomes a lone surrogate, which no row may hold (`text_fault`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corolla.data.rows import USUAL_SPLIT, Found, json_rows, listed, table_rows
from corolla.errors import DataError
from corolla.files import scratch_folder

READ_AS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
GZIP, ZSTD, BZIP2, XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00"
PACKED = (GZIP, ZSTD, BZIP2, XZ)
MOST_OF_ANY, MOST_TIMES = 64 * 2**20, 200  # bytes that any file may have unpacked; or so many times its own
PACKED_NAMES = (".gz", ".zst", ".bz2", ".xz")
# What is often saved under the name of data, and what to say of it.
NO_DATA = (
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"version https://git-lfs", "is a Git LFS pointer and not the data itself: fetch it with git lfs pull"),
    (b"PAR1", "is a parquet file: its name should end in .parquet"),
)
SURROGATE = re.compile("[\ud800-\udfff]")


def is_file_name(source: str) -> bool:
    """Whether a source is meant as a file; otherwise it is a hub name."""
    return _kind(source) is not None or source.startswith((".", "/", "~")) or os.path.exists(source)


def read_file(source: str, split: str | None) -> Found:
    """All rows of a json, jsonl, csv, tsv or parquet file, compressed or not.

    `split` names a list in a json file that holds several. Raises `DataError` for a file that is missing, empty,
    broken as a whole or of another kind.
    """
    path = Path(os.path.expanduser(source))
    kind = _kind(source)
    _check_file(path, kind)
    if split is not None and kind != "json":
        raise DataError(f"{path} has no splits, so there is no {split} in it.")
    match kind:
        case "json":
            found = json_rows(path, _read_text(path), split)
        case "csv":
            found = table_rows(path, _read_text(path), ",;\t")
        case "tsv":
            found = table_rows(path, _read_text(path), "\t")
        case _:
            found = listed(_read_parquet(path))
    if not found.rows:
        raise DataError(f"{path} is empty: it holds no rows.")
    return found


def read_hub(name: str, split: str | None, token: str | None) -> Found:
    """All rows of a data set on the hub, of its `USUAL_SPLIT` unless told. Raises `DataError`."""
    load_dataset: Callable[..., Any] = _datasets().load_dataset
    try:
        rows = list(load_dataset(name, split=split or USUAL_SPLIT, token=token))
    except Exception as error:  # network, names, splits, scripts: many kinds, one consequence
        raise DataError(
            f"{name} is neither a file here nor a data set that the hub gives: {_first_line(error)}"
        ) from error
    if not rows:
        raise DataError(f"{name} is empty: it holds no rows.")
    return listed(rows)


def _kind(source: str) -> str | None:
    """What a file's name says that it holds; what it is compressed with does not matter."""
    name = source.lower()
    packed = next((ending for ending in PACKED_NAMES if name.endswith(ending)), "")
    return READ_AS.get(os.path.splitext(name.removesuffix(packed))[1])


def _check_file(path: Path, kind: str | None) -> None:
    """Raises `DataError` when this is no file, or one of another kind."""
    if os.path.isdir(path):
        readable = (
            sorted(name for name in os.listdir(path) if _kind(name)) if os.access(path, os.R_OK) else []
        )
        advice = f"give a file in it, such as {path / readable[0]}" if readable else "give a file"
        raise DataError(f"{path} is a folder: {advice}.")
    if not os.path.isfile(path):
        raise DataError(f"There is no file {path}.")
    if kind is None:
        raise DataError(
            f"{path} is none of the files that can be read: its name should end in {', '.join(READ_AS)}, "
            f"or in one of these and {', '.join(PACKED_NAMES)}."
        )


def _read_parquet(path: Path) -> list[Any]:
    if path.stat().st_size == 0:
        return []
    if _is_packed(path):
        raise DataError(
            f"{path} is compressed as a whole: unpack it first, parquet needs no other compression."
        )
    datasets = _datasets()
    from pyarrow.parquet import read_metadata  # a requirement of datasets

    # A folder of its own, so that no copy of the user's data stays behind.
    with scratch_folder("corolla-data-") as scratch:
        try:
            if not read_metadata(path).num_rows:
                return []  # which datasets cannot read
            return list(datasets.Dataset.from_parquet(str(path), cache_dir=scratch, keep_in_memory=True))
        except Exception as error:  # pyarrow and datasets raise what they like for a broken file
            raise DataError(f"{path} cannot be read as parquet: {_first_line(error)}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("Reading this data needs a package: pip install 'corolla[tune]'") from error
    return datasets


def _first_line(error: BaseException) -> str:
    # The innermost reason: `datasets` wraps it in "An error occurred while generating the dataset".
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# --- the text in a file ------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    """All of a file's text. Raises `DataError` for a file that cannot be read or holds none."""
    content = _unpacked(path, _read(path))
    for beginning, what in NO_DATA:
        if content.startswith(beginning):
            raise DataError(f"{path} {what}.")
    encoding = json.detect_encoding(content)  # by the byte order mark, else by where zeros stand
    try:
        text = content.decode(
            encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither UTF-8 text nor {encoding}: {error.reason}.") from error
    text = text.removeprefix("\ufeff")
    if text[:200].lstrip().lower().startswith(("<!doctype", "<html", "<?xml")):
        raise DataError(f"{path} is a web page and not data: download the data itself.")
    return text


def _is_packed(path: Path) -> bool:
    """Whether a file is compressed, by its first bytes."""
    try:
        with path.open("rb") as stream:
            return stream.read(6).startswith(PACKED)
    except OSError as error:
        raise _not_read(path, error) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _not_read(path, error) from error


def _not_read(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}.")


def _unpacked(path: Path, content: bytes) -> bytes:
    """What is in a compressed file; a text is never a two-hundredth of its size there, a bomb is."""
    packed = next((beginning for beginning in PACKED if content.startswith(beginning)), None)
    if packed is None:
        return content
    most = max(MOST_OF_ANY, MOST_TIMES * len(content))
    try:
        with _opened(path, content, packed) as stream:
            unpacked = bytes(stream.read(most + 1))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is compressed, but broken or cut off: {error}.") from error
    if len(unpacked) > most:
        raise DataError(
            f"{path} would be more than {MOST_TIMES} times as large when unpacked: it is no data."
        )
    return unpacked


def _opened(path: Path, content: bytes, packed: bytes) -> Any:
    """A stream of what is in it."""
    openers: dict[bytes, Callable[[io.BytesIO], Any]] = {GZIP: gzip.open, BZIP2: bz2.open, XZ: lzma.open}
    if packed in openers:
        return openers[packed](io.BytesIO(content))
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"Reading {path} needs a package: pip install 'corolla[tune]'") from error
    return pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd")


def text_fault(text: str) -> str | None:
    """What is wrong with a text that no tokenizer takes; None where nothing is."""
    found = SURROGATE.search(text)
    if found is None:
        return None
    if "\udc80" <= found.group() <= "\udcff":
        return "a byte that is not UTF-8"
    return "half a character (a lone surrogate)"
