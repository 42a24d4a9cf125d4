"""Whoever comes with an invitation gets in, however many strangers hold streams half open."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from corolla.errors import RequestRefused
from corolla.swarm.access.admission import (
    ADMISSION_PROTOCOL,
    MAX_STREAMS,
    AdmissionService,
    Gate,
    present,
    redeem,
)
from corolla.swarm.access.invitations import check_certificate, sign_certificate, sign_invitation
from corolla.swarm.access.membership import Issuer, Membership, PeerFile
from corolla.swarm.channel import Channel, request
from corolla.swarm.transport.base import Stream
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, Ping
from tests.strangers.crowd import identities

ISSUER, MEMBER, NEW = identities(3)
BEGINNINGS = [b"", struct.pack(">I", 1000)[:2], struct.pack(">I", 1000) + b"\x82"]


@pytest.mark.parametrize(
    "strangers",
    [MAX_STREAMS // 2 + 1, 4 * MAX_STREAMS, pytest.param(40 * MAX_STREAMS, marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "before and meanwhile"])
async def test_half_open_streams_of_many_identities(tmp_path: Path, strangers: int, meanwhile: bool) -> None:
    network = MemoryNetwork()
    server = network.transport(ISSUER.peer_id)
    membership = Membership(ISSUER.peer_id, issuers={ISSUER.peer_id})
    issuer = Issuer(ISSUER, tmp_path / "identity", PeerFile(tmp_path / "revoked", optional=True))
    await server.serve(ADMISSION_PROTOCOL, AdmissionService(membership, issuer).handle)
    crowd = [network.transport(f"stranger-{number}") for number in range(strangers)]
    held: list[Stream] = []

    async def hold() -> None:
        for number, stranger in enumerate(2 * crowd):
            held.append(await stranger.open(ISSUER.peer_id, ADMISSION_PROTOCOL))
            if beginning := BEGINNINGS[number % len(BEGINNINGS)]:
                await held[-1].write([beginning])
            await asyncio.sleep(0)

    await hold()
    others = asyncio.create_task(hold() if meanwhile else asyncio.sleep(0))
    try:
        async with asyncio.timeout(5):
            token = sign_invitation(ISSUER, [], seconds=100)
            certificate = await redeem(network.transport(NEW.peer_id), ISSUER.peer_id, token)
            check_certificate(certificate, NEW.peer_id, {ISSUER.peer_id})
            mine = sign_certificate(ISSUER, MEMBER.peer_id)
            await present(network.transport(MEMBER.peer_id), ISSUER.peer_id, [mine])
    finally:
        await others
        for transport in crowd:
            await transport.close()
        await server.close()


async def test_strangers_at_the_gate_keep_nobody_from_hearing_that_it_should_present_itself() -> None:
    """They ask for nothing and stay; a member that the server has forgotten is told so all the same."""
    network = MemoryNetwork()
    server = network.transport(ISSUER.peer_id)
    await server.serve(PROTOCOL_NAME, Gate(lambda _peer: False).guarded(_never))
    crowd = [network.transport(f"stranger-{number}") for number in range(2 * MAX_STREAMS)]
    held = [await stranger.open(ISSUER.peer_id, PROTOCOL_NAME) for stranger in crowd for _ in range(2)]
    channel = Channel(
        await network.transport(MEMBER.peer_id).open(ISSUER.peer_id, PROTOCOL_NAME), side="client"
    )
    with pytest.raises(RequestRefused) as refused:
        await request(channel, Packet(Ping()))
    assert refused.value.code == "not_allowed"
    for stream in held:
        await stream.close()
    await channel.close()
    for transport in [*crowd, server]:
        await transport.close()


async def _never(_stream: Stream) -> None:
    raise AssertionError("a stranger came in")
