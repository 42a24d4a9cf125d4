"""Which steps share a pass, what comes between what, and that others in a pass change no result."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch
from tests.server.world import (
    BLOCKS,
    HIDDEN,
    Blocker,
    Clock,
    OneServer,
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
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.scheduler import execution
from corolla.server.scheduler.engine import AGEING_SECONDS, Engine
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions.step import StepRequest
from corolla.swarm.channel import Channel, request
from corolla.wire.frames import Packet
from corolla.wire.messages import CloseSession, Step


@pytest.fixture(params=["llama", "bloom"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[OneServer]:
    """Over families that can be packed, with room for a crowd."""
    world = OneServer(request.param, capacity=200)
    await world.start()
    yield world
    await world.close()


@pytest.fixture
def every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training gives way before each operator."""
    monkeypatch.setattr("corolla.server.training.SHORT_SECONDS", 0.0)
    monkeypatch.setattr("corolla.server.scheduler.execution.PIECE_SECONDS", 0.0)
    monkeypatch.setattr("corolla.server.scheduler.execution.LEAST_SHARE", 0.0)


class Passes:
    """Notes every packed pass of a world: which sessions' steps, how many tokens of each, of which kind."""

    def __init__(self, world: OneServer) -> None:
        self.taken: list[list[tuple[StepRequest, int]]] = []
        own = world.engine.run_pass

        def noted(parts: list[tuple[Any, int]]) -> list[BaseException | None]:
            self.taken.append(parts)
            result: list[BaseException | None] = own(parts)
            return result

        world.engine.run_pass = noted

    @property
    def tokens(self) -> list[int]:
        return [sum(count for _, count in parts) for parts in self.taken]

    def counts(self, kind: Kind) -> list[int]:
        """Tokens of steps of that kind in each pass."""
        return [sum(count for step, count in parts if step.kind is kind) for parts in self.taken]


class Client:
    """A session with a sequence of its own that is fed piece by piece, and what it should have answered."""

    def __init__(self, world: OneServer, channel: Channel, seed: int, with_prompts: bool) -> None:
        self.world, self.channel = world, channel
        self.tokens = noise(1, 90, HIDDEN, seed=seed)
        self.prompts = noise(BLOCKS, 3, HIDDEN, seed=seed + 1) if with_prompts else None
        self.outputs: list[Tensor] = []
        self.at = 0

    async def open(self) -> Client:
        tensors = {} if self.prompts is None else {"prompts": self.prompts}
        await request(self.channel, Packet(opening(tokens=90), tensors))
        return self

    async def step(self, count: int) -> None:
        hidden = self.tokens[:, self.at : self.at + count].contiguous()
        reply = await request(self.channel, Packet(Step(position=self.at), {"hidden": hidden}))
        self.outputs.append(reply.tensors["hidden"])
        self.at += count

    def assert_right(self) -> None:
        wanted = self.world.reference.forward(self.tokens[:, : self.at], prompts=self.prompts)
        assert_same(torch.cat(self.outputs, 1), wanted)


async def clients_of(world: OneServer, count: int) -> list[Client]:
    """Some with deep prompts."""
    return [
        await Client(world, await world.connect(), 10 * index, index % 3 == 0).open()
        for index in range(count)
    ]


async def at_once(
    world: OneServer, *asked: Coroutine[Any, Any, Any], begins_when: Callable[[], bool] = lambda: True
) -> None:
    """All requests are there before the first is computed; see `every_iteration`."""
    with contextlib.ExitStack() as stack:
        async with Blocker(world.engine):
            tasks = [asyncio.create_task(one) for one in asked]
            await until_waiting(world, len(asked))
            stack.enter_context(every_iteration(world, begins_when))
        await asyncio.gather(*tasks)


async def test_steps_of_all_sessions_share_their_passes(world: OneServer) -> None:
    clients, passes = await clients_of(world, 5), Passes(world)
    await at_once(world, *(one.step(9 + index) for index, one in enumerate(clients)))
    assert passes.tokens == [9 + 10 + 11 + 12 + 13]
    for _ in range(3):
        await at_once(world, *(one.step(1) for one in clients))
    assert passes.tokens[1:] == [5, 5, 5]
    for one in clients:
        one.assert_right()


async def test_sessions_over_other_blocks_go_by_themselves(world: OneServer) -> None:
    first = await Client(world, await world.connect(), 1, False).open()
    halves = [await world.connect() for _ in range(2)]
    for channel in halves:
        await request(channel, Packet(opening(end=world.span.start + 1)))
    passes, hidden = Passes(world), noise(1, 4, HIDDEN)
    answers: list[Tensor] = []

    async def ask(channel: Channel) -> None:
        answers.append(
            (await request(channel, Packet(Step(position=0), {"hidden": hidden}))).tensors["hidden"]
        )

    await at_once(world, first.step(4), *(ask(channel) for channel in halves))
    assert sorted(passes.tokens) == [4, 8]
    first.assert_right()
    for answer in answers:
        assert_same(answer, world.reference.view(world.span.start, world.span.start + 1).forward(hidden))


@pytest.mark.parametrize("apart", [False, True])
async def test_a_long_prompt_is_cut_while_others_generate(
    world: OneServer, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """A piece of the prompt comes with or after everybody's next token; nobody waits for the whole prompt."""
    monkeypatch.setattr(execution, "SPLIT_SHARE", float("inf") if apart else 0.0)
    monkeypatch.setattr(execution, "SHARED_PASS_SECONDS", 0.0)  # so, the least that a pass takes of a prompt
    long, *others = await clients_of(world, 4)
    await at_once(world, *(one.step(9) for one in others))
    await at_once(world, *(one.step(1) for one in others))
    passes, done = Passes(world), asyncio.Event()

    async def prompt() -> None:
        await long.step(80)
        done.set()

    async def generate(one: Client) -> None:
        while not done.is_set():
            await one.step(1)

    everybody = (prompt(), *(generate(one) for one in others))
    await at_once(world, *everybody, begins_when=lambda: done.is_set() or _waiting(world) >= 3)
    both = [(3, 0), (0, execution.LEAST_PREFILL_TOKENS)] * 5
    if not apart:
        both = [(3, execution.LEAST_PREFILL_TOKENS)] * 5
    counts = zip(passes.counts(Kind.DECODE), passes.counts(Kind.PREFILL), strict=True)
    assert list(counts)[: len(both)] == both
    for one in (long, *others):
        one.assert_right()


async def test_a_short_prompt_is_not_cut_for_those_who_generate(
    world: OneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "SHARED_PASS_SECONDS", 0.0)
    prompts, (other,) = await clients_of(world, 2), await clients_of(world, 1)
    await other.step(9)
    await other.step(1)
    passes = Passes(world)
    await at_once(world, *(one.step(execution.WHOLE_PROMPT) for one in prompts), other.step(1))
    assert [count for count in passes.counts(Kind.PREFILL) if count] == [execution.WHOLE_PROMPT] * 2
    for one in (*prompts, other):
        one.assert_right()


async def _result(task: asyncio.Task[Any]) -> Any:
    return await task


@contextlib.contextmanager
def every_iteration(world: OneServer, begins_when: Callable[[], bool]) -> Iterator[None]:
    """The engine takes its next work only when the event loop has brought that about."""
    engine = world.engine
    own = engine._iterate

    def patient() -> None:
        pause = threading.Event()
        for _ in range(20_000):
            if begins_when():
                break
            pause.wait(0.001)
        else:
            raise AssertionError("what the iteration waited for did not come")
        engine._receive(wait=False)
        own()

    engine._iterate = patient  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine._iterate = own  # type: ignore[method-assign]


def _waiting(world: OneServer) -> int:
    """As `Engine.waiting`, for the compute thread."""
    return sum(not job.begun for job in list(world.engine._open))


def test_what_a_decode_pass_takes_decides_whether_prompts_are_computed_apart() -> None:
    times = execution.PassTimes()
    for _ in range(20):
        times.passed(16, 0.032)  # 2 ms a token
        times.passed(1, 0.015)
    assert times.splits_decode(16)
    for _ in range(20):  # weights that take long to read
        times.passed(1, 0.017)
    assert not times.splits_decode(16)
    assert times.splits_decode(32)


async def test_a_prompt_is_not_cut_while_nobody_generates(world: OneServer) -> None:
    first, second = await clients_of(world, 2)
    passes = Passes(world)
    await at_once(world, first.step(80), second.step(70))
    assert passes.tokens == [150]
    first.assert_right()
    second.assert_right()


@pytest.mark.usefixtures("every_operator")
async def test_training_comes_after_generation_until_it_has_waited(world: OneServer) -> None:
    """With a new generation step at every moment, a training job is computed once it has aged."""
    clock, (one, two) = Clock(), await clients_of(world, 2)
    world.engine._clock = clock
    passes, trained = Passes(world), await world.connect()

    def all_wait() -> bool:
        if training.done():
            return True
        if _waiting(world) < 3:
            return False
        clock.now += AGEING_SECONDS / 4
        return True

    async def generate(client: Client) -> None:
        while not training.done():
            assert len(passes.taken) < 60
            await client.step(1)

    # In the middle of the training job nobody is let in here.
    world.engine.yield_to_others = lambda: trained_at.append(len(passes.taken)) or 0.0  # type: ignore[method-assign]
    trained_at: list[int] = []
    training = asyncio.create_task(request(trained, Packet(forward(), packed(noise(2, 5, HIDDEN)))))
    await at_once(world, _result(training), generate(one), generate(two), begins_when=all_wait)
    assert trained_at[0] == 7  # two classes up takes eight iterations, the last one of which is its own
    assert passes.tokens[:7] == [2] * 7
    one.assert_right()
    two.assert_right()


@pytest.mark.usefixtures("every_operator")
async def test_a_generation_step_comes_in_between_two_pieces_of_training(world: OneServer) -> None:
    """In the forward, in the backward of a kept graph, and in a backward that computes all anew."""
    one, two = [await Client(world, await world.connect(), seed, True).open() for seed in (3, 6)]
    trained = await world.connect()
    hidden, grad, prompts = noise(2, 7, HIDDEN), noise(2, 7, HIDDEN, seed=1), noise(BLOCKS, 3, HIDDEN, seed=2)
    leaf, deep = hidden.clone().requires_grad_(), prompts.clone().requires_grad_()
    expected = world.reference.forward(leaf, prompts=deep)
    wanted = torch.autograd.grad(expected, [leaf, deep], grad)
    sent, lease = packed(hidden, prompts=prompts), "0" * 16
    whole = sent | {"grad": packed(grad)["hidden"]}
    requests = [
        Packet(forward(lease=lease), sent),
        Packet(backward(lease=lease, prompt_gradient=True), {"grad": whole["grad"]}),
        Packet(backward(prompt_gradient=True), whole),
    ]
    answers = []
    passes, inside = Passes(world), InTheMiddle(world)
    for packet in requests:
        async with inside:
            training = asyncio.create_task(request(trained, packet))
            await inside.begun()
            steps = [asyncio.create_task(client.step(2)) for client in (one, two)]
            await until_waiting(world, 2)
            inside.go_on()
            await asyncio.gather(*steps)
            assert not training.done()  # it stands still behind its next block
            inside.finish()
            answers.append((await training).tensors)
    assert passes.tokens == [4, 4, 4]  # both at once
    assert_same(answers[0]["hidden"].view_as(hidden), expected.detach())
    for answer in answers[1:]:
        assert_same(answer["grad"].view_as(grad), wanted[0])
        assert_same(answer["prompts"], wanted[1].float())
    one.assert_right()
    two.assert_right()


class InTheMiddle:
    """Stops a training job where it lets others in: once before, once after."""

    def __init__(self, world: OneServer) -> None:
        self._world = world
        self._own = world.engine.yield_to_others

    async def __aenter__(self) -> InTheMiddle:
        self._begun, self._free, self._finish = threading.Event(), threading.Event(), threading.Event()
        self._calls = 0

        def slowed() -> float:
            self._calls += 1
            if self._calls == 1:
                self._begun.set()
                assert self._free.wait(20)
            away = self._own()
            if self._calls == 1:
                assert self._finish.wait(20)
            return away

        self._world.engine.yield_to_others = slowed  # type: ignore[method-assign]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.go_on()
        self.finish()
        self._world.engine.yield_to_others = self._own  # type: ignore[method-assign]

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, 20)

    def go_on(self) -> None:
        self._free.set()

    def finish(self) -> None:
        self._finish.set()


@pytest.mark.usefixtures("every_operator")
async def test_a_step_given_up_does_not_come_in_between(world: OneServer) -> None:
    """Its session is freed already; computed all the same, it would hold pages that nobody frees."""
    staying, leaving = await clients_of(world, 2)
    await at_once(world, staying.step(9), leaving.step(9))
    trained, inside = await world.connect(), InTheMiddle(world)
    async with inside:
        training = asyncio.create_task(request(trained, Packet(forward(), packed(noise(2, 7, HIDDEN)))))
        await inside.begun()
        steps = [asyncio.create_task(staying.step(1)), asyncio.create_task(leaving.step(20))]
        await until_waiting(world, 2)
        steps[1].cancel()
        await leaving.channel.close()
        await until(lambda: len(world.server.sessions) == 1)
        inside.go_on()
        await steps[0]
        inside.finish()
        await training
    await request(staying.channel, Packet(CloseSession()))
    assert world.budget.reserved == await world.pages_held() == 0


async def test_a_step_that_fails_in_company_fails_alone(
    world: OneServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A block that cannot bear one session's values: the others' steps are computed and nothing is lost."""
    clients = await clients_of(world, 4)
    await at_once(world, *(one.step(9) for one in clients))
    poisoned = clients[2]
    poisoned.tokens[:, 9:] = 1e6

    def fail(_block: object, arguments: tuple[Tensor, ...]) -> None:
        if bool((arguments[0].abs() > 1e5).any()):
            raise ZeroDivisionError("planted")

    handle = world.span.blocks[-1].register_forward_pre_hook(fail)  # the first block has cached by then
    refused = []

    async def poison() -> None:
        with pytest.raises(RequestRefused) as refusal:
            await poisoned.step(3)
        refused.append(refusal.value.code)

    try:
        await at_once(world, *(poison() if one is poisoned else one.step(3) for one in clients))
    finally:
        handle.remove()
    assert refused == ["internal"]
    assert len(world.server.sessions) == 3
    others = [one for one in clients if one is not poisoned]
    await at_once(world, *(one.step(1) for one in others))
    for one in others:
        one.assert_right()
        await request(one.channel, Packet(CloseSession()))
    assert world.budget.reserved == await world.pages_held() == 0
    await assert_serves_exactly(world)


async def test_a_step_of_padding_only_and_one_with_holes_among_others(world: OneServer) -> None:
    whole = (await clients_of(world, 1))[0]
    channel, tokens = await world.connect(), noise(3, 5, HIDDEN, seed=44)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0], mask[1, :2], mask[2, 1:4] = False, False, False
    answers = []

    async def ask() -> None:
        sent = {"hidden": tokens, "mask": mask}
        answers.append((await request(channel, Packet(Step(position=0), sent))).tensors["hidden"])

    await request(channel, Packet(opening(rows=3)))
    await at_once(world, whole.step(20), ask())
    whole.assert_right()
    (found,) = answers
    assert not found[0].any()
    assert not found[~mask].any()
    columns = torch.arange(5)[None]
    for row in (1, 2):
        real = mask[row]
        wanted = world.reference.forward(
            tokens[row : row + 1, real], positions=columns[:, real], mask=torch.ones(1, int(real.sum()))
        )
        assert_same(found[row : row + 1, real], wanted)
    nothing = {"hidden": tokens[:, :1].contiguous(), "mask": torch.cat([mask, torch.zeros(3, 1) > 0], 1)}
    reply = await request(channel, Packet(Step(position=5), nothing))
    assert not reply.tensors["hidden"].any()


async def test_what_is_posted_is_done_before_what_comes_after() -> None:
    engine, done = Engine(), []
    engine.start()
    engine.post(lambda: done.append("posted"))
    await engine.submit(Kind.DECODE, lambda: done.append("submitted"))
    await engine.close()
    engine.post(lambda: done.append("too late"))
    assert done == ["posted", "submitted"]
