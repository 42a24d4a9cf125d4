"""What may stand in the DHT: what its own server signed, as it signed it, and not too much of it."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import msgspec
import pytest
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from corolla.swarm.directory import dht_records
from corolla.swarm.directory.dht_records import (
    Entry,
    Ledger,
    RecordValidator,
    key_id,
    sign_entry,
    stored_until,
)
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.transport.identity import Identity
from corolla.wire.messages import PROTOCOL_NAME

NOW = time.time() + 3600  # hivemind looks at the real clock, and the tests may be long in coming


@cache
def someone(name: str) -> Identity:
    return Identity.generate()


def about(identity: Identity, model: str = "m", **changes: object) -> ServerRecord:
    base = ServerRecord(
        peer_id=identity.peer_id,
        model=model,
        model_name="smol",
        num_blocks=6,
        start=0,
        end=3,
        dtype="float32",
    )
    return msgspec.structs.replace(base, **changes)


def stored(
    record: ServerRecord,
    signer: Identity,
    *,
    withdrawn: bool = False,
    expires: float = NOW + 60,
    **changes: Any,
) -> DHTRecord:
    """As it travels; `changes` are made after signing."""
    value = sign_entry(Entry(record, withdrawn, expires), signer)
    fields = {
        "key": key_id(f"{PROTOCOL_NAME}/model/{record.model}"),
        "subkey": msgspec.msgpack.encode(f"{record.peer_id}/{record.model}"),
        "value": msgspec.msgpack.encode(value),
        "expiration_time": stored_until(expires),
    }
    return DHTRecord(**(fields | changes))


def good(name: str = "a", **changes: Any) -> DHTRecord:
    return stored(about(someone(name)), someone(name), **changes)


def taken(record: DHTRecord) -> bool:
    return RecordValidator(lambda: NOW).validate(record)


def test_a_good_record_is_taken() -> None:
    assert taken(good())
    assert taken(good(withdrawn=True))
    assert taken(good(key=key_id(f"{PROTOCOL_NAME}/servers")))
    assert taken(good(expires=NOW - 5)), "an expired one must not spoil a whole answer"


def test_the_longest_record_that_the_schema_allows_fits() -> None:
    wide = about(
        someone("a"),
        model="\N{GRINNING FACE}" * 64,
        model_name="\N{GRINNING FACE}" * 256,
        dtype="x" * 32,
        version="v" * 64,
    )
    assert taken(stored(wide, someone("a")))


@pytest.mark.parametrize("clock", [-600, 600])
def test_clocks_may_differ_by_ten_minutes(clock: float) -> None:
    """A server that announces for 15 minutes is taken by a peer whose clock is ten minutes off."""
    record = good(expires=NOW + clock + dht_records.MAX_TTL)
    assert taken(record)
    assert record.expiration_time > NOW, "the storage drops what has expired by its own clock"


def tampered(**changes: object) -> DHTRecord:
    """A true server's record in which somebody changed the content and kept the signature."""
    mine = msgspec.msgpack.decode(sign_entry(Entry(about(someone("a")), False, NOW + 60), someone("a")))
    mine[0] = msgspec.msgpack.encode(Entry(about(someone("a"), **changes), False, NOW + 60))
    return good(value=msgspec.msgpack.encode(msgspec.msgpack.encode(mine)))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: stored(about(someone("a")), someone("b")), id="signed by another"),
        pytest.param(lambda: tampered(throughput=9e8), id="altered"),
        pytest.param(lambda: good(expiration_time=NOW + 700), id="kept alive"),
        pytest.param(
            lambda: good(subkey=msgspec.msgpack.encode(f"{someone('b').peer_id}/m")), id="another's place"
        ),
        pytest.param(lambda: good(key=key_id(f"{PROTOCOL_NAME}/model/other")), id="another model's key"),
        pytest.param(lambda: good(key=key_id("elsewhere")), id="a key of no kind"),
        pytest.param(lambda: good(expires=NOW + 10_000), id="for too long"),
        pytest.param(lambda: stored(about(someone("a"), start=-1), someone("a")), id="against the schema"),
        pytest.param(lambda: good(value=b"\xc1"), id="no msgpack"),
        pytest.param(lambda: good(value=b""), id="nothing"),
        pytest.param(lambda: good(value=msgspec.msgpack.encode(b"x" * 4000)), id="too large"),
        pytest.param(lambda: good(subkey=b"\xda\xff\xff" + b"x" * 65535), id="a subkey too large"),
        pytest.param(lambda: good(value=msgspec.msgpack.encode("text")), id="text"),
    ],
)
def test_anything_else_is_dropped(make: Any) -> None:
    assert not taken(make())


# --- what is kept for others ---------------------------------------------------------------------------------


class Kept:
    """A ledger with a clock of its own."""

    def __init__(self, *members: str) -> None:
        self.now = NOW
        ids = {someone(name).peer_id for name in members}
        self.ledger = Ledger(
            RecordValidator(lambda: self.now), lambda peer: not members or peer in ids, lambda: self.now
        )

    def store(self, *records: DHTRecord, by: str = "a", **changes: Any) -> bool:
        fields = {
            "keys": [record.key for record in records],
            "subkeys": [record.subkey for record in records],
            "values": [record.value for record in records],
            "expiration_time": [record.expiration_time for record in records],
            "in_cache": [False for _ in records],
        }
        return self.ledger.takes(someone(by).peer_id, dht_pb2.StoreRequest(**(fields | changes)))


def test_a_member_s_record_is_kept_and_handed_over_by_another() -> None:
    kept = Kept("a", "b")
    assert kept.store(good())
    assert kept.store(good("b"), good("b", key=key_id(dht_records.MAP_KEY)), by="a")


def test_nothing_of_a_stranger() -> None:
    kept = Kept("a")
    assert not kept.store(good("b"), by="b")
    assert not kept.store(good("b"), by="a"), "a member does not bring a stranger's record in"
    assert not kept.ledger.takes(someone("b").peer_id, dht_pb2.PingRequest())
    assert not kept.ledger.takes(someone("b").peer_id, dht_pb2.FindRequest(keys=[b"k"]))
    assert kept.ledger.takes(someone("a").peer_id, dht_pb2.FindRequest(keys=[b"k"]))


def test_a_whole_dictionary_is_looked_into() -> None:
    def handed_over(*records: DHTRecord) -> DHTRecord:
        whole = DictionaryDHTValue()
        for record in records:
            whole.store(MSGPackSerializer.loads(record.subkey), record.value, record.expiration_time)
        return good(subkey=b"", value=MSGPackSerializer.dumps(whole))

    kept = Kept("a", "b")
    assert kept.store(handed_over(good(), good("b")))
    assert not kept.store(handed_over(good(), good("stranger")))
    assert not kept.store(handed_over(good(), stored(about(someone("b")), someone("a"))))
    assert not kept.store(good(subkey=b"", value=b"junk"))


def test_the_library_s_cache_stays_empty() -> None:
    assert not Kept().store(good(), in_cache=[True])


def test_a_request_of_unequal_columns() -> None:
    assert not Kept().store(good(), expiration_time=[])
    assert not Kept().ledger.takes("a", dht_pb2.FindRequest(keys=[b"k"] * 65))


def test_one_peer_s_models_are_bounded_and_expire() -> None:
    kept = Kept()
    most = 2 * dht_records.MAX_MODELS_OF_A_PEER
    records = [stored(about(someone("a"), f"m{i}"), someone("a")) for i in range(most + 1)]
    assert all(kept.store(record) for record in records[:most])
    assert not kept.store(records[most])
    assert kept.store(records[0]), "what is there may be renewed"
    assert kept.store(good("b"))
    kept.now += 60 + dht_records.LEEWAY + 60
    assert kept.store(stored(about(someone("a"), "new"), someone("a"), expires=kept.now + 60))


def test_all_peers_records_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_records, "MAX_RECORDS", 2)
    kept = Kept()
    assert kept.store(good("a"), good("b"))
    assert not kept.store(good("c"))
    assert kept.store(good("a"))


def test_one_sender_s_records_a_minute_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a check and a place in the library's heap, though it may say nothing new."""
    monkeypatch.setattr(dht_records, "RECORDS_A_MINUTE", 3)
    kept = Kept()
    assert all(kept.store(good()) for _ in range(3))
    assert not kept.store(good())
    assert kept.store(good("b"), by="b"), "others are not held to it"
    kept.now += 60
    assert kept.store(good())
