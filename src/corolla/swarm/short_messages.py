"""Short messages over a stream of their own, one at a time, and how many of such streams a peer answers.

Invariant: no message is decoded before its size is known to be small; of the streams whose peers are waited for, few
are one peer's, and few there are in all, and the newest are let in: whoever only holds a stream loses it to whoever
comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from corolla.errors import ProtocolError
from corolla.swarm.transport.base import Stream
from corolla.text import one_line

T = TypeVar("T")

_LENGTH = struct.Struct(">I")


async def send_short(stream: Stream, message: msgspec.Struct) -> None:
    """Send one message. Raises `PeerDisconnected`."""
    data = msgspec.msgpack.encode(message)
    await stream.write([_LENGTH.pack(len(data)), data])


async def receive_short(stream: Stream, decoder: msgspec.msgpack.Decoder[T], most: int) -> T:
    """The next message, of at most `most` bytes. Raises `PeerDisconnected`, `ProtocolError`."""
    (size,) = _LENGTH.unpack(await stream.read(_LENGTH.size))
    if size > most:
        raise ProtocolError(f"A message of {size} bytes is too long.", field="size", peer_id=stream.peer_id)
    data = await stream.read(size)
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A message is malformed: {one_line(error)}.", peer_id=stream.peer_id) from error


class StreamLimits:
    """The streams whose peers are waited for: for a request, or until they take their answer."""

    def __init__(self, of_a_peer: int, in_all: int) -> None:
        self._of_a_peer = of_a_peer
        self._in_all = in_all
        self._waiting: dict[str, list[Stream]] = {}  # by peer; those that have waited longest come first
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def waits(self, stream: Stream) -> Iterator[None]:
        """While the body waits for the peer. Where there is no room, whoever has waited longest is closed for it.

        That is a stream of the same peer where the peer has its share, else one of whoever has most.
        """
        own = self._waiting.setdefault(stream.peer_id, [])
        own.append(stream)
        try:
            if len(own) > self._of_a_peer:
                self._close(own.pop(0))
            elif sum(map(len, self._waiting.values())) > self._in_all:
                self._close(max(self._waiting.values(), key=len).pop(0))
            yield
        finally:
            if stream in own:
                own.remove(stream)
            if not own and self._waiting.get(stream.peer_id) is own:
                del self._waiting[stream.peer_id]

    def _close(self, stream: Stream) -> None:
        task = asyncio.create_task(stream.close())  # which waits a little for its peer
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
