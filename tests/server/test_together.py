"""Steps of several sessions in one message: each is taken or refused as if it had come by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch
from tests.server.test_limits import served
from tests.server.world import (
    HIDDEN,
    Blocker,
    OneServer,
    assert_same,
    assert_serves_exactly,
    noise,
    opening,
    span_of,
    until,
    until_waiting,
)
from tests.virtual_time import SimulatedEngine, in_virtual_time
from torch import Tensor

from corolla.errors import PeerDisconnected, RequestRefused
from corolla.models.compiled.program import Program
from corolla.models.kernels.native import library
from corolla.models.span import Span
from corolla.server.sessions import step as step_module
from corolla.swarm.channel import Channel, request
from corolla.swarm.transport.memory import MemoryTransport
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, CloseSession, Outputs, Part, Ping, Step, Steps


@pytest.fixture(params=["llama", "bloom", "qwen3_5_text", "falcon_h1"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[OneServer]:
    world = OneServer(request.param, capacity=60)
    await world.start()
    yield world
    await world.close()


class Peer:
    """One client with some sessions, and a stream for the steps of all."""

    def __init__(self, world: OneServer, name: str = "peer") -> None:
        self.world = world
        self.transport: MemoryTransport = world.network.transport(name)
        self.sessions: list[Session] = []

    async def channel(self) -> Channel:
        return Channel(await self.transport.open("server", PROTOCOL_NAME), side="client", silence=20)

    async def open(self, *rows: int, tokens: int = 30) -> list[Session]:
        for count in rows:
            index = len(self.sessions)
            session = Session(
                await self.channel(), f"session number {index}", noise(count, 30, HIDDEN, seed=index)
            )
            message = opening(rows=count, tokens=tokens, name=session.name)
            await request(session.channel, Packet(message))
            await session.step(5 + index)
            self.sessions.append(session)
        self.together = await self.channel()
        return self.sessions

    async def step(self, sessions: Sequence[Session], **changes: int) -> Outputs:
        """One token of each; those that were taken are noted."""
        parts = tuple(session.part(**changes) for session in sessions)
        hidden = torch.cat([session.next() for session in sessions])
        reply = await request(self.together, Packet(Steps(parts=parts), {"hidden": hidden}))
        assert isinstance(reply.message, Outputs)
        outputs = torch.split(reply.tensors["hidden"], [part.rows for part in parts])
        for session, output in zip(sessions, outputs, strict=True):
            if session.name in codes(reply.message):
                assert not output.any()
            else:
                session.took(output)
        return reply.message


class Session:
    def __init__(self, channel: Channel, name: str, tokens: Tensor) -> None:
        self.channel, self.name, self.tokens = channel, name, tokens
        self.outputs: list[Tensor] = []
        self.at = 0

    def part(self, **changes: int) -> Part:
        return Part(**({"name": self.name, "position": self.at, "rows": len(self.tokens)} | changes))  # type: ignore[arg-type]

    def next(self, count: int = 1) -> Tensor:
        return self.tokens[:, self.at : self.at + count].contiguous()

    def took(self, output: Tensor) -> None:
        self.outputs.append(output)
        self.at += int(output.shape[1])

    async def step(self, count: int = 1) -> None:
        packet = Packet(Step(position=self.at), {"hidden": self.next(count)})
        self.took((await request(self.channel, packet)).tensors["hidden"])

    def assert_right(self, world: OneServer) -> None:
        assert_same(torch.cat(self.outputs, 1), world.reference.forward(self.tokens[:, : self.at]))


def codes(reply: Outputs) -> dict[str, str]:
    return {name: failure.code for name, failure in reply.failures}


async def test_sessions_of_any_rows_step_together_and_by_themselves_in_turn(world: OneServer) -> None:
    peer = Peer(world)
    one, two, three = await peer.open(1, 2, 1)
    for turn in range(4):
        assert not (await peer.step((three, one, two))).failures
        await (one, two, three)[turn % 3].step()
    for session in (one, two, three):
        session.assert_right(world)
    assert world.server.counters.inference == sum(len(one.tokens) * one.at for one in peer.sessions)


async def test_a_step_back_among_others(world: OneServer) -> None:
    peer = Peer(world)
    one, two = await peer.open(1, 1)
    await peer.step((one, two))
    one.at, one.outputs = 3, [torch.cat(one.outputs, 1)[:, :3]]
    one.tokens[:, 3:] = noise(1, 27, HIDDEN, seed=99)
    await peer.step((one, two))
    await peer.step((one, two))
    for session in (one, two):
        session.assert_right(world)


async def test_all_parts_share_a_pass(world: OneServer) -> None:
    peer, passes = Peer(world), []
    sessions = await peer.open(1, 1, 1)
    own = world.engine.run_pass
    world.engine.run_pass = lambda parts: passes.append(len(parts)) or own(parts)  # type: ignore[func-returns-value]
    await peer.step(sessions)
    assert passes == [3]


async def test_each_part_is_refused_by_itself(world: OneServer) -> None:
    peer, stranger = Peer(world), Peer(world, "stranger")
    one, two, three, four = await peer.open(1, 1, 1, 1)
    [own] = await stranger.open(1)
    own.name = four.name  # a name is its peer's own
    stranger_s = await request(own.channel, Packet(CloseSession()))
    assert stranger_s.message
    reply = await stranger.step([own])
    assert codes(reply) == {four.name: "evicted"}

    two.at += 1  # a token is left out
    three.name = "somebody else's!"
    reply = await peer.step((one, two, three, four))
    assert codes(reply) == {two.name: "malformed", three.name: "evicted"}
    assert dict(reply.failures)[two.name].field == "position"
    await peer.step((one, four))
    for session in (one, four):
        session.assert_right(world)
    with pytest.raises(RequestRefused) as refused:  # its cache went with the refusal
        await two.step()
    assert refused.value.code == "evicted"
    await assert_serves_exactly(world)


async def test_the_wrong_number_of_rows_or_width(world: OneServer) -> None:
    peer = Peer(world)
    one, two = await peer.open(1, 2)
    two.tokens = two.tokens[:1]
    assert codes(await peer.step((one, two))) == {two.name: "malformed"}
    one.assert_right(world)


async def test_what_would_have_to_wait_for_room_is_told_to_come_alone(world: OneServer) -> None:
    peer = Peer(world)
    one, two = await peer.open(1, 1)
    before = world.budget.reserved
    reply = await peer.step((one, two), reserve=5000)
    assert codes(reply) == dict.fromkeys((one.name, two.name), "not_batchable")
    assert {failure.field for _, failure in reply.failures} == {"reserve"}
    assert world.budget.reserved == before
    for session in (one, two):
        await session.step()
        session.assert_right(world)


async def test_room_that_is_free_is_given_on_the_way(world: OneServer) -> None:
    """As far as it goes; and nobody gets past those who wait in line."""
    peer = Peer(world)
    one, two = await peer.open(1, 1)
    own, tokens = world.server.sessions.opened("peer", one.name), 100
    assert own is not None
    while own.pages_needed(1, tokens, one.at, None) - own.pages <= world.budget.free // 2:
        tokens += 16
    assert codes(await peer.step((one, two), reserve=tokens)) == {two.name: "not_batchable"}
    late, message = await peer.channel(), opening(tokens=tokens, name="a newcomer's name")
    waiting = asyncio.create_task(request(late, Packet(message)))
    await until(lambda: world.budget.waiting == 1)
    assert codes(await peer.step((one, two), reserve=tokens // 2)) == {two.name: "not_batchable"}
    await late.close()
    with pytest.raises(PeerDisconnected):
        await waiting
    await until(lambda: not world.budget.waiting)
    assert not (await peer.step((one, two), reserve=tokens // 2)).failures
    for session in (one, two):
        session.assert_right(world)


async def test_states_are_stacked_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A company that fails changes nothing of those before it."""
    world, companies = OneServer("qwen3_5_text", capacity=60), []
    own, begin = Span.forward_stacked, step_module.StepRequest.begin

    def forward_stacked(span: Span, hidden: Sequence[Tensor], *more: Any) -> Sequence[Tensor]:
        companies.append(len(hidden))
        return own(span, hidden, *more)

    def fail_once(step: step_module.StepRequest) -> None:
        if step.session.name == three.name and step.session.length == three.at and companies == [2]:
            companies.append(0)
            raise ZeroDivisionError
        begin(step)

    monkeypatch.setattr(Span, "forward_stacked", forward_stacked)
    monkeypatch.setattr(step_module, "STACKED_BYTES", 2 * world.span.cache_bytes[1])
    await world.start()
    try:
        peer = Peer(world)
        one, two, three = await peer.open(1, 1, 1)
        monkeypatch.setattr(step_module.StepRequest, "begin", fail_once)
        for _ in range(2):
            assert not (await peer.step((one, two, three))).failures
        assert companies == [2, 0, 2, 1]
        for session in (one, two, three):
            session.assert_right(world)
    finally:
        await world.close()


@pytest.mark.skipif(library() is None, reason="there is no C compiler here")
async def test_a_step_with_states_is_compiled_without_company_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world, companies = OneServer(span=span_of("qwen3_5_text", torch.float32), capacity=60), []
    assert world.span.compile() is not None
    own = Program.run_stacked

    def run_stacked(program: Program, hidden: Tensor, *more: Any, **named: Any) -> Tensor:
        companies.append(len(hidden))
        return own(program, hidden, *more, **named)

    monkeypatch.setattr(Program, "run_stacked", run_stacked)
    await world.start()
    try:
        peer = Peer(world)
        one, two = await peer.open(1, 1)
        for company in ((one,), (one, two), (two,)):
            assert not (await peer.step(company)).failures
        assert companies == [1, 2, 1]
    finally:
        await world.close()


async def test_a_family_that_cannot_be_packed() -> None:
    world = OneServer("falcon", capacity=60)
    await world.start()
    try:
        peer = Peer(world)
        one, two = await peer.open(1, 1)
        assert set(codes(await peer.step((one, two))).values()) == {"not_batchable"}
        await one.step()
        one.assert_right(world)
    finally:
        await world.close()


async def test_a_session_takes_one_step_at_a_time(world: OneServer) -> None:
    peer = Peer(world)
    one, two = await peer.open(1, 1)
    with pytest.raises(RequestRefused, match="one step at a time"):
        await peer.step((one, two, one))
    peer.together = await peer.channel()
    second = await peer.channel()
    async with Blocker(world.engine):
        going = asyncio.create_task(peer.step((one,)))
        await until_waiting(world, 1)
        parts = (one.part(), two.part())
        asked = asyncio.create_task(
            request(second, Packet(Steps(parts=parts), {"hidden": torch.cat([one.next(), two.next()])}))
        )
        await until_waiting(world, 2)
    await going
    reply = await asked
    assert isinstance(reply.message, Outputs)
    assert codes(reply.message) == {one.name: "malformed"}
    two.took(reply.tensors["hidden"][1:])
    await peer.step((one, two))
    for session in (one, two):
        session.assert_right(world)


async def test_a_session_closed_while_its_step_waits(world: OneServer) -> None:
    """The others' are answered; nothing is computed for it, and no page stays."""
    peer = Peer(world)
    one, two = await peer.open(1, 1)
    async with Blocker(world.engine):
        going = asyncio.create_task(peer.step((one, two)))
        await until_waiting(world, 2)
        await one.channel.close()
        await until(lambda: len(world.server.sessions) == 1)
    assert codes(await going) == {one.name: "evicted"}
    two.assert_right(world)
    await two.channel.close()
    await until(lambda: world.held == (0, 0, 0))
    assert await world.pages_held() == 0


async def test_a_client_that_goes_while_its_steps_wait(world: OneServer) -> None:
    """What its sessions hold is not known any more, so they hold nothing."""
    peer = Peer(world)
    one, two = await peer.open(1, 1)
    async with Blocker(world.engine):
        going = asyncio.create_task(peer.step((one, two)))
        await until_waiting(world, 2)
        going.cancel()
        await asyncio.wait([going])
        await peer.together.close()
        await until(lambda: world.engine.waiting == 0)
    for session in (one, two):
        with pytest.raises(RequestRefused) as refused:
            await session.step()
        assert refused.value.code == "evicted"
    assert await world.pages_held() == 0


async def test_a_step_that_fails_fails_alone(world: OneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(world)
    one, two = await peer.open(1, 1)
    own = step_module.StepRequest.begin

    def begin(step: step_module.StepRequest) -> None:
        if step.session.length == one.at:
            raise ZeroDivisionError
        own(step)

    monkeypatch.setattr(step_module.StepRequest, "begin", begin)
    reply = await peer.step((one, two))
    assert codes(reply) == {one.name: "internal"}
    two.assert_right(world)
    monkeypatch.undo()
    await peer.step((two,))
    two.assert_right(world)


@in_virtual_time
async def test_a_stream_may_be_silent_while_its_session_steps_with_others() -> None:
    async with served(session_silence=60.0, engine=SimulatedEngine) as world:
        peer = Peer(world)
        one, two = await peer.open(1, 1)
        for _ in range(8):
            assert not (await peer.step((one, two))).failures
            await asyncio.sleep(50.0)
        for session in (one, two):
            session.assert_right(world)
        await request(peer.together, Packet(Ping()))
        await asyncio.sleep(61.0)
        assert len(world.server.sessions) == 0  # both silent now
