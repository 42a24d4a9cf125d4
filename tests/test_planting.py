"""A planted mistake that only raises is noticed, whoever has caught what it raised (`mutants.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.mutants import Mistakes, passes


class Counter:
    """What mistakes are planted into."""

    def step(self, size: int) -> int:
        return size

    async def later(self, size: int) -> int:
        return size

    @property
    def whole(self) -> int:
        return self.step(1)

    def run(self) -> None:
        """Uses all of it; errors are lost."""
        for one in (lambda: self.step(1), lambda: self.whole, lambda: asyncio.run(self.later(1))):
            with contextlib.suppress(Exception):
                one()


def raised_by(patch: pytest.MonkeyPatch, name: str, mistake: Any) -> bool:
    mistakes = Mistakes(patch)
    mistakes.setattr(Counter, name, mistake)
    Counter().run()
    try:
        mistakes.assert_none_raised([])
    except AssertionError:
        return True
    return False


def of_a_name_that_is_gone(self: Any, size: int) -> int:
    return int(self.former) + size


def of_other_arguments(_self: Any) -> int:
    return 1


def of_a_shape(_self: Any, size: int) -> int:
    return [1][size]


async def of_a_name_that_is_gone_later(self: Any, size: int) -> int:
    return int(self.former) + size


def wrong(_self: Any, size: int) -> int:
    return size + 1


@pytest.mark.parametrize(
    ("name", "mistake", "stale"),
    [
        ("step", of_a_name_that_is_gone, True),
        ("step", of_other_arguments, True),
        ("step", of_a_shape, True),
        ("later", of_a_name_that_is_gone_later, True),
        ("whole", property(lambda self: self.former), True),
        ("step", wrong, False),
        ("whole", property(lambda _self: 2), False),
    ],
)
def test_what_only_raises_is_told_from_what_computes_otherwise(
    name: str, mistake: Any, stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert raised_by(monkeypatch, name, mistake) == stale


def failing_with(error: Exception) -> Callable[[], bool]:
    def check() -> bool:
        raise RuntimeError("a reply did not come") from error

    return check


def test_a_check_fails_by_what_was_computed_and_not_for_a_name() -> None:
    assert passes(lambda: True)
    assert not passes(lambda: False)
    assert not passes(failing_with(ValueError("of another length")))
    with pytest.raises(AssertionError, match="only raises"):
        passes(failing_with(AttributeError("it has no such name")))


def test_what_was_logged_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    mistakes = Mistakes(monkeypatch)
    try:
        of_a_name_that_is_gone(Counter(), 1)
    except AttributeError:
        logging.getLogger(__name__).exception("A server failed")
    with pytest.raises(AssertionError, match="only raises"):
        mistakes.assert_none_raised(caplog.records)
