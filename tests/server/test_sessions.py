"""Sessions as honest clients use them, and what is freed when clients, or computations, come to a bad end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.server.world import (
    BLOCKS,
    CAPACITY,
    END,
    HIDDEN,
    START,
    Blocker,
    World,
    assert_same,
    assert_serves_exactly,
    backward,
    forward,
    frame,
    noise,
    opening,
    span_of,
    stepwise,
)
from torch import Tensor, nn

from corolla.errors import RequestRefused
from corolla.swarm.channel import Channel, request
from corolla.wire.frames import Packet
from corolla.wire.messages import Alive, CloseSession, Failure, Opened, Output, Ping, ServerStatus, Step

TOKENS = noise(2, 9, HIDDEN, seed=5)


async def step(
    channel: Channel, position: int, hidden: Tensor, *, reserve: int = 0, **tensors: Tensor
) -> Tensor:
    tensors = {name: tensor.contiguous() for name, tensor in ({"hidden": hidden} | tensors).items()}
    answer = await request(channel, Packet(Step(position=position, reserve=reserve), tensors))
    return answer.tensors["hidden"]


async def opened(world: World, **arguments: Any) -> Channel:
    channel = await world.connect()
    assert (await request(channel, Packet(opening(**arguments)))).message == Opened()
    return channel


# --- honest sessions ---------------------------------------------------------------------------------------


async def test_a_session_may_go_back_and_say_something_else(world: World) -> None:
    channel = await opened(world, rows=2)
    await stepwise(channel, noise(2, 6, HIDDEN, seed=6), (4, 5, 6))
    await step(channel, 0, TOKENS[:, :7])
    await step(channel, 7, noise(2, 2, HIDDEN, seed=7))
    assert_same(await step(channel, 7, TOKENS[:, 7:]), world.span.forward(TOKENS)[:, 7:])


async def test_rows_may_be_reordered_repeated_and_dropped(world: World) -> None:
    channel = await opened(world, rows=2)
    await step(channel, 0, TOKENS[:, :4])
    more, order = noise(3, 2, HIDDEN, seed=8), torch.tensor([1, 1, 0])
    whole = torch.cat([TOKENS[order, :4], more], 1)
    assert_same(await step(channel, 4, more, rows=order), world.span.forward(whole)[:, 4:])
    last, chosen = noise(1, 1, HIDDEN, seed=9), torch.tensor([2])
    whole = torch.cat([whole[chosen], last], 1)
    assert_same(await step(channel, 6, last, rows=chosen), world.span.forward(whole)[:, 6:])
    assert world.budget.reserved == 1 * 20 * BLOCKS  # one row is left


@pytest.mark.parametrize("family", ["llama", "bloom"])
async def test_padded_rows_equal_themselves_alone(family: str) -> None:
    # In float32, since bloom's own padding is NaN in float64.
    world = World(span=span_of(family, torch.float32))
    await world.start()
    tokens, mask = TOKENS.float(), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    channel = await opened(world, rows=2)
    outputs = await stepwise(channel, tokens, (6, 7, 9), mask=mask, positions=positions)
    assert_same(outputs[:1], world.span.forward(tokens[:1]), 2e-4)
    assert_same(outputs[1:, 4:], world.span.forward(tokens[1:, 4:]), 2e-4)
    await request(channel, Packet(CloseSession()))

    sent = {"hidden": tokens, "mask": mask, "positions": positions}
    output = (await request(channel, Packet(forward(), sent))).tensors["hidden"]
    assert_same(output[1:, 4:], world.span.forward(tokens[1:, 4:]), 2e-4)
    grad = noise(2, 9, HIDDEN, seed=12).float() * mask[:, :, None]  # as a loss gives none to padding
    found = (await request(channel, Packet(backward(), sent | {"grad": grad}))).tensors["grad"]
    alone = tokens[1:, 4:].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(world.span.forward(alone), alone, grad[1:, 4:])
    torch.testing.assert_close(found[1:, 4:], wanted, rtol=1e-3, atol=1e-3)
    assert not found[1, :4].any()
    await world.close()


@pytest.mark.parametrize("length", [2, 9, 12])
async def test_deep_prompts_may_be_longer_than_a_piece_or_than_all_tokens(world: World, length: int) -> None:
    prompts = noise(BLOCKS, length, HIDDEN, seed=10).requires_grad_()
    hidden = TOKENS.clone().requires_grad_()
    expected = world.span.forward(hidden, prompts=prompts)
    grad = noise(2, 9, HIDDEN, seed=11)
    wanted = torch.autograd.grad(expected, [hidden, prompts], grad)

    channel = await world.connect()
    sent = {"hidden": TOKENS, "prompts": prompts.detach()}
    await request(channel, Packet(opening(rows=2), {"prompts": prompts.detach()}))
    assert_same(await stepwise(channel, TOKENS, (1, 3, 9)), expected.detach())
    await request(channel, Packet(CloseSession()))
    output = await request(channel, Packet(forward(), sent))
    assert_same(output.tensors["hidden"], expected.detach())
    grads = (await request(channel, Packet(backward(prompt_gradient=True), sent | {"grad": grad}))).tensors
    assert_same(grads["grad"], wanted[0])
    torch.testing.assert_close(grads["prompts"], wanted[1].float())
    assert not grads["prompts"][:, 9:].any()
    unasked = (await request(channel, Packet(backward(), sent | {"grad": grad}))).tensors
    assert set(unasked) == {"grad"}
    assert_same(unasked["grad"], wanted[0])


async def test_a_session_over_some_of_the_blocks(world: World) -> None:
    first, second = await opened(world, rows=2, end=START + 1), await opened(world, rows=2, start=END - 1)
    assert world.budget.reserved == 2 * 20 * BLOCKS
    halfway = await stepwise(first, TOKENS, (4, 5, 9))
    assert_same(await stepwise(second, halfway, (6, 9)), world.span.forward(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
async def test_answers_come_in_the_dtype_of_the_question(world: World, dtype: torch.dtype) -> None:
    channel, sent = await world.connect(), TOKENS.to(dtype)
    output = (await request(channel, Packet(forward(), {"hidden": sent}))).tensors["hidden"]
    assert output.dtype == dtype
    assert_same(output, world.span.forward(sent.double()).to(dtype))
    grads = (await request(channel, Packet(backward(), {"hidden": sent, "grad": sent}))).tensors
    assert grads["grad"].dtype == dtype


async def test_a_ping_counts_what_was_done(world: World) -> None:
    channel = await opened(world, rows=2, tokens=20)
    await step(channel, 0, TOKENS[:, :4])
    await step(channel, 2, TOKENS[:, :3])
    inside = (await request(channel, Packet(Ping()))).message
    assert isinstance(inside, ServerStatus)
    assert (inside.sessions, inside.tokens_inference) == (1, 2 * 4 + 2 * 3)
    assert inside.free_cache_tokens == CAPACITY // BLOCKS - 2 * 20
    await request(channel, Packet(CloseSession()))
    await request(channel, Packet(forward(), {"hidden": TOKENS}))
    await request(channel, Packet(backward(), {"hidden": TOKENS[:1], "grad": TOKENS[:1]}))
    after = (await request(channel, Packet(Ping()))).message
    assert isinstance(after, ServerStatus)
    assert (after.sessions, after.tokens_forward, after.tokens_backward) == (0, 18, 9)
    assert after.free_cache_tokens == CAPACITY // BLOCKS
    assert (after.model, after.start, after.end) == (world.server.model, START, END)


# --- budgets -----------------------------------------------------------------------------------------------


async def test_a_full_server_is_busy_until_somebody_leaves(world: World) -> None:
    first = await opened(world, tokens=150)
    second = await world.connect()
    with pytest.raises(RequestRefused) as refused:
        await request(second, Packet(opening(tokens=51)))
    assert (refused.value.code, refused.value.field) == ("busy", "max_tokens")
    assert refused.value.retry_after
    assert world.held == (150 * BLOCKS, 1, 0)
    await request(first, Packet(CloseSession()))
    assert (await request(second, Packet(opening(tokens=51)))).message == Opened()


async def test_a_step_may_ask_for_more_room(world: World) -> None:
    channel = await opened(world, tokens=10)
    other = await opened(world, tokens=100)
    await step(channel, 0, TOKENS[:1, :4], reserve=50)
    assert world.budget.reserved == (50 + 100) * BLOCKS
    with pytest.raises(RequestRefused) as refused:
        await step(channel, 4, TOKENS[:1, 4:], reserve=101)
    assert (refused.value.code, refused.value.field) == ("busy", "reserve")
    assert world.budget.reserved == (50 + 100) * BLOCKS  # as it was
    await request(other, Packet(CloseSession()))
    rest = await step(channel, 4, TOKENS[:1, 4:], reserve=101)
    assert_same(rest, world.span.forward(TOKENS[:1])[:, 4:])
    assert world.budget.reserved == 101 * BLOCKS


async def test_tokens_beyond_the_reservation_are_reserved_before_they_are_computed(world: World) -> None:
    channel = await opened(world, tokens=4)
    await opened(world, tokens=CAPACITY // BLOCKS - 8)
    await step(channel, 0, TOKENS[:1, :8])
    assert world.budget.free == 0
    with pytest.raises(RequestRefused) as refused:
        await step(channel, 8, TOKENS[:1, 8:])
    assert refused.value.code == "busy"
    assert world.server.counters.inference == 8
    assert_same(await step(channel, 4, TOKENS[:1, 4:8]), world.span.forward(TOKENS[:1, :8])[:, 4:])


# --- bad ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["leaves", "is killed", "stops within a message"])
async def test_a_session_left_open_is_freed(world: World, way: str) -> None:
    channel = await opened(world)
    await step(channel, 0, TOKENS[:1])
    assert world.held == (20 * BLOCKS, 1, 0)
    if way == "is killed":
        world.network.kill("client")
    else:
        if way == "stops within a message":
            await channel.stream.write([frame(Step(position=9), hidden=TOKENS[:1])[:100]])
        await channel.stream.close()
    await world.all_streams_ended()
    assert world.held == (0, 0, 0)
    world.client = world.network.transport("another")
    await assert_serves_exactly(world)


async def test_a_client_killed_while_its_step_is_computed(world: World) -> None:
    client = await world.raw()
    await client.ask(opening())
    async with Blocker(world.engine):
        await client.send(Step(position=0), hidden=TOKENS[:1])
        assert isinstance((await client.next()).message, Alive)
        world.network.kill("client")
    await world.all_streams_ended()
    assert world.held == (0, 0, 0)
    world.client = world.network.transport("another")
    await assert_serves_exactly(world)


async def test_a_client_that_leaves_without_reading_its_answer(world: World) -> None:
    client = await world.raw()
    large = noise(64, 100, HIDDEN)  # more than fits into the stream's buffer
    await client.send(forward(), hidden=large)
    answer = asyncio.create_task(client.stream.read(1))  # the answer has begun
    await asyncio.wait_for(answer, 20)
    await client.stream.close()
    await world.all_streams_ended()
    assert world.held == (0, 0, 0)
    await assert_serves_exactly(world)


async def test_all_is_freed_when_the_server_closes(world: World) -> None:
    await opened(world)
    busy = await world.raw()
    await busy.ask(opening())
    async with Blocker(world.engine):
        await busy.send(Step(position=0), hidden=TOKENS[:1])
        assert isinstance((await busy.next()).message, Alive)
        await world.transport.close()
        assert world.held == (0, 0, 0)


async def test_signs_of_life_come_while_a_request_waits(world: World) -> None:
    client = await world.raw()
    async with Blocker(world.engine):
        await client.send(forward(), hidden=TOKENS)
        signs = [(await client.next()).message for _ in range(2)]
        assert all(isinstance(sign, Alive) and sign.ahead == 1 for sign in signs)
    assert_same((await client.answer()).tensors["hidden"], world.span.forward(TOKENS))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
async def test_hidden_states_beyond_all_numbers_harm_nobody(world: World, value: float) -> None:
    honest = await opened(world, rows=2)
    first = await step(honest, 0, TOKENS[:, :5])
    mad = await opened(world, rows=1)
    wild = torch.full((1, 3, HIDDEN), value, dtype=torch.float64)
    assert (await step(mad, 0, wild)).shape == wild.shape
    await request(mad, Packet(CloseSession()))
    sent = {"hidden": wild, "prompts": torch.full((BLOCKS, 2, HIDDEN), value, dtype=torch.float64)}
    assert (await request(mad, Packet(forward(), sent))).message == Output()
    grads = await request(mad, Packet(backward(prompt_gradient=True), sent | {"grad": wild}))
    assert grads.tensors["prompts"].shape == (BLOCKS, 2, HIDDEN)
    second = await step(honest, 5, TOKENS[:, 5:])
    assert_same(torch.cat([first, second], 1), world.span.forward(TOKENS))


async def test_a_step_that_breaks_off_takes_the_sessions_cache_with_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    client = await world.raw()
    await client.ask(opening())
    await client.ask(Step(position=0), hidden=TOKENS[:1, :3])
    with failing(world.span.blocks[-1]):  # when the first block has cached the new tokens
        refusal = (await client.ask(Step(position=3), hidden=TOKENS[:1, 3:])).message
        assert isinstance(refusal, Failure)
        assert (refusal.code, refusal.field) == ("internal", None)
        assert "ZeroDivisionError" in refusal.message
        assert world.held == (0, 0, 0)
        for message, tensors in ((forward(), {}), (backward(), {"grad": TOKENS})):
            refusal = (await client.ask(message, hidden=TOKENS, **tensors)).message
            assert isinstance(refusal, Failure)
            assert refusal.code == "internal"
    assert [record.exc_info is not None for record in caplog.records] == [True] * 3  # for the operator
    # The same stream is of use again.
    assert (await client.ask(opening())).message == Opened()
    replayed = await client.ask(Step(position=0), hidden=TOKENS[:1])
    assert_same(replayed.tensors["hidden"], world.span.forward(TOKENS[:1]))
    await client.stream.close()
    await world.all_streams_ended()
    await assert_serves_exactly(world)


@contextlib.contextmanager
def failing(block: nn.Module) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    handle = block.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
