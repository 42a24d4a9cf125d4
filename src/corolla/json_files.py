"""JSON from files that somebody else may have written: one reader, with bounds.

Invariant: what is not JSON of the kind that is asked for, is nested too deeply, too large or not text ends in
the caller's own error, in one sentence that names the file; no input ends in another exception.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from corolla.errors import CorollaError
from corolla.files import read_bounded

MOST_DEPTH = 100


class JsonError(ValueError):
    """What is wrong with some JSON, as a part of a sentence."""


def parse_object(raw: bytes | str) -> dict[str, Any]:
    """One JSON object. Raises `JsonError`."""
    content = parse(raw)
    if not isinstance(content, dict):
        raise JsonError("should hold one JSON object")
    return content


def parse(raw: bytes | str) -> Any:
    """Any JSON value of at most `MOST_DEPTH` levels, in UTF-8. Raises `JsonError`."""
    return _decoded(lambda: json.loads(raw if isinstance(raw, str) else raw.decode("utf-8-sig")))


def end_of_value(text: str) -> int:
    """Where the JSON value ends that a text begins with. Raises `JsonError`."""
    _, end = _decoded(lambda: list(json.JSONDecoder().raw_decode(text)))
    return int(end)


def _decoded(decode: Callable[[], Any]) -> Any:
    try:
        content = decode()
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except ValueError as error:
        raise JsonError("is not readable JSON") from error
    if _depth(content) > MOST_DEPTH:
        raise JsonError("is nested too deeply")
    return content


def load_object(path: Path) -> dict[str, Any]:
    """The one JSON object in a file. Raises `JsonError`, `OSError`."""
    return parse_object(read_bounded(path))


def read_object(path: Path, kind: type[CorollaError], remedy: str) -> dict[str, Any]:
    """The same; raises `kind`, and `remedy` ends its sentence."""
    try:
        return load_object(path)
    except OSError as error:
        raise kind(f"{path} cannot be read ({error.strerror or error}); {remedy}.") from error
    except JsonError as error:
        raise kind(f"{path} {error}; {remedy}.") from error


def _depth(content: Any) -> int:
    """How many containers are around the innermost value, counted to a little over `MOST_DEPTH`."""
    depth, level = 0, [content]
    while depth <= MOST_DEPTH and (level := [inner for value in level for inner in _inside(value)]):
        depth += 1
    return depth


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
