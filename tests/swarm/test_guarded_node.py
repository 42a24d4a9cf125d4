"""A guarded peer over libp2p: its directory, its relay, and clocks that are wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.swarm.directory.test_directory import record

from corolla.config import GuardConfig, NodeConfig
from corolla.errors import NotAdmitted, PeerUnreachable, SwarmUnavailable, UsageError
from corolla.swarm import node as node_module
from corolla.swarm.access.admission import Introductions, join
from corolla.swarm.access.invitations import LEEWAY, sign_certificate, sign_invitation
from corolla.swarm.access.membership import keep_certificate, read_certificates, revoke
from corolla.swarm.directory.directory_dht import DHTDirectory
from corolla.swarm.node import Node, SwarmClock
from corolla.swarm.transport.identity import Identity, prepare_identity
from corolla.swarm.transport.libp2p import Libp2pTransport


@dataclass
class Guarded:
    node: Node
    path: Path
    issuer: Identity
    addresses: list[str]

    def certify(self, identity: Path) -> str:
        """Make an identity a member, on paper; gives its peer id."""
        member = prepare_identity(identity)
        keep_certificate(identity, self.issuer.peer_id, sign_certificate(self.issuer, member.peer_id))
        return member.peer_id


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    path = tmp_path / "issuer"
    issuer = prepare_identity(path)
    node = await Node.create(identity=path, guard=GuardConfig())
    await node.directory.announce(record(node.peer_id), 60)
    yield Guarded(node, path, issuer, await node.join_addresses())
    await node.close()


async def test_a_stranger_joins_neither_politely_nor_otherwise(guarded: Guarded) -> None:
    with pytest.raises(NotAdmitted, match="only members"):
        await Node.create(initial_peers=guarded.addresses, client_only=True)
    transport = await Libp2pTransport.create(initial_peers=guarded.addresses)
    try:
        with pytest.raises(SwarmUnavailable):  # it goes straight to the directory, and hears nothing there
            await DHTDirectory.create(transport, initial_peers=guarded.addresses)
    finally:
        await transport.close()
    assert not guarded.node.directory._node.protocol.routing_table.peer_id_to_uid  # type: ignore[attr-defined]


async def test_a_member_reads_and_announces_until_it_is_revoked(guarded: Guarded, tmp_path: Path) -> None:
    """Its certificate is presented by the directory itself, where it is refused."""
    member_id = guarded.certify(tmp_path / "member")
    transport = await Libp2pTransport.create(initial_peers=guarded.addresses, identity=tmp_path / "member")
    transport.calls.introduce = Introductions(
        transport, list(read_certificates(tmp_path / "member").values())
    ).introduce
    directory = await DHTDirectory.create(transport, initial_peers=guarded.addresses)
    try:
        await directory.announce(record(member_id), 60)
        everybody = {guarded.node.peer_id, member_id}
        assert {found.peer_id for found in await directory.servers("m")} == everybody
        assert {found.peer_id for found in await guarded.node.directory.servers("m")} == everybody
        revoke(guarded.path, member_id)
        later = record(member_id, free_cache_tokens=7)
        await directory.announce(later, 60)
        found = {one.peer_id: one.free_cache_tokens for one in await guarded.node.directory.servers("m")}
        assert found == {guarded.node.peer_id: 0, member_id: 0}, "it says nothing new any more"
    finally:
        await directory.close()
        await transport.close()


async def test_an_invitation_is_redeemed_over_the_network(guarded: Guarded, tmp_path: Path) -> None:
    token = sign_invitation(guarded.issuer, guarded.addresses, seconds=100)
    assert await join(token, tmp_path / "guest") == guarded.issuer.peer_id
    guest = await Node.create(initial_peers=guarded.addresses, identity=tmp_path / "guest", client_only=True)
    try:
        assert [found.peer_id for found in await guest.directory.servers("m")] == [guarded.node.peer_id]
    finally:
        await guest.close()
    with pytest.raises(NotAdmitted, match="redeemed by another"):
        await join(token, tmp_path / "thief")


# libp2p's circuit relay, version 2: a peer is reached through a relay once it has reserved a place there.
HOP = "/libp2p/circuit/relay/0.2.0/hop"
RESERVE = bytes([2, 8, 0])  # a protobuf message of two bytes: type (field 1) RESERVE (0)


async def relays(addresses: list[str], peer_id: str) -> bool:
    """Whether a stranger gets a place, which any peer may use to talk to it through that peer."""
    stranger = await Libp2pTransport.create(initial_peers=addresses)
    try:
        stream = await stranger.open(peer_id, HOP)
        await stream.write([RESERVE])
        answer = await stream.read(2)  # begins with its length; a voucher of a place is hundreds of bytes
        await stream.close()
        return answer[0] > 127
    except PeerUnreachable:  # it does not know the protocol
        return False
    finally:
        await stranger.close()


async def test_a_guarded_peer_relays_nothing(guarded: Guarded) -> None:
    assert not await relays(guarded.addresses, guarded.node.peer_id)


async def test_another_peer_relays() -> None:
    """So that the test above asks the right question."""
    node = await Node.create()
    try:
        assert await relays(await node.join_addresses(), node.peer_id)
    finally:
        await node.close()


def test_a_guard_needs_somebody_to_let_in() -> None:
    with pytest.raises(UsageError, match="--identity"):
        NodeConfig(guard=GuardConfig())


# --- clocks ----------------------------------------------------------------------------------------------


class Wrong(SwarmClock):
    """Of a machine whose clock is ahead."""

    ahead = LEEWAY - 60

    def __call__(self) -> float:
        return super().__call__() + self.ahead


async def test_a_clock_nine_minutes_off_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(node_module, "SwarmClock", Wrong)
        first = await Node.create()
    join_through = await first.join_addresses()
    second = await Node.create(initial_peers=join_through)
    third = await Node.create(initial_peers=await second.join_addresses(), client_only=True)
    try:
        await first.directory.announce(record(first.peer_id), 60)
        await second.directory.announce(record(second.peer_id), 60)
        for node in (first, second, third):
            found = await node.directory.servers("m")
            assert {server.peer_id for server in found} == {first.peer_id, second.peer_id}
        await second.directory.withdraw(record(second.peer_id))
        assert [server.peer_id for server in await third.directory.servers("m")] == [first.peer_id]
    finally:
        for node in (third, second, first):
            await node.close()


@pytest.mark.parametrize(("offset", "word"), [(LEEWAY + 5, "behind"), (-LEEWAY - 5, "ahead of")])
def test_a_clock_further_off_is_said(offset: float, word: str) -> None:
    with pytest.raises(UsageError, match=rf"clock is 605 s {word} the swarm's"):
        node_module._checked_offset(1000.0 + offset, 999.0, 1001.0)
    with pytest.raises(UsageError):
        node_module._checked_offset(float("nan"), 999.0, 1001.0)
    assert node_module._checked_offset(1000.9, 999.0, 1001.0) == 0.0
    assert node_module._checked_offset(1300.0, 999.0, 1001.0) == 300.0
