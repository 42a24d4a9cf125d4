"""Instruction sets, for the tests of kernels and of what is built on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from corolla.models.kernels import isa, native


@pytest.fixture(params=native.instruction_sets() or [None])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs once with each of the sets that kernels can be built for here."""
    if request.param is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv(isa.VARIABLE, request.param)
    native.library.cache_clear()
    assert native.instruction_set() == request.param
    yield request.param
    native.library.cache_clear()
