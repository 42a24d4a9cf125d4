"""How peers come in, on the in-memory network: strangers, members, and members no more."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.swarm.access.test_membership import peer, someone

from corolla.client.view import SwarmView
from corolla.config import SwarmConfig
from corolla.errors import MissingBlocks, NotAdmitted, PeerDisconnected, ProtocolError, RequestRefused
from corolla.swarm.access import admission
from corolla.swarm.access.admission import (
    ADMISSION_PROTOCOL,
    MAX_STREAMS_OF_A_PEER,
    AdmissionService,
    Gate,
    Hello,
    Introductions,
    present,
    redeem,
)
from corolla.swarm.access.invitations import sign_certificate, sign_invitation
from corolla.swarm.access.membership import Issuer, Membership, PeerFile, beside, revoke
from corolla.swarm.channel import Channel, request
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.directory_memory import Board, MemoryDirectory
from corolla.swarm.transport.base import Stream
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, Failure, Ping, ServerStatus


class Guarded:
    """A guarded server that answers pings, and the peers that come to it."""

    def __init__(self, folder: Path) -> None:
        self.identity = folder / "identity"
        self.network = MemoryNetwork()
        self.server = self.network.transport(peer("issuer"))
        self.restart()
        self.handled: list[str] = []

    def restart(self) -> None:
        """Forget who was let in; what is on disk stays."""
        revoked = PeerFile(beside(self.identity, "revoked"), optional=True)
        issuers = {peer("issuer")}
        self.membership = Membership(peer("issuer"), issuers=issuers, revoked=revoked)
        self.gate = Gate(lambda who: self.membership.allowed(who))
        self.issuer = Issuer(someone("issuer"), self.identity, revoked)

    async def start(self) -> None:
        await self.server.serve(
            ADMISSION_PROTOCOL, AdmissionService(self.membership, self.issuer, lambda: 42.0).handle
        )
        await self.server.serve(PROTOCOL_NAME, self.gate.guarded(self._answer_pings))

    async def _answer_pings(self, stream: Stream) -> None:
        self.handled.append(stream.peer_id)
        channel = Channel(stream, side="server")
        while True:
            await channel.receive(timeout=None)
            await channel.send(
                Packet(
                    ServerStatus(
                        model="m", start=0, end=1, dtype="", version="", sessions=0, free_cache_tokens=0,
                        tokens_inference=0, tokens_forward=0, tokens_backward=0,
                    )
                )
            )  # fmt: skip

    async def ping(self, name: str) -> Channel:
        """A peer's ping, answered."""
        channel = Channel(
            await self.client(name).open(peer("issuer"), PROTOCOL_NAME), side="client", silence=10
        )
        await request(channel, Packet(Ping()))
        return channel

    def client(self, name: str):  # type: ignore[no-untyped-def]
        found = self.network.peers.get(peer(name))
        return found or self.network.transport(peer(name))

    def token(self) -> str:
        return sign_invitation(
            someone("issuer"), [f"/ip4/127.0.0.1/tcp/1/p2p/{peer('issuer')}"], seconds=1000
        )


@pytest.fixture
async def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    monkeypatch.setattr(admission, "REFUSAL_SECONDS", 0.3)
    world = Guarded(tmp_path)
    await world.start()
    yield world
    for transport in list(world.network.peers.values()):
        await transport.close()


async def test_a_stranger_hears_not_allowed_before_anything_is_read(guarded: Guarded) -> None:
    with pytest.raises(RequestRefused) as refused:
        await guarded.ping("stranger")
    assert refused.value.code == "not_allowed"
    assert guarded.handled == []
    stream = await guarded.client("stranger").open(peer("issuer"), PROTOCOL_NAME)
    unasked = await Channel(stream, side="client").receive(timeout=10)  # without having sent a byte
    assert isinstance(unasked.message, Failure)
    assert unasked.message.code == "not_allowed"
    with pytest.raises(PeerDisconnected):
        await stream.read(1)


async def test_a_large_request_of_a_stranger_is_refused_in_words_too(guarded: Guarded) -> None:
    """The server closes while the stranger is still sending: it hears why all the same."""
    import torch

    from corolla.wire.messages import Forward

    channel = Channel(
        await guarded.client("stranger").open(peer("issuer"), PROTOCOL_NAME), side="client", silence=10
    )
    tensors = {"hidden": torch.zeros(1, 1000, 2000), "lengths": torch.tensor([1000])}
    with pytest.raises(RequestRefused, match="only members"):
        await request(channel, Packet(Forward(model="m", start=0, end=1), tensors))


async def test_an_invited_peer_comes_in(guarded: Guarded) -> None:
    client, token = guarded.client("a"), guarded.token()
    certificate = await redeem(client, peer("issuer"), token)
    await guarded.ping("a")
    assert await redeem(client, peer("issuer"), token) == certificate
    with pytest.raises(NotAdmitted, match="another"):
        await redeem(guarded.client("b"), peer("issuer"), token)
    with pytest.raises(RequestRefused):
        await guarded.ping("b")


async def test_a_certificate_is_presented_once_and_for_oneself(guarded: Guarded) -> None:
    certificate = sign_certificate(someone("issuer"), peer("a"))
    with pytest.raises(NotAdmitted, match="only members"):
        await present(guarded.client("a"), peer("issuer"))
    with pytest.raises(NotAdmitted, match="another peer's"):
        await present(guarded.client("thief"), peer("issuer"), [certificate])
    assert await present(guarded.client("a"), peer("issuer"), ["junk", certificate]) == 42.0
    await guarded.ping("a")


async def test_a_revoked_peer_s_open_stream_is_closed(guarded: Guarded) -> None:
    for name in ("a", "b"):
        await present(guarded.client(name), peer("issuer"), [sign_certificate(someone("issuer"), peer(name))])
    streams = {name: await guarded.ping(name) for name in ("a", "b")}
    await guarded.gate.sweep()
    await request(streams["a"], Packet(Ping()))
    revoke(guarded.identity, peer("a"))
    await guarded.gate.sweep()
    with pytest.raises(PeerDisconnected):
        await request(streams["a"], Packet(Ping()))
    await request(streams["b"], Packet(Ping()))
    with pytest.raises(RequestRefused):
        await guarded.ping("a")
    with pytest.raises(NotAdmitted, match="revoked"):
        await redeem(guarded.client("a"), peer("issuer"), guarded.token())


async def test_an_unguarded_peer_welcomes_everybody_and_issues_nothing() -> None:
    network = MemoryNetwork()
    server, client = network.transport("server"), network.transport("client")
    await server.serve(ADMISSION_PROTOCOL, AdmissionService(None, clock=lambda: 7.0).handle)
    assert await present(client, "server") == 7.0
    with pytest.raises(NotAdmitted, match="no invitations"):
        await redeem(client, "server", "token")
    await client.close()
    await server.close()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 2**31),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1) + b"\x80",
        (lambda body: struct.pack(">I", len(body)) + body)(msgspec.msgpack.encode(Hello(["x"] * 9))),
    ],
    ids=["too long", "no msgpack", "no kind", "too many certificates"],
)
async def test_garbage_ends_the_stream(guarded: Guarded, data: bytes) -> None:
    stream = await guarded.client("stranger").open(peer("issuer"), ADMISSION_PROTOCOL)
    await stream.write([data])
    with pytest.raises(PeerDisconnected):
        await stream.read(1)
    with pytest.raises(NotAdmitted):
        await present(guarded.client("stranger"), peer("issuer"))


async def test_silent_streams_of_a_stranger_keep_nobody_else_out(guarded: Guarded) -> None:
    silent = [
        await guarded.client("stranger").open(peer("issuer"), ADMISSION_PROTOCOL)
        for _ in range(3 * MAX_STREAMS_OF_A_PEER)
    ]
    certificate = sign_certificate(someone("issuer"), peer("a"))
    assert await present(guarded.client("a"), peer("issuer"), [certificate]) == 42.0
    with pytest.raises(PeerDisconnected):
        await silent[0].read(1)
    for stream in silent:
        await stream.close()


async def test_an_answer_that_is_too_long_is_not_read(guarded: Guarded) -> None:
    liar = guarded.network.transport("liar")

    async def lie(stream: Stream) -> None:
        await stream.write([struct.pack(">I", 2**31)])

    await liar.serve(ADMISSION_PROTOCOL, lie)
    with pytest.raises(ProtocolError):
        await present(guarded.client("a"), "liar")


# --- a client's view ------------------------------------------------------------------------------------------


def server_record(peer_id: str, start: int = 0, end: int = 4) -> ServerRecord:
    return ServerRecord(
        peer_id=peer_id, model="m", model_name="smol", num_blocks=4, start=start, end=end, dtype="float32"
    )


async def view_of(
    guarded: Guarded, *certificates: str, trust: list[str] | None = None, others: tuple[str, ...] = ()
) -> SwarmView:
    board = Board()
    for peer_id in (peer("issuer"), *others):
        board.put(server_record(peer_id), 1000)
    client = guarded.client("a")
    return SwarmView(
        client,
        MemoryDirectory(board),
        SwarmConfig.of(trust=trust),
        model="m",
        model_name="smol",
        num_blocks=4,
        introductions=Introductions(client, certificates),
    )


async def ping_through(view: SwarmView) -> str:
    """As the retry loop does it: another attempt after each refusal."""
    while True:
        (hop,) = await view.route(0, 4)
        channel = await view.channels.take(hop.peer_id)
        try:
            await request(channel, Packet(Ping()))
        except RequestRefused as error:
            await channel.close()
            await view.failed(error)
            continue
        view.answered(hop, 1, 1, 0.001)
        await channel.close()
        return hop.peer_id


async def test_a_client_presents_its_certificate_where_it_is_refused(guarded: Guarded) -> None:
    view = await view_of(guarded, sign_certificate(someone("issuer"), peer("a")))
    async with asyncio.timeout(10):
        assert await ping_through(view) == peer("issuer")
        guarded.restart()
        await guarded.start()
        assert await ping_through(view) == peer("issuer"), "and again to a server that has forgotten it"


@pytest.mark.parametrize("certificate", ["", "of another"])
async def test_a_client_that_nobody_lets_in_says_so(guarded: Guarded, certificate: str) -> None:
    certificates = [sign_certificate(someone("issuer"), peer("b"))] if certificate else []
    view = await view_of(guarded, *certificates)
    async with asyncio.timeout(10):
        with pytest.raises(NotAdmitted, match="only members") as error:
            await ping_through(view)
    assert peer("a") in str(error.value)
    assert "corolla join" in str(error.value)


async def test_a_server_that_contradicts_itself_is_not_asked_for_ever(guarded: Guarded) -> None:
    guarded.gate.allowed = lambda _peer: False  # its reception says welcome
    view = await view_of(guarded, sign_certificate(someone("issuer"), peer("a")))
    async with asyncio.timeout(10):
        with pytest.raises(NotAdmitted):
            await ping_through(view)


async def test_only_trusted_servers_are_used(guarded: Guarded) -> None:
    view = await view_of(guarded, trust=["theirs"], others=("theirs", "another"))
    assert [hop.peer_id for hop in await view.route(0, 4)] == ["theirs"]
    nobody = await view_of(guarded, trust=["absent"])
    with pytest.raises(
        MissingBlocks, match=r"servers that you trust do not serve blocks 0, 1, 2, 3 .* 1 other"
    ):
        await nobody.route(0, 4)
