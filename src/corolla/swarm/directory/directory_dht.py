"""The directory over hivemind's Kademlia DHT, on the peer's own libp2p daemon.

Invariant: what is read was signed by the server that it is about, is not expired and not taken back
(`dht_records.py`). Reads go to the network, never to a cache.

Each record stands under two keys, one for its model and one for the map of all models. A record that is
taken back is replaced by one marked `withdrawn`, since the DHT forgets nothing before it expires. All times
are the swarm's: the clock of the peer that everybody joined through, as far as one knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from corolla.errors import SwarmUnavailable
from corolla.swarm.directory.addresses import join_multiaddr, peer_of
from corolla.swarm.directory.dht_records import (
    MAP_KEY,
    Entry,
    Ledger,
    RecordValidator,
    model_key,
    read_entry,
    sign_entry,
    stored_until,
    subkey_of,
)
from corolla.swarm.directory.directory import Directory, ServerRecord
from corolla.swarm.transport.libp2p import Libp2pTransport
from corolla.text import get_logger

logger = get_logger(__name__)

REQUEST_SECONDS = 3.0  # after which a DHT peer that does not answer is passed over
REJOIN_SECONDS = 2.0


def _everybody(_peer_id: str) -> bool:
    return True


class DHTDirectory(Directory):
    """One peer's access to the DHT. Made by `create`, before the transport is closed ended by `close`."""

    def __init__(
        self, node: Any, transport: Libp2pTransport, peers: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self._node = node
        self._identity = transport.identity
        self._peers = peers  # base58 ids of those we joined through
        self._clock = clock
        self._expirations: dict[str, float] = {}
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
        """Join the DHT through peers that the transport already knows.

        With `client_only` this peer stores nothing for others. Only peers for which `allowed` is true are
        answered, and only their records kept. `clock` tells the swarm's time. Raises `SwarmUnavailable` when
        none of the initial peers takes part in a DHT of ours, or can reach this one.
        """
        addresses = [join_multiaddr(address) for address in initial_peers]
        validator = RecordValidator(clock)
        transport.calls.takes = Ledger(validator, allowed, clock).takes
        node = await DHTNode.create(
            p2p=transport.p2p,
            initial_peers=addresses or None,
            client_mode=client_only,
            record_validator=validator,
            wait_timeout=REQUEST_SECONDS,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            # Else clocks that differ by three seconds are refused; whether we joined is checked below.
            ensure_bootstrap_success=False,
        )
        directory = cls(node, transport, [peer_of(address) for address in addresses], clock)
        try:
            await directory._check_joined(initial_peers)
        except BaseException:
            await node.shutdown()
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

    async def announce(self, record: ServerRecord, ttl: float) -> None:
        await self._store(record, withdrawn=False, ttl=ttl)

    async def withdraw(self, record: ServerRecord) -> None:
        # Kept as long as the longest-lived record that it may have to outlive somewhere.
        await self._store(record, withdrawn=True, ttl=0.0)

    async def servers(self, model: str) -> list[ServerRecord]:
        return await self._read(model_key(model))

    async def all_servers(self) -> list[ServerRecord]:
        return await self._read(MAP_KEY)

    async def close(self) -> None:
        if self._node.is_alive:
            await self._node.shutdown()

    async def _store(self, record: ServerRecord, *, withdrawn: bool, ttl: float) -> None:
        if self._identity is None or record.peer_id != self._identity.peer_id:
            raise ValueError("A peer announces itself only, and a client nothing.")
        await self._rejoin()
        subkey = subkey_of(record)
        # The DHT keeps whichever expires later: each of our records must outlive the one that it replaces.
        expires = max(self._clock() + ttl, self._expirations.get(subkey, 0.0) + 0.001)
        self._expirations[subkey] = expires
        value = sign_entry(Entry(record, withdrawn, expires), self._identity)
        stored = await self._node.store_many(
            keys=[model_key(record.model), MAP_KEY],
            subkeys=[subkey, subkey],
            values=[value, value],
            expiration_time=stored_until(expires),
        )
        if not all(stored.values()):
            logger.warning("Not everybody took this peer's announcement; it is repeated with the next one.")

    async def _read(self, key: str) -> list[ServerRecord]:
        await self._rejoin()
        found = await self._node.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return []
        now = self._clock()
        entries = [read_entry(found.value[subkey].value) for subkey in sorted(found.value, key=str)]
        return [entry.record for entry in entries if not entry.withdrawn and entry.expires > now]

    async def _rejoin(self) -> None:
        """Greet those we joined through again, if we lost them: they may have come back after a restart."""
        table = self._node.protocol.routing_table
        lost = [peer for peer in map(PeerID.from_base58, self._peers) if table.get(peer_id=peer) is None]
        if not lost or time.monotonic() - self._rejoined < REJOIN_SECONDS:
            return
        self._rejoined = time.monotonic()
        await asyncio.gather(*(self._node.protocol.call_ping(peer) for peer in lost))
