"""Instruction sets, for the tests of kernels and of what is built on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from corolla.models.kernels import isa, native


@contextmanager
def limited_to(name: str | None) -> Iterator[str]:
    if name is None:
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(isa.VARIABLE, name)
        native.library.cache_clear()
        assert native.instruction_set() == name
        yield name
    native.library.cache_clear()


INSTRUCTION_SETS = native.instruction_sets() or [None]
LANES = [one for one in INSTRUCTION_SETS if one != "avx-vnni"]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each of the sets that kernels can be built for here."""
    with limited_to(request.param) as name:
        yield name


@pytest.fixture(params=LANES)
def lanes(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same with each but AVX-VNNI, which is AVX2 for all but products of bytes."""
    with limited_to(request.param) as name:
        yield name
