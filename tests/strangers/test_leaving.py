"""A server that leaves while strangers keep streams open says nothing about it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from corolla.swarm.transport.base import Stream
from corolla.swarm.transport.libp2p import Libp2pTransport


@pytest.mark.parametrize("count", [3, pytest.param(300, marks=pytest.mark.nightly)])
async def test_open_streams_are_ended_without_a_traceback_each(count: int) -> None:
    server = await Libp2pTransport.create()
    stranger = await Libp2pTransport.create(initial_peers=await server.addresses())
    begun: list[str] = []

    async def waits(stream: Stream) -> None:
        begun.append(stream.peer_id)
        await stream.read(1)

    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    await server.serve("waits", waits)
    streams = [await stranger.open(server.peer_id, "waits") for _ in range(count)]
    async with asyncio.timeout(20):
        while len(begun) < len(streams):
            await asyncio.sleep(0.01)
    await server.close()
    for one in streams:
        await one.close()
    await stranger.close()
    assert not said
