"""The server that most tests talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.server.world import World


@pytest.fixture(params=["llama", "bloom"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    world = World(request.param)
    await world.start()
    yield world
    await world.close()
