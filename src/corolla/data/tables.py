"""Rows of a table written as text, one a line: csv and its kin.

Read here, since a reply of "10" or "NA" is text too, and a quote that is wrong costs its row only.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corolla.data.rows import Found, Unreadable, unreadable
from corolla.data.schemas import schema_of
from corolla.errors import DataError

LONGEST_CELL = 2**31 - 1
_LIMIT = threading.Lock()  # csv has one limit for the whole process


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
