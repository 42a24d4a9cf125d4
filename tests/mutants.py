"""Planted mistakes: whether a check notices one, and whether it is still the mistake that it was meant to be.

A mistake that only raises, since the code around it has changed, would be noticed by every check and prove nothing.
What it raises may be caught on its way, or logged, as servers do; so the fixture `mistakes`, with which they are
planted, watches the mistakes themselves.
"""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
from collections.abc import Callable, Collection, Iterable
from types import FunctionType
from typing import Any

import pytest

from corolla.shortage import chain

Plant = Callable[["Mistakes"], None]
# What is raised for a name or an argument that there is no longer.
STALE = (AttributeError, NameError, TypeError)


def no_mistake(_patch: Mistakes) -> None:
    """The checks pass on the code as it is."""


class Mistakes:
    """Plants mistakes as `pytest.MonkeyPatch` does, and notes what those raise that no longer fit in their place."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._raised: list[BaseException] = []

    def setattr(self, *place: Any) -> None:
        """A target, a name and a value, or both names in one string and a value."""
        *names, value = place
        self._patch.setattr(*names, self._watched(value))

    def assert_none_raised(self, records: Iterable[logging.LogRecord]) -> None:
        """That no mistake has only raised; what was logged may be what came of one."""
        logged = [record.exc_info[1] for record in records if record.exc_info]
        stale = [*self._raised, *(one for one in logged if one is not None and _is_stale(one))]
        assert not stale, f"the mistake only raises, instead of computing otherwise: {stale!r}"

    def _watched(self, value: Any) -> Any:
        if isinstance(value, property):
            return property(self._watched(value.fget))
        if not isinstance(value, FunctionType) or not value.__module__.startswith("tests."):
            return value  # one of the code's own, or no function
        return self._watched_later(value) if inspect.iscoroutinefunction(value) else self._watched_now(value)

    def _watched_now(self, mistake: FunctionType) -> Callable[..., Any]:
        @functools.wraps(mistake)
        def watched(*arguments: Any, **named: Any) -> Any:
            try:
                return mistake(*arguments, **named)
            except Exception as error:
                self._note(error, mistake)
                raise

        return watched

    def _watched_later(self, mistake: FunctionType) -> Callable[..., Any]:
        @functools.wraps(mistake)
        async def watched(*arguments: Any, **named: Any) -> Any:
            try:
                return await mistake(*arguments, **named)
            except Exception as error:
                self._note(error, mistake)
                raise

        return watched

    def _note(self, error: Exception, mistake: FunctionType) -> None:
        """Errors of its own lines, or of the call of it; the code that it calls may raise for its sake."""
        (end,) = traceback.extract_tb(error.__traceback__)[-1:]
        if end.filename in (mistake.__code__.co_filename, __file__) or isinstance(error, STALE):
            self._raised.append(error)


def passes(check: Callable[[], bool]) -> bool:
    """Whether the check comes out right; a mistake may also break the code, but not for a name that is gone."""
    try:
        return check()
    except Exception as error:
        assert_is_planted(error)
        return False


def failing(checks: object, due: Collection[str]) -> set[str]:
    """Those methods of `checks` that come out wrong: of the `due` ones, or of all where none is due."""
    names = due or [name for name in vars(type(checks)) if name[0] != "_"]
    return {name for name in names if not passes(getattr(checks, name))}


def assert_is_planted(error: BaseException) -> None:
    """That the error comes of what a mistake has computed."""
    assert not _is_stale(error), f"the mistake only raises, instead of computing otherwise: {error!r}"


def _is_stale(error: BaseException) -> bool:
    return any(isinstance(link, STALE) for link in chain(error))
