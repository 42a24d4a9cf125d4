"""A simulated swarm in virtual time with one client, honest servers, and strangers that a test has written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from corolla.client.connection import SwarmConnection
from corolla.client.model.arguments import from_pretrained
from corolla.client.model.causal_lm import load_distributed
from corolla.errors import RemoteError
from corolla.swarm.channel import Channel
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.transport.base import Stream
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, Alive, Failure, Opened
from tests.reference import local_model, random_ids
from tests.schedules.world import DTYPE, FOREVER, ServerPlan, SimulatedSwarm, checkpoint_of

Talk = Callable[[Channel], Awaitable[None]]
NEW = 5


async def mute(_channel: Channel) -> None:
    """Accepts, and says nothing."""
    await asyncio.Event().wait()


async def alive(channel: Channel) -> None:
    """Shows signs of life for ever."""
    await channel.receive(timeout=None)
    while True:
        await channel.send(Packet(Alive(ahead=1)))
        await asyncio.sleep(1.0)


def refusing(code: str, retry_after: float | None = None) -> Talk:
    """Answers everything with the same refusal."""

    async def talk(channel: Channel) -> None:
        while True:
            await channel.receive(timeout=None)
            failure = Failure(code=code, message="No.", retry_after=retry_after)  # type: ignore[arg-type]
            await channel.send(Packet(failure))

    return talk


async def opens_only(channel: Channel) -> None:
    """Opens a session, and says nothing more."""
    await channel.receive(timeout=None)
    await channel.send(Packet(Opened()))
    await asyncio.Event().wait()


class Strange:
    """Honest servers of four blocks in float64, strangers beside them, and a client's model over both."""

    def __init__(self, root: Path, plans: Sequence[ServerPlan], *, patience: float = 600.0) -> None:
        self.checkpoint = checkpoint_of("llama", root)
        self.swarm = SimulatedSwarm(self.checkpoint, plans)
        self._patience = patience
        self._clients = 0
        self.asked: dict[str, int] = {}  # streams that each stranger was sent

    def add(self, peer: str, talk: Talk | None, **record: Any) -> None:
        """A peer that says it serves all blocks, faster than anybody, and does `talk` on each stream.

        None: a record only, with nobody behind it. `record` are fields of its `ServerRecord`.
        """
        self.asked[peer] = 0

        async def handle(stream: Stream) -> None:
            self.asked[peer] += 1
            try:
                assert talk is not None
                await talk(Channel(stream, side="server"))
            except RemoteError:
                pass

        async def add() -> None:
            if talk is not None:
                await self.swarm.network.transport(peer).serve(PROTOCOL_NAME, handle)
            fields: dict[str, Any] = {
                "peer_id": peer,
                "model": self.checkpoint.identity,
                "model_name": self.checkpoint.name,
                "num_blocks": self.checkpoint.num_blocks,
                "start": 0,
                "end": self.checkpoint.num_blocks,
                "dtype": "float64",
                "throughput": 1e9,
            }
            self.swarm._board.put(ServerRecord(**(fields | record)), FOREVER)

        self.swarm.loop.run(add())

    def connect(self) -> SwarmConnection:
        """A new client, which knows nobody yet."""
        self._clients += 1
        return self.swarm.connect(f"client-{self._clients}", self._patience)

    def model(self) -> Any:
        """A model over a new client's connection."""
        model = load_distributed(
            from_pretrained(self.checkpoint.name, dtype=DTYPE), connection=self.connect()
        )
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    def first_reply(self) -> float:
        """Virtual seconds that a new client's first reply takes, which must be right."""
        began = self.swarm.loop.time()
        check_reply(self.model(), self.checkpoint.name)
        return self.swarm.loop.time() - began

    def train(self) -> None:
        """A new client's first training pass, which must be right."""
        ids = random_ids(2, 8, 3)
        loss = self.model()(ids, labels=ids).loss
        local = local_model(self.checkpoint.name, DTYPE)
        torch.testing.assert_close(loss, local(ids, labels=ids).loss)

    def close(self) -> None:
        """End everything."""
        self.swarm.close()


def check_reply(model: Any, name: str, seed: int = 0) -> None:
    """A reply must be the local model's."""
    ids = random_ids(1, 6, seed)
    local = local_model(name, DTYPE)
    local.generation_config.eos_token_id, local.generation_config.pad_token_id = None, 0
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, local.generate(ids, max_new_tokens=NEW, do_sample=False))
