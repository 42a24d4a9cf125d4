"""Rows as they were found, good or bad: from JSON, and from tables written as text (csv and its kin).

Read here, since `datasets` wants all rows of one shape and gives up at the first bad line, and a reply of "10" or
"NA" is text in a table, too.

Invariant: what cannot be read as a row at all is still one row, so that the numbers of the others are right
and it is counted.
"""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.data.schemas import schema_of
from corolla.errors import DataError

TOO_DEEP = "it is nested too deeply"
MOST_SHOWN = 200  # characters of what could not be read
BETWEEN = re.compile(r"[\s,]*")
SPACE = re.compile(r"\s*")
LONGEST_CELL = 2**31 - 1
USUAL_SPLIT = "train"  # where nobody says which
_LIMIT = threading.Lock()  # csv has one limit for the whole process


@dataclass(frozen=True)
class Unreadable:
    """A row that is none, with the reason."""

    reason: str
    detail: str
    shown: str


@dataclass(frozen=True)
class Found:
    """What a source holds: numbers from 1 with rows; the numbers are of lines where there are any."""

    rows: list[tuple[int, Any]]
    unit: str = "row"  # or "line"


def unreadable(reason: str, text: str, detail: str = "") -> Unreadable:
    """A row that is none; the beginning of `text` is kept to be shown, `detail` for where no row is any."""
    return Unreadable(reason, detail or reason, text[:MOST_SHOWN].strip())


def listed(items: list[Any]) -> Found:
    """Items by their place in a list."""
    return Found(list(enumerate(items, start=1)))


# --- JSON: a list, an object with lists in it, or values one after the other, mostly one a line ---------------


def json_rows(path: Path, text: str, split: str | None) -> Found:
    """All rows in a file's text. `split` names a list in an object that holds several. Raises `DataError`."""
    values = _values(text)
    if values and all(isinstance(value, Unreadable) for _, value in values):
        raise DataError(f"{path} is not valid JSON: {values[0][1].detail}.")
    if len(values) == 1:
        content = values[0][1]
        if isinstance(content, dict) and schema_of(content) is None:
            content = _one_list(path, content, split)
            split = None
        if isinstance(content, list):
            return _without_splits(path, listed(content), split)
    return _without_splits(path, Found(values, "line"), split)


def _without_splits(path: Path, found: Found, split: str | None) -> Found:
    if split is not None:
        raise DataError(f"{path} has no splits, so there is no {split} in it.")
    return found


def _values(text: str) -> list[tuple[int, Any]]:
    """The values with the numbers of the lines that they begin in.

    Where one is broken, its line is lost, and the next line may begin another.
    """
    decoder = json.JSONDecoder()
    values: list[tuple[int, Any]] = []
    line, counted, position = 1, 0, _after(SPACE, text, 0)
    while position < len(text):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = decoder.raw_decode(text, position)
            position = _after(BETWEEN, text, end)
        except RecursionError:
            value, position = _broken(TOO_DEEP, TOO_DEEP, text, position)
        except ValueError as error:
            value, position = _broken("not valid JSON", _where(error), text, position)
        values.append((line, value))
    return values


def _broken(reason: str, detail: str, text: str, start: int) -> tuple[Unreadable, int]:
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    return unreadable(reason, text[start:end], detail), _after(SPACE, text, end)


def _where(error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg} in line {error.lineno}, column {error.colno}"


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position


def _one_list(path: Path, content: dict[str, Any], split: str | None) -> Any:
    """The rows in an object such as `{"train": […], "valid": […]}`."""
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if split is not None and split not in lists:
        raise DataError(f"{path} has no list called {split}; it has {', '.join(lists) or 'none'}.")
    if split is not None or USUAL_SPLIT in lists:
        return lists[split or USUAL_SPLIT]
    return next(iter(lists.values())) if len(lists) == 1 else content


# --- tables: one row a line ------------------------------------------------------------------------------------


def table_rows(path: Path, text: str, delimiters: str) -> Found:
    """The rows below the header. Raises `DataError` when there is no row or the header makes no sense."""
    with _long_cells():
        delimiter = _delimiter(text, delimiters)
        lines = list(_cells(text, delimiter))
    if not lines:
        return Found([], "line")
    rows = lines[1:]
    header: Any = lines[0][1]
    if isinstance(header, Unreadable):
        raise DataError(f"{path} cannot be read as csv: {header.detail}.")
    names = [name.strip() for name in header]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has two columns called {twice!r}: rename or remove one.")
    if rows and all(isinstance(cells, Unreadable) for _, cells in rows):
        raise DataError(f"{path} cannot be read as csv: {rows[0][1].detail} (line {rows[0][0]}).")
    return Found([(number, _row(names, cells)) for number, cells in rows], "line")


def _delimiter(text: str, delimiters: str) -> str:
    """The one with which the header has a known shape: some countries' tables have `;` between cells."""
    for delimiter in delimiters:
        header: Any = next(_cells(text, delimiter), (0, []))[1]
        if not isinstance(header, Unreadable) and schema_of({name.strip(): "x" for name in header}):
            return delimiter
    return delimiters[0]


def _cells(text: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Numbers of lines, and the cells of the row that begins there.

    Where a row is broken, the line that it begins in is left out and the next one read: a quote that nobody
    closed would take other rows with it.
    """
    lines = list(io.StringIO(text, newline=""))
    start = 0
    while start < len(lines):
        reader = csv.reader(
            (lines[index] for index in range(start, len(lines))), delimiter=delimiter, strict=True
        )
        first, begin = start, start
        try:
            for cells in reader:
                if cells:
                    yield begin + 1, cells
                begin = first + reader.line_num
            return
        except csv.Error as error:
            yield begin + 1, unreadable("a quote in it is wrong", lines[begin], str(error))
            start = begin + 1


def _row(names: list[str], cells: Any) -> Any:
    if isinstance(cells, Unreadable):
        return cells
    if any(cell.strip() for cell in cells[len(names) :]):
        return unreadable("it has more cells than there are columns", ",".join(cells))
    filled = [*cells, *[None] * (len(names) - len(cells))]
    return {name: cell for name, cell in zip(names, filled, strict=False) if name}


@contextmanager
def _long_cells() -> Iterator[None]:
    with _LIMIT:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            yield
        finally:
            csv.field_size_limit(before)
