"""What `directory.py` promises, on the twin and on the DHT."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from corolla.swarm.directory import Directory, ServerRecord
from corolla.swarm.directory_memory import Board, MemoryDirectory
from corolla.swarm.node import Node

Peers = list[Directory]


def record(peer_id: str = "a", model: str = "m", **changes: object) -> ServerRecord:
    base = ServerRecord(
        peer_id=peer_id, model=model, model_name="smol", num_blocks=6, start=0, end=3, dtype="float32"
    )
    return msgspec.structs.replace(base, **changes)


async def three_in_memory() -> tuple[Peers, list[Node]]:
    board = Board()
    return [MemoryDirectory(board) for _ in range(3)], []


async def three_on_the_dht() -> tuple[Peers, list[Node]]:
    """Two servers and a client."""
    first = await Node.create()
    join = await first.join_addresses()
    nodes = [
        first,
        await Node.create(initial_peers=join),
        await Node.create(initial_peers=join, client_only=True),
    ]
    return [node.directory for node in nodes], nodes


@pytest.fixture(params=[three_in_memory, three_on_the_dht], ids=["memory", "dht"])
async def peers(request: pytest.FixtureRequest) -> AsyncIterator[Peers]:
    make: Callable[[], Awaitable[tuple[Peers, list[Node]]]] = request.param
    directories, nodes = await make()
    yield directories
    for node in reversed(nodes):
        await node.close()


async def test_what_is_announced_is_seen_by_all(peers: Peers) -> None:
    a, b, other = record("a"), record("b", start=3, end=6), record("a", model="other")
    await peers[0].announce(a, 60)
    await peers[1].announce(b, 60)
    await peers[0].announce(other, 60)
    for peer in peers:
        assert sorted(await peer.servers("m"), key=lambda r: r.peer_id) == [a, b]
        assert await peer.servers("other") == [other]
        assert await peer.servers("nothing") == []
        assert {(r.peer_id, r.model) for r in await peer.all_servers()} == {
            ("a", "m"),
            ("b", "m"),
            ("a", "other"),
        }


async def test_an_announcement_replaces_the_one_before(peers: Peers) -> None:
    """Also with a shorter life, and though everybody has just read the earlier one."""
    await peers[0].announce(record(free_cache_tokens=10), 60)
    assert [r.free_cache_tokens for r in await peers[2].servers("m")] == [10]
    await peers[0].announce(record(free_cache_tokens=20, state="draining"), 30)
    for peer in peers:
        for found in (await peer.servers("m"), await peer.all_servers()):
            assert [(r.free_cache_tokens, r.state) for r in found] == [(20, "draining")]


async def test_a_withdrawn_record_is_gone_at_once_and_may_come_back(peers: Peers) -> None:
    await peers[0].announce(record("a"), 60)
    await peers[1].announce(record("b"), 60)
    await peers[0].withdraw(record("a"))
    for peer in peers:
        assert [r.peer_id for r in await peer.servers("m")] == ["b"]
        assert [r.peer_id for r in await peer.all_servers()] == ["b"]
    await peers[0].announce(record("a"), 60)
    for peer in peers:
        assert [r.peer_id for r in await peer.servers("m")] == ["a", "b"]


async def test_a_record_expires(peers: Peers) -> None:
    await peers[0].announce(record("a"), 3.0)
    await peers[1].announce(record("b"), 60)
    assert [r.peer_id for r in await peers[2].servers("m")] == ["a", "b"]
    async with asyncio.timeout(10):
        while len(await peers[2].servers("m")) > 1:
            await asyncio.sleep(0.05)
    for peer in peers:
        assert [r.peer_id for r in await peer.all_servers()] == ["b"]


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

    from corolla.swarm import directory_dht

    assert isinstance(tmp_path, Path)
    first = await Node.create(identity=tmp_path / "id")
    join = await first.join_addresses()
    listen = ["/".join(join[0].split("/")[:5])]
    server = await Node.create(initial_peers=join)
    await first.close()
    await server.directory.announce(record(), 60)  # finds nobody
    first = await Node.create(identity=tmp_path / "id", listen=listen)
    try:
        assert await first.join_addresses() == join
        async with asyncio.timeout(10 * directory_dht.REJOIN_SECONDS):
            while not await first.directory.servers("m"):
                await server.directory.announce(record(), 60)
                await asyncio.sleep(0.1)
    finally:
        await server.close()
        await first.close()


def stored(
    entry: object, *, key: str = "corolla/1/model/m", subkey: str = "a/m", expires: float = 60
) -> object:
    from hivemind.dht.crypto import DHTRecord
    from hivemind.dht.routing import DHTID

    value = entry if isinstance(entry, bytes) else msgspec.msgpack.encode(msgspec.msgpack.encode(entry))
    return DHTRecord(
        DHTID.generate(source=key).to_bytes(), msgspec.msgpack.encode(subkey), value, time.time() + expires
    )


GOOD = [record(), False]


def test_a_good_record_is_taken() -> None:
    from corolla.swarm.directory_dht import _Validator

    assert _Validator().validate(stored(GOOD))
    assert _Validator().validate(stored([record(), True]))
    assert _Validator().validate(stored(GOOD, key="corolla/1/servers"))
    assert _Validator().validate(stored(GOOD, expires=-5)), "an expired one must not spoil a whole answer"


@pytest.mark.parametrize(
    "arguments",
    [
        {"entry": GOOD, "subkey": "b/m"},
        {"entry": GOOD, "key": "corolla/1/model/other"},
        {"entry": GOOD, "key": "elsewhere"},
        {"entry": GOOD, "expires": 10_000},
        {"entry": [*GOOD, 1]},
        {"entry": [record(start=-1), False]},
        {"entry": [record(model_name="x" * 257), False]},
        {"entry": b"\xc1"},
        {"entry": b""},
        {"entry": msgspec.msgpack.encode(b"x" * 3000)},
        {"entry": msgspec.msgpack.encode("text")},
    ],
)
def test_anything_else_is_dropped(arguments: dict[str, object]) -> None:
    from corolla.swarm.directory_dht import _Validator

    assert not _Validator().validate(stored(**arguments))  # type: ignore[arg-type]


async def test_a_stranger_s_record_does_not_hide_the_good_ones() -> None:
    first = await Node.create()
    try:
        await first.directory.announce(record(), 60)
        node = first.directory._node  # type: ignore[attr-defined]
        for subkey, value in [("b/m", b"junk"), (None, b"junk"), ("a/m", b"junk")]:
            assert not await node.store("corolla/1/model/m", value, time.time() + 100, subkey=subkey)
        assert await first.directory.servers("m") == [record()]
    finally:
        await first.close()
