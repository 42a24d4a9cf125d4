"""What `directory.py` promises, on the twin and on the DHT."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import msgspec
import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.proto import dht_pb2

from corolla.swarm.directory.directory import Directory, ServerRecord
from corolla.swarm.directory.directory_memory import Board, MemoryDirectory
from corolla.swarm.directory.distributed import DIRECTORY_PROTOCOL
from corolla.swarm.node import Node
from corolla.swarm.transport.base import Stream
from corolla.swarm.transport.libp2p import MAX_NEAREST, Libp2pTransport, SmallCall, only_who_is_near
from corolla.wire.messages import PROTOCOL_NAME


@dataclass
class Peer:
    """Somebody who reads the directory, and, but for a client, is announced in it."""

    directory: Directory
    peer_id: str

    def record(self, **changes: object) -> ServerRecord:
        return record(self.peer_id, **changes)


Peers = list[Peer]


def record(peer_id: str = "a", model: str = "m", **changes: object) -> ServerRecord:
    base = ServerRecord(
        peer_id=peer_id, model=model, model_name="smol", num_blocks=6, start=0, end=3, dtype="float32"
    )
    return msgspec.structs.replace(base, **changes)


async def three_in_memory() -> tuple[Peers, list[Node]]:
    board = Board()
    return [Peer(MemoryDirectory(board), name) for name in "abc"], []


async def three_on_the_dht() -> tuple[Peers, list[Node]]:
    """Two servers and a client."""
    first = await Node.create()
    join = await first.join_addresses()
    nodes = [
        first,
        await Node.create(initial_peers=join),
        await Node.create(initial_peers=join, client_only=True),
    ]
    return [Peer(node.directory, node.peer_id) for node in nodes], nodes


@pytest.fixture(params=[three_in_memory, three_on_the_dht], ids=["memory", "dht"])
async def peers(request: pytest.FixtureRequest) -> AsyncIterator[Peers]:
    make: Callable[[], Awaitable[tuple[Peers, list[Node]]]] = request.param
    directories, nodes = await make()
    yield directories
    for node in reversed(nodes):
        await node.close()


async def test_what_is_announced_is_seen_by_all(peers: Peers) -> None:
    a, b = peers[0].record(), peers[1].record(start=3, end=6)
    other = peers[0].record(model="other")
    await peers[0].directory.announce(a, 60)
    await peers[1].directory.announce(b, 60)
    await peers[0].directory.announce(other, 60)
    for peer in peers:
        found = await peer.directory.servers("m")
        assert sorted(found, key=lambda r: r.start) == [a, b]
        assert await peer.directory.servers("other") == [other]
        assert await peer.directory.servers("nothing") == []
        assert {(r.peer_id, r.model) for r in await peer.directory.all_servers()} == {
            (a.peer_id, "m"),
            (b.peer_id, "m"),
            (a.peer_id, "other"),
        }


async def test_an_announcement_replaces_the_one_before(peers: Peers) -> None:
    """Also with a shorter life, and though everybody has just read the earlier one."""
    await peers[0].directory.announce(peers[0].record(free_cache_tokens=10), 60)
    assert [r.free_cache_tokens for r in await peers[2].directory.servers("m")] == [10]
    await peers[0].directory.announce(peers[0].record(free_cache_tokens=20, state="draining"), 30)
    for peer in peers:
        for found in (await peer.directory.servers("m"), await peer.directory.all_servers()):
            assert [(r.free_cache_tokens, r.state) for r in found] == [(20, "draining")]


async def test_a_withdrawn_record_is_gone_at_once_and_may_come_back(peers: Peers) -> None:
    a, b = peers[0], peers[1]
    await a.directory.announce(a.record(), 60)
    await b.directory.announce(b.record(), 60)
    await a.directory.withdraw(a.record())
    for peer in peers:
        assert [r.peer_id for r in await peer.directory.servers("m")] == [b.peer_id]
        assert [r.peer_id for r in await peer.directory.all_servers()] == [b.peer_id]
    await a.directory.announce(a.record(), 60)
    for peer in peers:
        assert {r.peer_id for r in await peer.directory.servers("m")} == {a.peer_id, b.peer_id}


async def test_a_record_expires(peers: Peers) -> None:
    a, b = peers[0], peers[1]
    await a.directory.announce(a.record(), 3.0)
    await b.directory.announce(b.record(), 60)
    assert {r.peer_id for r in await peers[2].directory.servers("m")} == {a.peer_id, b.peer_id}
    async with asyncio.timeout(10):
        while len(await peers[2].directory.servers("m")) > 1:
            await asyncio.sleep(0.05)
    for peer in peers:
        assert [r.peer_id for r in await peer.directory.all_servers()] == [b.peer_id]


def test_the_twin_keeps_a_record_for_its_time_only() -> None:
    now = 0.0
    board = Board(clock=lambda: now)
    board.put(record(), 10)
    now = 9.9
    assert board.valid()
    now = 10.0
    assert not board.valid()


# --- the DHT's own -------------------------------------------------------------------------------------------


async def test_a_swarm_survives_its_first_peer_and_finds_it_again(tmp_path: object) -> None:
    """The peer that others joined through restarts with its identity; nobody else does."""
    from pathlib import Path

    from corolla.swarm.directory import directory_dht

    assert isinstance(tmp_path, Path)
    first = await Node.create(identity=tmp_path / "id")
    join = await first.join_addresses()
    listen = ["/".join(join[0].split("/")[:5])]
    server = await Node.create(initial_peers=join)
    await first.close()
    mine = record(server.peer_id)
    await server.directory.announce(mine, 60)  # finds nobody
    first = await Node.create(identity=tmp_path / "id", listen=listen)
    try:
        assert await first.join_addresses() == join
        async with asyncio.timeout(10 * directory_dht.REJOIN_SECONDS):
            while not await first.directory.servers("m"):
                await server.directory.announce(mine, 60)
                await asyncio.sleep(0.1)
    finally:
        await server.close()
        await first.close()


async def test_a_peer_announces_itself_only() -> None:
    first = await Node.create()
    try:
        with pytest.raises(ValueError, match="itself"):
            await first.directory.announce(record("another"), 60)
    finally:
        await first.close()


async def test_a_stranger_s_records_do_not_hide_the_good_ones() -> None:
    """Another peer of the DHT stores what it likes, where hivemind would take it and where a directory is kept."""
    first = await Node.create()
    stranger = await Libp2pTransport.create(initial_peers=await first.join_addresses())
    node = await DHTNode.create(p2p=stranger.p2p, initial_peers=await first.join_addresses())
    try:
        good = record(first.peer_id)
        await first.directory.announce(good, 60)
        key = f"{PROTOCOL_NAME}/model/m"
        assert not await node.store(key, b"junk", time.time() + 800, subkey="b/m", exclude_self=True)
        assert len(first.directory._node.protocol.storage) == 0  # type: ignore[attr-defined]
        node.protocol.storage.store(
            DHTID.generate(key), b"junk", time.time() + 800
        )  # so it says it has found it
        await stranger.serve(DIRECTORY_PROTOCOL, junk)
        assert await first.directory.servers("m") == [good]
        client = await Node.create(initial_peers=await first.join_addresses(), client_only=True)
        try:
            assert await client.directory.servers("m") == [good]
        finally:
            await client.close()
    finally:
        await node.shutdown()
        await stranger.close()
        await first.close()


async def junk(stream: Stream) -> None:
    """A peer that answers for the directory whatever comes to its mind."""
    await stream.write([b"\xff" * 100])


@pytest.mark.parametrize("found", [dht_pb2.FOUND_DICTIONARY, dht_pb2.FOUND_REGULAR])
def test_hivemind_gets_nothing_to_decode_that_a_peer_says_is_stored(found: int) -> None:
    """Values nest as deep as their sender likes, and hivemind would decode them in the loop that answers."""
    many = [b"x" * 20] * 10_000
    result = dht_pb2.FindResult(
        type=found, value=b"\x91" * 10_000, nearest_node_ids=many, nearest_peer_ids=many
    )
    cleaned = only_who_is_near(dht_pb2.FindResponse(results=[result]))
    assert cleaned.results[0].type == dht_pb2.NOT_FOUND
    assert cleaned.results[0].value == b""
    assert len(cleaned.results[0].nearest_node_ids) == len(cleaned.results[0].nearest_peer_ids) == MAX_NEAREST


def test_a_large_argument_of_a_call_is_not_parsed() -> None:
    request = dht_pb2.FindRequest(keys=[b"k" * 20] * 64)
    assert SmallCall(dht_pb2.FindRequest).FromString(request.SerializeToString()) == request
    with pytest.raises(ValueError, match="too large"):
        SmallCall(dht_pb2.FindRequest).FromString(b"\xff" * 2**20)  # would be no request either
