"""Budgets of one peer and of all, peers that are kept out, and clients that are slow, silent or gone."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
import torch
from tests.server.world import (
    HIDDEN,
    Clock,
    OneServer,
    RawClient,
    assert_serves_exactly,
    forward,
    frame,
    limited,
    noise,
    opening,
    packed,
    until,
)
from tests.virtual_time import SimulatedEngine, in_virtual_time

from corolla.config import NodeConfig, ServerConfig
from corolla.errors import PeerDisconnected, RequestRefused, UsageError
from corolla.server.peers import MOST_LEASES, Account, Budgets, Lease, Leases, PeerLimits
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.wire.messages import (
    PROTOCOL_NAME,
    Failure,
    Opened,
    Output,
    Ping,
    ServerStatus,
    Step,
)

LARGE = 800  # tokens whose hidden states are more than one piece


served = partial(limited, 200)


async def refusal(client: RawClient, *message: Any, **tensors: torch.Tensor) -> Failure:
    answer = (await client.ask(*message, **tensors)).message
    assert isinstance(answer, Failure)
    return answer


def taken(world: OneServer) -> list[int]:
    limits = world.server.limits
    return [one.taken for one in (limits.streams, limits.in_flight)]


# --- the account -------------------------------------------------------------------------------------------


class Holding:
    """Something of some peer, in use a moment ago."""

    def __init__(self, peer: str, used: float = 0.0, idle_after: float | None = 5.0) -> None:
        self.peer, self.last_used, self.idle_after = peer, used, idle_after
        self.pages, self.evicted = 0, False

    def on_evicted(self) -> None:
        self.evicted = True


def test_an_account_never_goes_above_its_total_or_a_share() -> None:
    account = Account("things", 10, share=0.6, retry_after=3.0)
    one, other, late = [Holding(peer, idle_after=None) for peer in "abc"]
    account.take(one, 6)
    with pytest.raises(RequestRefused, match="6 of the 10 things") as own:
        account.take(one)
    assert (own.value.code, own.value.retry_after) == ("busy", 3.0)
    account.take(other, 4)
    with pytest.raises(RequestRefused, match="All 10 things"):
        account.take(late)
    account.give(one, 6)
    account.take(late, 6)
    assert (account.taken, account.of("a"), account.of("b"), account.of("c")) == (10, 0, 4, 6)
    account.give(late, 100)
    account.give(late)
    assert account.taken == 4


def test_nothing_is_refused_for_ever() -> None:
    """More than a share, or than all there is, for whoever has nothing, when nobody has anything."""
    account = Account("bytes", 10)
    large = Holding("a", idle_after=None)
    account.take(large, 50)
    for holder in (large, Holding("b")):
        with pytest.raises(RequestRefused):
            account.take(holder)
    account.give(large, 50)
    assert account.taken == 0


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_is_above_none_and_at_most_all(share: float) -> None:
    with pytest.raises(UsageError, match="--peer-share"):
        ServerConfig("model", NodeConfig(), peer_share=share)


# --- garbage -----------------------------------------------------------------------------------------------


async def test_a_peer_that_keeps_sending_garbage_loses_its_streams_and_is_kept_out() -> None:
    async with served(malformed=3, kept_out=40.0) as world:
        idle, good = await world.raw("bad"), await world.raw("good")
        assert (await idle.ask(opening())).message == Opened()
        assert (await good.ask(opening())).message == Opened()
        for sent in ({"type": "Nonsense"}, Step(position=0), {"type": "Ping", "x": 1}):
            assert isinstance((await idle.ask(Ping())).message, ServerStatus)  # still served
            client = await world.raw("bad")
            await refusal(
                client, sent, **({"hidden": noise(1, 1, HIDDEN)} if sent == Step(position=0) else {})
            )
        with pytest.raises(PeerDisconnected):
            await idle.next()
        await until(lambda: len(world.server.sessions) == 1)
        world.clock.now += 10
        kept_out = await refusal(await world.raw("bad"), Ping())
        assert (kept_out.code, kept_out.retry_after) == ("busy", 30.0)
        assert (await good.ask(Step(position=0), hidden=noise(1, 2, HIDDEN))).message == Output()
        world.clock.now += 31
        assert isinstance((await (await world.raw("bad")).ask(Ping())).message, ServerStatus)


async def test_garbage_counts_though_its_sender_does_not_wait_for_the_answer() -> None:
    async with served(malformed=3) as world:
        clients = [await world.raw("bad") for _ in range(3)]
        for client in clients:
            await client.stream.write([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
        await until(lambda: "bad" in world.server.limits._out_until)
        assert (await refusal(await world.raw("bad"), Ping())).code == "busy"


async def test_garbage_now_and_then_is_forgiven() -> None:
    async with served(malformed=3, malformed_window=60.0) as world:
        for _ in range(6):
            await refusal(await world.raw("clumsy"), {"type": "Nonsense"})
            world.clock.now += 31
        assert isinstance((await (await world.raw("clumsy")).ask(Ping())).message, ServerStatus)


def test_peers_that_come_but_once_are_forgotten() -> None:
    clock = Clock()
    limits = PeerLimits(Budgets(malformed=2), clock)
    for number in range(500):
        clock.now += 1
        limits.malformed(f"peer-{number}")
    assert len(limits._malformed) <= 62


# --- budgets -----------------------------------------------------------------------------------------------


async def test_streams_of_one_peer_and_of_all() -> None:
    async with served(streams=4) as world:
        streams = [await world.raw(peer) for peer in ("a", "a", "b", "c")]
        for one in streams:
            assert (await one.ask(opening(tokens=1))).message == Opened()
        refused = await refusal(await world.raw("a"), Ping())
        assert (refused.code, refused.retry_after) == ("busy", 5.0)
        late = await world.raw("d")
        assert isinstance((await late.ask(Ping())).message, ServerStatus)
        with pytest.raises(PeerDisconnected):  # of the peer that has two
            await streams[0].next()
        assert (await late.ask(opening(tokens=1))).message == Opened()
        assert (await refusal(await world.raw("e"), Ping())).code == "busy"  # all have one, in use
        assert taken(world)[0] == 4


async def test_bytes_in_flight_are_refused_before_memory_is_taken() -> None:
    """The stream goes on after it: what was refused was read and thrown away."""
    large = packed(noise(1, LARGE, HIDDEN))
    nbytes = large["hidden"].nbytes
    async with served(bytes_in_flight=5 * nbytes) as world:
        first, second, third = await world.raw("a"), await world.raw("a"), await world.raw("b")
        data = frame(forward(), **large)
        await first.stream.write([data[:-1]])  # all but the last byte
        await until(lambda: taken(world)[1] > 0)
        before = taken(world)[1]
        refused = await refusal(second, forward(), **large)
        assert (refused.code, refused.retry_after) == ("busy", 1.0)
        assert (await second.ask(forward(), **packed(noise(1, 4, HIDDEN)))).message == Output()
        assert (await third.ask(forward(), **large)).message == Output()
        await until(lambda: taken(world)[1] == before)
        await first.stream.write([data[-1:]])
        assert (await first.answer()).message == Output()
        await until(lambda: taken(world)[1] == 0)
        assert (await second.ask(forward(), **large)).message == Output()
        await until(lambda: taken(world)[1] == 0)


async def test_a_busy_step_leaves_its_session_as_it_was() -> None:
    large = noise(1, LARGE, HIDDEN)
    async with served(bytes_in_flight=3 * large.nbytes, share=1.0) as world:
        first, second = await world.raw("a"), await world.raw("b")
        assert (await second.ask(opening(tokens=LARGE + 1))).message == Opened()
        await first.stream.write([frame(forward(), **packed(large))[:-1]])
        await until(lambda: taken(world)[1] >= 2 * large.nbytes)
        assert (await refusal(second, Step(position=0), hidden=large)).code == "busy"
        assert (await second.ask(Step(position=0), hidden=noise(1, 3, HIDDEN))).message == Output()


# --- shares of the cache and of leases ---------------------------------------------------------------------


async def test_one_peer_may_have_the_whole_cache_until_another_comes() -> None:
    budget = CacheBudget(20, clock=lambda: 1.0)
    greedy = [Holding("greedy", used) for used in (0.3, 0.1, 0.2)]
    for one, pages in zip(greedy, (8, 8, 4), strict=True):
        await budget.reserve(one, pages, "max_tokens")
    await budget.reserve(Holding("modest"), 8, "max_tokens")
    assert [one.evicted for one in greedy] == [False, True, False]
    assert (budget.of("greedy"), budget.of("modest"), budget.free) == (12, 8, 0)


async def test_nobody_is_driven_out_of_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corolla.server.sessions.kv_cache.WAIT_SECONDS", 0.0)
    budget = CacheBudget(20, clock=lambda: 1.0)
    first = [Holding("a"), Holding("a")]
    for one in first:
        await budget.reserve(one, 5, "max_tokens")
    other = Holding("b")
    await budget.reserve(other, 10, "max_tokens")
    with pytest.raises(RequestRefused) as refused:
        await budget.reserve(Holding("b"), 2, "max_tokens")
    assert refused.value.code == "busy"
    assert refused.value.retry_after is not None
    assert not any(one.evicted for one in (*first, other))


async def test_two_peers_with_half_each_keep_no_third_one_out() -> None:
    budget = CacheBudget(20, clock=lambda: 1.0)
    held = [Holding(peer, used) for peer, used in (("a", 0.1), ("a", 0.2), ("b", 0.3), ("b", 0.4))]
    for one in held:
        await budget.reserve(one, 5, "max_tokens")
    await budget.reserve(Holding("c"), 7, "max_tokens")
    assert [one.evicted for one in held] == [True, False, True, False]


async def test_work_at_hand_is_not_evicted_for_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corolla.server.sessions.kv_cache.WAIT_SECONDS", 0.0)
    budget = CacheBudget(20, clock=lambda: 1.0)
    working = Holding("greedy")
    working.idle_after = None
    await budget.reserve(working, 20, "max_tokens")
    with pytest.raises(RequestRefused):
        await budget.reserve(Holding("modest"), 1, "max_tokens")
    assert not working.evicted


async def test_a_peer_within_its_share_overtakes_one_beyond_it() -> None:
    budget = CacheBudget(20)
    working, other = Holding("greedy"), Holding("greedy")
    for one, pages in ((working, 16), (other, 3)):
        one.idle_after = None
        await budget.reserve(one, pages, "max_tokens")
    greedy, modest = Holding("greedy"), Holding("modest")
    modest.idle_after = None
    waiting = [asyncio.create_task(budget.reserve(one, 4, "max_tokens")) for one in (greedy, modest)]
    await until(lambda: budget.waiting == 2)
    budget.release(other)
    await waiting[1]
    assert (modest.pages, greedy.pages) == (4, 0)
    budget.release(working)
    await waiting[0]
    assert greedy.pages == 4


def lease(nbytes: int) -> Lease:
    return Lease((0, 1), torch.zeros(1), torch.zeros(1), {}, nbytes, tokens=1)


def test_leases_of_a_modest_peer_survive_a_greedy_one() -> None:
    leases = Leases(100)
    leases.keep("modest", "name", lease(30))
    for number in range(20):
        leases.keep("greedy", f"{number}", lease(20))
    assert leases.held == 90
    assert leases.take("modest", "name") is not None
    assert leases.take("greedy", "16") is None
    assert leases.take("greedy", "17") is not None


def test_leases_are_not_more_than_can_be_counted_by_their_bytes() -> None:
    leases = Leases(10**9)
    for number in range(MOST_LEASES + 5):
        leases.keep("peer", f"{number}", lease(1))
    assert len(leases) == leases.held == MOST_LEASES


# --- slow, silent and gone ---------------------------------------------------------------------------------


async def drip(client: RawClient, data: bytes) -> None:
    """One byte after the other, for as long as somebody takes them."""
    for place in range(len(data)):
        await client.stream.write([data[place : place + 1]])
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("begin", [0, 25, 200])
async def test_a_slow_writer_is_given_up(begin: int) -> None:
    """In the preamble, the header and the tensors."""
    async with served(silence=0.1) as world:
        slow = await world.raw()
        data = frame(forward(), **packed(noise(1, LARGE, HIDDEN)))
        await slow.stream.write([data[:begin]])
        with pytest.raises(PeerDisconnected):
            await drip(slow, data[begin:])
        await world.all_streams_ended()
        assert (world.held, taken(world)) == ((0, 0, 0), [0, 0])
        await assert_serves_exactly(world)


async def test_a_slow_reader_is_given_up() -> None:
    """Its reply does not fit into the stream's buffer."""
    async with limited(2000, silence=0.1) as world:
        slow = await world.raw()
        await slow.send(forward(), **packed(noise(100, 50, HIDDEN)))  # 1.3 MB
        await world.all_streams_ended()
        assert (world.held, taken(world)) == ((0, 0, 0), [0, 0])
        await assert_serves_exactly(world)


async def test_a_stream_that_nobody_uses_is_closed() -> None:
    async with served(stream_silence=0.05) as world:
        client = await world.raw()
        with pytest.raises(PeerDisconnected):
            await client.next()
        await world.all_streams_ended()
        await assert_serves_exactly(world)


async def test_a_silent_clients_session_expires_and_is_told_so() -> None:
    async with served(session_silence=0.05) as world:
        client = await world.raw()
        assert (await client.ask(opening())).message == Opened()
        assert (await client.ask(Step(position=0), hidden=noise(1, 2, HIDDEN))).message == Output()
        await until(lambda: world.held == (0, 0, 0))
        assert await world.pages_held() == 0
        assert (await refusal(client, Step(position=2), hidden=noise(1, 1, HIDDEN))).code == "evicted"
        assert (await client.ask(opening())).message == Opened()


@in_virtual_time
async def test_a_request_that_takes_longer_than_silence_may_is_not_silence() -> None:
    """Neither one that is computed nor one whose tensors are under way."""
    silence = {"stream_silence": 5.0, "session_silence": 5.0}
    async with served(engine=SimulatedEngine, silence=60.0, **silence) as world:
        client, slow = await world.raw(), await world.raw()
        data = frame(forward(), **packed(noise(1, LARGE, HIDDEN)))
        await slow.stream.write([data[:-1]])
        assert isinstance(world.engine, SimulatedEngine)
        world.engine.delay = 30.0
        assert (await client.ask(forward(), **packed(noise(1, 4, HIDDEN)))).message == Output()
        await slow.stream.write([data[-1:]])
        assert (await slow.answer()).message == Output()


@pytest.mark.parametrize("end", ["closed", "vanished"])
async def test_a_thousand_sessions_opened_and_abandoned(end: str) -> None:
    async with limited(3000, streams=4000) as world:
        crowd = world.network.transport("crowd")
        clients = [RawClient(await crowd.open("server", PROTOCOL_NAME)) for _ in range(1000)]
        for client in clients:
            assert (await client.ask(opening(tokens=20))).message == Opened()
        assert world.held == (2000, 1000, 0)
        if end == "closed":
            await crowd.close()
        else:
            world.network.kill("crowd")
        await world.all_streams_ended()
        assert (world.held, taken(world)) == ((0, 0, 0), [0, 0])
        await assert_serves_exactly(world)


async def test_an_evicted_sessions_prompts_are_let_go() -> None:
    """Its stream may stay open for long."""
    world = OneServer(capacity=4)
    await world.start()
    try:
        client, other = await world.raw("a"), await world.raw("b")
        assert (await client.ask(opening(tokens=60), prompts=noise(2, 3, HIDDEN))).message == Opened()
        (held,) = world.budget._holders
        world.clock.now += 100
        assert (await other.ask(opening(tokens=60))).message == Opened()
        await world.pages_held()
        assert held.evicted
        assert held.prompts is None  # type: ignore[attr-defined]
        assert (await refusal(client, Step(position=0), hidden=noise(1, 1, HIDDEN))).code == "evicted"
    finally:
        await world.close()
