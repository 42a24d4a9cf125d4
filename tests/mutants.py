"""Planted mistakes: whether a check notices one, and whether it is still the mistake that it was meant to be.

A mistake that only raises, since the code around it has changed, would be noticed by every check and prove nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator

import pytest


def passes(check: Callable[[], bool], file: str) -> bool:
    """Whether the check comes out right; a mistake planted by `file` may also break the code in other ways."""
    try:
        return check()
    except Exception as error:
        assert_is_planted(error, file)
        return False


def failing(checks: object, due: Collection[str], file: str) -> set[str]:
    """Those methods of `checks` that come out wrong: of the `due` ones, or of all where none is due."""
    names = due or [name for name in vars(type(checks)) if name[0] != "_"]
    return {name for name in names if not passes(getattr(checks, name), file)}


def assert_is_planted(error: BaseException, file: str) -> None:
    """That the error was not raised by the lines of the mistake itself, or for want of an argument of theirs."""
    for one in _chain(error):
        end = traceback.extract_tb(one.__traceback__)[-1:]
        own = bool(end) and end[0].filename == file and not isinstance(one, AssertionError)
        unfit = isinstance(one, TypeError) and "argument" in str(one)
        out_of_date = own or unfit
        assert not out_of_date, f"the mistake only raises, instead of computing otherwise: {one!r}"


def assert_none_raised(caplog: pytest.LogCaptureFixture, file: str) -> None:
    """The same of the errors that were logged, as servers do."""
    for record in caplog.records:
        if record.exc_info and record.exc_info[1] is not None:
            assert_is_planted(record.exc_info[1], file)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
