"""A client that takes all it can and waits to be killed: `greedy_client.py ADDRESS`. See test_vanished.py."""

from __future__ import annotations

import asyncio
import sys

import torch

from corolla.swarm.channel import Channel, request
from corolla.swarm.node import Node
from corolla.wire.frames import Packet, encode
from corolla.wire.messages import PROTOCOL_NAME, Forward, OpenSession, Step

SESSIONS = 30
HIDDEN = 32


async def main(address: str) -> None:
    node = await Node.create(initial_peers=[address], client_only=True)
    (record,) = await node.directory.all_servers()
    span = {"model": record.model, "start": record.start, "end": record.end}

    async def channel() -> Channel:
        return Channel(await node.transport.open(record.peer_id, PROTOCOL_NAME), side="client", silence=30)

    sessions = [await channel() for _ in range(SESSIONS)]  # kept: a forgotten stream ends by itself
    for session in sessions:
        await request(session, Packet(OpenSession(**span, rows=2, max_tokens=40)))
        await request(session, Packet(Step(position=0), {"hidden": torch.zeros(2, 3, HIDDEN)}))
    whole = {"hidden": torch.zeros(1, 4000, HIDDEN), "lengths": torch.full((40,), 100)}
    training = await channel()
    await request(training, Packet(Forward(**span, lease="a" * 16), whole))
    stream = await node.transport.open(record.peer_id, PROTOCOL_NAME)
    half = b"".join(bytes(part) for part in encode(Packet(Forward(**span), whole)))
    await stream.write([half[: len(half) // 2]])
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
