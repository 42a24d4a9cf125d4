"""Streams, sessions, bytes and pages that strangers hold: a newcomer gets in, and who was here before stays."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import PeerDisconnected
from corolla.server.peers import CLEARLY, choose_evictions
from corolla.server.scheduler.engine import KNOWN_SECONDS, PeerHistory
from corolla.wire.messages import Opened, Output, Ping, ServerStatus, Step
from tests.server.world import (
    HIDDEN,
    OneServer,
    RawClient,
    assert_same,
    forward,
    frame,
    limited,
    noise,
    opening,
    packed,
    until,
)

SIZES = [pytest.param(32), pytest.param(2048, marks=pytest.mark.nightly)]


served = partial(limited, 6000)


async def chatting(world: OneServer, peer: str) -> RawClient:
    """A session with three tokens in its cache."""
    chat = await world.raw(peer)
    assert (await chat.ask(opening())).message == Opened()
    assert (await chat.ask(Step(position=0), hidden=noise(1, 3, HIDDEN))).message == Output()
    return chat


async def assert_goes_on(world: OneServer, chat: RawClient) -> None:
    """The session of `chatting` is there, with what it had."""
    reply = await chat.ask(Step(position=3), hidden=noise(1, 5, HIDDEN)[:, 3:])
    assert_same(reply.tensors["hidden"], world.reference.forward(noise(1, 5, HIDDEN))[:, 3:])


async def has_ended(stranger: RawClient) -> bool:
    try:
        return not isinstance((await stranger.ask(Ping())).message, ServerStatus)
    except PeerDisconnected:
        return True


@pytest.mark.parametrize("streams", SIZES)
@pytest.mark.parametrize("identities", [2, 3, None], ids=["two", "three", "one each"])
async def test_sessions_of_one_token_shut_nobody_out(streams: int, identities: int | None) -> None:
    """As many as a server has streams for, opened at once and then left alone."""
    async with served(streams=streams) as world:
        friend = await chatting(world, "friend")
        world.clock.now += 1.0
        for number in range(streams + 8):
            stranger = await world.raw(f"stranger-{number % (identities or streams + 8)}")
            await stranger.ask(opening(tokens=1))  # which is refused at last
        assert len(world.server.sessions) > streams // 2
        world.clock.now += 2.0 if identities else 6.0  # of many identities, those that do nothing go
        await assert_goes_on(world, friend)
        for number in range(4):
            await chatting(world, f"new-{number}")
        if identities:
            await assert_goes_on(world, await chatting(world, "last"))


@pytest.mark.parametrize("streams", SIZES)
async def test_silent_streams_shut_nobody_out_and_go_first(streams: int) -> None:
    """Four peers open all that there are and ask nothing; a session that has been idle for longer stays."""
    async with served(streams=streams) as world:
        friend = await chatting(world, "friend")
        world.clock.now += 100.0
        for number in range(streams + 8):
            await world.raw(f"stranger-{number % 4}")
        await until(lambda: world.server.limits.streams.taken >= 3 * streams // 4)
        for number in range(8):
            await chatting(world, f"new-{number}")
        await assert_goes_on(world, friend)


async def test_a_stream_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(first_request=0.05) as world:
        silent, asked = await world.raw("silent"), await world.raw("asked")
        assert isinstance((await asked.ask(Ping())).message, ServerStatus)
        with pytest.raises(PeerDisconnected):
            await silent.next()
        assert isinstance((await asked.ask(Ping())).message, ServerStatus)


def large(tokens: int = 800) -> dict[str, Any]:
    return packed(noise(1, tokens, HIDDEN))


@pytest.mark.parametrize("frames", [pytest.param(24), pytest.param(144, marks=pytest.mark.nightly)])
async def test_frames_that_announce_much_and_trickle_hold_nothing(frames: int) -> None:
    """What has not arrived takes no room, and what has takes only what nobody else needs."""
    nbytes = large()["hidden"].nbytes
    async with served(bytes_in_flight=16 * nbytes, streams=1000) as world:
        in_flight = world.server.limits.in_flight
        data = frame(forward(), **large(8000))
        strangers = [await world.raw(f"stranger-{number % 3}") for number in range(frames)]
        for one in strangers:
            await one.stream.write([data[:1000]])
        await until(lambda: in_flight.taken > 0)
        assert in_flight.taken <= 16 * nbytes
        newcomer = await world.raw("newcomer")
        assert (await newcomer.ask(forward(), **large())).message == Output()
        data = frame(forward(), **large(1200))
        strangers = [await world.raw(f"stranger-{number % 3}") for number in range(frames)]
        for one in strangers:  # all but the last byte
            await one.stream.write([data[:-1]])
        await until(lambda: not in_flight.of("newcomer"))  # its reply was taken
        assert (await newcomer.ask(forward(), **large())).message == Output()
        assert in_flight.taken <= 16 * nbytes


async def test_a_request_that_takes_too_long_to_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each piece comes in time."""
    monkeypatch.setattr("corolla.swarm.channel.PIECE", 1000)
    monkeypatch.setattr("corolla.swarm.channel.LEAST_PACE", math.inf)
    async with served() as world:
        world.server.silence = 0.3
        slow, data = await world.raw("slow"), frame(forward(), **large())

        async def drip() -> None:
            for place in range(0, len(data), 1000):
                await slow.stream.write([data[place : place + 1000]])
                await asyncio.sleep(0.01)

        with pytest.raises(PeerDisconnected):
            await drip()
        assert world.server.limits.in_flight.taken == 0


async def test_who_was_here_before_outranks_any_number_of_new_ones() -> None:
    """Busy as these may be, about half is for those whom the server has worked for."""
    async with served(streams=20) as world:
        for number in range(4):
            world.server.limits.history.computed(f"known-{number}", KNOWN_SECONDS)
        strangers = [await chatting(world, f"stranger-{number}") for number in range(20)]
        known = [await chatting(world, f"known-{number % 4}") for number in range(8)]
        assert sum([await has_ended(one) for one in strangers]) == 8
        assert not any([await has_ended(one) for one in known])


# --- the rule itself ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Holding:
    peer: str
    count: int
    last_used: float = 0.0
    idle_after: float | None = math.inf

    def on_evicted(self) -> None: ...


def gives_way(
    held: Sequence[Holding], peer: str, amount: int, missing: int, history: PeerHistory | None = None
) -> list[Holding]:
    holdings = {one: one.count for one in held}
    return choose_evictions(holdings, Holding(peer, 0), amount, missing, history or PeerHistory(), 100.0)


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 9), st.floats(0, 100), st.sampled_from([5.0, math.inf])),
        max_size=30,
    ),
    st.integers(0, 7),
    st.integers(1, 12),
)
def test_nobody_has_less_than_whoever_takes_it_but_for_what_is_idle(
    drawn: list[tuple[int, int, float, float]], asker: int, amount: int
) -> None:
    held = [Holding(f"{peer}", count, used, after) for peer, count, used, after in drawn]
    chosen = gives_way(held, f"{asker}", amount, amount)
    before = {str(peer): sum(one.count for one in held if one.peer == str(peer)) for peer in range(8)}
    assert not chosen or sum(one.count for one in chosen) >= amount
    for one in chosen:
        busy = 100.0 - one.last_used < (one.idle_after or 0.0)
        lost = sum(other.count for other in chosen[: chosen.index(one)] if other.peer == one.peer)
        have = before[one.peer] - lost
        wanted = before[str(asker)] + amount
        assert have - one.count >= wanted or have > wanted if busy else have >= before[str(asker)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=20))
def test_a_newcomer_gets_what_others_have_more_of_though_it_is_in_use(drawn: list[tuple[int, int]]) -> None:
    """As long as that leaves them as much, or they have more than an equal share."""
    held = [Holding(f"{peer}", count) for peer, count in drawn]
    of = {one.peer: sum(other.count for other in held if other.peer == one.peer) for one in held}
    equal = (sum(of.values()) + 1) / (len(of) + 1)
    fair = [of[one.peer] > one.count or of[one.peer] > CLEARLY * max(1, equal) for one in held]
    assert bool(gives_way(held, "new", 1, 1)) == any(fair)
