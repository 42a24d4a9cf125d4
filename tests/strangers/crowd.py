"""Thousands of identities at the cost of a few primes, and networks of peers that keep a directory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, islice

import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.distributed import DIRECTORY_PROTOCOL, DistributedDirectory, RecordService
from corolla.swarm.directory.records import Entry, RecordStore, Verifier, sign_entry
from corolla.swarm.transport.base import Transport
from corolla.swarm.transport.identity import Identity
from corolla.swarm.transport.memory import MemoryNetwork

MODEL = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # as long as a real one


@cache
def _primes(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        numbers = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_numbers()
        found += [numbers.p, numbers.q]
    return found


def identity_of(p: int, q: int, exponent: int = 65537) -> Identity:
    """A key pair of two primes."""
    d = pow(exponent, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPrivateNumbers(
        p=p,
        q=q,
        d=d,
        dmp1=d % (p - 1),
        dmq1=d % (q - 1),
        iqmp=pow(q, -1, p),
        public_numbers=rsa.RSAPublicNumbers(exponent, p * q),
    )
    return Identity(numbers.private_key(unsafe_skip_rsa_key_validation=True))


def identities(count: int) -> Iterator[Identity]:
    """So many different ones. Whoever knows two of them knows the primes of others: for tests only."""
    primes = 2
    while primes * (primes - 1) // 2 < count:
        primes += 2
    pairs = combinations(_primes(primes), 2)
    return islice((identity_of(p, q) for p, q in pairs if (p * q).bit_length() == 2048), count)


def record_of(identity: Identity, model: str = MODEL, **changes: object) -> ServerRecord:
    base = ServerRecord(
        peer_id=identity.peer_id,
        model=model,
        model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        num_blocks=30,
        start=0,
        end=30,
        dtype="float32",
        throughput=123.456,
        free_cache_tokens=100_000,
        version="0.1.0",
    )
    return msgspec.structs.replace(base, **changes)


def signed(identity: Identity, model: str = MODEL, **changes: object) -> tuple[Entry, bytes]:
    """A record as its server makes it, for a minute."""
    entry = Entry(record_of(identity, model, **changes), False, time.time() + 60)
    return entry, sign_entry(entry, identity)


class KeepersSwarm:
    """Peers that keep a directory, on the in-memory network."""

    def __init__(self, *keepers: Identity) -> None:
        self.network = MemoryNetwork()
        self._transports: dict[str, Transport] = {}
        self.shelves: dict[str, RecordStore] = {}
        self._verifiers: list[Verifier] = []
        self._keepers = keepers

    async def __aenter__(self) -> KeepersSwarm:
        for identity in self._keepers:
            shelf = self.shelves[identity.peer_id] = RecordStore()
            keeper = RecordService(shelf, self._verifier(), lambda _peer: True)
            await self.transport(identity.peer_id).serve(DIRECTORY_PROTOCOL, keeper.handle)
        return self

    def transport(self, peer_id: str) -> Transport:
        """The peer's, made when it is first asked for."""
        if peer_id not in self._transports:
            self._transports[peer_id] = self.network.transport(peer_id)
        return self._transports[peer_id]

    def directory(
        self, identity: Identity | None = None, *, of: Sequence[str] | None = None
    ) -> DistributedDirectory:
        """A client's, or a server's; it knows the keepers `of`, by default all."""
        known = list(self.shelves) if of is None else list(of)

        async def keepers(_models: Sequence[str | None]) -> list[str]:
            return known

        transport = self.transport("client" if identity is None else identity.peer_id)
        return DistributedDirectory(transport, identity, keepers, self._verifier(), time.time)

    def _verifier(self) -> Verifier:
        self._verifiers.append(Verifier())
        return self._verifiers[-1]

    async def __aexit__(self, *_: object) -> None:
        for transport in self._transports.values():
            await transport.close()
        for verifier in self._verifiers:
            verifier.close()
