"""An event loop whose clock stands still while anybody computes, and jumps to the next timer when all wait.

So a silence of five seconds, or ten minutes of patience, costs nothing, and however slow the machine is, no
timer fires early: a schedule of faults gives the same run every time.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

from corolla.server.scheduler.engine import Engine
from corolla.server.scheduler.execution import Request
from corolla.swarm.loop import EventLoopThread

P = ParamSpec("P")
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
        self._loop.thread = self  # type: ignore[attr-defined]

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


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """An asynchronous test that runs so: for what waits for nothing but timers, its own loop and `SimulatedEngine`."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        thread = VirtualLoopThread()
        try:
            thread.run(test(*args, **kwargs))
        finally:
            thread.close()

    return run


class SimulatedEngine(Engine):
    """A server's engine on a virtual loop: computing takes no time, but for what `delay` adds to every job."""

    def __init__(self, thread: VirtualLoopThread | None = None, **how: Any) -> None:
        """On the running loop's thread, or that one."""
        super().__init__(**how)
        self._on = thread or asyncio.get_running_loop().thread  # type: ignore[attr-defined]
        self.delay = 0.0  # virtual seconds
        self._late: set[asyncio.Task[None]] = set()

    def enqueue(self, requests: Sequence[Request]) -> None:
        if not self.delay:
            return self._enqueue_now(requests)
        for request in requests:
            late = asyncio.ensure_future(self._enqueue_late(request))
            self._late.add(late)
            late.add_done_callback(self._late.discard)

    async def _enqueue_late(self, request: Request) -> None:
        await asyncio.sleep(self.delay)
        try:
            self._enqueue_now([request])
        except Exception as error:
            if not request.done.done():
                request.done.set_exception(error)

    def _enqueue_now(self, requests: Sequence[Request]) -> None:
        super().enqueue(requests)
        for request in requests:
            self._on._computing += 1
            request.done.add_done_callback(self._computed)

    def _computed(self, _done: asyncio.Future[Any]) -> None:
        self._on._computing -= 1
