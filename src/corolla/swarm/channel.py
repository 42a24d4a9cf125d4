"""Streams that carry packets: framing, legal order and silence, in one place; and those that lie ready.

Invariant: what `receive` returns is well-formed and legal at this moment, and what `send` has begun is
never cut in the middle without the channel being unusable from then on. No wait for a peer that owes
something is unbounded: each piece of at most `PIECE` bytes has to move within `silence` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from corolla.config import WireFormat
from corolla.errors import (
    OutOfOrder,
    PeerDisconnected,
    PeerSilent,
    ProtocolError,
    RemoteError,
    RequestRefused,
    UsageError,
)
from corolla.swarm.transport.base import Buffer, Stream, Transport
from corolla.text import one_line
from corolla.wire.failures import ends_in, meaning
from corolla.wire.frames import (
    LIMITS,
    PREAMBLE_SIZE,
    Header,
    Limits,
    Packet,
    compress,
    encode,
    expand,
    parse_header,
    parse_payload,
    parse_preamble,
)
from corolla.wire.messages import (
    CLIENT_TURN,
    HEARTBEAT_SECONDS,
    SILENCE_SECONDS,
    TRANSITIONS,
    Alive,
    ClientMessage,
    Failure,
    Message,
    ServerMessage,
    State,
)

T = TypeVar("T")

PIECE = 128 * 1024
# A server waits longer for a client's bytes: no request of others depends on them.
SERVER_SILENCE_SECONDS = 30.0


# A message has to arrive at this pace at least, bytes a second.
LEAST_PACE = 32 * 1024
# What a server says to so many more bytes, of so many in all, of a request before it takes memory for them; None: come
# in.
Admit = Callable[[int, int], RequestRefused | None]


# What a client makes of a peer's sign of life so many seconds after it was asked; raises `PeerSilent` to give it up.
Hear = Callable[[str, float], None]


@dataclass(frozen=True)
class RefusedPacket(Packet):
    """A request whose tensors were not taken; the stream goes on once it is answered with the refusal."""

    refusal: RequestRefused | None = None


def following(state: State, message: Message) -> State:
    """The state after `message`. Raises `OutOfOrder(field="type")` where it is not legal in `state`."""
    try:
        if isinstance(message, Failure) and state is not State.ENDED:
            return ends_in(message, state)
        return TRANSITIONS[state][type(message)]
    except KeyError:
        raise OutOfOrder(
            f"{type(message).__name__} is out of order here (state: {state.value}).", field="type"
        ) from None


class Conversation:
    """One side's view of a stream's conversation; both sides advance it with every message."""

    def __init__(self) -> None:
        self.state = State.IDLE

    def advance(self, message: Message) -> None:
        """Note a message that was sent or received. Raises `OutOfOrder`, and stays as it was."""
        self.state = following(self.state, message)

    @property
    def request_open(self) -> bool:
        """Whether the server owes an answer."""
        return self.state not in CLIENT_TURN and self.state is not State.ENDED


class Channel:
    """Packets over a `Stream`. One task receives; any task may send, frames never mix."""

    def __init__(
        self,
        stream: Stream,
        *,
        side: Literal["client", "server"],
        limits: Limits = LIMITS,
        silence: float | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        form: WireFormat = "compute",
        admit: Admit | None = None,
        hear: Hear | None = None,
    ) -> None:
        """`form`: how a client's activations travel; a server answers in the form of the last request.
        `silence`: seconds that a piece may take in either direction, and a client waits for a sign of
        life; the default depends on the side. `heartbeat`: seconds between a server's signs of life.
        `admit` is asked about every packet with tensors, `hear` is told of every sign of life."""
        self.stream = stream
        self.peer_id = stream.peer_id
        self.conversation = Conversation()
        self._server = side == "server"
        self._limits = limits
        default = SERVER_SILENCE_SECONDS if self._server else SILENCE_SECONDS
        self.silence = default if silence is None else silence
        self._heartbeat = heartbeat
        self._admit = admit
        self.receiving = False  # a packet has begun to arrive, and is not yet complete
        self._form = form
        self._receivable: Any = ClientMessage if self._server else ServerMessage
        self._sending = asyncio.Lock()
        self._usable = True
        self.hear = hear

    async def send(self, packet: Packet) -> None:
        """Send one packet.

        Raises `PeerSilent` when the peer takes nothing for `silence` seconds, `PeerDisconnected` when the
        stream has ended; `ValueError` or `UsageError` (see `encode`) or, for a message out of order,
        `ProtocolError` before anything is sent. Cancelled in the middle, it leaves the channel unusable.
        """
        buffers = encode(Packet(packet.message, compress(packet.tensors, self._form)), self._limits)
        async with self._sending:
            if not self._usable:
                raise PeerDisconnected("The stream was cut in the middle of a message.", peer_id=self.peer_id)
            self.conversation.advance(packet.message)
            self._usable = False
            for group in _pieces(buffers):
                await self._bounded(self.stream.write(group), self.silence)
            self._usable = True

    async def receive(self, *, timeout: float | None) -> Packet:
        """The next packet.

        `timeout`: seconds until the packet begins, `None` for ever; after it has begun, `silence` applies to
        each of its pieces. One that was not admitted is a `RefusedPacket`. Raises `PeerSilent`,
        `PeerDisconnected`, or `ProtocolError` for what is malformed or out of order; after the latter nothing
        more can be received. A server sends signs of life by itself while a large request arrives.
        """
        try:
            preamble = await self._bounded(self.stream.read(1), timeout)
            self.receiving = True
            preamble += await self._bounded(self.stream.read(PREAMBLE_SIZE - 1), self.silence)
            sizes = parse_preamble(preamble, self._limits)
            data = await self._bounded(self.stream.read(sizes.header), self.silence)
            header = parse_header(data, sizes.payload, self._receivable, self._limits)
            self.conversation.advance(header.message)
            if self._server and sizes.payload > PIECE:
                async with self.heartbeat():
                    return await self._body(header)
            return await self._body(header)
        except RemoteError as error:
            error.peer_id = self.peer_id
            raise
        finally:
            self.receiving = False

    async def _body(self, header: Header) -> Packet:
        payload = bytearray()
        refusal = await self._read_payload(header, payload)
        if refusal is not None:
            return RefusedPacket(header.message, refusal=refusal)
        return self._expanded(parse_payload(header, payload))

    async def close(self) -> None:
        """End the stream; safe to call twice, and never raises."""
        self._usable = False
        await self.stream.close()

    @contextlib.asynccontextmanager
    async def heartbeat(self, ahead: Callable[[], int] = lambda: 0) -> AsyncIterator[None]:
        """For servers: send `Alive` at regular intervals while the body runs.

        `ahead()` counts the requests that will be computed before this one. The heartbeat has ended, and no
        `Alive` is half sent, when the body's answer is sent after the block. A peer that went away is not
        noticed here but by whoever sends or receives next.
        """
        done = asyncio.Event()
        beating: list[asyncio.Task[None]] = []

        def begin() -> None:
            beating.append(asyncio.create_task(self._beat(done, ahead)))

        # Most answers come before the first sign is due; for those there is no task.
        first = asyncio.get_running_loop().call_later(self._heartbeat, begin)
        try:
            yield
            done.set()
        finally:
            first.cancel()
            if beating:
                if not done.is_set():  # left by an error or a cancellation: do not wait for a slow peer
                    beating[0].cancel()
                await asyncio.wait(beating)

    async def _beat(self, done: asyncio.Event, ahead: Callable[[], int]) -> None:
        while not done.is_set():
            try:
                await self.send(Packet(Alive(ahead=ahead())))
            except RemoteError:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), self._heartbeat)

    def _expanded(self, packet: Packet) -> Packet:
        if not packet.tensors:
            return packet
        tensors, form = expand(packet.tensors)
        if self._server:
            self._form = form
        return Packet(packet.message, tensors)

    async def _read_payload(self, header: Header, into: bytearray) -> RequestRefused | None:
        """All of its bytes, or why they were thrown away.

        Each piece is admitted before it is read: a peer that only announces a large payload takes no memory.
        """
        size, refusal, now = header.payload_size, None, asyncio.get_running_loop().time
        deadline = now() + self.silence + size / LEAST_PACE
        whole = max(size, header.expanded_size)
        in_memory = whole / max(size, 1)  # bytes, of each that arrives
        while size:
            if now() > deadline:
                raise PeerSilent(f"Peer {self.peer_id} sends too slowly.", peer_id=self.peer_id)
            count = min(PIECE, size)
            if refusal is None and self._admit is not None:
                refusal = self._admit(math.ceil(count * in_memory), whole)
            piece = await self._bounded(self.stream.read(count), self.silence)
            size -= count
            if refusal is None:
                into += piece
            else:
                into.clear()
        return refusal

    async def _bounded(self, operation: Awaitable[T], seconds: float | None) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await operation
        except TimeoutError:
            raise PeerSilent(
                f"Peer {self.peer_id} was silent for {seconds:g} seconds.", peer_id=self.peer_id
            ) from None


async def request(channel: Channel, packet: Packet) -> Packet:
    """A client's whole exchange: send, wait through signs of life, return the answer.

    Raises `RequestRefused` for a `Failure`, after which the channel is as `wire/failures.py` says, and
    `PeerSilent`, `PeerDisconnected` or `ProtocolError`. After these, and when cancelled, an answer may still
    be under way: the channel is closed. `UsageError` and `ValueError` come before anything is sent.
    """
    sent = False
    try:
        await channel.send(packet)
        sent = True
        answer = await _answer(channel)
    except BaseException as error:
        if sent or not isinstance(error, ValueError | UsageError):
            await channel.close()
        raise
    if isinstance(answer.message, Failure):
        raise refused(answer.message, channel.peer_id)
    return answer


def refused(failure: Failure, peer: str) -> RequestRefused:
    """The peer's typed refusal, to be raised."""
    return RequestRefused(
        one_line(failure.message, characters=2048),
        code=failure.code,
        field=None if failure.field is None else one_line(failure.field),
        retry_after=failure.retry_after,
        peer_id=peer,
    )


def checked(reply: Packet, name: str, like: Tensor, peer: str) -> Tensor:
    """The reply's tensor, if it has the shape and dtype of `like`. Raises `ProtocolError`."""
    tensor = reply.tensors.get(name)
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ProtocolError(
            f"{peer} sent {found} where {like.dtype} {list(like.shape)} was due.", field=name, peer_id=peer
        )
    return tensor


async def _answer(channel: Channel) -> Packet:
    clock = asyncio.get_running_loop().time
    began = clock()
    while True:
        packet = await channel.receive(timeout=channel.silence)
        if not isinstance(packet.message, Alive):
            return packet
        if channel.hear is not None:
            channel.hear(channel.peer_id, clock() - began)


def _pieces(buffers: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """The same bytes in groups of at most `PIECE`, small buffers together, large ones cut, none copied."""
    group: list[Buffer] = []
    room = PIECE
    for buffer in buffers:
        view = memoryview(buffer)
        while view.nbytes:
            part = view[:room]
            group.append(part)
            room -= part.nbytes
            view = view[part.nbytes :]
            if not room:
                yield group
                group, room = [], PIECE
    if group:
        yield group


class ChannelPool:
    """Streams to peers that lie ready, with no request open on them. Used on one event loop."""

    def __init__(
        self, transport: Transport, protocol: str, form: WireFormat, hear: Hear | None = None
    ) -> None:
        """`hear` is told of every sign of life."""
        self._hear = hear
        self._transport = transport
        self._protocol = protocol
        self._form = form
        self._idle: dict[str, list[Channel]] = defaultdict(list)

    async def take(self, peer: str) -> Channel:
        """A stream to the peer. Raises `PeerUnreachable`."""
        if self._idle[peer]:
            return self._idle[peer].pop()
        stream = await self._transport.open(peer, self._protocol)
        return Channel(stream, side="client", form=self._form, hear=self._hear)

    def give(self, channel: Channel) -> None:
        """Give a stream back after a complete exchange."""
        self._idle[channel.peer_id].append(channel)

    async def ask(self, peer: str, packet: Packet) -> Packet:
        """The answer to one request, see `request`; the stream lies ready again where it can still be trusted."""
        channel = await self.take(peer)
        try:
            answer = await request(channel, packet)
        except BaseException as error:
            if isinstance(error, RequestRefused) and not meaning(error).stream_lost:
                self.give(channel)
            else:
                await channel.close()
            raise
        self.give(channel)
        return answer

    async def drop(self, peer: str) -> None:
        """Close the streams to the peer."""
        for channel in self._idle.pop(peer, []):
            await channel.close()

    async def close(self) -> None:
        """Close all of them."""
        for peer in list(self._idle):
            await self.drop(peer)
