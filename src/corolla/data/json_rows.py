"""Rows from JSON: a list, an object with lists in it, or values one after the other, mostly one a line.

Read here, since `datasets` wants all rows of one shape and gives up at the first bad line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from corolla.data.rows import TOO_DEEP, Found, Unreadable, listed, unreadable
from corolla.data.schemas import schema_of
from corolla.errors import DataError

BETWEEN = re.compile(r"[\s,]*")
SPACE = re.compile(r"\s*")


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
    if split is not None or "train" in lists:
        return lists[split or "train"]
    return next(iter(lists.values())) if len(lists) == 1 else content
