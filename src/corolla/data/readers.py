"""Rows from files and from the hub, whatever is in them.

Invariant: only a source that gives no rows raises; what is wrong with one row is for that row to say.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corolla.data.json_rows import json_rows
from corolla.data.raw_text import PACKED_NAMES, is_packed, read_text
from corolla.data.rows import Found, listed
from corolla.data.tables import table_rows
from corolla.errors import DataError

READ_AS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


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
            found = json_rows(path, read_text(path), split)
        case "csv":
            found = table_rows(path, read_text(path), ",;\t")
        case "tsv":
            found = table_rows(path, read_text(path), "\t")
        case _:
            found = listed(_read_parquet(path))
    if not found.rows:
        raise DataError(f"{path} is empty: it holds no rows.")
    return found


def read_hub(name: str, split: str | None, token: str | None) -> Found:
    """All rows of a data set on the hub, of its `train` split unless told. Raises `DataError`."""
    load_dataset: Callable[..., Any] = _datasets().load_dataset
    try:
        rows = list(load_dataset(name, split=split or "train", token=token))
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
    if is_packed(path):
        raise DataError(
            f"{path} is compressed as a whole: unpack it first, parquet needs no other compression."
        )
    # A folder of its own, so that no copy of the user's data stays behind.
    with tempfile.TemporaryDirectory(prefix="corolla-data-") as scratch:
        try:
            return list(_datasets().Dataset.from_parquet(str(path), cache_dir=scratch, keep_in_memory=True))
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
