"""Work that nobody waits for any more, work that comes too early, and work that is too large at once."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from tests.server.world import (
    HIDDEN,
    Blocker,
    OneServer,
    assert_same,
    assert_serves_exactly,
    backward,
    forward,
    noise,
    opening,
    packed,
    span_of,
    stepwise,
    until_waiting,
)

from corolla.errors import RequestRefused
from corolla.server.memory import check_memory, working_bytes
from corolla.server.scheduler import engine, execution
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions import step
from corolla.swarm.channel import Channel, request
from corolla.wire.frames import Packet
from corolla.wire.messages import Failure, Opened, Ping, Step


async def test_work_of_a_client_that_left_is_not_computed(world: OneServer) -> None:
    gone, session = await world.raw(), await world.raw()
    assert isinstance((await session.ask(opening())).message, Opened)
    async with Blocker(world.engine):
        await gone.send(forward(), **packed(noise(1, 4, HIDDEN)))
        await session.send(Step(position=0), hidden=noise(1, 4, HIDDEN))
        await until_waiting(world, 2)
        await gone.stream.close()
        await session.stream.close()
        await until_waiting(world, 0)  # while the thread is still busy with something else
        await world.all_streams_ended()
        assert world.held == (0, 0, 0)
    assert (world.server.counters.forward, world.server.counters.inference) == (0, 0)
    await assert_serves_exactly(world)


async def test_a_client_that_left_while_its_work_ran(world: OneServer) -> None:
    gone = await world.raw()
    await gone.ask(opening())
    blocker = Blocker(world.engine)
    await blocker.begun()
    await gone.send(Step(position=0), hidden=noise(1, 4, HIDDEN))
    await until_waiting(world, 1)
    following = asyncio.create_task(world.engine.submit(Kind.TRAINING, lambda: None))
    await blocker.release()
    await gone.stream.close()
    await following
    await world.all_streams_ended()
    assert world.held == (0, 0, 0)
    await assert_serves_exactly(world)


async def test_a_second_request_before_the_answer_is_out_of_order(world: OneServer) -> None:
    hasty = await world.raw()
    await hasty.ask(opening())
    async with Blocker(world.engine):
        await hasty.send(Step(position=0), hidden=noise(1, 4, HIDDEN))
        await until_waiting(world, 1)
        await hasty.send(Ping())
        refusal = (await hasty.answer()).message
        assert isinstance(refusal, Failure)
        assert refusal.code == "out_of_order"
        await world.all_streams_ended()
        assert world.held == (0, 0, 0)
    await assert_serves_exactly(world)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine, execution, step):  # all use it
        monkeypatch.setattr(module, "PASS_TOKENS", 8)  # 4 tokens of each of two rows


@pytest.mark.usefixtures("short_pieces")
async def test_a_long_prefill_in_pieces_gives_the_same(world: OneServer) -> None:
    """Reordered rows, a mask and positions included."""
    channel = await world.connect()
    hidden, order = noise(2, 13, HIDDEN), torch.tensor([1, 0])
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 1] = mask[0, 8] = False
    positions = torch.arange(13).repeat(2, 1)
    positions[1, 2:] -= 1
    wanted = world.reference.forward(hidden, mask=mask, positions=positions)
    await request(channel, Packet(opening(rows=2)))
    first = {"hidden": hidden, "mask": mask, "positions": positions}
    swapped = {name: tensor[order][:, :2].contiguous() for name, tensor in first.items()}
    await request(channel, Packet(Step(position=0), swapped))
    rest = {"hidden": hidden[:, 2:].contiguous(), "mask": mask, "positions": positions[:, 2:].contiguous()}
    reply = await request(channel, Packet(Step(position=2), rest | {"rows": order}))
    assert_same(reply.tensors["hidden"][mask[:, 2:]], wanted[:, 2:][mask[:, 2:]])


@pytest.mark.usefixtures("short_pieces")
async def test_a_decode_step_comes_between_the_pieces_of_a_prefill(
    world: OneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step arrives when the first piece is being computed; training, less urgent, comes after the last."""
    monkeypatch.setattr(execution, "SPLIT_SHARE", 0.0)  # the step shares a pass with the second piece
    channel, other, training = [await world.connect() for _ in range(3)]
    await request(channel, Packet(opening(rows=2)))
    await request(other, Packet(opening(rows=1)))
    answered = {name: threading.Event() for name in ("prefill", "decode", "training")}
    begun, free = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    due = {2: answered["decode"], 5: answered["prefill"]}  # by then
    computations = 0

    def hold(*_: object) -> None:
        nonlocal computations
        if computations == 0:
            loop.call_soon_threadsafe(begun.set)
            assert free.wait(60)
        elif computations in due:
            assert due[computations].wait(20)
        computations += 1

    async def ask(name: str, channel: Channel, packet: Packet) -> None:
        await request(channel, packet)
        answered[name].set()

    def start(name: str, channel: Channel, packet: Packet) -> asyncio.Task[None]:
        return asyncio.create_task(ask(name, channel, packet))

    handle = world.span.blocks[0].register_forward_pre_hook(hold)
    try:
        asked = [start("prefill", channel, Packet(Step(position=0), {"hidden": noise(2, 16, HIDDEN)}))]
        await asyncio.wait_for(begun.wait(), 20)
        asked.append(start("training", training, Packet(forward(), packed(noise(1, 4, HIDDEN)))))
        asked.append(start("decode", other, Packet(Step(position=0), {"hidden": noise(1, 1, HIDDEN)})))
        await until_waiting(world, 2)
        free.set()
        await asyncio.gather(*asked)
    finally:
        free.set()
        handle.remove()
    assert computations == 6


@pytest.mark.usefixtures("short_pieces")
async def test_a_prefill_that_fails_in_the_middle_ends_its_session(world: OneServer) -> None:
    """A block that fails at its third call: what the caches of a half-done step hold is not used again."""
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("planted")

    channel = await world.connect()
    await request(channel, Packet(opening(rows=2)))
    handle = world.span.blocks[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RequestRefused) as refused:
            await request(channel, Packet(Step(position=0), {"hidden": noise(2, 16, HIDDEN)}))
    finally:
        handle.remove()
    assert refused.value.code == "internal"
    assert world.held == (0, 0, 0)
    assert await world.pages_held() == 0
    await assert_serves_exactly(world, channel)


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon"])
def test_the_estimate_of_memory_grows_as_the_computation_does(family: str) -> None:
    span = span_of(family)
    one = working_bytes(span, rows=1, tokens=8, total=8, with_gradients=False)
    assert working_bytes(span, rows=3, tokens=8, total=8, with_gradients=False) == 3 * one
    assert working_bytes(span, rows=1, tokens=8, total=8, with_gradients=True) > one
    assert working_bytes(span, rows=1, tokens=8, total=64, with_gradients=False) > one
    square = working_bytes(span, rows=1, tokens=100_000, total=100_000, with_gradients=False)
    assert square > 100_000**2  # bytes
    check_memory(one, rows=1, tokens=8, limit=one)
    with pytest.raises(RequestRefused, match="fewer rows"):
        check_memory(one, rows=1, tokens=8, limit=one - 1)


async def test_what_would_not_fit_memory_is_refused_and_changes_nothing(world: OneServer) -> None:
    channel = await world.connect()
    await request(channel, Packet(opening(rows=1)))
    hidden = noise(1, 9, HIDDEN)
    first = await stepwise(channel, hidden[:, :5], (5,))
    world.server.working_bytes = 1
    with pytest.raises(RequestRefused) as refused:
        await request(channel, Packet(Step(position=5), {"hidden": hidden[:, 5:].contiguous()}))
    assert (refused.value.code, refused.value.field) == ("too_large", "hidden")
    training = await world.connect()
    with pytest.raises(RequestRefused, match="fewer rows"):
        await request(training, Packet(forward(), packed(hidden)))
    with pytest.raises(RequestRefused, match="fewer rows"):
        await request(training, Packet(backward(), packed(hidden, grad=hidden)))
    world.server.working_bytes = 2**30
    rest = await request(channel, Packet(Step(position=5), {"hidden": hidden[:, 5:].contiguous()}))
    assert_same(torch.cat([first, rest.tensors["hidden"]], 1), world.reference.forward(hidden))


async def test_idle_means_that_no_answer_was_due_for_a_while(world: OneServer) -> None:
    channel = await world.connect()
    await asyncio.wait_for(world.server.until_idle(quiet=60), 20)  # nobody has asked anything yet
    async with Blocker(world.engine):
        task = asyncio.create_task(request(channel, Packet(forward(), packed(noise(1, 2, HIDDEN)))))
        await until_waiting(world, 1)
        idle = asyncio.create_task(world.server.until_idle())
        quiet = asyncio.create_task(world.server.until_idle(quiet=60))
        await asyncio.sleep(0)
        assert not idle.done()
    await task
    await asyncio.wait_for(idle, 20)
    assert not quiet.done()
    quiet.cancel()


async def test_a_server_that_leaves_takes_nothing_new_but_ends_what_it_began(world: OneServer) -> None:
    running, other = await world.connect(), await world.connect()
    hidden = noise(1, 6, HIDDEN)
    await request(running, Packet(opening(rows=1)))
    first = await stepwise(running, hidden[:, :4], (4,))
    world.server.draining = True
    for packet in (Packet(opening()), Packet(forward(), packed(hidden))):
        with pytest.raises(RequestRefused) as refused:
            await request(other, packet)
        assert refused.value.code == "draining"
    await request(other, Packet(backward(), packed(hidden, grad=hidden)))
    rest = await request(running, Packet(Step(position=4), {"hidden": hidden[:, 4:].contiguous()}))
    assert_same(torch.cat([first, rest.tensors["hidden"]], 1), world.reference.forward(hidden))
