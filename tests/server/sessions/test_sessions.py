"""Sessions as honest clients use them, and what is freed when clients, or computations, come to a bad end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
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
    OneServer,
    assert_same,
    assert_serves_exactly,
    backward,
    forward,
    frame,
    noise,
    opening,
    packed,
    span_of,
    stepwise,
    until,
    until_waiting,
)
from torch import Tensor, nn

from corolla.errors import RequestRefused
from corolla.models.attention.pages import PAGE
from corolla.server.sessions import session as session_module
from corolla.server.sessions.kv_cache import WAIT_SECONDS
from corolla.swarm.channel import Channel, request
from corolla.wire.frames import Packet
from corolla.wire.messages import (
    Alive,
    CloseSession,
    Failure,
    Opened,
    Origin,
    Output,
    Ping,
    ServerStatus,
    Step,
)

TOKENS = noise(2, 9, HIDDEN, seed=5)


def pages(tokens: int) -> int:
    """Pages of 16 tokens, reckoned by hand."""
    return (tokens + 15) // 16


def pages_of_rows(world: OneServer, rows: int, tokens: int) -> int:
    """What is reserved for so many rows; caches that lie in no pages are reckoned by the token."""
    return rows * pages(tokens) if world.span.packable else pages(rows * tokens)


async def step(
    channel: Channel, position: int, hidden: Tensor, *, reserve: int = 0, **tensors: Tensor
) -> Tensor:
    tensors = {name: tensor.contiguous() for name, tensor in ({"hidden": hidden} | tensors).items()}
    answer = await request(channel, Packet(Step(position=position, reserve=reserve), tensors))
    return answer.tensors["hidden"]


async def opened(world: OneServer, **arguments: Any) -> Channel:
    channel = await world.connect()
    assert (await request(channel, Packet(opening(**arguments)))).message == Opened()
    return channel


# --- honest sessions ---------------------------------------------------------------------------------------


async def test_a_session_may_go_back_and_say_something_else(world: OneServer) -> None:
    channel = await opened(world, rows=2)
    await stepwise(channel, noise(2, 6, HIDDEN, seed=6), (4, 5, 6))
    await step(channel, 0, TOKENS[:, :7])
    await step(channel, 7, noise(2, 2, HIDDEN, seed=7))
    assert_same(await step(channel, 7, TOKENS[:, 7:]), world.reference.forward(TOKENS)[:, 7:])


async def test_rows_may_be_reordered_repeated_and_dropped(world: OneServer) -> None:
    channel = await opened(world, rows=2)
    await step(channel, 0, TOKENS[:, :4])
    more, order = noise(3, 2, HIDDEN, seed=8), torch.tensor([1, 1, 0])
    whole = torch.cat([TOKENS[order, :4], more], 1)
    assert_same(await step(channel, 4, more, rows=order), world.reference.forward(whole)[:, 4:])
    last, chosen = noise(1, 1, HIDDEN, seed=9), torch.tensor([2])
    whole = torch.cat([whole[chosen], last], 1)
    assert_same(await step(channel, 6, last, rows=chosen), world.reference.forward(whole)[:, 6:])
    assert world.budget.reserved == pages_of_rows(world, 2, 20)  # which are the session's until it closes


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon"])
async def test_padded_rows_equal_themselves_alone(family: str) -> None:
    # In float32, since bloom's own padding is NaN in float64.
    world = OneServer(span=span_of(family, torch.float32))
    await world.start()
    tokens, mask = TOKENS.float(), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    channel = await opened(world, rows=2)
    outputs = await stepwise(channel, tokens, (6, 7, 9), mask=mask, positions=positions)
    assert_same(outputs[:1], world.reference.forward(tokens[:1]), 2e-4)
    assert_same(outputs[1:, 4:], world.reference.forward(tokens[1:, 4:]), 2e-4)
    if world.span.packable:
        assert not outputs[1, :4].any()  # not computed
    await request(channel, Packet(CloseSession()))
    await world.close()


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
async def test_packed_sequences_equal_each_alone(world: OneServer, given: bool) -> None:
    """Forward and backward of lengths 5, 1 and 9, with position ids from 0 on or from anywhere."""
    channel, lengths = await world.connect(), [5, 1, 9]
    hidden = noise(1, sum(lengths), HIDDEN, seed=12)
    grad, prompts = noise(1, sum(lengths), HIDDEN, seed=13), noise(BLOCKS, 3, HIDDEN, seed=14)
    starts = [4, 0, 2] if given else [0, 0, 0]
    ids = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    sent = {"hidden": hidden, "lengths": torch.tensor(lengths), "prompts": prompts}
    sent |= {"positions": torch.cat(ids)[None]} if given else {}
    output = (await request(channel, Packet(forward(), sent))).tensors["hidden"]
    grads = (await request(channel, Packet(backward(prompt_gradient=True), sent | {"grad": grad}))).tensors
    wanted_prompts = torch.zeros_like(prompts)
    for place, part in enumerate(torch.split(hidden, lengths, dim=1)):
        own = slice(sum(lengths[:place]), sum(lengths[: place + 1]))
        alone, deep = part.clone().requires_grad_(), prompts.clone().requires_grad_()
        expected = world.reference.forward(alone, positions=ids[place][None], prompts=deep)
        wanted = torch.autograd.grad(expected, [alone, deep], grad[:, own])
        assert_same(output[:, own], expected.detach())
        assert_same(grads["grad"][:, own], wanted[0])
        wanted_prompts += wanted[1]
    assert_same(grads["prompts"], wanted_prompts.float(), 1e-4)


async def test_a_mask_that_contradicts_what_was_cached_is_for_the_client_to_replay(world: OneServer) -> None:
    """What was cached as padding cannot become a token, nor the other way round; the whole is sent again."""
    first, second = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    first[1, 1] = False
    channel = await opened(world, rows=2)
    await step(channel, 0, TOKENS[:, :4], mask=first)
    with pytest.raises(RequestRefused) as refused:
        await step(channel, 4, TOKENS[:, 4:], mask=second)
    assert (refused.value.code, refused.value.field) == ("evicted", "mask")
    assert world.held == (0, 0, 0)
    assert (await request(channel, Packet(opening(rows=2)))).message == Opened()
    assert_same(await step(channel, 0, TOKENS, mask=second), world.reference.forward(TOKENS))
    await request(channel, Packet(CloseSession()))
    assert await world.pages_held() == 0


@pytest.mark.parametrize("length", [2, 9, 12])
async def test_deep_prompts_may_be_longer_than_a_piece_or_than_all_tokens(
    world: OneServer, length: int
) -> None:
    prompts = noise(BLOCKS, length, HIDDEN, seed=10).requires_grad_()
    hidden = TOKENS.clone().requires_grad_()
    expected = world.reference.forward(hidden, prompts=prompts)
    grad = noise(2, 9, HIDDEN, seed=11)
    wanted = torch.autograd.grad(expected, [hidden, prompts], grad)

    channel = await world.connect()
    sent = packed(TOKENS, grad=grad, prompts=prompts.detach())
    asked = {name: tensor for name, tensor in sent.items() if name != "grad"}
    await request(channel, Packet(opening(rows=2), {"prompts": prompts.detach()}))
    assert_same(await stepwise(channel, TOKENS, (1, 3, 9)), expected.detach())
    await request(channel, Packet(CloseSession()))
    output = await request(channel, Packet(forward(), asked))
    assert_same(output.tensors["hidden"].view_as(hidden), expected.detach())
    grads = (await request(channel, Packet(backward(prompt_gradient=True), sent))).tensors
    assert_same(grads["grad"].view_as(hidden), wanted[0])
    assert_same(grads["prompts"], wanted[1].float())
    assert not grads["prompts"][:, 9:].any()
    unasked = (await request(channel, Packet(backward(), sent))).tensors
    assert set(unasked) == {"grad"}
    assert_same(unasked["grad"].view_as(hidden), wanted[0])


async def test_a_session_over_some_of_the_blocks(world: OneServer) -> None:
    first, second = await opened(world, rows=2, end=START + 1), await opened(world, rows=2, start=END - 1)
    assert world.budget.reserved == 2 * pages_of_rows(world, 2, 20)
    halfway = await stepwise(first, TOKENS, (4, 5, 9))
    assert_same(await stepwise(second, halfway, (6, 9)), world.reference.forward(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
async def test_answers_come_in_the_dtype_of_the_question(world: OneServer, dtype: torch.dtype) -> None:
    channel, sent = await world.connect(), TOKENS.to(dtype)
    output = (await request(channel, Packet(forward(), packed(sent)))).tensors["hidden"]
    assert output.dtype == dtype
    assert_same(output.view_as(sent), world.reference.forward(sent.double()).to(dtype))
    grads = (await request(channel, Packet(backward(), packed(sent, grad=sent)))).tensors
    assert grads["grad"].dtype == dtype


async def test_a_ping_counts_what_was_done(world: OneServer) -> None:
    channel = await opened(world, rows=2, tokens=20)
    await step(channel, 0, TOKENS[:, :4])
    await step(channel, 2, TOKENS[:, :3])
    inside = (await request(channel, Packet(Ping()))).message
    assert isinstance(inside, ServerStatus)
    assert (inside.sessions, inside.tokens_inference) == (1, 2 * 4 + 2 * 3)
    assert inside.free_cache_tokens == (CAPACITY - pages_of_rows(world, 2, 20)) * PAGE
    await request(channel, Packet(CloseSession()))
    await request(channel, Packet(forward(), packed(TOKENS)))
    await request(channel, Packet(backward(), packed(TOKENS[:1], grad=TOKENS[:1])))
    after = (await request(channel, Packet(Ping()))).message
    assert isinstance(after, ServerStatus)
    assert (after.sessions, after.tokens_forward, after.tokens_backward) == (0, 18, 9)
    assert after.free_cache_tokens == CAPACITY * PAGE
    assert (after.model, after.start, after.end) == (world.server.model, START, END)


# --- budgets -----------------------------------------------------------------------------------------------


@pytest.fixture
def nobody_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "IDLE_SECONDS", float("inf"))


async def refused_in_the_end(world: OneServer, asked: Coroutine[Any, Any, Any]) -> RequestRefused:
    """The refusal of a request that waits in line as long as a newcomer does."""
    task = asyncio.create_task(asked)
    await until(lambda: world.budget.waiting == 1)
    assert not task.done()
    world.clock.now += WAIT_SECONDS
    with pytest.raises(RequestRefused) as refused:
        await asyncio.wait_for(task, 20)
    return refused.value


@pytest.mark.usefixtures("nobody_idle")
async def test_a_full_server_is_busy_until_somebody_leaves(world: OneServer) -> None:
    first = await opened(world, tokens=150)
    second = await world.connect()
    refused = await refused_in_the_end(world, request(second, Packet(opening(tokens=51))))
    assert (refused.code, refused.field) == ("busy", "max_tokens")
    assert refused.retry_after
    assert "full, 0 ahead of you" in str(refused)
    assert world.held == (pages(150), 1, 0)
    waiting = asyncio.create_task(request(second, Packet(opening(tokens=51))))
    await until(lambda: world.budget.waiting == 1)
    await request(first, Packet(CloseSession()))
    assert (await asyncio.wait_for(waiting, 20)).message == Opened()


@pytest.mark.usefixtures("nobody_idle")
async def test_a_step_may_ask_for_more_room(world: OneServer) -> None:
    channel = await opened(world, tokens=10)
    other = await opened(world, tokens=100)
    await step(channel, 0, TOKENS[:1, :4], reserve=50)
    assert world.budget.reserved == pages(50) + pages(100)
    refused = await refused_in_the_end(world, step(channel, 4, TOKENS[:1, 4:], reserve=101))
    assert (refused.code, refused.field) == ("busy", "reserve")
    assert world.budget.reserved == pages(50) + pages(100)  # as it was
    await request(other, Packet(CloseSession()))
    rest = await step(channel, 4, TOKENS[:1, 4:], reserve=101)
    assert_same(rest, world.reference.forward(TOKENS[:1])[:, 4:])
    assert world.budget.reserved == pages(101)


@pytest.mark.usefixtures("nobody_idle")
async def test_tokens_beyond_the_reservation_are_reserved_before_they_are_computed(world: OneServer) -> None:
    channel, tokens = await opened(world, tokens=4), noise(1, 40, HIDDEN)
    await opened(world, tokens=(CAPACITY - 2) * PAGE)
    await step(channel, 0, tokens[:, :20])
    assert world.budget.free == 0
    refused = await refused_in_the_end(world, step(channel, 20, tokens[:, 20:]))
    assert refused.code == "busy"
    assert world.server.counters.inference == 20
    assert_same(await step(channel, 12, tokens[:, 12:30]), world.reference.forward(tokens[:, :30])[:, 12:])


async def test_a_session_behind_a_prefix_fills_no_more_pages_than_it_reserved(world: OneServer) -> None:
    form = world.span.key_values
    assert form is not None
    prefix, tokens = noise(END - START, PAGE + 4, form.width), noise(1, 3 * PAGE, HIDDEN)
    channel = await world.connect()
    message = opening(tokens=3 * PAGE)
    assert (await request(channel, Packet(message, {"prefix": prefix}))).message == Opened()
    for begin in range(0, 3 * PAGE, PAGE):  # its second page is its own and lies apart from the prefix's
        await step(channel, begin, tokens[:, begin : begin + PAGE])
        assert await world.pages_held() <= world.budget.reserved


async def test_a_prompt_in_a_fork_has_what_it_reads_brought_together(world: OneServer) -> None:
    """Its attention reads all of it in each block; where pages lie apart, that is copied each time."""
    if not world.span.packable:
        return
    tokens, twin = noise(1, 50, HIDDEN), await world.connect()
    first = await opened(world, tokens=40, name="1" * 16)
    await step(first, 0, tokens[:, :20])
    message = opening(tokens=60, name="2" * 16, origin=Origin("1" * 16, PAGE, 0))
    assert (await request(twin, Packet(message))).message == Opened(position=PAGE)
    found = await step(twin, PAGE, tokens[:, PAGE:])
    assert_same(found, world.reference.forward(tokens)[:, PAGE:])
    session = world.server.sessions.find("client", "2" * 16)
    assert session is not None
    assert [table.contiguous_from() is not None for table in session.block_tables[0].tables] == [True]
    assert_same(await step(first, 20, tokens[:, 20:23]), world.reference.forward(tokens[:, :23])[:, 20:])


# --- bad ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["leaves", "is killed", "stops within a message"])
async def test_a_session_left_open_is_freed(world: OneServer, way: str) -> None:
    channel = await opened(world)
    await step(channel, 0, TOKENS[:1])
    assert world.held == (pages(20), 1, 0)
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


async def test_a_client_killed_while_its_step_is_computed(world: OneServer) -> None:
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


async def test_a_client_that_leaves_without_reading_its_answer(world: OneServer) -> None:
    client = await world.raw()
    large = noise(64, 100, HIDDEN)  # more than fits into the stream's buffer
    await client.send(forward(), **packed(large))
    answer = asyncio.create_task(client.stream.read(1))  # the answer has begun
    await asyncio.wait_for(answer, 20)
    await client.stream.close()
    await world.all_streams_ended()
    assert world.held == (0, 0, 0)
    await assert_serves_exactly(world)


async def test_all_is_freed_when_the_server_closes(world: OneServer) -> None:
    await opened(world)
    busy = await world.raw()
    await busy.ask(opening())
    async with Blocker(world.engine):
        await busy.send(Step(position=0), hidden=TOKENS[:1])
        assert isinstance((await busy.next()).message, Alive)
        await world.transport.close()
        assert world.held == (0, 0, 0)


async def test_signs_of_life_come_while_a_request_waits(world: OneServer) -> None:
    first, client = await world.raw(), await world.raw()
    async with Blocker(world.engine):
        await first.send(forward(), **packed(TOKENS))
        await until_waiting(world, 1)
        await client.send(forward(), **packed(TOKENS))
        signs = [(await client.next()).message for _ in range(2)]
        assert all(isinstance(sign, Alive) and sign.ahead == 1 for sign in signs)
    assert_same((await client.answer()).tensors["hidden"].view_as(TOKENS), world.reference.forward(TOKENS))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
async def test_hidden_states_beyond_all_numbers_harm_nobody(world: OneServer, value: float) -> None:
    honest = await opened(world, rows=2)
    first = await step(honest, 0, TOKENS[:, :5])
    mad = await opened(world, rows=1)
    wild = torch.full((1, 3, HIDDEN), value, dtype=torch.float64)
    assert (await step(mad, 0, wild)).shape == wild.shape
    await request(mad, Packet(CloseSession()))
    prompts = torch.full((BLOCKS, 2, HIDDEN), value, dtype=torch.float64)
    assert (await request(mad, Packet(forward(), packed(wild, prompts=prompts)))).message == Output()
    sent = packed(wild, grad=wild, prompts=prompts)
    grads = await request(mad, Packet(backward(prompt_gradient=True), sent))
    assert grads.tensors["prompts"].shape == (BLOCKS, 2, HIDDEN)
    second = await step(honest, 5, TOKENS[:, 5:])
    assert_same(torch.cat([first, second], 1), world.reference.forward(TOKENS))


async def test_a_step_that_breaks_off_takes_the_sessions_cache_with_it(
    world: OneServer, caplog: pytest.LogCaptureFixture
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
        for message, tensors in ((forward(), packed(TOKENS)), (backward(), packed(TOKENS, grad=TOKENS))):
            refusal = (await client.ask(message, **tensors)).message
            assert isinstance(refusal, Failure)
            assert refusal.code == "internal"
    assert [record.exc_info is not None for record in caplog.records] == [True] * 3  # for the operator
    # The same stream is of use again.
    assert (await client.ask(opening())).message == Opened()
    replayed = await client.ask(Step(position=0), hidden=TOKENS[:1])
    assert_same(replayed.tensors["hidden"], world.reference.forward(TOKENS[:1]))
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
