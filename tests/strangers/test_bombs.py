"""Messages that are small to send and large to read: nested, flat, or longer than they are.

What a stranger may have decoded before anybody knows what it is: the header of a frame, a short message to the
directory or at the door of a guarded peer. Arguments of calls of the DHT stand in `tests/swarm/directory/`.
"""

from __future__ import annotations

import struct
import time

import msgspec
import pytest

from corolla.errors import PeerDisconnected, ProtocolError
from corolla.swarm.directory.distributed import DIRECTORY_PROTOCOL, List
from corolla.wire.frames import LIMITS, parse_header
from corolla.wire.messages import ClientMessage, ServerMessage
from tests.strangers.crowd import MODEL, KeepersSwarm, identities, record_of

MANY = 48
GAP = 2.0  # seconds in which all of these together are dealt with, or for which an open chat may stand still
MESSAGE = b"\x82\xa7tensors\x90\xa7message"
STEPS = MESSAGE + b"\x82\xa4type\xa5Steps\xa5parts"
OUTPUTS = MESSAGE + b"\x82\xa4type\xa7Outputs\xa8failures"

BOMBS = {
    "nested arrays": MESSAGE + b"\x91" * LIMITS.max_header_bytes,
    "nested maps": MESSAGE + b"\x81\xa1a" * LIMITS.max_header_bytes,
    "many arrays": MESSAGE + b"\xdc\xff\xff" + b"\x90" * LIMITS.max_header_bytes,
    "more arrays than bytes": MESSAGE + b"\xdd\xff\xff\xff\xff" + b"\x90" * LIMITS.max_header_bytes,
    "many fields": MESSAGE + b"\xdf\xff\xff\xff\xff" + b"\xa0\xc0" * LIMITS.max_header_bytes,
    "many parts": STEPS + b"\xdc\xff\xff" + b"\x84" * LIMITS.max_header_bytes,
    "nested parts": STEPS + b"\x91" * LIMITS.max_header_bytes,
    "many tensors": b"\x82\xa7tensors\xdc\xff\xff" + b"\x93" * LIMITS.max_header_bytes,
    "many failures": OUTPUTS + b"\xdd\xff\xff\xff\xff" + b"\x92" * LIMITS.max_header_bytes,
    "one field many times": MESSAGE + b"\xde\xff\xff" + b"\xa8position\x01" * LIMITS.max_header_bytes,
    "a long text": MESSAGE + b"\x82\xa4type\xdb\x00\x00\xf0\x00" + b"a" * LIMITS.max_header_bytes,
    "another library's type": MESSAGE + b"\xc9\x00\x00\xff\x00\x50" + b"\x91" * LIMITS.max_header_bytes,
}


@pytest.mark.parametrize("many", [MANY, pytest.param(10 * MANY, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("allowed", [ClientMessage, ServerMessage], ids=["server", "client"])
def test_a_header_is_read_in_no_time_whatever_it_holds(kind: str, allowed: object, many: int) -> None:
    bomb = BOMBS[kind][: LIMITS.max_header_bytes]
    started = time.monotonic()
    for _ in range(many):
        with pytest.raises(ProtocolError):
            parse_header(bomb, 0, allowed)
    assert time.monotonic() - started < GAP * many / MANY


async def test_short_messages_that_are_none() -> None:
    """From many streams at a time, beside somebody who reads the directory."""
    keeper, server, *strangers = identities(2 + MANY)
    async with KeepersSwarm(keeper) as swarm:
        await swarm.directory(server).announce(record_of(server), 60)
        streams = [
            await swarm.transport(one.peer_id).open(keeper.peer_id, DIRECTORY_PROTOCOL) for one in strangers
        ]
        kinds = list(BOMBS.values())
        for number, stream in enumerate(streams):
            bomb = kinds[number % len(kinds)][:8000]
            await stream.write([struct.pack(">I", len(bomb)), bomb])
        started = time.monotonic()
        assert await swarm.directory().servers(MODEL) == [record_of(server)]
        for stream in streams:
            with pytest.raises(PeerDisconnected):
                await stream.read(1)
        assert time.monotonic() - started < GAP


def test_a_model_s_name_that_is_asked_for_is_bounded_too() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(List("m" * 129)), type=List)
