"""Shares of the compute thread: however much a peer asks for, another that always has work gets as much."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.world import Blocker

from corolla.server.scheduler.engine import KNOWN_SECONDS, MOST_REMEMBERED, Engine, PeerHistory, Shares
from corolla.server.scheduler.execution import Kind, Speed

JOB_SECONDS = 0.002


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    engine.start()
    yield engine
    await engine.close()


def spin() -> None:
    """Keep the thread for a known time of its own, which others' work does not lengthen."""
    until = time.thread_time() + JOB_SECONDS
    while time.thread_time() < until:
        pass


async def order_of(engine: Engine, kind: Kind, peers: list[str]) -> list[str]:
    """A job for each of these peers, all waiting before the first begins; in which order they ran."""
    ran: list[str] = []

    def job(peer: str) -> None:
        spin()
        ran.append(peer)

    async with Blocker(engine):
        tasks = [
            asyncio.create_task(engine.submit(kind, lambda peer=peer: job(peer), peer=peer)) for peer in peers
        ]
        while engine.waiting < len(tasks):
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return ran


async def test_a_peer_with_many_jobs_waits_for_one_with_few(engine: Engine) -> None:
    ran = await order_of(engine, Kind.TRAINING, ["greedy"] * 40 + ["modest"] * 4)
    last = max(place for place, peer in enumerate(ran) if peer == "modest")
    assert last <= 14, ran  # beside one another they take turns; in order of arrival it would be place 43


async def test_who_comes_late_takes_no_more_than_turns(engine: Engine) -> None:
    """A peer that had nothing to do for long has gathered no credit against one that worked."""
    for _ in range(20):
        await engine.submit(Kind.PREFILL, spin, peer="early")
    ran = await order_of(engine, Kind.PREFILL, ["late"] * 12 + ["early"] * 12)
    first_half = Counter(ran[:12])
    assert min(first_half["late"], first_half["early"]) >= 3, ran


@given(st.lists(st.floats(0.001, 1.0), min_size=30, max_size=200), st.integers(2, 5))
def test_busy_peers_are_never_more_than_a_job_apart(costs: list[float], peers: int) -> None:
    names = [f"peer-{number}" for number in range(peers)]
    had, history = dict.fromkeys(names, 0.0), PeerHistory()
    for name in names:  # the same of all
        history.computed(name, KNOWN_SECONDS)
    shares = Shares(history)
    for cost in costs:
        shares.settle(names)
        chosen = min(names, key=shares.after)
        shares.give(chosen, cost)
        had[chosen] += cost
        assert max(had.values()) - min(had.values()) <= 1.0 + 1e-9


@given(st.integers(1, 60), st.integers(1, 5))
def test_new_peers_together_get_no_more_than_those_with_a_history(new: int, known: int) -> None:
    """However many identities a stranger makes."""
    history = PeerHistory()
    friends, strangers = [f"known-{one}" for one in range(known)], [f"new-{one}" for one in range(new)]
    for peer in friends:
        history.computed(peer, KNOWN_SECONDS)
    shares, had = Shares(history), Counter[str]()
    shares.settle([*friends, *strangers])
    for _ in range(600):
        chosen = min([*friends, *strangers], key=shares.after)
        shares.give(chosen, 0.01)
        had[str(chosen in friends)] += 1
    assert had["True"] >= 600 * min(0.5, known / (known + new)) - known - new


def test_a_history_is_bounded_and_made_of_time() -> None:
    history = PeerHistory()
    for number in range(2 * MOST_REMEMBERED):
        history.computed(f"passer-{number}", 0.01)
        history.computed("steady", 0.01)
    assert history.known("steady")
    assert not history.known("passer-1")
    assert len(history) == MOST_REMEMBERED


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.001, 1.0)), min_size=50, max_size=300))
def test_peers_that_have_gone_are_forgotten(given_to: list[tuple[int, float]]) -> None:
    """A thousand passers-by leave nothing behind once somebody else has had as much as they."""
    shares = Shares()
    for peer, seconds in given_to:
        shares.settle({f"passer-{peer}"})
        shares.give(f"passer-{peer}", seconds)
    most = max(shares.after(f"passer-{peer}") for peer, _ in given_to)
    shares.give("steady", most - shares.after("steady") + 1.0)
    shares.settle({"steady"})
    assert len(shares) == 0


def test_an_estimate_is_what_work_took_at_best() -> None:
    speed = Speed()
    for seconds in [9.0, 1.0] * 10:
        speed.took(1000, seconds)
        speed.took(1, seconds)  # says little
    assert speed.seconds_of(5000) == 5.0
