"""The directory's records: signed by the servers that they are about, and what a peer keeps of them for others.

Invariant: a record that is kept, or read, is small, well-formed and sound, and was signed by the peer that it names
together with its expiry; one that is kept expires within `MAX_TTL` seconds (clocks may differ by `LEEWAY`). Cheap
checks come first, and signatures are checked on a thread of their own, never by the loop that answers. What is kept is
bounded, for each server and in all; newcomers do not push out those who have been here for long, nor these them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

import msgspec
from cachetools import LRUCache

from corolla.swarm.access.invitations import LEEWAY
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.transport.identity import MAX_KEY_BYTES, Identity, is_signed_by

MAX_RECORD_BYTES = 2560  # RSA with 4096 bits (key and signature: 1062) and the longest texts; 875 are usual
MAX_TTL = 900.0  # seconds
MAX_RECORDS = 30_000  # kept for others
MAX_MODELS_OF_A_PEER = 4
PUTS_A_MINUTE = 60  # of one peer
ESTABLISHED_SECONDS = 600.0  # who has been kept so long is no newcomer
NEWCOMERS_PART = 0.25  # of `MAX_RECORDS` that the established leave to newcomers
NAME_BYTES, PLACE_BYTES = 16, 8

_SIGNED_AS = b"corolla server record 3\0"


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a server says of itself until `expires` (the swarm's time); `withdrawn` takes the record back."""

    record: ServerRecord
    withdrawn: bool
    expires: float


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    entry: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]  # an encoded `Entry`
    key: Annotated[bytes, msgspec.Meta(max_length=MAX_KEY_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(max_length=MAX_KEY_BYTES)]


_entries = msgspec.msgpack.Decoder(Entry)
_signed = msgspec.msgpack.Decoder(_Signed)


def sign_entry(entry: Entry, identity: Identity) -> bytes:
    """A record as it is kept and travels."""
    data = msgspec.msgpack.encode(entry)
    return msgspec.msgpack.encode(_Signed(data, identity.public, identity.sign(_SIGNED_AS + data)))


def read_record(value: bytes) -> Entry | None:
    """What a record says if all of it holds; None otherwise, whatever a peer sent. Costs most for a good one."""
    if len(value) > MAX_RECORD_BYTES:
        return None
    try:
        signed = _signed.decode(value)
        entry = _entries.decode(signed.entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if not entry.record.is_sound:
        return None
    genuine = is_signed_by(entry.record.peer_id, signed.key, _SIGNED_AS + signed.entry, signed.signature)
    return entry if genuine else None


def name_of(entry: Entry, value: bytes) -> bytes:
    """The name of a version of a record: one half says whose it is and of what model, the other which version."""
    place = sha256(f"{entry.record.peer_id}/{entry.record.model}".encode()).digest()
    return place[:PLACE_BYTES] + version_of(value)


def version_of(value: bytes) -> bytes:
    """The second half of a record's name."""
    return sha256(value).digest()[: NAME_BYTES - PLACE_BYTES]


class Verifier:
    """Reads records on one thread of its own, in the order in which they come."""

    def __init__(self) -> None:
        self.waiting = 0  # records
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="corolla-verifier")

    async def read(self, values: Sequence[bytes]) -> list[Entry | None]:
        """As `read_record`, for each."""
        self.waiting += len(values)
        try:
            reading = self._thread.submit(lambda: [read_record(value) for value in values])
            return await asyncio.wrap_future(reading)
        finally:
            self.waiting -= len(values)

    def close(self) -> None:
        """Read no more; safe to call twice."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Kept:
    value: bytes
    name: bytes
    expires: float
    since: float  # when the first of its versions came


@dataclass
class _List:
    names: bytes
    changes: int  # that had been made when it was
    good_until: float


class RecordStore:
    """The records that one peer keeps for others: the newest of each server for each of its models."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # By owner and model. Whoever has been here for longest comes first: a newer version takes the same place.
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._by_place: dict[bytes, _Kept] = {}  # the same, by the first half of their names
        self._models: Counter[str] = Counter()  # that each owner has here
        self._puts: Counter[str] = Counter()  # of each owner in the running minute
        self._minute = 0
        self._leaving: list[tuple[str, str]] = []  # newcomers, in the order in which they will make room
        self._changes = 0
        self._lists: LRUCache[str | None, _List] = LRUCache(64)  # by model

    def may_put(self, owner: str) -> bool:
        """Whether the owner's next record is read at all. To be asked once for each."""
        self._forget_expired()
        self._puts[owner] += 1
        return self._puts[owner] <= PUTS_A_MINUTE

    def put(self, entry: Entry, value: bytes) -> bool:
        """Keep a record that was read; False where it would stay too long, or there is no room for its owner."""
        if not entry.expires <= self._clock() + MAX_TTL + LEEWAY:
            return False
        owner, place = entry.record.peer_id, (entry.record.peer_id, entry.record.model)
        before = self._kept.get(place)
        if before is None and not self._has_room(owner):
            return False
        if before is not None and before.expires >= entry.expires:
            return True  # a newer one is here already
        since = self._clock() if before is None else before.since
        self._models[owner] += before is None
        kept = _Kept(value, name_of(entry, value), entry.expires, since)
        self._kept[place] = self._by_place[kept.name[:PLACE_BYTES]] = kept
        self._changes += 1
        return True

    def names(self, model: str | None) -> bytes:
        """The names of the records of a model, or of all, one behind the other; those of longest standing first.

        Where many records change all the time, a list may be used for some moments: no more than a tenth of the time
        goes into them.
        """
        known, now = self._lists.get(model), time.perf_counter()
        if known is not None and (known.changes == self._changes or now < known.good_until):
            return known.names
        names = b"".join(kept.name for (_, of), kept in self._kept.items() if model is None or of == model)
        ended = time.perf_counter()
        self._lists[model] = _List(names, self._changes, good_until=ended + 9 * (ended - now))
        return names

    def values(self, names: Iterable[bytes]) -> list[bytes]:
        """Those of these records that are still here, in their newest versions."""
        places = (name[:PLACE_BYTES] for name in names)
        return [self._by_place[place].value for place in places if place in self._by_place]

    def _has_room(self, owner: str) -> bool:
        if self._models[owner] >= MAX_MODELS_OF_A_PEER:
            return False
        if len(self._kept) < MAX_RECORDS:
            return True
        self._drop(self._next_to_leave())
        return True

    def _next_to_leave(self) -> tuple[str, str]:
        # Newcomers make room for newcomers, in random order, so that each is here for some of the time; the
        # established are as many as leave them a part of the room.
        while True:
            if not self._leaving:
                latest = self._clock() - ESTABLISHED_SECONDS
                settled = int(MAX_RECORDS * (1 - NEWCOMERS_PART))
                places = enumerate(self._kept.items())
                self._leaving = [p for n, (p, kept) in places if n >= settled or kept.since > latest]
                random.shuffle(self._leaving)
            place = self._leaving.pop()
            if place in self._kept:
                return place

    def _drop(self, place: tuple[str, str]) -> None:
        self._changes += 1
        self._by_place.pop(self._kept.pop(place).name[:PLACE_BYTES], None)
        self._models[place[0]] -= 1
        if not self._models[place[0]]:
            del self._models[place[0]]

    def _forget_expired(self) -> None:
        now = self._clock()
        if self._minute == int(now // 60):
            return
        self._minute = int(now // 60)
        self._puts.clear()
        for place in [place for place, kept in self._kept.items() if kept.expires + LEEWAY < now]:
            self._drop(place)
