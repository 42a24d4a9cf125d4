"""The directory over libp2p: hivemind's Kademlia finds the peers that keep it.

Those are the few peers nearest to the key of a model, and to the key of the map of all models, and besides them those
that this peer joined through, which its user has chosen: whoever places himself near a key hides nobody. hivemind
stores nothing and is believed nothing but who is near; how records travel is `distributed.py`'s. All times are the
swarm's: the clock of the peer that everybody joined through, as far as one knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from corolla.errors import SwarmUnavailable
from corolla.swarm.directory.addresses import join_multiaddr, peer_of
from corolla.swarm.directory.distributed import (
    DIRECTORY_PROTOCOL,
    REQUEST_SECONDS,
    DistributedDirectory,
    RecordService,
)
from corolla.swarm.directory.records import RecordStore, Verifier
from corolla.swarm.transport.libp2p import Libp2pTransport
from corolla.text import get_logger
from corolla.wire.messages import PROTOCOL_NAME

logger = get_logger(__name__)

REJOIN_SECONDS = 2.0
LOOKUP_SECONDS = 2.0  # after which those count as nearest that are known already
KEEPERS = 5  # of each key, besides those that one joined through
MAX_KEYS_ASKED = 64  # in one request


def _everybody(_peer_id: str) -> bool:
    return True


class DHTDirectory(DistributedDirectory):
    """One peer's access to the directory. Made by `create`, before the transport is closed ended by `close`."""

    def __init__(
        self,
        node: Any,
        transport: Libp2pTransport,
        peers: Sequence[str],
        clock: Callable[[], float],
        own: RecordStore | None,
        allowed: Callable[[str], bool],
    ) -> None:
        self.verifier, introduce = Verifier(), transport.calls.introduce
        super().__init__(
            transport, transport.identity, self._nearest, self.verifier, clock, own=own, introduce=introduce
        )
        self._node = node
        self._peers = peers  # base58 ids of those we joined through
        self._allowed = allowed
        self._rejoined = time.monotonic()

    @classmethod
    async def create(
        cls,
        transport: Libp2pTransport,
        *,
        initial_peers: Sequence[str] = (),
        client_only: bool = False,
        allowed: Callable[[str], bool] = _everybody,
        clock: Callable[[], float] = time.time,
    ) -> DHTDirectory:
        """Join through peers that the transport already knows.

        With `client_only` this peer keeps nothing for others. Only peers for which `allowed` is true are
        answered and asked, and only their records kept. `clock` tells the swarm's time. Raises `SwarmUnavailable` when
        none of the initial peers takes part in a directory of ours, or can reach this one.
        """
        addresses = [join_multiaddr(address) for address in initial_peers]
        transport.calls.takes = lambda peer, request: allowed(peer) and _is_harmless(request)
        own = None if client_only else RecordStore(clock)
        node = await DHTNode.create(
            p2p=transport.p2p,
            initial_peers=addresses or None,
            client_mode=client_only,
            wait_timeout=REQUEST_SECONDS,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            # Else clocks that differ by three seconds are refused; whether we joined is checked below.
            ensure_bootstrap_success=False,
        )
        directory = cls(node, transport, [peer_of(address) for address in addresses], clock, own, allowed)
        try:
            await directory._check_joined(initial_peers)
            if own is not None:
                await transport.serve(
                    DIRECTORY_PROTOCOL, RecordService(own, directory.verifier, allowed).handle
                )
        except BaseException:
            await directory.close()
            raise
        return directory

    async def _check_joined(self, initial_peers: Sequence[str]) -> None:
        """Raises `SwarmUnavailable` unless one of them answers and, if we serve, reaches us."""
        if not self._peers:
            return
        answers = await asyncio.gather(*map(self._ping, self._peers))
        listed = ", ".join(initial_peers)
        if not any(answer is not None for answer in answers):
            raise SwarmUnavailable(
                f"Cannot join the swarm: nobody at {listed} answers as a peer of a Corolla swarm."
            )
        if not self._node.protocol.client_mode and not any(
            answer is not None and answer.available for answer in answers
        ):
            raise SwarmUnavailable(
                f"Cannot join the swarm: the peer at {listed} cannot reach this one; open its port in the firewall "
                "and name it with --listen and --announce."
            )

    async def _ping(self, peer: str) -> Any:
        protocol = self._node.protocol
        stub = protocol.get_stub(PeerID.from_base58(peer))
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=not protocol.client_mode)
        try:
            return await stub.rpc_ping(request, timeout=2 * REQUEST_SECONDS)
        except Exception as error:  # the library's own kinds, a timeout, another's bug
            logger.debug("No answer from %s: %s", peer, error)
            return None

    async def close(self) -> None:
        await super().close()
        if self._node.is_alive:
            await self._node.shutdown()

    async def _nearest(self, models: Sequence[str | None]) -> list[str]:
        """The other peers that keep the records of these models."""
        await self._rejoin()
        keys = [
            DHTID.generate(f"{PROTOCOL_NAME}/{'servers' if one is None else f'model/{one}'}")
            for one in models
        ]
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                near = await self._node.find_nearest_nodes(keys, k_nearest=KEEPERS)
        except TimeoutError:  # somebody on the way is mute
            table = self._node.protocol.routing_table
            near = {key: dict(table.get_nearest_neighbors(key, KEEPERS)) for key in keys}
        found = [peer.to_base58() for nodes in near.values() for peer in nodes.values()]
        others = [peer for peer in dict.fromkeys([*self._peers, *found]) if peer != self._transport.peer_id]
        return [peer for peer in others if self._allowed(peer)]

    async def _rejoin(self) -> None:
        """Greet those we joined through again, if we lost them: they may have come back after a restart."""
        table = self._node.protocol.routing_table
        lost = [peer for peer in map(PeerID.from_base58, self._peers) if table.get(peer_id=peer) is None]
        if not lost or time.monotonic() - self._rejoined < REJOIN_SECONDS:
            return
        self._rejoined = time.monotonic()
        await asyncio.gather(*(self._node.protocol.call_ping(peer) for peer in lost))


def _is_harmless(request: Any) -> bool:
    """Whether a call of a peer is one that costs little: hivemind keeps no records here."""
    if isinstance(request, dht_pb2.FindRequest):
        return len(request.keys) <= MAX_KEYS_ASKED
    return not isinstance(request, dht_pb2.StoreRequest)
