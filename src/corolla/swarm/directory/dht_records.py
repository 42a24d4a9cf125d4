"""What stands in the DHT: entries that their own servers have signed, and how many a peer keeps for others.

Invariant: a record that enters this peer's part of the DHT, or leaves it, is small, decodes as a
`ServerRecord`, stands under the key and the peer id that it names, was signed by that peer together with its
expiry, and expires within `MAX_TTL` seconds (clocks may differ by `LEEWAY`). What is kept for others is
bounded, for each server and in all.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.routing import DHTID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from corolla.swarm.access.invitations import LEEWAY
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.transport.identity import MAX_KEY_BYTES, Identity, is_signed_by
from corolla.wire.messages import PROTOCOL_NAME

MAX_RECORD_BYTES = 3072
MAX_SUBKEY_BYTES = 320
MAX_TTL = 900.0  # seconds
MAX_RECORDS = 20_000  # kept for others
MAX_MODELS_OF_A_PEER = 16  # each of them a record under two keys
RECORDS_A_MINUTE = 5_000  # that one peer may send, its own and others'
MAX_KEYS_ASKED = 64  # in one request

WHOLE_DICTIONARY = b""  # what the library puts in a subkey's place when it hands over all of a key's records

MAP_KEY = f"{PROTOCOL_NAME}/servers"
_SIGNED_AS = b"corolla server record 2\0"


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a server says of itself until `expires` (the swarm's time); `withdrawn` takes the record back."""

    record: ServerRecord
    withdrawn: bool
    expires: float


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    entry: bytes  # an encoded `Entry`
    key: Annotated[bytes, msgspec.Meta(max_length=MAX_KEY_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(max_length=MAX_KEY_BYTES)]


_entries = msgspec.msgpack.Decoder(Entry)
_signed = msgspec.msgpack.Decoder(_Signed)


def model_key(model: str) -> str:
    """The key under which a model's servers stand."""
    return f"{PROTOCOL_NAME}/model/{model}"


def subkey_of(record: ServerRecord) -> str:
    """A server's place under a key."""
    return f"{record.peer_id}/{record.model}"


def stored_until(expires: float) -> float:
    """When the DHT forgets an entry: late enough for peers whose clock is ahead."""
    return expires + LEEWAY


def sign_entry(entry: Entry, identity: Identity) -> bytes:
    """The value to store."""
    data = msgspec.msgpack.encode(entry)
    return msgspec.msgpack.encode(_Signed(data, identity.public, identity.sign(_SIGNED_AS + data)))


def read_entry(value: bytes) -> Entry:
    """The entry of a stored value that was validated. Raises `msgspec.MsgspecError`."""
    return _entries.decode(_signed.decode(value).entry)


def key_id(key: str) -> bytes:
    """A key as the DHT knows it."""
    identifier: bytes = DHTID.generate(source=key).to_bytes()
    return identifier


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Lets only our own kind of record, signed by its server, into and out of the DHT."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def validate(self, record: DHTRecord) -> bool:
        if len(record.value) > MAX_RECORD_BYTES or len(record.subkey) > MAX_SUBKEY_BYTES:
            return False
        if record.expiration_time > self._clock() + MAX_TTL + 2 * LEEWAY:
            return False
        try:
            signed = _signed.decode(msgspec.msgpack.decode(record.value, type=bytes))
            entry = _entries.decode(signed.entry)
            subkey = msgspec.msgpack.decode(record.subkey, type=str)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        return (
            subkey == subkey_of(entry.record)
            and record.key in (key_id(MAP_KEY), key_id(model_key(entry.record.model)))
            # The expiry is signed too: nobody can keep an old record alive, or bring one back.
            and record.expiration_time == stored_until(entry.expires)
            and is_signed_by(entry.record.peer_id, signed.key, _SIGNED_AS + signed.entry, signed.signature)
        )


class Ledger:
    """Decides which requests of other peers this one's part of the DHT takes: from whom, and how much."""

    def __init__(
        self,
        validator: RecordValidator,
        allowed: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`allowed` says of a peer id whether the peer is a member."""
        self._validator = validator
        self._allowed = allowed
        self._clock = clock
        self._kept: dict[tuple[bytes, bytes], float] = {}  # key, subkey -> when it is forgotten
        self._of_owner: defaultdict[str, set[tuple[bytes, bytes]]] = defaultdict(set)
        self._sent: defaultdict[str, int] = defaultdict(int)  # records by each sender in the running minute
        self._minute = 0

    def takes(self, sender: str, request: Any) -> bool:
        """Whether a request of `sender` may be answered at all."""
        if not self._allowed(sender):
            return False
        if isinstance(request, dht_pb2.FindRequest):
            return len(request.keys) <= MAX_KEYS_ASKED
        if isinstance(request, dht_pb2.StoreRequest):
            return self._takes_records(sender, request)
        return True

    def _takes_records(self, sender: str, request: Any) -> bool:
        # Nothing is stored as a cache here, whose size the library does not bound.
        columns = (request.keys, request.subkeys, request.values, request.expiration_time)
        if len({len(column) for column in columns}) != 1 or any(request.in_cache):
            return False
        self._forget_expired()
        records = [record for row in zip(*columns, strict=True) for record in _unpacked(*row)]
        self._sent[sender] += len(records)
        if not records or self._sent[sender] > RECORDS_A_MINUTE:
            return False
        # All or nothing: peers send either their own record, or hand a list over that they have checked.
        return all(self._takes_record(record) for record in records)

    def _takes_record(self, record: DHTRecord) -> bool:
        if not self._validator.validate(record):
            return False
        owner = msgspec.msgpack.decode(record.subkey, type=str).partition("/")[0]
        if not self._allowed(owner):
            return False
        place, places = (record.key, record.subkey), self._of_owner[owner]
        if place not in self._kept and (
            len(self._kept) >= MAX_RECORDS or len(places) >= 2 * MAX_MODELS_OF_A_PEER
        ):
            return False
        self._kept[place] = max(record.expiration_time, self._kept.get(place, 0.0))
        places.add(place)
        return True

    def _forget_expired(self) -> None:
        now = self._clock()
        if self._minute == int(now // 60):
            return
        self._minute = int(now // 60)
        self._sent.clear()
        for place in [place for place, expires in self._kept.items() if expires < now]:
            del self._kept[place]
        for owner, places in list(self._of_owner.items()):
            places &= self._kept.keys()
            if not places:
                del self._of_owner[owner]


def _unpacked(key: bytes, subkey: bytes, value: bytes, expires: float) -> list[DHTRecord]:
    """The records of one stored item: itself, or those of a whole dictionary."""
    if subkey != WHOLE_DICTIONARY:
        return [DHTRecord(key, subkey, value, expires)]
    try:
        whole = MSGPackSerializer.loads(value)
        with whole.freeze():
            return [
                DHTRecord(key, MSGPackSerializer.dumps(name), item.value, item.expiration_time)
                for name, item in whole.items()
            ]
    except Exception:  # a parser's errors, or something that is no dictionary
        return []
