"""An event loop whose clock stands still while anybody computes, and jumps to the next timer when all wait.

So a silence of five seconds, or ten minutes of patience, costs nothing, and however slow the machine is, no
timer fires early: a schedule of faults gives the same run every time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from corolla.server.scheduler.engine import Engine, Kind
from corolla.swarm.loop import EventLoopThread

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, sets the clock to it, if `may_jump()`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.may_jump: Callable[[], bool] = lambda: False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is not None and self.may_jump():
            self.now += timeout
            return []
        return super().select(None)  # until somebody has computed something, or a client calls


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, selector: _JumpingSelector) -> None:
        self._virtual = selector
        super().__init__(selector)

    def time(self) -> float:
        return self._virtual.now


class VirtualLoopThread(EventLoopThread):
    """As a client's own loop, in virtual time. Time passes only while somebody waits in `run`."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.may_jump = self._all_wait
        self._selector = selector
        self._callers = 0
        self._computing = 0
        super().__init__(_VirtualLoop(selector))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._selector.now

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        return super().run(self._counted(work), timeout)

    async def _counted(self, work: Coroutine[Any, Any, T]) -> T:
        # Counted on the loop itself: between its result and the caller's waking up no time may pass.
        self._callers += 1
        try:
            return await work
        finally:
            self._callers -= 1

    def _all_wait(self) -> bool:
        return self._callers > 0 and not self._computing


class SimulatedEngine(Engine):
    """A server's engine on a virtual loop: computing takes no time, but for what `delay` adds to every job."""

    def __init__(self, thread: VirtualLoopThread) -> None:
        super().__init__()
        self._on = thread
        self.delay = 0.0  # virtual seconds

    async def submit(self, kind: Kind, run: Callable[[], T], **extra: Any) -> T:
        await self._dawdle()
        self._on._computing += 1
        try:
            return await super().submit(kind, run, **extra)
        finally:
            self._on._computing -= 1

    def steps(self, steps: Sequence[Any], **extra: Any) -> list[asyncio.Future[Any]]:
        if self.delay:
            return [asyncio.ensure_future(self._later(step, extra)) for step in steps]
        results = super().steps(steps, **extra)
        self._on._computing += len(results)
        for one in results:
            one.add_done_callback(self._computed)
        return results

    async def _later(self, step: Any, extra: dict[str, Any]) -> Any:
        await self._dawdle()
        self._on._computing += 1
        try:
            return await super().steps([step], **extra)[0]
        finally:
            self._on._computing -= 1

    def _computed(self, _done: asyncio.Future[Any]) -> None:
        self._on._computing -= 1

    async def _dawdle(self) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)
