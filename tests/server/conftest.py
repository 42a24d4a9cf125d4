"""The server that most tests talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.server.world import OneServer

from corolla.server.sessions import kv_cache


@pytest.fixture(params=["llama", "bloom", "falcon"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[OneServer]:
    """Over families that are packed, by the registry and by a module of our own, and one that is not."""
    world = OneServer(request.param)
    await world.start()
    yield world
    await world.close()


@pytest.fixture(autouse=True)
def no_long_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits in line for room looks again at once, so tests that set the clock need not wait."""
    monkeypatch.setattr(kv_cache, "LOOK_AGAIN_SECONDS", 0.005)
