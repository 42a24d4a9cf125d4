"""Servers that a test has written, in the in-memory swarm, with a record that makes them everybody's first choice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from corolla.swarm.channel import Channel
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.directory_memory import MemoryDirectory
from corolla.swarm.transport.base import Stream
from corolla.wire.messages import PROTOCOL_NAME
from tests.swarm_fixture import FOREVER, MemorySwarm

Talk = Callable[[Channel], Awaitable[None]]


def add_evil(swarm: MemorySwarm, talk: Talk, peer_id: str = "evil", **record: object) -> str:
    """A peer that says it serves all blocks and does on each stream what `talk` does; gives its peer id.

    `record` are fields of its `ServerRecord`.
    """

    async def handle(stream: Stream) -> None:
        await talk(Channel(stream, side="server"))

    async def add() -> None:
        transport = swarm.network.transport(peer_id)
        await transport.serve(PROTOCOL_NAME, handle)
        fields: dict[str, object] = {
            "peer_id": peer_id,
            "model": swarm.checkpoint.identity,
            "model_name": swarm.checkpoint.name,
            "num_blocks": swarm.checkpoint.num_blocks,
            "start": 0,
            "end": swarm.checkpoint.num_blocks,
            "dtype": "float32",
            "throughput": 1e6,
            "quantization": "none",
        }
        await MemoryDirectory(swarm.board).announce(ServerRecord(**(fields | record)), FOREVER)  # type: ignore[arg-type]

    swarm.loop.run(add())
    return peer_id
