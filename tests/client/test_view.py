"""Who is used after a failure, and when: on a clock of the test's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
import pytest

from corolla.client.servers import (
    EXCUSE_SECONDS,
    KEPT_SECONDS,
    LONGEST_REST,
    MOST_EXCUSES,
    REFRESH_SECONDS,
    SLOW_READ_SECONDS,
    Finding,
)
from corolla.client.view import SwarmView
from corolla.errors import MissingBlocks, PeerDisconnected, RequestRefused
from corolla.swarm.directory.directory import Directory, ServerRecord
from corolla.swarm.directory.routing import Hop
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.messages import SILENCE_SECONDS


class Slow(Directory):
    """A directory that answers when it may."""

    def __init__(self, records: Sequence[ServerRecord]) -> None:
        self.records = list(records)
        self.may = asyncio.Event()
        self.may.set()

    async def announce(self, record: ServerRecord, ttl: float) -> None:
        self.records.append(record)

    async def withdraw(self, record: ServerRecord) -> None:
        self.records.remove(record)

    async def servers(self, model: str) -> list[ServerRecord]:
        await self.may.wait()
        return list(self.records)

    async def all_servers(self) -> list[ServerRecord]:
        return await self.servers("m")

    async def close(self) -> None:
        pass


def record(peer: str, throughput: float) -> ServerRecord:
    return ServerRecord(
        peer_id=peer,
        model="m",
        model_name="m",
        num_blocks=2,
        start=0,
        end=2,
        dtype="float32",
        throughput=throughput,
    )


class ClockedView:
    """A view of some servers, the first the fastest, and its clock."""

    def __init__(self, *peers: str) -> None:
        self.now = 0.0
        self.directory = Slow([record(peer, 100.0 - index) for index, peer in enumerate(peers)])
        self.view = SwarmView(
            MemoryNetwork().transport(),
            self.directory,
            model="m",
            model_name="m",
            num_blocks=2,
            clock=lambda: self.now,
        )

    async def peer(self) -> str:
        (hop,) = await self.view.route(0, 2)
        return hop.peer_id

    def answers(self, peer: str) -> None:
        self.view.answered(Hop(peer, 0, 2), 1, 0, 0.0)

    async def fails(self, peer: str) -> None:
        await self.view.failed(PeerDisconnected("gone", peer_id=peer))


async def test_a_directory_that_was_cut_short_proves_nothing() -> None:
    """Who was not named this time is used as before, and of blocks that nobody is named for nothing is said."""
    world = ClockedView("a", "b")
    assert await world.peer() == "a"
    world.directory.cut_short = True
    world.directory.records = [record("b", 100.0)]
    world.now += REFRESH_SECONDS + 1
    assert {one.peer_id for one in await world.view.usable()} == {"a", "b"}
    world.now += KEPT_SECONDS
    assert {one.peer_id for one in await world.view.usable()} == {"b"}  # but not for ever
    nobody = ClockedView()
    nobody.directory.cut_short = True
    with pytest.raises(MissingBlocks, match="cut short") as missing:
        await nobody.peer()
    assert "nobody" not in str(missing.value)


async def test_another_server_is_preferred_for_a_while() -> None:
    world = ClockedView("a", "b")
    world.answers("a")
    world.answers("b")
    assert await world.peer() == "a"
    await world.fails("a")
    assert await world.peer() == "b"
    world.now += 1.9
    assert await world.peer() == "b"
    world.now += 0.2
    assert await world.peer() == "a"


async def test_the_only_server_is_asked_again_at_once_then_after_rests_that_grow_to_a_bound() -> None:
    world = ClockedView("a")
    await world.fails("a")
    assert await world.peer() == "a"
    rests = []
    for _ in range(12):
        await world.fails("a")
        with pytest.raises(MissingBlocks, match="failed a moment ago"):
            await world.peer()
        rests.append(world.view.health.next_return())
        world.now += rests[-1] + 0.001
        assert await world.peer() == "a"
    assert rests[0] == pytest.approx(0.1)
    assert rests == sorted(rests)
    assert rests[-1] == pytest.approx(LONGEST_REST)
    world.view.health.forgive("a")
    await world.fails("a")
    assert await world.peer() == "a"


async def test_of_two_that_fail_in_turns_the_one_that_has_rested_is_used() -> None:
    world = ClockedView("a", "b")
    for _ in range(2):
        await world.fails("a")
    await world.fails("b")
    assert await world.peer() == "b"
    await world.fails("b")
    with pytest.raises(MissingBlocks):
        await world.peer()
    world.now += 0.11
    assert await world.peer() == "a"


async def test_a_busy_server_is_left_alone_as_long_as_it_asked_for() -> None:
    world = ClockedView("a")
    await world.view.failed(RequestRefused("full", code="busy", retry_after=7.0, peer_id="a"))
    assert world.view.health.next_return() == pytest.approx(7.0)
    world.now += 6.9
    with pytest.raises(MissingBlocks):
        await world.peer()
    world.now += 0.2
    assert await world.peer() == "a"


async def test_a_slow_directory_holds_nobody_up_who_knows_servers() -> None:
    world = ClockedView("a")
    assert await world.peer() == "a"
    world.directory.may.clear()
    world.directory.records.append(record("b", 1000.0))
    world.now += REFRESH_SECONDS + 1
    started = time.monotonic()
    for _ in range(5):  # one of them waits a moment
        assert await world.peer() == "a"
    assert time.monotonic() - started < 3 * SLOW_READ_SECONDS
    world.directory.may.set()
    while await world.peer() == "a":  # what was being read meanwhile is used
        await asyncio.sleep(0)
    await world.view.close()


async def test_without_any_record_the_directory_is_waited_for() -> None:
    world = ClockedView("a")
    world.directory.may.clear()
    found = asyncio.create_task(world.peer())
    await asyncio.wait({found}, timeout=2 * SLOW_READ_SECONDS)
    assert not found.done()
    world.directory.may.set()
    assert await found == "a"


async def test_who_has_never_answered_is_avoided_for_longer_than_a_try_takes() -> None:
    world = ClockedView("a", "b")
    await world.fails("a")
    assert await world.peer() == "b"
    avoided = 0.0
    while await world.peer() == "b":
        world.now += 1.0
        avoided += 1.0
    assert avoided > 2 * SILENCE_SECONDS
    await world.fails("a")
    world.now += avoided + 1.0
    assert await world.peer() == "b"  # twice as long the second time


async def test_who_has_answered_before_is_preferred_to_who_says_that_it_is_faster() -> None:
    world = ClockedView("fast", "slow")
    world.answers("slow")
    assert await world.peer() == "slow"


async def test_an_excuse_is_believed_a_few_times() -> None:
    world = ClockedView("a", "b")
    for peer in ("a", "b"):
        world.answers(peer)
    evicted = RequestRefused("gone", code="evicted", peer_id="a")
    for _ in range(MOST_EXCUSES):
        await world.view.failed(evicted)
        assert await world.peer() == "a"
        world.answers("a")  # which does not make up for it
    await world.view.failed(evicted)
    assert await world.peer() == "b"
    world.now += EXCUSE_SECONDS
    world.answers("a")
    await world.view.failed(evicted)
    assert await world.peer() == "a"


async def test_a_server_that_is_always_busy_is_left_alone_however_short_a_time_it_names() -> None:
    world = ClockedView("a", "b")
    await world.view.failed(RequestRefused("full", code="busy", retry_after=0.0, peer_id="a"))
    assert await world.peer() == "b"


async def test_a_kind_in_which_only_liars_have_answered_binds_nobody() -> None:
    world = ClockedView("liar", "honest")
    world.directory.records[1] = msgspec.structs.replace(world.directory.records[1], dtype="float64")
    view = world.view
    assert await world.peer() == "liar"
    world.answers("liar")
    view.settle_numerics("float32", 0, 2)
    await world.fails("liar")
    assert await world.peer() == "liar"  # what was begun in float32 goes on in it
    view.verdicts.condemn(Finding(Hop("liar", 0, 2), "step", 9.0, None))
    assert await world.peer() == "honest"
