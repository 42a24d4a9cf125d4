"""Packets over streams: framing, order, silence, backpressure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.virtual_time import in_virtual_time

from corolla.errors import PeerDisconnected, PeerSilent, ProtocolError, RequestRefused, UsageError
from corolla.swarm.channel import PIECE, Channel, _pieces, request
from corolla.swarm.transport.base import Buffer, Stream
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.frames import Limits, Packet, encode
from corolla.wire.messages import (
    HEARTBEAT_SECONDS,
    Alive,
    Backward,
    CloseSession,
    Failure,
    Forward,
    Opened,
    OpenSession,
    Output,
    State,
    Step,
)

Handler = Callable[[Channel], Awaitable[None]]

FORWARD = Forward(model="m", start=0, end=2)


def forward(hidden: torch.Tensor) -> Packet:
    """A request that carries `hidden`."""
    return Packet(FORWARD, {"hidden": hidden, "lengths": torch.tensor([1])})


class TwoEnds:
    """A client and a server whose handler the test chooses."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.client = self.network.transport("client")
        self.server = self.network.transport("server")
        self.errors: list[Exception] = []

    async def connect(
        self, handler: Handler, *, silence: float | None = None, heartbeat: float = HEARTBEAT_SECONDS
    ) -> Channel:
        async def serve(stream: Stream) -> None:
            try:
                await handler(Channel(stream, side="server", heartbeat=heartbeat))
            except Exception as error:
                self.errors.append(error)

        await self.server.serve("corolla/1", serve)
        return Channel(await self.client.open("server", "corolla/1"), side="client", silence=silence)


@pytest.fixture
async def world() -> AsyncIterator[TwoEnds]:
    world = TwoEnds()
    yield world
    await world.client.close()
    await world.server.close()


async def echo_forward(channel: Channel) -> None:
    while True:
        packet = await channel.receive(timeout=None)
        await channel.send(Packet(Output(), {"hidden": packet.tensors["hidden"]}))


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 64), (3, 257, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
async def test_tensors_cross_exactly(world: TwoEnds, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    channel = await world.connect(echo_forward)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    answer = await request(channel, forward(hidden))
    assert answer.message == Output()
    assert torch.equal(answer.tensors["hidden"], hidden)


async def test_a_received_tensor_may_be_written_to(world: TwoEnds) -> None:
    channel = await world.connect(echo_forward)
    answer = await request(channel, forward(torch.ones(1, 2, 4)))
    assert answer.tensors["hidden"].add_(1).sum() == 16


async def test_a_session_from_opening_to_closing(world: TwoEnds) -> None:
    seen: list[str] = []

    async def server(channel: Channel) -> None:
        answers = {OpenSession: Opened(), Step: Output(), CloseSession: None}
        while True:
            packet = await channel.receive(timeout=None)
            seen.append(type(packet.message).__name__)
            answer = answers[type(packet.message)]
            if answer is None:
                return
            tensors = {"hidden": packet.tensors["hidden"]} if isinstance(answer, Output) else {}
            await channel.send(Packet(answer, tensors))

    channel = await world.connect(server)
    await request(channel, Packet(OpenSession(model="m", start=0, end=1, rows=1, max_tokens=8)))
    assert channel.conversation.state is State.OPEN
    for position in range(3):
        await request(channel, Packet(Step(position=position), {"hidden": torch.zeros(1, 1, 4)}))
    with pytest.raises(PeerDisconnected):
        await request(channel, Packet(CloseSession()))
    assert seen == ["OpenSession", "Step", "Step", "Step", "CloseSession"]


async def test_signs_of_life_are_eaten(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        packet = await channel.receive(timeout=None)
        for ahead in (2, 1, 0):
            await channel.send(Packet(Alive(ahead=ahead)))
        await channel.send(Packet(Output(), {"hidden": packet.tensors["hidden"]}))

    channel = await world.connect(server)
    answer = await request(channel, forward(torch.ones(1, 1, 1)))
    assert answer.message == Output()


async def test_a_refusal_becomes_an_error_and_the_channel_stays_usable(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        packet = await channel.receive(timeout=None)
        await channel.send(
            Packet(Failure(code="busy", message="\x1b[2JLater.\n", field="hidden", retry_after=2.5))
        )
        packet = await channel.receive(timeout=None)
        await channel.send(Packet(Output(), {"hidden": packet.tensors["hidden"]}))

    channel = await world.connect(server)
    packet = forward(torch.ones(1, 1, 1))
    with pytest.raises(RequestRefused, match=r"^\[2JLater\.$") as refused:  # it steers no terminal
        await request(channel, packet)
    error = refused.value
    assert (error.code, error.field, error.retry_after, error.peer_id) == ("busy", "hidden", 2.5, "server")
    assert (await request(channel, packet)).message == Output()


async def test_a_silent_server_is_noticed(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        await channel.receive(timeout=None)
        await asyncio.Event().wait()

    channel = await world.connect(server, silence=0.05)
    with pytest.raises(PeerSilent) as silent:
        await request(channel, forward(torch.ones(1, 1, 1)))
    assert silent.value.peer_id == "server"
    with pytest.raises(PeerDisconnected):
        await request(channel, forward(torch.ones(1, 1, 1)))


async def test_a_stopped_server_is_noticed_while_sending(world: TwoEnds) -> None:
    channel = await world.connect(echo_forward, silence=0.05)
    world.network.stop("server")
    with pytest.raises(PeerSilent):
        await channel.send(forward(torch.ones(1, 1024, 1024)))


@in_virtual_time
async def test_silence_counts_between_pieces_not_in_all() -> None:
    """A transfer may take longer than `silence` as long as it moves."""
    world = TwoEnds()
    pieces, pause, silence = 12, 0.9, 1.0
    hidden = torch.ones(1, pieces, PIECE // 4)

    async def server(channel: Channel) -> None:
        await channel.receive(timeout=None)
        for buffer in encode(Packet(Output(), {"hidden": hidden})):
            view = memoryview(buffer)
            for at in range(0, view.nbytes, PIECE):
                await channel.stream.write([view[at : at + PIECE]])
                await asyncio.sleep(pause)
        await asyncio.Event().wait()

    channel = await world.connect(server, silence=silence)
    await channel.send(forward(torch.ones(1, 1, 1)))
    started = asyncio.get_running_loop().time()
    answer = await channel.receive(timeout=silence)
    assert asyncio.get_running_loop().time() - started > silence
    assert torch.equal(answer.tensors["hidden"], hidden)


async def test_a_peer_that_stalls_inside_a_message_is_noticed(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        await channel.receive(timeout=None)
        frame = b"".join(encode(Packet(Output(), {"hidden": torch.ones(1, 1, 64)})))
        await channel.stream.write([frame[:-1]])
        await asyncio.Event().wait()

    channel = await world.connect(server, silence=0.05)
    await channel.send(forward(torch.ones(1, 1, 1)))
    with pytest.raises(PeerSilent):
        await channel.receive(timeout=None)


async def test_a_server_may_wait_for_a_request_in_vain_and_go_on(world: TwoEnds) -> None:
    waited = asyncio.Event()

    async def server(channel: Channel) -> None:
        with pytest.raises(PeerSilent):
            await channel.receive(timeout=0.01)
        waited.set()
        await echo_forward(channel)

    channel = await world.connect(server)
    await waited.wait()
    await request(channel, forward(torch.ones(1, 1, 1)))


@in_virtual_time
async def test_heartbeats_while_computing() -> None:
    """A request may take longer than `silence` as long as the server gives signs of life."""
    world = TwoEnds()

    async def server(channel: Channel) -> None:
        while True:
            packet = await channel.receive(timeout=None)
            async with channel.heartbeat(ahead=lambda: 3):
                await asyncio.sleep(60)
            await channel.send(Packet(Output(), {"hidden": packet.tensors["hidden"]}))

    channel = await world.connect(server, silence=0.7, heartbeat=0.5)
    answer = await request(channel, forward(torch.ones(1, 1, 1)))
    assert answer.message == Output()
    await channel.send(forward(torch.ones(1, 1, 1)))
    assert (await channel.receive(timeout=5)).message == Alive(ahead=3)


async def test_heartbeats_while_a_large_request_arrives(world: TwoEnds) -> None:
    channel = await world.connect(echo_forward, heartbeat=0.01)
    first, *rest = encode(forward(torch.ones(1, 64, 1024)))
    channel.conversation.advance(FORWARD)
    await channel.stream.write([first])
    assert (await channel.receive(timeout=5)).message == Alive()
    await channel.stream.write(rest)
    packet = await channel.receive(timeout=5)
    while isinstance(packet.message, Alive):
        packet = await channel.receive(timeout=5)
    assert packet.message == Output()


class Trickle(Stream):
    """A stream that takes one byte at a time, so that everybody else gets a turn in between."""

    def __init__(self, stream: Stream) -> None:
        self.peer_id = stream.peer_id
        self._stream = stream

    async def write(self, buffers: Sequence[Buffer]) -> None:
        for byte in b"".join(buffers):
            await self._stream.write([bytes([byte])])
            await asyncio.sleep(0)

    async def read(self, size: int) -> bytearray:
        return await self._stream.read(size)

    async def close(self) -> None:
        await self._stream.close()


async def test_frames_of_several_tasks_do_not_mix(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        trickle = Channel(Trickle(channel.stream), side="server")
        packet = await trickle.receive(timeout=None)
        beats = (trickle.send(Packet(Alive(ahead=ahead))) for ahead in range(5))
        await asyncio.gather(*beats, trickle.send(Packet(Output(), {"hidden": packet.tensors["hidden"]})))

    channel = await world.connect(server)
    await channel.send(forward(torch.ones(1, 3, 5)))
    for ahead in range(5):
        assert (await channel.receive(timeout=5)).message == Alive(ahead=ahead)
    assert torch.equal((await channel.receive(timeout=5)).tensors["hidden"], torch.ones(1, 3, 5))


@given(st.lists(st.integers(0, 3 * PIECE), max_size=6))
def test_pieces_are_the_same_bytes_in_bounded_groups(sizes: list[int]) -> None:
    buffers = [bytes([index]) * size for index, size in enumerate(sizes)]
    groups = [b"".join(group) for group in _pieces(buffers)]
    assert b"".join(groups) == b"".join(buffers)
    assert all(len(group) == PIECE for group in groups[:-1])
    assert all(0 < len(group) <= PIECE for group in groups)


async def test_a_cut_message_makes_the_channel_unusable(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        await asyncio.Event().wait()

    channel = await world.connect(server)
    sending = asyncio.create_task(channel.send(forward(torch.ones(1, 1024, 1024))))
    done, _ = await asyncio.wait([sending], timeout=0.05)
    assert not done
    sending.cancel()
    await asyncio.wait([sending])
    with pytest.raises(PeerDisconnected):
        await channel.send(forward(torch.ones(1, 1, 1)))


async def test_a_cancelled_request_closes_its_channel(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        packet = await channel.receive(timeout=None)
        with pytest.raises(PeerDisconnected):
            await channel.receive(timeout=5)
        world.errors.append(ValueError(type(packet.message).__name__))

    channel = await world.connect(server)
    asking = asyncio.create_task(request(channel, forward(torch.ones(1, 1, 1))))
    await asyncio.wait([asking], timeout=0.05)
    asking.cancel()
    await asyncio.wait([asking])
    async with asyncio.timeout(5):
        while not world.errors:
            await asyncio.sleep(0)
    assert str(world.errors) == str([ValueError("Forward")])


async def test_what_we_must_not_send_is_refused_here(world: TwoEnds) -> None:
    channel = await world.connect(echo_forward)
    with pytest.raises(ProtocolError, match="out of order"):
        await channel.send(Packet(Step(position=0), {"hidden": torch.ones(1, 1, 1)}))
    with pytest.raises(ValueError, match="hidden"):
        await request(channel, Packet(FORWARD))
    small = Channel(channel.stream, side="client", limits=Limits(max_payload_bytes=64))
    with pytest.raises(UsageError, match="smaller batch"):
        await request(small, forward(torch.ones(1, 4, 8)))
    # None of it has reached the stream.
    assert (await request(channel, forward(torch.ones(1, 1, 1)))).message == Output()


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "magic"),
        (b"".join(encode(Packet(Output(), {"hidden": torch.ones(1, 1, 1)}))), "type"),
        (b"".join(encode(Packet(Step(position=0), {"hidden": torch.ones(1, 1, 1)}))), "type"),
        (b"".join(encode(forward(torch.ones(1, 1, 100)))), "payload"),
    ],
    ids=["not ours", "a server's message", "at the wrong time", "over the server's limit"],
)
async def test_a_server_names_what_is_wrong(world: TwoEnds, frame: bytes, field: str) -> None:
    caught: asyncio.Future[ProtocolError] = asyncio.get_running_loop().create_future()

    async def serve(stream: Stream) -> None:
        channel = Channel(stream, side="server", limits=Limits(max_payload_bytes=256))
        try:
            await channel.receive(timeout=5)
        except ProtocolError as error:
            caught.set_result(error)
            await channel.send(Packet(Failure(code="malformed", message=str(error), field=error.field)))

    await world.server.serve("corolla/1", serve)
    channel = Channel(await world.client.open("server", "corolla/1"), side="client")
    await channel.stream.write([frame])
    error = await caught
    assert (error.field, error.peer_id) == (field, "client")
    answer = await channel.receive(timeout=5)
    assert isinstance(answer.message, Failure)
    assert answer.message.field == field


async def test_a_server_that_answers_something_else_is_noticed(world: TwoEnds) -> None:
    async def server(channel: Channel) -> None:
        packet = await channel.receive(timeout=None)
        await channel.stream.write(encode(Packet(Output(), {"hidden": packet.tensors["hidden"]})))

    channel = await world.connect(server)
    tensors = {"hidden": torch.ones(1, 1, 1), "grad": torch.ones(1, 1, 1)}
    with pytest.raises(ProtocolError) as wrong:
        await request(channel, Packet(Backward(model="m", start=0, end=1), tensors))
    assert (wrong.value.field, wrong.value.peer_id) == ("type", "server")
