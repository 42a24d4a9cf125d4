"""The in-memory twin of the libp2p transport: same behaviour, faults included, no processes, no sockets.

Invariant: nothing here looks at a clock or draws a random number, so that a schedule of faults gives the
same run every time. Bytes cross as copies, through buffers of bounded size. All peers of one network
live in one event loop.

Faults are switched on at the network: `kill` (the process is gone: its streams end, new streams to it still
open and then end), `stop` (SIGSTOP: new streams open, nothing moves, until `resume`), `cut` (no bytes
between two peers, and no new streams, until `heal`). A `tap` sees every write before it leaves and may change,
cut or hold it, or make any of these faults at that moment: faults at the n-th message or byte.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from corolla.errors import PeerDisconnected, PeerUnreachable, RemoteError
from corolla.swarm.transport.base import Buffer, Stream, StreamHandler, Transport
from corolla.text import get_logger

logger = get_logger(__name__)

BUFFER_BYTES = 1024 * 1024  # where libp2p's backpressure sets in

# Called with (stream's number, sender, receiver, buffers) before a write; gives the buffers that are written. The
# two directions of a stream have numbers of their own.
Tap = Callable[[int, str, str, Sequence[Buffer]], Awaitable[Sequence[Buffer]]]


class MemoryNetwork:
    """Everything that several memory transports share; the place where faults are made."""

    def __init__(self) -> None:
        self.peers: dict[str, MemoryTransport] = {}
        self._killed: set[str] = set()
        self._stopped: set[str] = set()
        self._cuts: set[frozenset[str]] = set()
        self._changed: set[asyncio.Event] = set()
        self._made = 0
        self._pipe_numbers = itertools.count(1)
        self.tap: Tap | None = None

    def transport(self, peer_id: str | None = None) -> MemoryTransport:
        """A new peer. A killed or closed peer's id may be used again: the peer has come back."""
        self._made += 1
        peer_id = peer_id or f"peer-{self._made}"
        if peer_id in self.peers:
            raise ValueError(f"The peer id {peer_id!r} is in use.")
        self._killed.discard(peer_id)
        self._stopped.discard(peer_id)
        transport = self.peers[peer_id] = MemoryTransport(self, peer_id)
        return transport

    def kill(self, peer_id: str) -> None:
        """As SIGKILL: the peer's tasks are gone and its streams end, without a word from itself."""
        transport = self.peers.pop(peer_id)
        self._killed.add(peer_id)
        transport.abort()

    def stop(self, peer_id: str) -> None:
        """As SIGSTOP: the peer neither reads nor writes; streams to it open and stay silent."""
        self._stopped.add(peer_id)

    def resume(self, peer_id: str) -> None:
        """As SIGCONT: undo `stop`; what was sent meanwhile arrives."""
        self._stopped.discard(peer_id)
        self._wake()

    def cut(self, a: str, b: str) -> None:
        """Let no bytes pass between two peers."""
        self._cuts.add(frozenset((a, b)))

    def heal(self, a: str, b: str) -> None:
        """Undo `cut`; what was sent meanwhile arrives."""
        self._cuts.discard(frozenset((a, b)))
        self._wake()

    # --- for the transports ------------------------------------------------------------------------------

    def dial(self, caller: str, callee: str, protocol: str) -> MemoryStream:
        """The caller's end of a new stream; the callee's handler is started on the other end."""
        there, back = _Pipe(self, caller, callee), _Pipe(self, callee, caller)
        near, far = MemoryStream(callee, back, there), MemoryStream(caller, there, back)
        if callee in self._killed:
            near.end()
            return near
        peer = self.peers.get(callee)
        if peer is None or frozenset((caller, callee)) in self._cuts:
            raise PeerUnreachable(f"Peer {callee} cannot be reached.", peer_id=callee)
        if not peer.accept(protocol, far):
            raise PeerUnreachable(f"Peer {callee} does not speak {protocol}.", peer_id=callee)
        return near

    def forget(self, transport: MemoryTransport) -> None:
        """Called by a transport that closes in order: nobody can reach it any more."""
        if self.peers.get(transport.peer_id) is transport:
            del self.peers[transport.peer_id]

    async def until_running(self, peer_id: str) -> None:
        """Wait as a stopped process does."""
        await self.wait_until(lambda: peer_id not in self._stopped, asyncio.Event())

    async def wait_until(self, condition: Callable[[], bool], event: asyncio.Event) -> None:
        """Wait for a condition, tested again when `event` is set or a fault is undone."""
        while not condition():
            event.clear()
            self._changed.add(event)
            try:
                await event.wait()
            finally:
                self._changed.discard(event)

    def _wake(self) -> None:
        for event in self._changed:
            event.set()


class _Pipe:
    """Bytes in one direction, in order, from `sender` to `receiver`."""

    def __init__(self, network: MemoryNetwork, sender: str, receiver: str) -> None:
        self.network, self.sender, self.receiver = network, sender, receiver
        self.number = next(network._pipe_numbers)
        self.buffer = bytearray()
        self._ends = frozenset((sender, receiver))
        self.ended = False
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    async def tapped(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """What the network's tap makes of a write."""
        if self.network.tap is None or self.ended:
            return buffers
        return await self.network.tap(self.number, self.sender, self.receiver, buffers)

    async def write(self, data: memoryview) -> None:
        while data.nbytes:
            await self.network.wait_until(self._may_write, self._writable)
            if self.ended:
                raise PeerDisconnected(
                    f"The stream to peer {self.receiver} has ended.", peer_id=self.receiver
                )
            part = data[: BUFFER_BYTES - len(self.buffer)]
            self.buffer += part
            data = data[part.nbytes :]
            self._readable.set()

    async def read(self, size: int) -> bytearray:
        # A request larger than the buffer is collected piece by piece; a smaller one is taken at once, so
        # that a read that is cancelled before its bytes are there has taken none.
        taken = bytearray()
        while len(taken) < size:
            wanted = min(size - len(taken), BUFFER_BYTES)
            await self.network.wait_until(partial(self._may_read, wanted), self._readable)
            if len(self.buffer) < wanted:
                raise PeerDisconnected(f"The stream from peer {self.sender} has ended.", peer_id=self.sender)
            taken += self.buffer[:wanted]
            del self.buffer[:wanted]
            self._writable.set()
        return taken

    def end(self, *, lose: bool = False) -> None:
        """No more bytes; those that were written may still be read, unless they are lost."""
        self.ended = True
        if lose:
            self.buffer.clear()
        self._readable.set()
        self._writable.set()

    def _may_write(self) -> bool:
        return self.sender not in self.network._stopped and (self.ended or len(self.buffer) < BUFFER_BYTES)

    def _may_read(self, size: int) -> bool:
        if self.receiver in self.network._stopped or self._ends in self.network._cuts:
            return False
        return self.ended or len(self.buffer) >= size


class MemoryStream(Stream):
    """One end of a pair of pipes."""

    def __init__(self, peer_id: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.peer_id = peer_id
        self._incoming = incoming
        self._outgoing = outgoing

    async def write(self, buffers: Sequence[Buffer]) -> None:
        for buffer in await self._outgoing.tapped(buffers):
            await self._outgoing.write(memoryview(buffer).cast("B"))

    async def read(self, size: int) -> bytearray:
        return await self._incoming.read(size)

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        """Both directions end; what the peer has not read yet of ours still reaches it."""
        self._outgoing.end()
        self._incoming.end(lose=True)


class MemoryTransport(Transport):
    """One peer of a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, peer_id: str) -> None:
        self.peer_id = peer_id
        self._network = network
        self.handlers: dict[str, StreamHandler] = {}
        self._streams: weakref.WeakSet[MemoryStream] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def addresses(self) -> list[str]:
        return [f"/memory/{self.peer_id}"]

    async def open(self, peer_id: str, protocol: str) -> Stream:
        if self._closed:
            raise PeerUnreachable("This peer has left the network.", peer_id=peer_id)
        await self._network.until_running(self.peer_id)
        stream = self._network.dial(self.peer_id, peer_id, protocol)
        self._streams.add(stream)
        return stream

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler

    async def close(self) -> None:
        self._network.forget(self)
        tasks = self.abort()
        if tasks:
            await asyncio.wait(tasks)

    # --- for the network ---------------------------------------------------------------------------------

    def accept(self, protocol: str, stream: MemoryStream) -> bool:
        """Start the handler for a stream that comes in; `False` when there is none."""
        handler = self.handlers.get(protocol)
        if handler is None:
            return False
        self._streams.add(stream)
        task = asyncio.get_running_loop().create_task(self._handle(handler, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def abort(self) -> list[asyncio.Task[None]]:
        """End all streams and cancel all handlers; the tasks that are about to end are returned."""
        self._closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        for stream in self._streams:
            stream.end()
        self._streams.clear()
        return tasks

    async def _handle(self, handler: StreamHandler, stream: MemoryStream) -> None:
        try:
            await self._network.until_running(self.peer_id)
            await handler(stream)
        except RemoteError as error:
            logger.debug("A stream from peer %s: %s", stream.peer_id, error)
        except Exception:
            logger.exception("The handler of a stream from peer %s failed", stream.peer_id)
        finally:
            stream.end()
            self._streams.discard(stream)
