"""A real client that is killed while it holds sessions, a lease and a half-sent request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.client.conftest import random_ids
from tests.e2e.greedy_client import SESSIONS
from tests.e2e.processes import Talking, processes
from tests.e2e.test_processes import GREEDY, load
from tests.reference import Prompted, local_model
from tests.tiny_models import write_tiny

from corolla.swarm.channel import Channel, request
from corolla.swarm.node import Node
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, Ping, ServerStatus

FREED_SECONDS = 60.0


def test_what_a_killed_client_held_is_free_within_a_minute(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "model")
    with processes(tmp_path) as started:
        address, _ = started.swarm(folder, ["0:4"], "--dtype", "float32", "--cache-tokens", "4096")
        with contextlib.closing(Talking(address, module="tests.e2e.greedy_client")) as greedy:
            greedy.until("ready")
            held = asyncio.run(status_when(address, lambda one: True))
            assert held.sessions == SESSIONS
            assert held.free_cache_tokens <= 4096 - SESSIONS * 2 * 40
        freed = asyncio.run(status_when(address, lambda one: one.sessions == 0))
        assert (freed.sessions, freed.free_cache_tokens) == (0, 4096)
        model, ids = load(address, folder), random_ids(1, 6)
        try:
            Prompted(local_model(folder), torch.zeros(0, 32)).assert_greedy(
                model.generate(ids, max_new_tokens=8, **GREEDY), 6
            )
        finally:
            model.close()


async def status_when(address: str, condition: Callable[[ServerStatus], bool]) -> ServerStatus:
    """What the server says of itself once the condition holds."""
    node = await Node.create(initial_peers=[address], client_only=True)
    (record,) = await node.directory.all_servers()
    channel = Channel(await node.transport.open(record.peer_id, PROTOCOL_NAME), side="client")
    deadline = time.monotonic() + FREED_SECONDS
    try:
        while True:
            found = (await request(channel, Packet(Ping()))).message
            assert isinstance(found, ServerStatus)
            if condition(found):
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)
    finally:
        await channel.close()
        await node.close()
