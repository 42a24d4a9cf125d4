"""Whoever comes with an invitation gets in, however many strangers hold streams half open."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from corolla.swarm.access.admission import ADMISSION_PROTOCOL, MAX_STREAMS, Reception, present, redeem
from corolla.swarm.access.invitations import check_certificate, sign_certificate, sign_invitation
from corolla.swarm.access.membership import Issuer, Membership, PeerFile
from corolla.swarm.transport.base import Stream
from corolla.swarm.transport.memory import MemoryNetwork
from tests.strangers.crowd import identities

ISSUER, MEMBER, NEW = identities(3)
BEGINNINGS = [b"", struct.pack(">I", 1000)[:2], struct.pack(">I", 1000) + b"\x82"]


@pytest.mark.parametrize("strangers", [MAX_STREAMS // 2 + 1, 4 * MAX_STREAMS])
@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "before and meanwhile"])
async def test_half_open_streams_of_many_identities(tmp_path: Path, strangers: int, meanwhile: bool) -> None:
    network = MemoryNetwork()
    server = network.transport(ISSUER.peer_id)
    membership = Membership(ISSUER.peer_id, issuers={ISSUER.peer_id})
    issuer = Issuer(ISSUER, tmp_path / "identity", PeerFile(tmp_path / "revoked", optional=True))
    await server.serve(ADMISSION_PROTOCOL, Reception(membership, issuer).handle)
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
