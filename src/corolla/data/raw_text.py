"""The text in a file, whatever it was packed and encoded with.

Invariant: a byte that is no text costs the row that it is in, not the file: it becomes a lone surrogate, which
no row may hold (`text_fault`).
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from pathlib import Path
from typing import Any

from corolla.errors import DataError

GZIP, ZSTD, BZIP2, XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00"
PACKED = (GZIP, ZSTD, BZIP2, XZ)
PACKED_NAMES = (".gz", ".zst", ".bz2", ".xz")
# What is often saved under the name of data, and what to say of it.
NO_DATA = (
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"version https://git-lfs", "is a Git LFS pointer and not the data itself: fetch it with git lfs pull"),
    (b"PAR1", "is a parquet file: its name should end in .parquet"),
)
SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: Path) -> str:
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


def text_fault(text: str) -> str | None:
    """What is wrong with a text that no tokenizer takes; None where nothing is."""
    found = SURROGATE.search(text)
    if found is None:
        return None
    if "\udc80" <= found.group() <= "\udcff":
        return "a byte that is not UTF-8"
    return "half a character (a lone surrogate)"


def is_packed(path: Path) -> bool:
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
    try:
        if content.startswith(GZIP):
            return gzip.decompress(content)
        if content.startswith(BZIP2):
            return bz2.decompress(content)
        if content.startswith(XZ):
            return lzma.decompress(content)
        if content.startswith(ZSTD):
            return _unzstd(path, content)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is compressed, but broken or cut off: {error}.") from error
    return content


def _unzstd(path: Path, content: bytes) -> bytes:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"Reading {path} needs a package: pip install 'corolla[tune]'") from error
    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
        unpacked: Any = stream.read()
    return bytes(unpacked)
