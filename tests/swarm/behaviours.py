"""What a test's remote peer does with its streams; the same code in memory and in a process of its own."""

from __future__ import annotations

import asyncio
import struct

from corolla.swarm.transport.base import Stream, Transport

LENGTH = struct.Struct("<Q")
FLOOD_BYTES = 4 * 1024 * 1024


async def echo(stream: Stream) -> None:
    """Length-prefixed messages come back as they are."""
    while True:
        prefix = await stream.read(LENGTH.size)
        await stream.write([prefix, await stream.read(LENGTH.unpack(prefix)[0])])


async def stall(stream: Stream) -> None:
    """Never reads, never writes, never returns."""
    await asyncio.Event().wait()


async def farewell(stream: Stream) -> None:
    """Writes and returns at once, with bytes of the other side unread."""
    await stream.write([b"goodbye"])


async def fail(stream: Stream) -> None:
    """Raises after the first byte."""
    await stream.read(1)
    raise RuntimeError("planned")


async def flood(stream: Stream) -> None:
    """Writes a few megabytes and closes without waiting for anybody to read them."""
    await stream.write([bytes(FLOOD_BYTES)])


PROTOCOLS = {"echo": echo, "stall": stall, "farewell": farewell, "fail": fail, "flood": flood}


async def serve_all(transport: Transport) -> None:
    for protocol, handler in PROTOCOLS.items():
        await transport.serve(protocol, handler)


async def call_echo(stream: Stream, data: bytes | bytearray) -> bytearray:
    """Send `data` to an `echo` peer while receiving, and return what comes back."""
    sending = asyncio.create_task(stream.write([LENGTH.pack(len(data)), data]))
    try:
        size = LENGTH.unpack(await stream.read(LENGTH.size))[0]
        received = await stream.read(size)
    finally:
        sending.cancel() if not sending.done() else await sending
    return received
