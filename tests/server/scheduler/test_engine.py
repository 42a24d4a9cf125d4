"""The order of work, and what becomes of jobs that fail or are given up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch
from tests.server.world import Blocker, Clock, until

from corolla.errors import RequestRefused
from corolla.server.scheduler.engine import AGEING_SECONDS, Engine
from corolla.server.scheduler.execution import Kind, Request


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def engine(clock: Clock) -> AsyncIterator[Engine]:
    engine = Engine(clock)
    engine.start()
    yield engine
    await engine.close()


class Step(Request):
    """A step that is done after one pass."""

    passes = True

    def __init__(self) -> None:
        super().__init__(Kind.DECODE, "")

    def run_pass(self, parts: Sequence[tuple[Any, int]]) -> list[BaseException | None]:
        return [None for _ in parts]

    def result(self) -> None:
        """Nothing."""


async def stepped(engine: Engine) -> None:
    step = Step()
    engine.enqueue([step])
    await step.done


class Order:
    """Submits jobs that note when they ran."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ran: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def submit(self, name: str, kind: Kind) -> asyncio.Task[None]:
        """Returns once the job waits."""
        waiting = self.engine.waiting
        task = asyncio.create_task(self.engine.submit(kind, lambda: self.ran.append(name)))
        self.tasks.append(task)
        while self.engine.waiting == waiting:
            await asyncio.sleep(0)
        return task

    async def all_done(self) -> list[str]:
        await asyncio.wait_for(asyncio.gather(*self.tasks), 20)
        return self.ran


async def test_urgent_work_comes_first_and_equals_in_order_of_arrival(engine: Engine, clock: Clock) -> None:
    order = Order(engine)
    async with Blocker(engine):
        for number, kind in enumerate([Kind.TRAINING, Kind.PREFILL, Kind.DECODE] * 2):
            clock.now += 0.1
            await order.submit(f"{kind.name}{number // 3}", kind)
    assert await order.all_done() == ["DECODE0", "DECODE1", "PREFILL0", "PREFILL1", "TRAINING0", "TRAINING1"]


@pytest.mark.parametrize(
    ("waited", "first"),
    [(2 * AGEING_SECONDS - 0.1, "decode"), (2 * AGEING_SECONDS + 0.1, "training")],
    ids=["not yet", "old enough"],
)
async def test_what_has_waited_moves_up(engine: Engine, clock: Clock, waited: float, first: str) -> None:
    order = Order(engine)
    async with Blocker(engine):
        await order.submit("training", Kind.TRAINING)
        clock.now += waited
        await order.submit("decode", Kind.DECODE)
    assert (await order.all_done())[0] == first


async def test_nobody_starves_beside_endless_urgent_work(engine: Engine, clock: Clock) -> None:
    """A job of the last class runs although there is a new job of the first class at every moment."""
    order = Order(engine)
    decoded = 0
    another_waits = threading.Semaphore(0)

    def decode() -> None:
        nonlocal decoded
        assert another_waits.acquire(timeout=20)
        clock.now += 0.5
        decoded += 1

    async with Blocker(engine):
        training = await order.submit("training", Kind.TRAINING)
        running = [asyncio.create_task(engine.submit(Kind.DECODE, decode)) for _ in range(2)]
        await until(lambda: engine.waiting == 3)
    while not training.done():
        assert decoded < 100
        running.append(asyncio.create_task(engine.submit(Kind.DECODE, decode)))
        await asyncio.sleep(0)
        another_waits.release()
        await running.pop(0)
    another_waits.release(len(running))
    await asyncio.gather(*running)
    assert decoded >= 2 * AGEING_SECONDS / 0.5


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ZeroDivisionError("mine"), "ZeroDivisionError('mine')"),
        (SystemExit("mine"), "SystemExit('mine')"),
        # Futures do not carry these.
        (StopIteration("mine"), "RuntimeError('A computation raised StopIteration.')"),
        (asyncio.CancelledError("mine"), "RuntimeError('A computation raised CancelledError.')"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_goes_to_whoever_awaits_it_and_the_loop_goes_on(
    engine: Engine, raised: BaseException, seen: str
) -> None:
    def fail() -> None:
        raise raised

    async def caught() -> str:
        try:
            await engine.submit(Kind.DECODE, fail)
        except BaseException as error:
            return repr(error)
        return "nothing"

    results = asyncio.gather(
        engine.submit(Kind.DECODE, lambda: "before"), caught(), engine.submit(Kind.DECODE, lambda: "after")
    )
    assert [*await asyncio.wait_for(results, 20)] == ["before", seen, "after"]


async def test_a_job_given_up_while_it_waits_never_runs(engine: Engine) -> None:
    order = Order(engine)
    async with Blocker(engine):
        given_up = await order.submit("given up", Kind.DECODE)
        await order.submit("kept", Kind.TRAINING)
        assert engine.waiting == 2
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert engine.waiting == 1
    order.tasks.remove(given_up)
    assert await order.all_done() == ["kept"]


async def test_a_job_given_up_while_it_runs_does_not_stop_the_others(engine: Engine) -> None:
    order = Order(engine)
    blocker = Blocker(engine)
    await blocker.begun()
    await order.submit("next", Kind.TRAINING)
    blocker.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await blocker.task
    blocker.free.set()
    assert await order.all_done() == ["next"]


async def test_jobs_never_run_beside_each_other(engine: Engine) -> None:
    running = 0

    def job() -> int:
        nonlocal running
        running += 1
        seen = running
        for _ in range(1000):  # long enough for another thread to get its turn
            pass
        running -= 1
        return seen

    seen = await asyncio.gather(*(engine.submit(Kind(number % 3), job) for number in range(60)))
    assert set(seen) == {1}


async def test_what_is_nearly_nothing_is_nothing_with_any_number_of_threads(engine: Engine) -> None:
    least = torch.full((2**20,), 1e-20)

    def products() -> list[bool]:
        found = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            found.append(bool((least * least).any()))
        return found

    before = torch.get_num_threads()
    try:
        assert await engine.submit(Kind.PREFILL, products) == [False, False]
    finally:
        torch.set_num_threads(before)
    assert (least * least).all()  # other threads of the process compute as they did


async def test_closing_ends_the_job_at_hand_and_gives_up_the_rest(engine: Engine) -> None:
    order = Order(engine)
    blocker = Blocker(engine)
    await blocker.begun()
    waiting = await order.submit("too late", Kind.DECODE)
    closing = asyncio.create_task(engine.close())
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiting, 20)
    assert not closing.done()
    with pytest.raises(RequestRefused) as refused:
        await engine.submit(Kind.DECODE, lambda: None)
    assert refused.value.code == "draining"
    blocker.free.set()
    await asyncio.wait_for(asyncio.gather(closing, blocker.task), 20)  # computed, so its awaiter hears of it
    assert order.ran == []


async def test_the_thread_outlives_what_it_was_posted(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Work that nobody awaits, and a scheduler that goes wrong, are logged; the next job runs."""

    def fail() -> None:
        raise ZeroDivisionError("posted")

    engine.post(fail)
    assert await engine.submit(Kind.DECODE, lambda: 1) == 1
    engine._pack = fail  # type: ignore[method-assign,assignment]

    with pytest.raises(TypeError):
        await asyncio.wait_for(stepped(engine), 20)
    assert await engine.submit(Kind.DECODE, lambda: 2) == 2
    assert len(caplog.records) == 2


async def test_it_tidies_up_when_nobody_trains_and_not_before_each_job() -> None:
    """Memory given back before every job has to be asked for again in it; generation needs hardly any."""
    tidied: list[float] = []
    engine = Engine(when_quiet=lambda: tidied.append(time.monotonic()))
    engine.start()
    try:
        for _ in range(50):
            await engine.submit(Kind.TRAINING, lambda: None)
        assert len(tidied) < 5  # a machine that stands still for seconds makes one
        ended = time.monotonic()
        async with asyncio.timeout(20):
            while not tidied or tidied[-1] <= ended:  # beside jobs without end, too
                await stepped(engine)
    finally:
        await engine.close()
