"""The directory over hivemind's Kademlia DHT, on the peer's own libp2p daemon.

Invariant: a record that enters this peer's part of the DHT, or leaves it, is small, decodes as a
`ServerRecord`, stands under the key and the peer id that it names, and expires within `MAX_TTL` seconds.
Reads go to the network, never to a cache.

Each record stands under two keys, one for its model and one for the map of all models. A record that is
taken back is replaced by one marked `withdrawn`, since the DHT forgets nothing before it expires. Nothing
here proves that the peer itself wrote its record: routes are only as good as what using them shows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from corolla.errors import SwarmUnavailable
from corolla.swarm.addresses import join_multiaddr, peer_of
from corolla.swarm.directory import Directory, ServerRecord
from corolla.swarm.transport.libp2p import Libp2pTransport

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 2048
MAX_TTL = 900.0  # seconds
REQUEST_SECONDS = 3.0  # after which a DHT peer that does not answer is passed over
REJOIN_SECONDS = 2.0

MAP_KEY = "corolla/1/servers"


class _Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is stored; `withdrawn` takes the record back."""

    record: ServerRecord
    withdrawn: bool


_decoder = msgspec.msgpack.Decoder(_Entry)


def _model_key(model: str) -> str:
    return f"corolla/1/model/{model}"


def _subkey(record: ServerRecord) -> str:
    return f"{record.peer_id}/{record.model}"


def _key_id(key: str) -> bytes:
    identifier: bytes = DHTID.generate(source=key).to_bytes()
    return identifier


class _Validator(RecordValidatorBase):  # type: ignore[misc]
    """Lets only our own kind of record into and out of the DHT."""

    def validate(self, record: DHTRecord) -> bool:
        if len(record.value) > MAX_RECORD_BYTES or len(record.subkey) > MAX_RECORD_BYTES:
            return False
        if record.expiration_time > time.time() + MAX_TTL:
            return False
        try:
            entry = _decoder.decode(msgspec.msgpack.decode(record.value, type=bytes))
            subkey = msgspec.msgpack.decode(record.subkey, type=str)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        keys = (_key_id(MAP_KEY), _key_id(_model_key(entry.record.model)))
        return subkey == _subkey(entry.record) and record.key in keys


class DHTDirectory(Directory):
    """One peer's access to the DHT. Made by `create`, before the transport is closed ended by `close`."""

    def __init__(self, node: Any, peers: Sequence[str]) -> None:
        self._node = node
        self._peers = peers  # base58 ids of those we joined through
        self._expirations: dict[str, float] = {}
        self._rejoined = time.monotonic()

    @classmethod
    async def create(
        cls, transport: Libp2pTransport, *, initial_peers: Sequence[str] = (), client_only: bool = False
    ) -> DHTDirectory:
        """Join the DHT through peers that the transport already knows.

        With `client_only` this peer stores nothing for others. Raises `SwarmUnavailable` when none of the
        initial peers takes part in a DHT of ours, or its clock differs by more than three seconds.
        """
        addresses = [join_multiaddr(address) for address in initial_peers]
        try:
            node = await DHTNode.create(
                p2p=transport.p2p,
                initial_peers=addresses or None,
                client_mode=client_only,
                record_validator=_Validator(),
                wait_timeout=REQUEST_SECONDS,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
            )
        except (RuntimeError, ValidationError) as error:
            listed = ", ".join(initial_peers)
            reason = (
                f"the peer at {listed} refuses this one ({error})"
                if isinstance(error, ValidationError)
                else f"nobody at {listed} answers as a peer of a Corolla swarm"
            )
            raise SwarmUnavailable(f"Cannot join the swarm: {reason}.") from error
        return cls(node, [peer_of(address) for address in addresses])

    async def announce(self, record: ServerRecord, ttl: float) -> None:
        await self._store(record, withdrawn=False, ttl=ttl)

    async def withdraw(self, record: ServerRecord) -> None:
        # Kept as long as the longest-lived record that it may have to outlive somewhere.
        await self._store(record, withdrawn=True, ttl=0.0)

    async def servers(self, model: str) -> list[ServerRecord]:
        return await self._read(_model_key(model))

    async def all_servers(self) -> list[ServerRecord]:
        return await self._read(MAP_KEY)

    async def close(self) -> None:
        if self._node.is_alive:
            await self._node.shutdown()

    async def _store(self, record: ServerRecord, *, withdrawn: bool, ttl: float) -> None:
        await self._rejoin()
        subkey = _subkey(record)
        # The DHT keeps whichever expires later: each of our records must outlive the one that it replaces.
        expiration = max(time.time() + ttl, self._expirations.get(subkey, 0.0) + 0.001)
        self._expirations[subkey] = expiration
        value = msgspec.msgpack.encode(_Entry(record, withdrawn))
        stored = await self._node.store_many(
            keys=[_model_key(record.model), MAP_KEY],
            subkeys=[subkey, subkey],
            values=[value, value],
            expiration_time=expiration,
        )
        if not all(stored.values()):
            logger.warning("Not everybody took this peer's announcement; it is repeated with the next one.")

    async def _read(self, key: str) -> list[ServerRecord]:
        await self._rejoin()
        found = await self._node.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return []
        now = time.time()
        records = []
        for subkey in sorted(found.value, key=str):
            item = found.value[subkey]
            entry = _decoder.decode(item.value)  # validated on its way here
            if not entry.withdrawn and item.expiration_time > now:
                records.append(entry.record)
        return records

    async def _rejoin(self) -> None:
        """Greet those we joined through again, if we lost them: they may have come back after a restart."""
        table = self._node.protocol.routing_table
        lost = [peer for peer in map(PeerID.from_base58, self._peers) if table.get(peer_id=peer) is None]
        if not lost or time.monotonic() - self._rejoined < REJOIN_SECONDS:
            return
        self._rejoined = time.monotonic()
        await asyncio.gather(*(self._node.protocol.call_ping(peer) for peer in lost))
