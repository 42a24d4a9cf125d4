"""Rows from files and from the hub, whatever is in them.

Invariant: what cannot be read as a row at all is still one row, which no schema accepts, so that the numbers
of the others are right and it is counted; only a source that gives no rows raises.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corolla.data.schemas import SCHEMAS, Row
from corolla.errors import DataError

READ_AS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
UNREADABLE = "not JSON"  # the only column of a row that is not JSON


def is_file_name(source: str) -> bool:
    """Whether a source is meant as a file; otherwise it is a hub name."""
    return (
        Path(source).exists() or Path(source).suffix.lower() in READ_AS or source.startswith((".", "/", "~"))
    )


def read_file(path: Path, split: str | None) -> list[Row]:
    """All rows of a json, jsonl, csv or parquet file. `split` names a list in a json file that holds several.

    Raises `DataError` for a file that is missing, empty, broken as a whole or of another kind.
    """
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    kind = READ_AS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"{path} is none of the files that can be read: its name should end in {', '.join(READ_AS)}."
        )
    if split is not None and kind != "json":
        raise DataError(f"{path} has no splits, so there is no {split} in it.")
    match kind:
        case "json":
            rows = _read_json(path, split)
        case "jsonl":
            rows = _json_lines(_read_text(path))
        case "csv":
            rows = _read_csv(path)
        case _:
            rows = _read_parquet(path)
    if not rows:
        raise DataError(f"{path} is empty: it holds no rows.")
    return rows


def read_hub(name: str, split: str | None, token: str | None) -> list[Row]:
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
    return rows


# --- JSON: read here, since `datasets` wants all rows of one shape and gives up at the first bad line ---------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text.") from error


def _read_json(path: Path, split: str | None) -> list[Row]:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("["):
            return _json_lines(text)  # under the other ending
        raise DataError(f"{path} is not valid JSON: {_first_line(error)}.") from error
    if isinstance(content, dict) and not any(schema.fits(content) for schema in SCHEMAS):
        content = _one_list(path, content, split)
    elif split is not None:
        raise DataError(f"{path} has no splits, so there is no {split} in it.")
    return [_as_row(item) for item in (content if isinstance(content, list) else [content])]


def _one_list(path: Path, content: dict[str, Any], split: str | None) -> Any:
    """The rows in an object such as `{"train": […], "valid": […]}`."""
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if split is not None and split not in lists:
        raise DataError(f"{path} has no list called {split}; it has {', '.join(lists) or 'none'}.")
    if split is not None or "train" in lists:
        return lists[split or "train"]
    return next(iter(lists.values())) if len(lists) == 1 else content


def _json_lines(text: str) -> list[Row]:
    # Not splitlines(): U+2028 and others may stand in a JSON string as they are.
    return [_as_row(_json_line(line)) for line in text.split("\n") if line.strip()]


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return {UNREADABLE: line[:200]}


def _as_row(item: Any) -> Row:
    return item if isinstance(item, dict) else {"not an object": item}


# --- tables -----------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> list[Row]:
    """Read here, since a reply of "10" or "NA" is text too. Lists in cells are written as JSON."""
    lines = io.StringIO(_read_text(path))
    try:
        return [
            {name: _json_cell(value) for name, value in row.items()}
            for row in csv.DictReader(lines, strict=True)
        ]
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as csv: {error}.") from error


def _read_parquet(path: Path) -> list[Row]:
    if path.stat().st_size == 0:
        return []
    # A folder of its own, so that no copy of the user's data stays behind.
    with tempfile.TemporaryDirectory(prefix="corolla-data-") as scratch:
        try:
            return list(_datasets().Dataset.from_parquet(str(path), cache_dir=scratch, keep_in_memory=True))
        except Exception as error:  # pyarrow and datasets raise what they like for a broken file
            raise DataError(f"{path} cannot be read as parquet: {_first_line(error)}") from error


def _json_cell(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


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
