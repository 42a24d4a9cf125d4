"""Sessions over blocks that see a window: what they reserve, what they give back, and how far back they go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from tests.server.world import (
    BLOCKS,
    HIDDEN,
    OneServer,
    assert_same,
    assert_serves_exactly,
    noise,
    opening,
    span_of,
)
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.models.attention.pages import PAGE, pages_for
from corolla.models.attention.windows import layout_of
from corolla.server.sessions.session import bytes_per_token, default_capacity
from corolla.swarm.channel import Channel, request
from corolla.wire.frames import Packet
from corolla.wire.messages import CloseSession, Opened, Origin, Ping, ServerStatus, Step

WINDOW = 6  # of both blocks of mistral, and of the second of gemma2
MARGIN = 20
KEPT = WINDOW - 1 + MARGIN
AT_REST = pages_for(KEPT + PAGE)
CAPACITY = 80
NAME = "a session's name"
FAMILIES = pytest.mark.parametrize("family", ["mistral", "gemma2"])
FULL_TABLES = {"mistral": 0, "gemma2": 1}


@asynccontextmanager
async def served(family: str, capacity: int = CAPACITY) -> AsyncIterator[OneServer]:
    world = OneServer(family, capacity=capacity, margin=MARGIN)
    await world.start()
    yield world
    await world.close()


async def opened(world: OneServer, **arguments: Any) -> Channel:
    channel = await world.connect()
    assert (await request(channel, Packet(opening(**arguments)))).message == Opened()
    return channel


async def step(
    channel: Channel, position: int, hidden: Tensor, *, reserve: int = 0, **tensors: Tensor
) -> Tensor:
    tensors = {name: tensor.contiguous() for name, tensor in ({"hidden": hidden} | tensors).items()}
    answer = await request(channel, Packet(Step(position=position, reserve=reserve), tensors))
    return answer.tensors["hidden"]


async def long_session(world: OneServer, tokens: Tensor, **arguments: Any) -> Channel:
    """All but the last 20 tokens as a prompt, then those one by one; exactly."""
    channel, count = await opened(world, rows=len(tokens), **arguments), tokens.shape[1]
    begun = count - 20
    outputs = [await step(channel, 0, tokens[:, :begun], reserve=count)]
    outputs += [await step(channel, at, tokens[:, at : at + 1]) for at in range(begun, count)]
    assert_same(torch.cat(outputs, 1), world.reference.forward(tokens))
    return channel


@FAMILIES
async def test_a_long_session_holds_windows_and_reserves_what_a_pass_needs(family: str) -> None:
    """The prompt is longer than a pass takes; the pages of blocks that see everything are all there."""
    async with served(family, 150) as world:
        tokens, full = noise(1, 700, HIDDEN, seed=1), FULL_TABLES[family] * pages_for(700)
        channel = await long_session(world, tokens)
        held = await world.pages_held()
        assert full < held <= full + AT_REST
        assert world.budget.reserved <= full + AT_REST + 1 + pages_for(512)
        # A call that goes on from there needs as much as its own tokens, beside what is reserved.
        await step(channel, 700, noise(1, 1, HIDDEN), reserve=701)
        assert await world.pages_held() <= full + FULL_TABLES[family] + AT_REST
        await request(channel, Packet(CloseSession()))
        assert await world.pages_held() == 0
        assert world.held == (0, 0, 0)


async def test_a_session_may_grow_far_beyond_the_budget_where_all_blocks_have_windows() -> None:
    """Fed in small steps: never are more pages held than the few that it reserved."""
    async with served("mistral", 6) as world:
        tokens = noise(1, 400, HIDDEN, seed=2)
        channel, outputs = await opened(world, tokens=16), []
        for at in range(0, 400, 16):
            outputs.append(await step(channel, at, tokens[:, at : at + 16]))
            assert await world.pages_held() <= world.budget.reserved <= 6
        assert_same(torch.cat(outputs, 1), world.reference.forward(tokens))


async def test_one_kind_of_blocks_that_sees_everything_is_enough_to_fill_the_budget() -> None:
    async with served("gemma2", 20) as world:
        channel = await opened(world, tokens=100)
        with pytest.raises(RequestRefused, match=r"room for .* of the 160 tokens") as refused:
            await step(channel, 0, noise(1, 4, HIDDEN), reserve=20 * PAGE)
        assert (refused.value.code, refused.value.field) == ("too_large", "reserve")
        assert_same(await step(channel, 0, noise(1, 4, HIDDEN)), world.reference.forward(noise(1, 4, HIDDEN)))


@FAMILIES
async def test_free_tokens_are_what_fits_for_sure(family: str) -> None:
    """A session of so many tokens is never refused; announced beside what was reserved."""
    async with served(family) as world:
        channel = await world.connect()
        status = (await request(channel, Packet(Ping()))).message
        assert isinstance(status, ServerStatus)
        tables = 1 + FULL_TABLES[family]
        assert status.free_cache_tokens == CAPACITY * PAGE // tables
        first = await opened(world, tokens=PAGE)
        status = (await request(channel, Packet(Ping()))).message
        assert isinstance(status, ServerStatus)
        assert status.free_cache_tokens == (CAPACITY - tables) * PAGE // tables
        await opened(world, tokens=status.free_cache_tokens)
        await request(first, Packet(CloseSession()))


@FAMILIES
async def test_a_step_back_within_the_margin_is_exact(family: str) -> None:
    async with served(family) as world:
        tokens, other = noise(1, 150, HIDDEN, seed=3), noise(1, 45, HIDDEN, seed=4)
        channel = await long_session(world, tokens)
        for place, back in enumerate((1, MARGIN - 1, MARGIN)):
            at = 150 - back
            found = await step(channel, at, other[:, : back + 15 * place])
            whole = torch.cat([tokens[:, :at], other[:, : back + 15 * place]], 1)
            assert_same(found, world.reference.forward(whole)[:, at:])
            await request(channel, Packet(CloseSession()))
            channel = await long_session(world, tokens)


@FAMILIES
async def test_a_step_back_beyond_what_is_kept_is_for_the_client_to_replay(family: str) -> None:
    async with served(family) as world:
        tokens, more = noise(1, 150, HIDDEN, seed=5), noise(1, 3, HIDDEN, seed=6)
        channel = await long_session(world, tokens)
        with pytest.raises(RequestRefused, match="replay the session") as refused:
            await step(channel, 60, more)
        assert (refused.value.code, refused.value.field) == ("evicted", "position")
        assert world.held == (0, 0, 0)
        assert await world.pages_held() == 0
        assert (await request(channel, Packet(opening()))).message == Opened()
        await step(channel, 0, tokens[:, :60])
        whole = torch.cat([tokens[:, :60], more], 1)
        assert_same(await step(channel, 60, more), world.reference.forward(whole)[:, 60:])


@FAMILIES
async def test_a_session_may_begin_anew_however_long_it_was(family: str) -> None:
    async with served(family) as world:
        channel = await long_session(world, noise(1, 150, HIDDEN, seed=5))
        again = noise(1, 50, HIDDEN, seed=7)
        assert_same(await step(channel, 0, again), world.reference.forward(again))


@FAMILIES
async def test_padded_rows_of_other_lengths(family: str) -> None:
    """The second row holds far fewer tokens, so its tables begin elsewhere; then both go back a little."""
    async with served(family) as world:
        tokens, mask = noise(2, 120, HIDDEN, seed=8), torch.ones(2, 120, dtype=torch.bool)
        mask[1, :70] = False
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        channel = await opened(world, rows=2, tokens=120)
        outputs, cuts = [], (90, 91, 95, 110, 120)
        for begin, end in zip((0, *cuts), cuts, strict=False):
            extra = {"mask": mask[:, :end], "positions": positions[:, begin:end]}
            outputs.append(await step(channel, begin, tokens[:, begin:end], **extra))
        found = torch.cat(outputs, 1)
        more = noise(2, 30, HIDDEN, seed=9)
        extra = {"mask": torch.cat([mask[:, :105], torch.ones(2, 30, dtype=torch.bool)], 1)}
        extra["positions"] = (extra["mask"].long().cumsum(1) - 1)[:, 105:]
        again = await step(channel, 105, more, **extra)
        for row, begin in enumerate((0, 70)):
            own = tokens[row : row + 1, begin:]
            assert_same(found[row : row + 1, begin:], world.reference.forward(own))
            whole = torch.cat([own[:, : 105 - begin], more[row : row + 1]], 1)
            assert_same(again[row : row + 1], world.reference.forward(whole)[:, -30:])


@FAMILIES
async def test_rows_are_reordered_and_repeated_beyond_the_window(family: str) -> None:
    async with served(family, 150) as world:
        tokens = noise(2, 100, HIDDEN, seed=10)
        channel = await long_session(world, tokens)
        order = torch.tensor([1, 1, 0, 1])
        whole = tokens[order]
        for seed in range(25):
            new = noise(4, 2, HIDDEN, seed=100 + seed)
            position = whole.shape[1] - (seed % 3)  # now and then a token is taken back, as speculation does
            whole = torch.cat([whole[order, :position] if seed else whole[:, :position], new], 1)
            found = await step(channel, position, new, rows=order)
            order = torch.tensor([0, 2, 2, 3])
            assert_same(found, world.reference.forward(whole)[:, position:])
            assert await world.pages_held() <= world.budget.reserved


# --- beginning with another session ------------------------------------------------------------------------


async def begun(world: OneServer, tokens: int, *, epoch: int = 0, name: str = NAME) -> tuple[Channel, int]:
    channel = await world.connect()
    origin = Origin(name=name, tokens=tokens, epoch=epoch)
    answer = await request(channel, Packet(opening(tokens=tokens + 40, origin=origin)))
    assert isinstance(answer.message, Opened)
    return channel, answer.message.position


@FAMILIES
@pytest.mark.parametrize("back", [0, 1, MARGIN])
async def test_two_sessions_share_what_is_kept(family: str, back: int) -> None:
    """Then both go on by themselves, each exactly, also when the first has gone."""
    async with served(family, 150) as world:
        tokens, more = noise(1, 150, HIDDEN, seed=11), noise(1, 40, HIDDEN, seed=12)
        first = await long_session(world, tokens, name=NAME)
        held = await world.pages_held()
        second, position = await begun(world, 150 - back)
        assert position == 150 - back
        assert await world.pages_held() == held  # nothing is copied
        whole = torch.cat([tokens[:, :position], more], 1)
        wanted = world.reference.forward(whole)[:, position:]
        found = [await step(second, position + at, more[:, at : at + 5]) for at in range(0, 20, 5)]
        other = torch.cat([tokens, more], 1)
        assert_same(await step(first, 150, more), world.reference.forward(other)[:, 150:])
        await request(first, Packet(CloseSession()))
        found += [await step(second, position + at, more[:, at : at + 1]) for at in range(20, 40)]
        assert_same(torch.cat(found, 1), wanted)
        await request(second, Packet(CloseSession()))
        assert await world.pages_held() == 0


@FAMILIES
async def test_a_beginning_that_is_no_longer_kept_is_not_shared(family: str) -> None:
    async with served(family, 150) as world:
        tokens = noise(1, 150, HIDDEN, seed=13)
        await long_session(world, tokens, name=NAME)
        for tokens_wanted in (150 - MARGIN - PAGE - 1, 60, 5):
            channel, position = await begun(world, tokens_wanted)
            assert position == 0
            assert_same(await step(channel, 0, tokens[:, :9]), world.reference.forward(tokens[:, :9]))


async def test_what_a_client_is_refused_does_not_harm_the_next() -> None:
    async with served("gemma2", 150) as world:
        channel = await long_session(world, noise(1, 150, HIDDEN, seed=14))
        with pytest.raises(RequestRefused):
            await step(channel, 20, noise(1, 1, HIDDEN))
        await assert_serves_exactly(world)
        assert world.held[0] == 0


# --- budgets -----------------------------------------------------------------------------------------------


@FAMILIES
async def test_prompts_are_bounded_by_what_is_cached_not_by_what_goes_by(family: str) -> None:
    """A session keeps its deep prompts; a number of tokens that costs nothing may not buy room for them."""
    async with served(family, 4000) as world:
        channel = await world.connect()
        fitting = noise(BLOCKS, KEPT, HIDDEN)
        much = noise(BLOCKS, KEPT * 10, HIDDEN)
        assert (
            await request(channel, Packet(opening(tokens=KEPT), {"prompts": fitting}))
        ).message == Opened()
        tokens = 10 * KEPT if family == "gemma2" else 10_000_000
        other = await world.connect()
        with pytest.raises(RequestRefused) as refused:
            await request(other, Packet(opening(tokens=tokens), {"prompts": much}))
        assert (refused.value.code, refused.value.field) == ("malformed", "prompts")


@pytest.mark.parametrize(("family", "depth"), [("mistral", 2), ("gemma2", 1)])
def test_a_pages_room_is_measured_on_the_span(family: str, depth: int) -> None:
    """A page of gemma2's two tables is half as deep, so that twice as many fit."""
    span = span_of(family)
    layout = layout_of(span)
    assert layout.depth == depth
    size = bytes_per_token(span) * PAGE * depth // BLOCKS
    assert default_capacity(span, 1000 * size, layout) == 500
