"""A server on the in-memory network, and two kinds of client: one that speaks raw bytes, and an honest one."""

from __future__ import annotations

import asyncio
import copy
import functools
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from tests.models.every_family import tiny
from tests.tiny_models import FAMILIES, write_tiny
from torch import Tensor

from corolla.models.attention.pages import MARGIN
from corolla.models.attention.windows import layout_of
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.miniature import random_model
from corolla.models.checks.selfcheck import check_family, steps_stack
from corolla.models.families import structure
from corolla.models.span import Span, load_span
from corolla.server.block_server import BlockServer
from corolla.server.handlers import handle
from corolla.server.peers import Budgets, Leases, PeerLimits
from corolla.server.scheduler.engine import Engine
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.swarm.channel import Channel, request
from corolla.swarm.transport.base import Stream
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.frames import PREAMBLE_SIZE, Packet, parse_header, parse_payload, parse_preamble
from corolla.wire.messages import (
    PROTOCOL_NAME,
    PROTOCOL_VERSION,
    Alive,
    Backward,
    CloseSession,
    Forward,
    Message,
    OpenSession,
    ServerMessage,
    Step,
)

MODEL = "the-tiny-model"
START, END = 1, 3  # of four blocks
BLOCKS = END - START
HIDDEN = 32
CAPACITY = 13  # pages: 208 tokens of one row
PREAMBLE = "<4sHHIQ"  # magic, version, reserved, header bytes, payload bytes
DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bool: "bool",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
}


@functools.cache
def span_of(family: str, dtype: torch.dtype = torch.float64) -> Span:
    """Blocks 1 and 2 of a tiny random model; for reading only, since all tests of a process share it.

    In float64 the order of summation, which differs between a session and a whole pass, does not show.
    """
    with tempfile.TemporaryDirectory() as folder:
        write = write_tiny if family in FAMILIES else write_hybrid
        checkpoint = open_checkpoint(str(write(family, Path(folder))))
        together = check_family(checkpoint.config), steps_stack(checkpoint.config)
        return load_span(checkpoint, START, END, dtype=dtype, packable=together[0], stackable=together[1])


def write_hybrid(family: str, folder: Path) -> Path:
    """The same of a family whose blocks keep states too, as wide."""
    config = tiny(family)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = HIDDEN, 4, 2
    torch.manual_seed(0)
    random_model(structure(config).causal_lm, config).save_pretrained(folder)
    return folder


class Clock:
    """A clock that the test sets; nothing waits by it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class OneServer:
    """One server, and as many clients as the test connects. Lives in the test's event loop.

    Time passes for the server's budget when the test says so (`clock`); for all else it is the real one.
    """

    def __init__(
        self,
        family: str = "llama",
        *,
        span: Span | None = None,
        capacity: int = CAPACITY,
        margin: int = MARGIN,
        clock: Clock | None = None,
        limits: PeerLimits | None = None,
        leases: Leases | None = None,
        engine: Callable[..., Engine] = Engine,
    ) -> None:
        self.network = MemoryNetwork()
        self.client = self.network.transport("client")
        self._clients = {"client": self.client}
        self.transport = self.network.transport("server")
        # Only one thread at a time may run a span: the server has one of its own, tests compare with another.
        self.reference = span or span_of(family)
        self.span = copy.deepcopy(self.reference)
        self.clock = clock or Clock()
        layout = layout_of(self.span, margin)
        self.budget = CacheBudget(capacity, self.clock, tables=layout.tables)
        self.server = BlockServer(
            self.span, self.budget, model=MODEL, layout=layout, limits=limits, leases=leases, engine=engine
        )
        self.engine = self.server.engine
        self._running = 0
        self._ended = asyncio.Condition()

    async def start(self) -> None:
        self.engine.start()
        await self.transport.serve(PROTOCOL_NAME, self._handle)

    async def close(self) -> None:
        await self.client.close()
        await self.transport.close()
        await self.engine.close()

    async def _handle(self, stream: Stream) -> None:
        self._running += 1
        try:
            await handle(self.server, stream)
        finally:
            self._running -= 1
            async with self._ended:
                self._ended.notify_all()

    async def all_streams_ended(self) -> None:
        """Wait until the server has left all its streams."""
        async with self._ended, asyncio.timeout(20):
            await self._ended.wait_for(lambda: not self._running)

    async def connect(self) -> Channel:
        """An honest client's channel."""
        return Channel(await self.client.open("server", PROTOCOL_NAME), side="client", silence=20)

    async def raw(self, peer: str = "client") -> RawClient:
        """A client of that name that may send anything; its transport ends with the network."""
        if peer not in self._clients:
            self._clients[peer] = self.network.transport(peer)
        return RawClient(await self._clients[peer].open("server", PROTOCOL_NAME))

    @property
    def held(self) -> tuple[int, int, int]:
        """What must be 0 once every client has left: reserved pages, sessions, waiting jobs."""
        return self.budget.reserved, len(self.server.sessions), self.engine.waiting

    async def pages_held(self) -> int:
        """Pages that rows hold once the compute thread has done what it was told to."""
        pool = self.server.pool
        return await self.engine.submit(Kind.DECODE, lambda: pool.pages - pool.free)


@asynccontextmanager
async def limited(
    capacity: int, *, silence: float | None = None, engine: Callable[..., Engine] = Engine, **budgets: Any
) -> AsyncIterator[OneServer]:
    """A server with such budgets, for as long as the block lasts."""
    clock = Clock()
    limits = PeerLimits(Budgets(**budgets), clock)
    world = OneServer(capacity=capacity, clock=clock, limits=limits, engine=engine)
    world.server.silence = silence
    await world.start()
    try:
        yield world
    finally:
        await world.close()


class RawClient:
    """Builds frames by itself, as `wire/frames.py` describes them, without any of its checks."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    async def send(self, message: Message | dict[str, Any], **tensors: Tensor) -> None:
        await self.stream.write([frame(message, **tensors)])

    async def answer(self) -> Packet:
        """The next message that is not a sign of life."""
        while True:
            packet = await self.next()
            if not isinstance(packet.message, Alive):
                return packet

    async def next(self) -> Packet:
        """The next message, signs of life included."""
        async with asyncio.timeout(20):
            sizes = parse_preamble(await self.stream.read(PREAMBLE_SIZE))
            header = parse_header(await self.stream.read(sizes.header), sizes.payload, ServerMessage)
            return parse_payload(header, await self.stream.read(sizes.payload))

    async def ask(self, message: Message | dict[str, Any], **tensors: Tensor) -> Packet:
        await self.send(message, **tensors)
        return await self.answer()


def frame(message: Message | dict[str, Any], *, version: int = PROTOCOL_VERSION, **tensors: Tensor) -> bytes:
    """One frame's bytes."""
    payload = b""
    for tensor in tensors.values():
        data = bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())
        payload += data + bytes(-len(data) % 16)
    described = [[name, DTYPES[value.dtype], list(value.shape)] for name, value in tensors.items()]
    header = msgspec.msgpack.encode({"tensors": described, "message": message})
    return struct.pack(PREAMBLE, b"CRLA", version, 0, len(header), len(payload)) + header + payload


class Blocker:
    """Keeps an engine's compute thread busy until `release()`."""

    def __init__(self, engine: Engine) -> None:
        self._begun, self.free = threading.Event(), threading.Event()
        self.task = asyncio.create_task(engine.submit(Kind.DECODE, self._block))

    def _block(self) -> None:
        self._begun.set()
        assert self.free.wait(60)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, 20)

    async def release(self) -> None:
        self.free.set()
        await self.task

    async def __aenter__(self) -> Blocker:
        await self.begun()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()


def opening(rows: int = 1, tokens: int = 20, **changes: Any) -> OpenSession:
    values = {"model": MODEL, "start": START, "end": END, "rows": rows, "max_tokens": tokens}
    return OpenSession(**(values | changes))


def forward(**changes: Any) -> Forward:
    return Forward(**({"model": MODEL, "start": START, "end": END} | changes))


def backward(**changes: Any) -> Backward:
    return Backward(**({"model": MODEL, "start": START, "end": END} | changes))


def packed(hidden: Tensor, *, prompts: Tensor | None = None, **like: Tensor) -> dict[str, Tensor]:
    """A batch [R, T, H] as `Forward` and `Backward` take it: R sequences of T tokens, one behind the other.

    `like` are tensors [R, T] or [R, T, H] that are packed as well.
    """
    rows, count = hidden.shape[:2]
    tensors = {
        name: one.reshape(1, rows * count, *one.shape[2:]) for name, one in {"hidden": hidden, **like}.items()
    }
    tensors["lengths"] = torch.full((rows,), count)
    return tensors if prompts is None else tensors | {"prompts": prompts}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Values are about 10; bloom's own code computes its softmax in float32 whatever the dtype."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the server's tasks have brought it about."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def until_waiting(world: OneServer, jobs: int) -> None:
    await until(lambda: world.engine.waiting == jobs)


async def stepwise(channel: Channel, hidden: Tensor, cuts: Sequence[int], **extra: Tensor) -> Tensor:
    """The outputs [R, T, H] of a session that is fed `hidden` in pieces that end at `cuts`."""
    outputs, begin = [], 0
    for end in cuts:
        tensors = {"hidden": hidden[:, begin:end].contiguous()}
        if "mask" in extra:
            tensors["mask"] = extra["mask"][:, :end].contiguous()
        if "positions" in extra:
            tensors["positions"] = extra["positions"][:, begin:end].contiguous()
        answer = await request(channel, Packet(Step(position=begin), tensors))
        outputs.append(answer.tensors["hidden"])
        begin = end
    return torch.cat(outputs, dim=1)


async def assert_serves_exactly(world: OneServer, channel: Channel | None = None) -> None:
    """An honest client's session, forward and backward equal what the blocks give by themselves."""
    channel = channel or await world.connect()
    hidden, prompts, grad = noise(2, 7, HIDDEN, seed=1), noise(BLOCKS, 3, HIDDEN, seed=2), noise(2, 7, HIDDEN)
    hidden.requires_grad_()
    prompts.requires_grad_()
    expected = world.reference.forward(hidden, prompts=prompts)
    wanted = torch.autograd.grad(expected, [hidden, prompts], grad)
    hidden, prompts, expected = hidden.detach(), prompts.detach(), expected.detach()

    await request(channel, Packet(opening(rows=2, tokens=7), {"prompts": prompts}))
    assert_same(await stepwise(channel, hidden, (2, 5, 6, 7)), expected)
    await request(channel, Packet(CloseSession()))
    output = await request(channel, Packet(forward(), packed(hidden, prompts=prompts)))
    assert_same(output.tensors["hidden"].view_as(expected), expected)
    tensors = packed(hidden, grad=grad, prompts=prompts)
    grads = await request(channel, Packet(backward(prompt_gradient=True), tensors))
    assert_same(grads.tensors["grad"].view_as(grad), wanted[0])
    assert_same(grads.tensors["prompts"], wanted[1].float())
