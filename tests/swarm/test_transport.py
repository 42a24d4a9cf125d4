"""What `transport/base.py` promises, on both transports, with a remote peer that can be killed or stopped."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.swarm.behaviours import FLOOD_BYTES, LENGTH, call_echo
from tests.swarm.networks import FAULTY_NETWORKS, NETWORKS, Network

from corolla.errors import PeerDisconnected, PeerUnreachable

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOON = 20.0  # seconds; only ever waited for in full when a test fails
SILENT = 0.5  # long enough for an answer on this machine to have come


async def _started(network: Network) -> AsyncIterator[Network]:
    await network.start()
    try:
        yield network
    finally:
        await network.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(NETWORKS))
async def network(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    """For tests that leave it as it was."""
    async for network in _started(NETWORKS[request.param]()):
        yield network


@pytest_asyncio.fixture(loop_scope="module", params=list(NETWORKS))
async def own_network(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    """As `network`, for one test that ends a part of it."""
    async for network in _started(NETWORKS[request.param]()):
        yield network


@pytest_asyncio.fixture(loop_scope="module", params=list(FAULTY_NETWORKS))
async def faulty(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    """As `network`, with a remote peer that can be killed and stopped."""
    async for network in _started(FAULTY_NETWORKS[request.param]()):
        yield network


async def _ask(network: Network, protocol: str) -> None:
    stream = await network.local.open(network.remote_id, protocol)
    try:
        await call_echo(stream, b"anybody?")
    finally:
        await stream.close()


async def test_bytes_come_back_as_sent(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "echo")
    assert stream.peer_id == network.remote_id
    for size in (0, 1, 2048, 1_000_001):
        data = random.Random(size).randbytes(size)
        received = await call_echo(stream, data)
        assert isinstance(received, bytearray)
        assert received == data
    await stream.close()


async def test_buffers_are_sent_in_order(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "echo")
    await stream.write([(6).to_bytes(8, "little"), b"ab", memoryview(bytearray(b"cd")), bytearray(b"ef")])
    assert await stream.read(14) == (6).to_bytes(8, "little") + b"abcdef"
    await stream.close()


async def test_sent_bytes_are_copies(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "echo")
    data = bytearray(b"before")
    await stream.write([(6).to_bytes(8, "little"), data])
    data[:] = b"after!"
    assert await stream.read(14) == (6).to_bytes(8, "little") + b"before"
    await stream.close()


async def test_32_megabytes_arrive_whole(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "echo")
    data = random.Random(0).randbytes(32 * 1024 * 1024)
    async with asyncio.timeout(60):
        assert await call_echo(stream, data) == data
    await stream.close()


async def test_a_small_message_passes_beside_bulk(network: Network) -> None:
    bulk = await network.local.open(network.remote_id, "echo")
    small = await network.local.open(network.remote_id, "echo")
    await call_echo(small, b"warm")
    transfer = asyncio.create_task(call_echo(bulk, bytes(32 * 1024 * 1024)))
    for _ in range(20):
        assert await call_echo(small, bytes(2048)) == bytes(2048)
    assert not transfer.done(), "the small messages waited for the bulk"
    assert len(await transfer) == 32 * 1024 * 1024
    await bulk.close()
    await small.close()


async def test_a_hundred_streams_at_once(network: Network) -> None:
    streams = await asyncio.gather(*(network.local.open(network.remote_id, "echo") for _ in range(100)))
    answers = await asyncio.gather(*(call_echo(s, f"stream {i}".encode()) for i, s in enumerate(streams)))
    assert answers == [f"stream {i}".encode() for i in range(100)]
    await asyncio.gather(*(stream.close() for stream in streams))


async def test_a_peer_that_does_not_read_holds_the_writer(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "stall")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await stream.write([bytes(64 * 1024 * 1024)])
    started = time.monotonic()
    await stream.close()
    assert time.monotonic() - started < 5, "closing waited for a peer that does not read"


async def test_a_stalled_stream_does_not_hold_others(network: Network) -> None:
    stalled = await network.local.open(network.remote_id, "stall")
    writing = asyncio.create_task(stalled.write([bytes(64 * 1024 * 1024)]))
    other = await network.local.open(network.remote_id, "echo")
    async with asyncio.timeout(SOON):
        assert await call_echo(other, b"hello") == b"hello"
    assert not writing.done()
    writing.cancel()
    await stalled.close()
    await other.close()


async def test_a_handler_that_returns_ends_the_stream(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "farewell")
    async with asyncio.timeout(SOON):
        assert await stream.read(7) == b"goodbye"
        with pytest.raises(PeerDisconnected):
            await stream.read(1)
    await stream.close()


async def test_what_was_written_before_the_end_arrives(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "flood")
    async with asyncio.timeout(SOON):
        assert len(await stream.read(FLOOD_BYTES)) == FLOOD_BYTES
        with pytest.raises(PeerDisconnected):
            await stream.read(1)
    await stream.close()


async def test_a_handler_that_fails_ends_its_stream_only(network: Network) -> None:
    failing = await network.local.open(network.remote_id, "fail")
    other = await network.local.open(network.remote_id, "echo")
    await failing.write([b"x"])
    async with asyncio.timeout(SOON):
        with pytest.raises(PeerDisconnected):
            await failing.read(1)
        assert await call_echo(other, b"still here") == b"still here"
    await failing.close()
    await other.close()


async def test_our_own_close_ends_our_reads_and_writes(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "echo")
    reading = asyncio.create_task(stream.read(1))
    await asyncio.sleep(0)
    await stream.close()
    await stream.close()
    async with asyncio.timeout(SOON):
        with pytest.raises(PeerDisconnected):
            await reading
        with pytest.raises(PeerDisconnected):
            await stream.write([b"x"])
        with pytest.raises(PeerDisconnected):
            await stream.read(1)


async def test_nothing_is_read_after_our_own_close(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "farewell")
    assert await stream.read(1) == b"g"
    await stream.close()
    with pytest.raises(PeerDisconnected):
        await stream.read(1)


async def test_a_cancelled_read_takes_no_bytes(network: Network) -> None:
    stream = await network.local.open(network.remote_id, "echo")
    reading = asyncio.create_task(stream.read(9))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert await call_echo(stream, b"whole") == b"whole"
    await stream.close()


async def test_unknown_peers_and_protocols_are_unreachable(network: Network) -> None:
    with pytest.raises(PeerUnreachable):
        await network.local.open("12D3KooWHHcuvioMQumpjayJRYA6bZce9ic3yadLDrZRCncNKGZq", "echo")
    with pytest.raises(PeerUnreachable):
        await network.local.open("nonsense", "echo")
    # The refusal of a protocol may come with the opening or with the first bytes.
    with pytest.raises((PeerUnreachable, PeerDisconnected)):
        await _ask(network, "no such protocol")


async def test_kill_ends_streams_at_once(faulty: Network) -> None:
    stream = await faulty.local.open(faulty.remote_id, "echo")
    assert await call_echo(stream, b"hello") == b"hello"
    reading = asyncio.create_task(stream.read(1))
    await faulty.kill()
    async with asyncio.timeout(5):
        with pytest.raises(PeerDisconnected):
            await reading
    await stream.close()


async def test_kill_ends_a_write_that_waits(faulty: Network) -> None:
    stream = await faulty.local.open(faulty.remote_id, "stall")
    writing = asyncio.create_task(stream.write([bytes(64 * 1024 * 1024)]))
    other = await faulty.local.open(faulty.remote_id, "echo")
    await call_echo(other, b"the write has begun")
    await faulty.kill()
    async with asyncio.timeout(5):
        with pytest.raises(PeerDisconnected):
            await writing
    await stream.close()
    await other.close()


async def test_a_killed_peer_answers_no_new_stream(faulty: Network) -> None:
    await faulty.kill()
    async with asyncio.timeout(SOON):
        with pytest.raises((PeerUnreachable, PeerDisconnected)):
            await _ask(faulty, "echo")


async def test_a_stopped_peer_is_silent_and_goes_on_later(faulty: Network) -> None:
    old = await faulty.local.open(faulty.remote_id, "echo")
    assert await call_echo(old, b"hello") == b"hello"
    faulty.stop()
    new = await faulty.local.open(faulty.remote_id, "echo")
    answers = [asyncio.create_task(call_echo(stream, b"still there?")) for stream in (old, new)]
    done, _ = await asyncio.wait(answers, timeout=SILENT)
    assert not done
    faulty.resume()
    async with asyncio.timeout(SOON):
        assert [await answer for answer in answers] == [b"still there?"] * 2
    await old.close()
    await new.close()


async def test_a_stopped_peer_holds_the_writer(faulty: Network) -> None:
    stream = await faulty.local.open(faulty.remote_id, "echo")
    assert await call_echo(stream, b"hello") == b"hello"
    faulty.stop()
    writing = asyncio.create_task(stream.write([LENGTH.pack(2**26), bytes(2**26)]))
    done, _ = await asyncio.wait([writing], timeout=2)
    assert not done, "a stopped peer took 64 MiB"
    writing.cancel()
    await asyncio.wait([writing])
    for _ in range(2):  # whoever sent it closes it, and whoever asked for that does so again
        await stream.close()
    with pytest.raises(PeerDisconnected):
        await stream.read(1)


async def test_a_peer_that_leaves_ends_its_streams(own_network: Network) -> None:
    stream = await own_network.local.open(own_network.remote_id, "stall")
    reading = asyncio.create_task(stream.read(1))
    await own_network.leave()
    async with asyncio.timeout(SOON):
        with pytest.raises(PeerDisconnected):
            await reading
    await stream.close()


async def test_closing_our_transport_ends_everything(own_network: Network) -> None:
    stream = await own_network.local.open(own_network.remote_id, "stall")
    reading = asyncio.create_task(stream.read(1))
    await own_network.local.close()
    await own_network.local.close()
    async with asyncio.timeout(SOON):
        with pytest.raises(PeerDisconnected):
            await reading
    with pytest.raises(PeerUnreachable):
        await own_network.local.open(own_network.remote_id, "echo")
    await stream.close()
