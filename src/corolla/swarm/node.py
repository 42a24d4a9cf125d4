"""One peer of a swarm: its transport, its view of the directory and its gate, made and ended together.

Invariant: after `close()`, or after a `create` that failed, no process, socket or file of the peer is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from corolla.config import GuardConfig
from corolla.errors import NotAdmitted, RemoteError, UsageError
from corolla.swarm.access.admission import ADMISSION_PROTOCOL, AdmissionService, Gate, Introductions, present
from corolla.swarm.access.invitations import LEEWAY
from corolla.swarm.access.membership import (
    INVITE_HINT,
    Issuer,
    Membership,
    PeerFile,
    beside,
    read_certificates,
    write_addresses,
)
from corolla.swarm.directory.addresses import join_multiaddr, peer_of
from corolla.swarm.directory.directory import Directory
from corolla.swarm.transport.base import Transport

PRESENT_SECONDS = 4.0  # for a peer that we join through


class SwarmClock:
    """The swarm's time: our own clock, set by the peer that we joined through."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        """Seconds since 1970."""
        return time.time() + self.offset


class Node:
    """A transport and a directory. Over libp2p by `create`; of the in-memory twins by the constructor."""

    def __init__(
        self,
        transport: Transport,
        directory: Directory,
        *,
        membership: Membership | None = None,
        introductions: Introductions | None = None,
    ) -> None:
        """Without a `membership` everybody may come in."""
        self.transport = transport
        self.directory = directory
        self.gate = Gate(_everybody if membership is None else membership.allowed)
        self.introductions = introductions or Introductions(transport)
        self._watching = contextlib.AsyncExitStack()

    @classmethod
    async def create(
        cls,
        *,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] | None = None,
        announce: Sequence[str] | None = None,
        identity: Path | None = None,
        client_only: bool = False,
        guard: GuardConfig | None = None,
    ) -> Node:
        """Join the swarm through `initial_peers`, or begin one when there are none.

        `listen` and `announce` are addresses (`HOST:PORT` or multiaddresses; by default 127.0.0.1 and a free
        port); `identity` is a file that keeps the peer id, written when it is not there; the certificates
        beside it are presented where they are asked for. With `client_only` the peer is not asked to keep the
        swarm's records. With a `guard` only members are answered, and no traffic is relayed. Raises
        `UsageError` for a malformed address, a port in use, an unusable identity file or a clock that is more
        than ten minutes off, `NotAdmitted` when the swarm is guarded, `SwarmUnavailable` when none of the
        peers answers.
        """
        # Importing the network layer takes seconds; who only wants the in-memory twins does not pay for it.
        from corolla.swarm.directory.directory_dht import DHTDirectory
        from corolla.swarm.transport.libp2p import Libp2pTransport

        peers = [peer_of(join_multiaddr(address)) for address in initial_peers]
        revoked = None if identity is None else PeerFile(beside(identity, "revoked"), optional=True)
        allow = None if guard is None or guard.allow is None else PeerFile(guard.allow)
        certificates = [] if identity is None else list(read_certificates(identity).values())
        transport = await Libp2pTransport.create(
            initial_peers=initial_peers,
            listen=listen,
            announce=announce,
            identity=identity,
            client_only=client_only,
            relays=guard is None,
        )
        try:
            membership = None
            if guard is not None:
                issuers = {*guard.issuers, transport.peer_id}
                membership = Membership(transport.peer_id, allow=allow, issuers=issuers, revoked=revoked)
            introductions = Introductions(transport, certificates)
            transport.calls.introduce = introductions.introduce
            clock = SwarmClock()
            if not client_only:
                issuer = None
                if identity is not None and transport.identity is not None and revoked is not None:
                    issuer = Issuer(transport.identity, identity, revoked)
                await transport.serve(ADMISSION_PROTOCOL, AdmissionService(membership, issuer, clock).handle)
            clock.offset = await _join(transport, peers, certificates)
            directory = await DHTDirectory.create(
                transport,
                initial_peers=initial_peers,
                client_only=client_only,
                # Those we join through keep the directory: they may call, too.
                allowed=_everybody
                if membership is None
                else lambda peer: peer in peers or membership.allowed(peer),
                clock=clock,
            )
        except BaseException:
            await transport.close()
            raise
        node = cls(transport, directory, membership=membership, introductions=introductions)
        if identity is not None and not client_only:
            write_addresses(identity, await node.join_addresses())
        if membership is not None:
            await node._watching.enter_async_context(node.gate.watched())
        return node

    @property
    def peer_id(self) -> str:
        """This peer's id."""
        return self.transport.peer_id

    async def join_addresses(self) -> list[str]:
        """Addresses that others can join through."""
        return await self.transport.addresses()

    async def close(self) -> None:
        """Leave the swarm; safe to call twice."""
        await self._watching.aclose()
        await self.directory.close()
        await self.transport.close()


def _everybody(_peer_id: str) -> bool:
    return True


async def _join(transport: Transport, peers: Sequence[str], certificates: Sequence[str]) -> float:
    """Present this peer to those it joins through; by how much the swarm's clock is ahead of ours, in seconds.

    Raises `NotAdmitted` when all that answer refuse, `UsageError` for a clock that is too far off.
    """
    started = time.time()
    asked = [asyncio.wait_for(present(transport, peer, certificates), PRESENT_SECONDS) for peer in peers]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refusals = []
    for peer, answer in zip(peers, answers, strict=True):
        if isinstance(answer, float):
            return _checked_offset(answer, started, time.time())
        if isinstance(answer, NotAdmitted):
            refusals.append(f"Peer {peer} does not let this one ({transport.peer_id}) in: {answer}")
        elif not isinstance(answer, RemoteError | TimeoutError):
            raise answer
    if refusals:
        raise NotAdmitted(f"{refusals[0]} If you are new here, {INVITE_HINT}.")
    return 0.0  # nobody answered in time; the directory says so if nobody answers there either


def _checked_offset(theirs: float, started: float, ended: float) -> float:
    """How far ahead the other clock is; 0 when that may be the exchange's own time."""
    if started <= theirs <= ended:
        return 0.0
    offset = theirs - (started + ended) / 2
    if not abs(offset) <= LEEWAY:
        raise UsageError(
            f"This machine's clock is {abs(offset):,.0f} s {'behind' if offset > 0 else 'ahead of'} the swarm's; "
            "more than ten minutes are not tolerated: set the clock and try again."
        )
    return offset
