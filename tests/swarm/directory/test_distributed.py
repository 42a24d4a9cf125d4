"""How records travel between servers, those who keep the directory and those who read it, on the in-memory network."""

from __future__ import annotations

import asyncio
import struct

import msgspec
import pytest
from tests.strangers.crowd import MODEL, KeepersSwarm, identities, record_of, signed

from corolla.errors import PeerDisconnected, SwarmUnavailable
from corolla.swarm.directory import distributed
from corolla.swarm.directory.distributed import (
    DIRECTORY_PROTOCOL,
    PAGE,
    Fetch,
    List,
    Names,
    Put,
    Records,
    Refused,
)
from corolla.swarm.directory.records import NAME_BYTES
from corolla.swarm.short_messages import receive_short, send_short
from corolla.swarm.transport.base import Stream

KEEPER, OTHER, SERVER, STRANGER, *CROWD = identities(2 * PAGE + 10)
_anything = msgspec.msgpack.Decoder(distributed.Done | Names | Records | Refused)


async def test_a_record_is_kept_by_several_and_read_once() -> None:
    async with KeepersSwarm(KEEPER, OTHER) as swarm:
        await swarm.directory(SERVER).announce(record_of(SERVER), 60)
        assert [len(shelf.names(MODEL)) for shelf in swarm.shelves.values()] == 2 * [NAME_BYTES]
        client = swarm.directory()
        for _ in range(2):
            assert await client.servers(MODEL) == await client.all_servers() == [record_of(SERVER)]
            assert await client.servers("other") == []
            assert not client.cut_short


async def test_more_than_a_page_from_peers_that_keep_different_ones() -> None:
    async with KeepersSwarm(KEEPER, OTHER) as swarm:
        for number, one in enumerate(CROWD):
            for place, shelf in enumerate(swarm.shelves.values()):
                if number % 3 != place:
                    shelf.put(*signed(one))
        client = swarm.directory()
        found = await client.servers(MODEL)
        assert {record.peer_id for record in found} == {one.peer_id for one in CROWD}
        assert not client.cut_short


async def test_nobody_who_keeps_the_directory_answers() -> None:
    """That is not the same as a directory that knows no server."""
    async with KeepersSwarm(KEEPER) as swarm:
        client = swarm.directory()
        assert await client.servers(MODEL) == []
        swarm.network.kill(KEEPER.peer_id)
        with pytest.raises(SwarmUnavailable, match="directory"):
            await client.servers(MODEL)


async def ask(swarm: KeepersSwarm, request: msgspec.Struct) -> object:
    stream = await swarm.transport(STRANGER.peer_id).open(KEEPER.peer_id, DIRECTORY_PROTOCOL)
    await send_short(stream, request)
    answer = await receive_short(stream, _anything, 2**20)
    await stream.close()
    return answer


async def test_a_peer_puts_its_own_record_only() -> None:
    async with KeepersSwarm(KEEPER) as swarm:
        assert await ask(swarm, Put(signed(SERVER)[1])) == Refused("unfit")
        assert await ask(swarm, Put(b"junk")) == Refused("unfit")
        assert await ask(swarm, List(None)) == Names(b"")
        with pytest.raises(ValueError, match="itself"):
            await swarm.directory(STRANGER).announce(record_of(SERVER), 60)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 2**31),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 8000) + b"\x91" * 8000,
        (lambda body: struct.pack(">I", len(body)) + body)(msgspec.msgpack.encode(Fetch(b"x" * 3216))),
        (lambda body: struct.pack(">I", len(body)) + body)(msgspec.msgpack.encode(List("x" * 129))),
    ],
    ids=["too long", "no msgpack", "nested", "too many names", "too long a model"],
)
async def test_garbage_ends_the_stream(data: bytes) -> None:
    async with KeepersSwarm(KEEPER) as swarm:
        stream = await swarm.transport(STRANGER.peer_id).open(KEEPER.peer_id, DIRECTORY_PROTOCOL)
        await stream.write([data])
        with pytest.raises(PeerDisconnected):
            await stream.read(1)
        await swarm.directory(SERVER).announce(record_of(SERVER), 60)
        assert await swarm.directory().servers(MODEL) == [record_of(SERVER)]


async def test_whoever_does_not_take_his_answers_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may have half a megabyte, and many who ask and do not read would keep as many of them here."""
    monkeypatch.setattr(distributed, "MAX_STREAMS", 8)
    monkeypatch.setattr("corolla.swarm.transport.memory.BUFFER_BYTES", 1000)
    async with KeepersSwarm(KEEPER) as swarm:
        for one in CROWD:
            swarm.shelves[KEEPER.peer_id].put(*signed(one))
        streams = []
        for number in range(12):
            asking = swarm.transport(f"stranger-{number}")
            streams.append(await asking.open(KEEPER.peer_id, DIRECTORY_PROTOCOL))
            await send_short(streams[-1], List(None))
        assert len(await swarm.directory().servers(MODEL)) == len(CROWD)
        for stream in streams[:4]:
            async with asyncio.timeout(5):
                with pytest.raises(PeerDisconnected):
                    await stream.read(10_000)


# --- peers that keep the directory badly -----------------------------------------------------------------


async def mute(stream: Stream) -> None:
    await asyncio.sleep(3600)


async def junk(stream: Stream) -> None:
    """Names records, and sends something else."""
    await receive_short(stream, msgspec.msgpack.Decoder(List), 8192)
    await send_short(stream, Names(b"x" * NAME_BYTES))
    await receive_short(stream, msgspec.msgpack.Decoder(Fetch), 8192)
    await send_short(stream, Records([b"junk"]))
    await asyncio.sleep(3600)


async def another(stream: Stream) -> None:
    """Sends a good record that was not asked for."""
    await receive_short(stream, msgspec.msgpack.Decoder(List), 8192)
    await send_short(stream, Names(b"x" * NAME_BYTES))
    await receive_short(stream, msgspec.msgpack.Decoder(Fetch), 8192)
    await send_short(stream, Records([signed(CROWD[0])[1]]))
    await asyncio.sleep(3600)


async def forgetful(stream: Stream) -> None:
    """Names records, and keeps none."""
    await receive_short(stream, msgspec.msgpack.Decoder(List), 8192)
    await send_short(stream, Names(b"x" * NAME_BYTES * 3 * PAGE))
    while True:
        await receive_short(stream, msgspec.msgpack.Decoder(Fetch), 8192)
        await send_short(stream, Records([]))


async def thief(stream: Stream) -> None:
    """Names the true records, so that it is asked for them, and then says nothing."""
    await receive_short(stream, msgspec.msgpack.Decoder(List), 8192)
    await send_short(stream, Names(THE_TRUE[0]))
    await asyncio.sleep(3600)


THE_TRUE: list[bytes] = []


@pytest.mark.parametrize("behaviour", [mute, junk, another, forgetful, thief])
async def test_a_bad_keeper_hides_nothing(behaviour: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "REQUEST_SECONDS", 0.3)
    async with KeepersSwarm(KEEPER) as swarm:
        await swarm.directory(SERVER).announce(record_of(SERVER), 60)
        THE_TRUE[:] = [swarm.shelves[KEEPER.peer_id].names(None)]
        await swarm.transport("bad").serve(DIRECTORY_PROTOCOL, behaviour)  # type: ignore[arg-type]
        client = swarm.directory(of=["bad", KEEPER.peer_id])
        for _ in range(3):
            assert await client.servers(MODEL) == [record_of(SERVER)]


async def test_records_that_this_release_cannot_read_do_not_cost_the_others() -> None:
    """A keeper of another release takes what this one does not, and a server chooses which."""
    async with KeepersSwarm(KEEPER) as swarm:
        await swarm.directory(SERVER).announce(record_of(SERVER), 60)
        for one in CROWD[: PAGE + 5]:
            entry, value = signed(one, dtype="float8")
            swarm.shelves[KEEPER.peer_id].put(entry, value)
        await swarm.directory(CROWD[-1]).announce(record_of(CROWD[-1]), 60)
        client = swarm.directory()
        for _ in range(2):
            assert {one.peer_id for one in await client.servers(MODEL)} == {SERVER.peer_id, CROWD[-1].peer_id}
            assert not client.cut_short


async def test_a_reading_that_was_cut_short_says_so_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with KeepersSwarm(KEEPER) as swarm:
        for one in CROWD:
            swarm.shelves[KEEPER.peer_id].put(*signed(one))
        whole = swarm.shelves[KEEPER.peer_id].values

        pages: list[object] = []

        def slow(names: object) -> list[bytes]:
            pages.append(names)
            if len(pages) == 2:
                swarm.network.stop(KEEPER.peer_id)
            return whole(names)  # type: ignore[arg-type]

        monkeypatch.setattr(distributed, "REQUEST_SECONDS", 0.2)
        monkeypatch.setattr(swarm.shelves[KEEPER.peer_id], "values", slow)
        client = swarm.directory()
        found = await client.servers(MODEL)
        assert client.cut_short
        assert len(found) == PAGE
        swarm.network.resume(KEEPER.peer_id)
        monkeypatch.undo()
        assert len(await client.servers(MODEL)) == len(CROWD)
        assert not client.cut_short
