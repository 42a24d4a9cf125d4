"""The scheduler's loop: every computation of a server passes through here, one at a time per device.

Invariant: handlers only enqueue and await; model code runs on the one compute thread. Waiting generation
steps come before prefill, prefill before training, and whatever has waited `AGEING_SECONDS` moves up a
class, so nobody starves. An exception of a job goes to whoever awaits it; the loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from corolla.errors import RequestRefused

T = TypeVar("T")

AGEING_SECONDS = 2.0


class Kind(IntEnum):
    """Classes of work, most urgent first."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


@dataclass(eq=False)  # the same work submitted twice is two jobs
class Job:
    """One computation: `run` is called on the compute thread; its result or error ends in `done`."""

    kind: Kind
    run: Callable[[], Any]
    arrived: float
    done: asyncio.Future[Any]

    def urgency(self, now: float) -> tuple[float, float]:
        """Smaller is sooner."""
        return (self.kind - (now - self.arrived) // AGEING_SECONDS, self.arrived)


class Engine:
    """Runs jobs in order of urgency. Made and used inside one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: list[Job] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="corolla-compute")
        self._loop: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to run what is submitted."""
        self._loop = asyncio.create_task(self._run(), name="engine")

    async def submit(self, kind: Kind, run: Callable[[], T]) -> T:
        """The result of `run()`, or its error. Cancelling the caller takes a job back that has not begun.

        Raises `RequestRefused` (draining) once the engine is closed.
        """
        if self._closed:
            raise RequestRefused("This server is going away; use another.", code="draining")
        job = Job(kind, run, self._clock(), asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        try:
            result: T = await job.done
            return result
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    async def close(self) -> None:
        """Stop after the job at hand, whose awaiter gets its result; waiting jobs are cancelled."""
        self._closed = True
        self._arrived.set()
        for job in self._waiting:
            job.done.cancel()
        self._waiting.clear()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        while not self._closed:
            if self._waiting:
                await self._run_one()
            else:
                self._arrived.clear()
                await self._arrived.wait()

    async def _run_one(self) -> None:
        job = min(self._waiting, key=lambda waiting: waiting.urgency(self._clock()))
        self._waiting.remove(job)
        result, error = await asyncio.get_running_loop().run_in_executor(self._thread, _outcome, job.run)
        if job.done.done():  # given up
            return
        if error is None:
            job.done.set_result(result)
        else:
            job.done.set_exception(error)


def _outcome(run: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """The result of `run()`, or its error as one that a future can carry."""
    try:
        return run(), None
    except (StopIteration, asyncio.CancelledError) as error:  # these would not reach the awaiter
        return None, RuntimeError(f"A computation raised {type(error).__name__}.")
    except BaseException as error:
        return None, error
