"""A bundle at a server: what a client can have of it, and that it can do nothing to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import torch
from tests.server.world import (
    BLOCKS,
    CAPACITY,
    END,
    HIDDEN,
    START,
    OneServer,
    assert_same,
    assert_serves_exactly,
    noise,
    opening,
)
from torch import Tensor

from corolla.errors import RequestRefused, UsageError
from corolla.models.attention.pages import PAGE
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions.prefilled import EnteringPrompt
from corolla.swarm.channel import request
from corolla.wire.frames import Packet
from corolla.wire.messages import Opened, OpenSession, Output, Prefilled, Step

LENGTH = 5
NAME, DEEP = "0" * 64, "1" * 64


@pytest.fixture(params=["llama", "bloom"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[OneServer]:
    world = OneServer(request.param)
    await world.start()
    await world.server.prefill_bundles([entering(NAME), entering(DEEP, deep=deep_prompts())])
    yield world
    await world.close()


def entering(name: str, deep: Tensor | None = None, length: int = LENGTH) -> EnteringPrompt:
    return EnteringPrompt(name, columns(length)[0], deep, torch.float64)


def columns(length: int = LENGTH) -> Tensor:
    """The prompt's columns as they enter the server's first block."""
    return noise(1, length, HIDDEN, seed=3)


def deep_prompts() -> Tensor:
    """For all four blocks of the model."""
    return noise(4, LENGTH, HIDDEN, seed=4)


def naming(digest: str, deep: bool = False, **changes: object) -> OpenSession:
    return opening(bundle=Prefilled(digest=digest, deep=deep), **changes)


@pytest.mark.parametrize("digest", [NAME, DEEP])
async def test_a_session_goes_on_behind_it(world: OneServer, digest: str) -> None:
    deep = deep_prompts()[START:END] if digest == DEEP else None
    tokens = noise(2, 4, HIDDEN, seed=6)
    whole = torch.cat([columns().expand(2, -1, -1), tokens], 1)
    wanted = world.reference.forward(whole, prompts=deep)
    channel = await world.connect()
    opened = await request(channel, Packet(naming(digest, deep is not None, rows=2)))
    assert opened.message == Opened(position=LENGTH)
    assert_same(opened.tensors["hidden"], wanted[:1, :LENGTH])
    found = await request(channel, Packet(Step(position=LENGTH), {"hidden": tokens}))
    assert_same(found.tensors["hidden"], wanted[:, LENGTH:])
    # Back to before it: from there the session is like any other, with the same deep prompts.
    other = noise(2, 7, HIDDEN, seed=8)
    found = await request(channel, Packet(Step(position=0), {"hidden": other}))
    assert_same(found.tensors["hidden"], world.reference.forward(other, prompts=deep))
    # And to the middle of it.
    again = await request(await world.connect(), Packet(naming(digest, deep is not None)))
    assert_same(again.tensors["hidden"], wanted[:1, :LENGTH])


async def test_a_part_of_the_blocks(world: OneServer) -> None:
    deep = deep_prompts()
    first = world.reference.view(START, START + 1).forward(columns(), prompts=deep[START : START + 1])
    channel = await world.connect()
    opened = await request(channel, Packet(naming(DEEP, True, end=START + 1)))
    assert_same(opened.tensors["hidden"], first)
    second = await request(await world.connect(), Packet(naming(DEEP, True, start=START + 1)))
    view = world.reference.view(START + 1, END)
    assert_same(second.tensors["hidden"], view.forward(first, prompts=deep[START + 1 : END]))


async def test_one_that_is_not_there(world: OneServer) -> None:
    channel = await world.connect()
    opened = await request(channel, Packet(naming("2" * 64)))
    assert (opened.message, opened.tensors) == (Opened(position=0), {})
    channel = await world.connect()
    with pytest.raises(RequestRefused) as refusal:
        await request(channel, Packet(naming("2" * 64, True)))
    assert (refusal.value.code, refusal.value.field) == ("no_bundle", "bundle")
    await assert_serves_exactly(world, channel)  # as if it had not been asked


async def test_nobody_writes_into_it(world: OneServer) -> None:
    """Whatever sessions do in its columns, others find them as they were; and its pages stay."""
    held = await world.pages_held()
    pool, row = world.server.pool, world.server.bundles[NAME].row
    before = await world.engine.submit(Kind.DECODE, lambda: _content(pool._stores, row.tables[0].pages))
    for position in range(LENGTH + 1):
        channel = await world.connect()
        await request(channel, Packet(naming(NAME, rows=2)))
        for step in (position, 2, 0):
            reply = await request(channel, Packet(Step(position=step), {"hidden": noise(2, 9, HIDDEN)}))
            assert isinstance(reply.message, Output)
        rows = torch.tensor([1, 1, 0])
        hidden = noise(3, 2, HIDDEN, seed=9)
        await request(channel, Packet(Step(position=3), {"hidden": hidden, "rows": rows}))
        await channel.close()
    await world.all_streams_ended()
    after = await world.engine.submit(Kind.DECODE, lambda: _content(pool._stores, row.tables[0].pages))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(before) == 2 * BLOCKS
    assert world.held == (0, 0, 0)
    assert await world.pages_held() == held


def _content(stores: dict[int, tuple[Tensor, Tensor]], pages: list[int]) -> list[Tensor]:
    (page,) = pages
    return [side[page * PAGE :][:LENGTH].clone() for store in stores.values() for side in store]


async def test_its_pages_are_out_of_the_budget(world: OneServer) -> None:
    """What sessions may hold together with bundles never exceeds what there is."""
    assert world.budget.capacity == CAPACITY - 2
    assert world.server.pool.pages == CAPACITY
    channel = await world.connect()
    with pytest.raises(RequestRefused, match=f"{PAGE * (CAPACITY - 2)} tokens"):
        await request(channel, Packet(opening(tokens=PAGE * (CAPACITY - 1))))
    # One that fills everything, its first page its own: the pages are there.
    channel = await world.connect()
    room = PAGE * (CAPACITY - 2)
    await request(channel, Packet(naming(NAME, tokens=room)))
    step = Step(position=LENGTH, reserve=room)
    await request(channel, Packet(step, {"hidden": noise(1, room - LENGTH, HIDDEN)}))
    assert world.server.pool.free == 0
    with pytest.raises(UsageError, match="--cache-tokens"):
        await world.server.prefill_bundles([entering("3" * 64, length=room)])
    assert set(world.server.bundles) == {NAME, DEEP}


async def test_a_session_of_fewer_tokens_than_the_bundle(world: OneServer) -> None:
    channel = await world.connect()
    opened = await request(channel, Packet(naming(NAME, tokens=1)))
    assert opened.message == Opened(position=LENGTH)
    assert world.budget.reserved == 1
