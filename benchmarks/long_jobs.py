"""What others feel of a stranger's forward of 8,000 tokens: a reply under way, and the first token of a new chat.

One server with all blocks of SmolLM2-135M, in one process with its clients. Prints each figure beside the same one
with nobody else, from the same run:

    python -m benchmarks.long_jobs [--tokens 8000] [--backward]

With --backward, some 2,500 tokens fit into a server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Coroutine
from functools import partial
from statistics import median
from typing import Any

import torch

from corolla.models.attention.windows import layout_of
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.kernels.apply import use_kernels
from corolla.models.span import load_span
from corolla.server.block_server import BlockServer
from corolla.server.handlers import handle
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.swarm.channel import Channel, request
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, Backward, Forward, OpenSession, Step

ROOM = 900  # tokens of a chat
PROMPT = 100


class Chat:
    """A session that is sent random hidden states."""

    def __init__(self, channel: Channel, span: Any) -> None:
        self._channel, self._span = channel, span
        self._position = 0

    async def open(self) -> Chat:
        blocks = {"start": self._span.start, "end": self._span.end}
        await request(self._channel, Packet(OpenSession(model="m", rows=1, max_tokens=ROOM, **blocks)))
        return self

    async def step(self, tokens: int) -> float:
        """Seconds that so many new tokens took."""
        began = time.perf_counter()
        hidden = torch.randn(1, tokens, self._span.hidden_size)
        await request(self._channel, Packet(Step(position=self._position), {"hidden": hidden}))
        self._position += tokens
        return time.perf_counter() - began

    async def reply(self, tokens: int) -> list[float]:
        """Seconds of each of so many tokens."""
        return [await self.step(1) for _ in range(tokens)]


class World:
    """One server, and whoever asks it."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint("smollm2")
        self.span = load_span(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32, packable=True)
        use_kernels(self.span.model, "none", self.span.device)
        layout = layout_of(self.span)
        budget = CacheBudget(4 * ROOM * layout.tables, tables=layout.tables)
        self.server = BlockServer(self.span, budget, model="m", layout=layout)
        self._network = MemoryNetwork()

    async def start(self) -> None:
        self.server.engine.start()
        transport = self._network.transport("server")
        await transport.serve(PROTOCOL_NAME, partial(handle, self.server))

    async def channel(self, peer: str) -> Channel:
        stream = await self._network.transport(peer).open("server", PROTOCOL_NAME)
        return Channel(stream, side="client", silence=600)

    async def chat(self, peer: str) -> Chat:
        return await Chat(await self.channel(peer), self.span).open()

    async def long_job(self, tokens: int, backward: bool) -> asyncio.Task[Packet]:
        """A stranger's request, begun."""
        hidden = torch.randn(1, tokens, self.span.hidden_size)
        tensors = {"hidden": hidden, "lengths": torch.tensor([tokens])}
        kind = Backward if backward else Forward
        if backward:
            tensors["grad"] = hidden
        message = kind(model="m", start=self.span.start, end=self.span.end)
        asked = request(await self.channel("stranger"), Packet(message, tensors))
        task = asyncio.create_task(_awaited(asked))
        await asyncio.sleep(2.0)  # until it is computed, on any machine
        return task


async def _awaited(asked: Coroutine[Any, Any, Packet]) -> Packet:
    return await asked


async def measure(tokens: int, backward: bool) -> None:
    world = World()
    await world.start()
    running = await world.chat("running")
    await running.step(PROMPT)
    await running.reply(10)
    await (await world.chat("first")).step(PROMPT)
    alone = await running.reply(40)
    new_alone = await (await world.chat("early")).step(PROMPT)
    job = await world.long_job(tokens, backward)
    beside = await running.reply(40)
    new_beside = await (await world.chat("new")).step(PROMPT)
    both = asyncio.create_task(running.reply(20))
    new_both = await (await world.chat("newer")).step(PROMPT)
    await both
    if job.done():
        raise SystemExit(
            f"The request had ended before the last measurement: {job.exception() or 'ask for more tokens'}"
        )
    job.cancel()
    await world.server.engine.close()
    name = "backward" if backward else "forward"
    print(f"beside a {name} of {tokens:,} tokens:")
    a, b = median(alone), median(beside)
    print(
        f"  a reply, ms a token           {1e3 * b:8.1f}  alone {1e3 * a:8.1f}  {b / a:5.2f}x  (at most 2x)"
    )
    print(f"  the same, worst               {1e3 * max(beside):8.1f}  alone {1e3 * max(alone):8.1f}")
    print(
        f"  new chat, {PROMPT} tokens, s       {new_beside:8.2f}  alone {new_alone:8.2f}         (at most 3 s)"
    )
    print(f"  the same, beside a reply too  {new_both:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--backward", action="store_true")
    given = parser.parse_args()
    asyncio.run(measure(given.tokens, given.backward))


if __name__ == "__main__":
    main()
