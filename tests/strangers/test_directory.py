"""A directory that neither its own success nor strangers can shut: many servers, many identities, costly keys.

Before, the records of a key travelled as one message of at most 4 MiB: 4,328 ordinary servers ended every reading.
`make nightly` takes far more of them. How fast one reading is depends on the machine; the bars are the issue's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.distributed import DIRECTORY_PROTOCOL, Done, Put, Refused
from corolla.swarm.directory.records import Entry, read_record, sign_entry
from corolla.swarm.node import Node
from corolla.swarm.short_messages import receive_short, send_short
from corolla.swarm.transport.identity import Identity
from corolla.swarm.transport.libp2p import Libp2pTransport
from tests.strangers.crowd import MODEL, KeepersSwarm, identities, identity_of, record_of, signed

SECONDS = (
    10.0  # for a new client's first look, and for a new server's announcement, beyond what they take alone
)
GAP = 2.0  # seconds for which an open chat may stand still

WIDE = "\N{GRINNING FACE}" * 256  # the longest name that a record may have


class Gaps:
    """The longest time for which this loop answered nothing, while the body ran."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def __aenter__(self) -> Gaps:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            self.worst = max(self.worst, time.monotonic() - before)


async def timed(work: Awaitable[object]) -> float:
    started = time.monotonic()
    await work
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("servers", "name"),
    [(570, WIDE), pytest.param(3_000, "SmolLM2-135M-Instruct", marks=pytest.mark.nightly)],
    ids=["few with long names", "thousands"],
)
async def test_more_servers_than_one_message_holds(
    servers: int, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each serves four models, over libp2p."""
    models = [f"{number}{MODEL[1:]}" for number in range(4)]
    transport = await Libp2pTransport.create()
    await transport.close()  # the library is imported now
    first = await Node.create()
    shelf = first.directory._own  # type: ignore[attr-defined]
    try:
        values = []
        for one in identities(servers):
            for model in models:
                entry, value = signed(one, model, model_name=name)
                values.append(value)
                assert shelf.put(entry, value)
        assert sum(map(len, values)) > 4 * 2**20
        client = await Node.create(initial_peers=await first.join_addresses(), client_only=True)
        try:
            async with Gaps() as gaps:
                assert await timed(client.directory.servers(models[0])) < SECONDS
            assert len(await client.directory.servers(models[0])) == servers
            assert len(await client.directory.all_servers()) == 4 * servers
            assert not client.directory.cut_short
            assert gaps.worst < GAP
        finally:
            await client.close()
        server = await Node.create(initial_peers=await first.join_addresses())
        try:
            assert await timed(server.directory.announce(record_of(server_identity(server)), 60)) < SECONDS
        finally:
            await server.close()
    finally:
        await first.close()
    assert not [one for one in caplog.records if one.levelname in ("WARNING", "ERROR")]


def server_identity(node: Node) -> Identity:
    identity = node.transport.identity  # type: ignore[attr-defined]
    assert isinstance(identity, Identity)
    return identity


@pytest.mark.parametrize("strangers", [500, pytest.param(5_000, marks=pytest.mark.nightly)])
async def test_a_crowd_of_identities_with_records_as_large_as_they_may_be(strangers: int) -> None:
    """The honest server was there first, comes in their middle, or last: it is found, and so is the next."""
    keeper, first, second, third = identities(4)
    async with KeepersSwarm(keeper) as swarm:
        await swarm.directory(first).announce(record_of(first), 600)
        shelf = swarm.shelves[keeper.peer_id]
        crowd = list(identities(strangers + 4))[4:]
        for one in crowd[: strangers // 2]:
            shelf.put(*signed(one, model_name=WIDE))
        assert await timed(swarm.directory(second).announce(record_of(second), 600)) < SECONDS
        for one in crowd[strangers // 2 :]:
            shelf.put(*signed(one, model_name=WIDE))
        assert await timed(swarm.directory(third).announce(record_of(third), 600)) < SECONDS
        client = swarm.directory()
        async with Gaps() as gaps:
            assert await timed(client.servers(MODEL)) < SECONDS
        assert gaps.worst < GAP
        found = {record.peer_id for record in await client.servers(MODEL)}
        assert {one.peer_id for one in (first, second, third)} <= found


# --- dear before cheap -----------------------------------------------------------------------------------


def costly_key() -> Identity:
    """A key whose modulus is of an allowed size, and whose public exponent has 2,040 bits: each check takes long."""
    numbers = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_numbers()
    return identity_of(numbers.p, numbers.q, exponent=2**2039 + 9)


def test_a_signature_is_not_checked_with_a_key_that_makes_it_dear() -> None:
    key = costly_key()
    value = sign_entry(Entry(record_of(key), False, time.time() + 60), key)
    key.key.public_key()
    assert read_record(value) is None


async def test_records_of_costly_keys_and_false_signatures_stop_nobody() -> None:
    """Peers that put the worst that they may, as fast as they can, beside an open chat and a new server."""
    keeper, server, *strangers = identities(12)
    costly = costly_key()
    async with KeepersSwarm(keeper) as swarm:
        values = [
            sign_entry(Entry(record_of(costly), False, time.time() + 60), costly),
            sign_entry(Entry(record_of(strangers[0]), False, time.time() + 60), strangers[1]),
            b"\x91" * 2_500,
            msgspec.msgpack.encode([b"\x93" + b"\x91" * 1_500, strangers[0].public, b"x" * 256]),
            msgspec.msgpack.encode([[0] * 2_000, b"", b""]),
        ]

        async def flood(stranger: Identity) -> None:
            answers = msgspec.msgpack.Decoder(Done | Refused)
            stream = await swarm.transport(stranger.peer_id).open(keeper.peer_id, DIRECTORY_PROTOCOL)
            for number in range(170):
                await send_short(stream, Put(values[number % len(values)]))
                assert isinstance(await receive_short(stream, answers, 8192), Refused)

        async with Gaps() as gaps:
            floods = asyncio.gather(*(flood(stranger) for stranger in strangers))
            assert await timed(swarm.directory(server).announce(record_of(server), 60)) < SECONDS
            await floods
        assert gaps.worst < GAP
        found: list[ServerRecord] = await swarm.directory().servers(MODEL)
        assert [record.peer_id for record in found] == [server.peer_id]
