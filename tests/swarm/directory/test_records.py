"""What a directory keeps: what its own server signed, as it signed it, and not too much of it."""

from __future__ import annotations

import logging
import time
from functools import cache

import msgspec
import pytest
from tests.strangers.crowd import identities, record_of, signed

from corolla.swarm.access.invitations import LEEWAY
from corolla.swarm.directory import records
from corolla.swarm.directory.records import (
    MAX_TTL,
    NAME_BYTES,
    Entry,
    RecordStore,
    Verifier,
    read_record,
    sign_entry,
)
from corolla.swarm.transport.identity import Identity

NOW = time.time()


@cache
def someone(number: int) -> Identity:
    return list(identities(6))[number]


def good(who: int = 0, expires: float = NOW + 60, withdrawn: bool = False, **changes: object) -> bytes:
    entry = Entry(record_of(someone(who), **changes), withdrawn, expires)  # type: ignore[arg-type]
    return sign_entry(entry, someone(who))


def test_a_good_record_is_read() -> None:
    entry = read_record(good())
    assert entry is not None
    assert entry.record == record_of(someone(0))
    assert read_record(good(withdrawn=True)) is not None
    for expires in (NOW - 5, NOW + 1e6):
        assert read_record(good(expires=expires)) is not None, "clocks differ"


def test_the_longest_record_that_the_schema_allows_fits() -> None:
    wide = good(model="m" * 128, model_name="\N{GRINNING FACE}" * 256, dtype="bfloat16", version="v" * 64)
    assert read_record(wide) is not None
    assert len(wide) + 2 * (550 - 294) <= records.MAX_RECORD_BYTES, "with a key and signature of 4096 bits"


def altered(**changes: object) -> bytes:
    """A true server's record in which somebody changed the content and kept the signature."""
    mine = msgspec.msgpack.decode(good())
    mine[0] = msgspec.msgpack.encode(Entry(record_of(someone(0), **changes), False, NOW + 60))
    return msgspec.msgpack.encode(mine)


WRONG = {
    "altered": lambda: altered(throughput=9e8),
    "signed by another": lambda: sign_entry(Entry(record_of(someone(0)), False, NOW + 60), someone(1)),
    "a block before the first": lambda: good(start=-1),
    "blocks that the model has not": lambda: good(end=31),
    "no block": lambda: good(start=3, end=3),
    "a kind of arithmetic that there is not": lambda: good(dtype="aaa"),
    "a kind with more behind it": lambda: good(dtype="float32\n"),
    "a quantization that there is not": lambda: good(quantization="int1"),
    "a name that steers a terminal": lambda: good(model_name="smol\x1b[2Jlm"),
    "a name that turns text around": lambda: good(model_name="smol\u202elm"),
    "a name of two lines": lambda: good(model_name="smol\nlm"),
    "a version that steers a terminal": lambda: good(version="1.0\x1b[31m"),
    "an identity of two words": lambda: good(model="a b"),
    "too large": lambda: good(model_name="x" * 3000),
    "no msgpack": lambda: b"\xc1",
    "nothing": lambda: b"",
    "text": lambda: msgspec.msgpack.encode("text"),
    "nested without end": lambda: b"\x91" * 2000,
}


@pytest.mark.parametrize("kind", WRONG)
def test_anything_else_is_dropped(kind: str) -> None:
    assert read_record(WRONG[kind]()) is None


async def test_a_verifier_reads_many_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    verifier = Verifier()
    try:
        read = await verifier.read([good(), b"junk", good(1)])
        assert [entry and entry.record.peer_id for entry in read] == [
            someone(0).peer_id, None, someone(1).peer_id,
        ]  # fmt: skip
    finally:
        verifier.close()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


# --- what is kept for others -----------------------------------------------------------------------------


class Kept:
    """A shelf with a clock of its own."""

    def __init__(self) -> None:
        self.now = NOW
        self.shelf = RecordStore(lambda: self.now)

    def put(self, who: int = 0, model: str = "m", **changes: object) -> bool:
        entry, value = signed(someone(who), model, **changes)
        entry = msgspec.structs.replace(entry, expires=self.now + 60)
        return self.shelf.may_put(entry.record.peer_id) and self.shelf.put(entry, value)

    def names(self, model: str | None = None) -> list[bytes]:
        names = self.shelf.names(model)
        return [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]

    def values(self, model: str | None = None) -> list[bytes]:
        return self.shelf.values(self.names(model))


def test_the_newest_version_of_each_server_is_kept_for_each_of_its_models() -> None:
    kept = Kept()
    assert kept.put(0)
    assert kept.put(0, "other")
    assert kept.put(1)
    (older, _) = kept.names("m")
    kept.now += 1
    assert kept.put(0, free_cache_tokens=7)
    assert len(kept.values("m")) == 2
    assert len(kept.values()) == 3
    assert len(kept.values("nothing")) == 0
    (value,) = kept.shelf.values([older])
    entry = read_record(value)
    assert entry is not None
    assert entry.record.free_cache_tokens == 7, "who asks by an older name gets the newest version"
    kept.now -= 1
    assert kept.put(0, free_cache_tokens=3), "an older one changes nothing, and is no fault"
    assert kept.shelf.values([older]) == [value]


@pytest.mark.parametrize("clock", [-LEEWAY, LEEWAY])
def test_clocks_may_differ_by_ten_minutes(clock: float) -> None:
    entry, value = signed(someone(0))
    shelf = RecordStore(lambda: NOW)
    assert shelf.put(msgspec.structs.replace(entry, expires=NOW + clock + MAX_TTL), value)
    for expires in (NOW + MAX_TTL + LEEWAY + 5, float("nan"), float("inf")):
        assert not shelf.put(msgspec.structs.replace(entry, expires=expires), value)


def test_one_peer_s_models_are_bounded_and_expire() -> None:
    kept = Kept()
    assert all(kept.put(0, f"m{number}") for number in range(records.MAX_MODELS_OF_A_PEER))
    assert not kept.put(0, "another")
    assert kept.put(0, "m0"), "what is there may be renewed"
    assert kept.put(1)
    kept.now += 60 + LEEWAY + 60
    assert kept.put(0, "another")
    assert len(kept.values()) == 1


def test_one_peer_s_puts_in_a_minute_are_bounded() -> None:
    """Each costs a check of a signature, though it may say nothing new."""
    kept = Kept()
    assert all(kept.put() for _ in range(records.PUTS_A_MINUTE))
    assert not kept.put()
    assert kept.put(1), "others are not held to it"
    kept.now += 60
    assert kept.put()


def test_a_crowd_of_newcomers_pushes_out_newcomers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORDS", 4)
    kept = Kept()
    assert all(kept.put(who) for who in range(3))
    for _ in range(12):
        kept.now += 55
        assert all(kept.put(who) for who in range(3))
    settled = set(kept.names())
    for model in ("a", "b", "c", "d"):
        assert kept.put(3, model)
        assert kept.put(4, model)
    assert settled < set(kept.names())
    assert len(kept.values()) == 4


def test_whoever_is_established_leaves_room_for_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORDS", 4)
    kept = Kept()
    for _ in range(13):
        kept.now += 55
        assert all(kept.put(who) for who in range(4))
    assert kept.put(5), "a newcomer gets in, in the place of the last of them"
    assert len(kept.values()) == 4
