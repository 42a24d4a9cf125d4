"""What Corolla needs of a network: authenticated peers, byte streams between them. Nothing else.

Invariant: all knowledge of a real network lives behind these two classes; whatever holds for one
implementation (`libp2p.py`) holds for the in-memory twin (`memory.py`), faults included. One suite of
tests, `tests/swarm/test_transport.py`, runs on both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence

Buffer = bytes | bytearray | memoryview


class Stream(ABC):
    """A two-way byte stream to one peer. One task reads, one task writes."""

    peer_id: str  # the other side, authenticated by the transport

    @abstractmethod
    async def write(self, buffers: Sequence[Buffer]) -> None:
        """Send all bytes, in order; waits while the peer does not read (backpressure).

        Raises `PeerDisconnected` when the stream has ended.
        """

    @abstractmethod
    async def read(self, size: int) -> bytearray:
        """Exactly `size` bytes. Raises `PeerDisconnected` when the stream ends before."""

    @abstractmethod
    async def close(self) -> None:
        """End the stream on both sides; safe to call twice, and never raises."""


StreamHandler = Callable[[Stream], Awaitable[None]]


class Transport(ABC):
    """One peer's access to the network. Made by an async classmethod; ended by `close()`."""

    peer_id: str

    @abstractmethod
    async def addresses(self) -> list[str]:
        """Addresses that others can join through, each ending in this peer's id."""

    @abstractmethod
    async def open(self, peer_id: str, protocol: str) -> Stream:
        """A new stream to a peer's handler for `protocol`.

        Raises `PeerUnreachable`. That it opens does not prove the peer alive: a stream to a stopped
        process opens and stays silent, one to a killed process opens and then ends.
        """

    @abstractmethod
    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` in a task of its own for every stream that comes in.

        The stream is closed when the handler returns or raises, so that no peer is left hanging.
        """

    @abstractmethod
    async def close(self) -> None:
        """End all streams and let go of every process, socket and file; safe to call twice."""
