"""Worlds with an API: in this process, made once for each module, and of processes, started once for each worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.api.deployed import Deployed, deployed
from tests.api.world import World, Worlds


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """For tests that need a world of their own, or look into it."""
    torch.set_num_threads(1)
    made = Worlds(tmp_path_factory.mktemp("api"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    """One that all tests of a module share."""
    return worlds.make("shared")


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Processes that all tests share, for those that ask as a client does and look at nothing but answers."""
    with deployed(tmp_path_factory.mktemp("deployed")) as found:
        yield found
