"""A request of many tokens: others' prompts and replies come in between, and what would take too long is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, Failure, Output, Step
from tests.server.world import (
    HIDDEN,
    OneServer,
    RawClient,
    assert_same,
    assert_serves_exactly,
    backward,
    forward,
    noise,
    opening,
    packed,
    until,
    until_waiting,
)

LONG = 600  # tokens
NAME = "0" * 16  # of a graph


@pytest.fixture(autouse=True)
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training gives way before each operator, and cuts long ones; how many it has is what time is measured in."""
    monkeypatch.setattr("corolla.server.training.SHORT_SECONDS", 0.0)
    sizes = {"PIECE_SECONDS": 0.0, "LEAST_SHARE": 0.0, "ROWS": 100, "SCORES": 100 * LONG, "FEWEST_QUERIES": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(f"corolla.server.scheduler.execution.{name}", value)


@pytest.fixture(params=["llama", "bloom"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[OneServer]:
    world = OneServer(request.param, capacity=400)
    await world.start()
    yield world
    await world.close()


async def client(world: OneServer, peer: str) -> RawClient:
    return RawClient(await world.network.transport(peer).open("server", PROTOCOL_NAME))


class Held:
    """A request of a stranger that goes on only while somebody else waits, until it is let go."""

    def __init__(self, world: OneServer) -> None:
        self._world, self._own = world, world.engine.yield_to_others
        self.begun, self.free = threading.Event(), threading.Event()
        self.pieces = 0
        world.engine.yield_to_others = self._slowed  # type: ignore[method-assign]

    def _slowed(self) -> float:
        self.pieces += 1
        self.begun.set()
        pause = threading.Event()
        for _ in range(10_000):
            if self.free.is_set() or self._world.engine.waiting:
                break
            pause.wait(0.001)
        return self._own()


def requests_of(kind: str) -> list[tuple[Packet, bool]]:
    """What a stranger sends, and which of it is held."""
    hidden = packed(noise(1, LONG, HIDDEN))
    if kind == "forward":
        return [(Packet(forward(), hidden), True)]
    if kind == "backward":
        return [(Packet(backward(), hidden | {"grad": hidden["hidden"]}), True)]
    kept = Packet(forward(lease=NAME), hidden)
    return [(kept, False), (Packet(backward(lease=NAME), {"grad": hidden["hidden"]}), True)]


@pytest.mark.parametrize("kind", ["forward", "backward", "backward of a kept graph"])
async def test_a_new_chat_and_running_ones_come_in_between(world: OneServer, kind: str) -> None:
    """A prompt and ten tokens are answered, exactly, before a long request has ended, which is exact as well."""
    stranger, chat = await client(world, "stranger"), await client(world, "chat")
    tokens = noise(1, 50, HIDDEN, seed=3)
    alone = [(await stranger.ask(one.message, **one.tensors)).tensors for one, _ in requests_of(kind)][-1]
    for packet, is_held in requests_of(kind):
        if not is_held:
            await stranger.ask(packet.message, **packet.tensors)
            continue
        held = Held(world)
        answer = asyncio.create_task(stranger.ask(packet.message, **packet.tensors))
        assert await asyncio.to_thread(held.begun.wait, 20)
        await chat.ask(opening(tokens=60))
        outputs = []
        for part in tokens.split([40] + [1] * 10, dim=1):
            position = sum(one.shape[1] for one in outputs)
            reply = await chat.ask(Step(position=position), hidden=part)
            assert reply.message == Output()
            outputs.append(reply.tensors["hidden"])
        assert not answer.done()
        held.free.set()
        found = (await answer).tensors
    assert_same(torch.cat(outputs, dim=1), world.reference.forward(tokens))
    for name, tensor in found.items():
        assert_same(tensor, alone[name])


async def test_a_prompt_takes_turns_with_a_long_request(
    world: OneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither waits for the other's end: the prompt's peer is given no more than the request's was."""
    for name, value in (("PREEMPTING_TOKENS", 20), ("PROMPT_CREDIT", 0.0)):
        monkeypatch.setattr(f"corolla.server.scheduler.engine.{name}", value)
    stranger, chat = await client(world, "stranger"), await client(world, "chat")
    await chat.ask(opening(tokens=LONG))
    ((packet, _),) = requests_of("forward")
    held, passes = Held(world), []
    own = world.engine.run_pass

    def noted(parts: list[tuple[object, int]]) -> list[BaseException | None]:
        passes.append((held.pieces, sum(count for _, count in parts)))
        result: list[BaseException | None] = own(parts)
        return result

    world.engine.run_pass = noted
    answer = asyncio.create_task(stranger.ask(packet.message, **packet.tensors))
    assert await asyncio.to_thread(held.begun.wait, 20)
    prompt = asyncio.create_task(chat.ask(Step(position=0), hidden=noise(1, LONG - 1, HIDDEN)))
    await until_waiting(world, 1)
    held.free.set()
    assert (await answer).message == (await prompt).message == Output()
    assert len(passes) > 3  # it is cut
    assert len({pieces for pieces, _ in passes}) > 3  # and the request goes on in between


async def test_a_request_whose_client_has_gone_ends_at_its_next_piece(world: OneServer) -> None:
    transport = world.network.transport("stranger")
    stranger = RawClient(await transport.open("server", PROTOCOL_NAME))
    held = Held(world)
    ((packet, _),) = requests_of("forward")
    await stranger.send(packet.message, **packet.tensors)
    assert await asyncio.to_thread(held.begun.wait, 20)
    await transport.close()
    await until(lambda: world.held == (0, 0, 0) and not world.server.limits.in_flight.taken)
    held.free.set()
    await world.pages_held()  # which is computed after it
    assert held.pieces == 1
    await assert_serves_exactly(world)


async def test_a_request_that_would_take_too_long_is_refused(
    world: OneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = await client(world, "stranger")
    monkeypatch.setattr("corolla.server.training.MOST_SECONDS", 1.0)
    for packet, _ in [*requests_of("forward"), *requests_of("backward")]:
        refused = (await stranger.ask(packet.message, **packet.tensors)).message
        assert isinstance(refused, Failure)
        assert (refused.code, refused.field) == ("too_large", "hidden")
        assert "send fewer rows or shorter sequences" in refused.message
    assert (await stranger.ask(forward(), **packed(noise(1, 9, HIDDEN)))).message == Output()
