"""Short messages over a stream of their own, one at a time, and how many of such streams a peer answers.

Invariant: no message is decoded before its size is known to be small; of the streams that a request is awaited from,
few are one peer's, and few there are in all, and the newest are let in: whoever only holds a stream loses it to
whoever comes.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
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


class Lobby:
    """The streams from which a request is awaited."""

    def __init__(self, of_a_peer: int, in_all: int) -> None:
        self._of_a_peer = of_a_peer
        self._in_all = in_all
        self._waiting: dict[str, list[Stream]] = {}  # by peer; those that have waited longest come first

    @contextlib.asynccontextmanager
    async def waits(self, stream: Stream) -> AsyncIterator[None]:
        """While the body awaits a request. Where there is no room, whoever has waited longest is closed for it.

        That is a stream of the same peer where the peer has its share, else one of whoever has most.
        """
        own = self._waiting.setdefault(stream.peer_id, [])
        own.append(stream)
        try:
            if len(own) > self._of_a_peer:
                await own.pop(0).close()
            elif sum(map(len, self._waiting.values())) > self._in_all:
                await max(self._waiting.values(), key=len).pop(0).close()
            yield
        finally:
            if stream in own:
                own.remove(stream)
            if not own and self._waiting.get(stream.peer_id) is own:
                del self._waiting[stream.peer_id]
