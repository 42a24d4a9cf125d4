"""Worlds with an API, made once for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.api.world import World, Worlds


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """For tests that need a world of their own."""
    torch.set_num_threads(1)
    made = Worlds(tmp_path_factory.mktemp("api"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    """One that all tests of a module share."""
    return worlds.make("shared")
