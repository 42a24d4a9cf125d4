"""How long it takes to reach the honest server among adversarial records: a property, and simulations.

The bound: of n records of others that never answer, all have been asked after `FIRST_SECONDS` + `STAGGER_SECONDS` x
log2(n + 1), if this process has room for as many streams; else the rest are asked as fast as streams fall silent.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.client.race import FIRST_SECONDS, STAGGER_SECONDS, Race, most_at_once
from corolla.client.retry import Retry
from corolla.client.view import LEAST_FAIR_SECONDS, MOST_FAIR_SECONDS, SwarmView
from corolla.errors import PeerDisconnected, PeerSilent, PeerUnreachable, RemoteError, RequestRefused
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.directory_memory import Board, MemoryDirectory
from corolla.swarm.directory.routing import KINDS, Hop
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.messages import SILENCE_SECONDS
from tests.virtual_time import VirtualLoopThread

BLOCKS = 6
HONEST_SECONDS = 3.0  # of which each second shows a sign of life
ROUND_TRIP = 0.1
SILENT = ("mute", "unreachable", "dead", "malformed", "internal", "busy", "evicted")
LATENCY = {"unreachable": 2.0}


Others = list[tuple[ServerRecord, str]]  # with what each does


class Crowd:
    """A client's view of one honest server for all blocks, and of many others."""

    def __init__(self, thread: VirtualLoopThread, others: Others, honest: ServerRecord) -> None:
        self.loop = thread
        self.does = {record.peer_id: does for record, does in others}
        self.asked = 0

        async def view() -> SwarmView:
            board = Board(thread.time)
            for record in [*(record for record, _ in others), honest]:
                board.put(record, 1e9)
            return SwarmView(
                MemoryNetwork().transport("client"),
                MemoryDirectory(board),
                model="m",
                model_name="m",
                num_blocks=BLOCKS,
            )

        self.view = thread.run(view())

    async def work(self, hop: Hop, _careful: bool) -> str:
        """What the peer does when it is asked."""
        self.asked += 1
        does = self.does.get(hop.peer_id, "honest")
        if does == "honest":
            for _ in range(int(HONEST_SECONDS)):
                await asyncio.sleep(1.0)
                self.view.heard(hop.peer_id, 1.0)
            self.view.answered(hop, 1, 0, HONEST_SECONDS)
            return hop.peer_id
        if does == "alive":
            while True:
                await asyncio.sleep(1.0)
                self.view.heard(hop.peer_id, 1.0)
        await asyncio.sleep(SILENCE_SECONDS if does == "mute" else LATENCY.get(does, ROUND_TRIP))
        if does == "mute":
            raise PeerSilent("silent", peer_id=hop.peer_id)
        if does == "unreachable":
            raise PeerUnreachable("nobody", peer_id=hop.peer_id)
        if does == "dead":
            raise PeerDisconnected("gone", peer_id=hop.peer_id)
        raise RequestRefused("no", code=does, peer_id=hop.peer_id)

    def seconds(self) -> float:
        """Until the honest server has done all blocks."""
        began = self.loop.time()

        async def once() -> str:
            return await self.view.first(0, BLOCKS, self.work, tokens=1)

        retry = Retry(self.view, patience=1e5)
        assert self.loop.run(retry.run(once, what="a test")) == "honest"
        return self.loop.time() - began


def record(
    peer: str, start: int = 0, end: int = BLOCKS, kind: str = "float32", throughput: float = 1e9
) -> ServerRecord:
    dtype, _, quantization = kind.partition("+")
    return ServerRecord(
        peer_id=peer,
        model="m",
        model_name="m",
        num_blocks=BLOCKS,
        start=start,
        end=end,
        dtype=dtype,
        quantization=quantization or "none",
        throughput=throughput,
    )


def bound(others: int) -> float:
    """Seconds, besides the honest server's own, for others that are silent or refuse."""
    rounds = math.log2(others + 1)
    return (
        FIRST_SECONDS
        + STAGGER_SECONDS * rounds
        + others / most_at_once() * SILENCE_SECONDS
        + max(LATENCY.values())
    )


@pytest.fixture
def thread() -> Iterator[VirtualLoopThread]:
    made = VirtualLoopThread()
    yield made
    made.close()


@st.composite
def adversaries(draw: st.DrawFn, does: tuple[str, ...]) -> Others:
    found = []
    for index in range(draw(st.integers(0, 40))):
        start = draw(st.integers(0, BLOCKS - 1))
        end = draw(st.integers(start + 1, BLOCKS))
        kind = draw(st.sampled_from([*KINDS, "aaa", "float32+huge"]))
        throughput = draw(st.sampled_from([0.0, 1e-6, 10.0, 1e9]))
        one = record(f"{draw(st.integers(0, 9))}-{index}", start, end, kind, throughput)
        found.append((one, draw(st.sampled_from(does))))
    return found


@given(adversaries(SILENT), st.sampled_from(KINDS), st.sampled_from([0.0, 1.0, 1e3]))
def test_the_honest_server_is_reached_within_the_bound(others: Others, kind: str, throughput: float) -> None:
    thread = VirtualLoopThread()
    try:
        crowd = Crowd(thread, others, record("honest", kind=kind, throughput=throughput))
        assert crowd.seconds() <= HONEST_SECONDS + bound(len(others))
        assert crowd.seconds() <= HONEST_SECONDS  # from now on it is known
    finally:
        thread.close()


@given(adversaries((*SILENT, "alive")), st.sampled_from(KINDS))
def test_so_it_is_among_some_that_show_signs_of_life_for_ever(others: Others, kind: str) -> None:
    """Which have as long as they may take by what they announce, within bounds, before twice as many are asked."""
    thread = VirtualLoopThread()
    try:
        crowd = Crowd(thread, others, record("honest", kind=kind))
        rounds = math.log2(len(others) + 1) + 1
        slow = any(does == "alive" and 0 < one.throughput < 1 for one, does in others)
        fair = MOST_FAIR_SECONDS if slow else LEAST_FAIR_SECONDS
        assert crowd.seconds() <= HONEST_SECONDS + bound(len(others)) + fair * rounds
    finally:
        thread.close()


@pytest.mark.parametrize("does", ["mute", "dead", "malformed", "mixed"])
@pytest.mark.parametrize("others", [1, 10, 100, 1000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_simulated_crowds(thread: VirtualLoopThread, others: int, does: str) -> None:
    draw = random.Random(others)
    liars = [
        (record(f"{draw.randrange(10)}-{index}"), draw.choice(SILENT) if does == "mixed" else does)
        for index in range(others)
    ]
    crowd = Crowd(thread, liars, record("honest", throughput=10.0))
    assert crowd.seconds() <= HONEST_SECONDS + bound(others)
    assert crowd.asked <= others + 1  # nobody is asked twice


def test_what_comes_too_late_is_undone(thread: VirtualLoopThread) -> None:
    """Two that answer at the same moment: one is used, what the other holds is given up."""
    discarded: list[str] = []

    async def work(hop: Hop, _careful: bool) -> str:
        await asyncio.sleep(0 if hop.peer_id == "silent" else 1.0)
        if hop.peer_id == "silent":
            await asyncio.sleep(1e6)
        return hop.peer_id

    async def discard(late: str) -> None:
        discarded.append(late)

    async def failed(_error: RemoteError) -> None:
        pass

    async def run() -> str:
        hops = [Hop(peer, 0, 1) for peer in ("silent", "one", "other")]
        race = Race(
            hops, work, heard=lambda _peer: -1.0, fair=lambda _hop: 8.0, failed=failed, discard=discard
        )
        winner = (await race.run())[1]
        await asyncio.sleep(1.0)
        return winner

    assert {thread.run(run()), *discarded} == {"one", "other"}
