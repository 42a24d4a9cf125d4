"""One asyncio loop on a thread of its own, for callers who are not asynchronous.

Invariant: all of a client's network work runs on this one loop, whichever thread asks for it (a notebook's
cell, a trainer, a finalizer); when `close()` returns, no task of it is left and its thread has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, Generic, TypeVar

from corolla.errors import UsageError

AWAKE_SECONDS = 0.1  # after which the main thread, which Ctrl-C is for, looks up from a wait

T = TypeVar("T")


class EventLoopThread:
    """An event loop that runs until `close()`. Its thread is a daemon: it keeps no program alive."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Runs a new loop, or `loop`, which must not run yet and ends with this object."""
        self._pid = os.getpid()
        self._loop = loop or asyncio.new_event_loop()
        # The collector may run a finalizer, which hands work over, in the thread that is just doing so.
        self._lock = threading.RLock()
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="corolla-loop", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether `close()` has been called."""
        return self._closed

    @property
    def is_current(self) -> bool:
        """Whether the caller is on this loop's own thread, which must not wait for it."""
        return threading.current_thread() is self._thread

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Wait for `work` and return its result or raise its error.

        After `timeout` seconds `work` is cancelled and `TimeoutError` raised; Ctrl-C in the calling thread
        cancels it as well. Raises `UsageError` in a forked process and after `close()`.
        """
        if self.is_current:
            work.close()
            raise RuntimeError("EventLoopThread.run would wait for itself; await the coroutine instead.")
        handed = _Work(work)
        try:
            self._submit(handed)
            return handed.wait(timeout)
        except BaseException:
            # Whatever ended the wait (an interrupt, even one that came while the work was being handed over,
            # the timeout, or the work itself), nothing goes on.
            self._call_off(handed)
            raise

    def run_soon(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start `work` without waiting; it may outlast the call but not `close()`.

        For finalizers: in a forked process or after `close()`, `work` is dropped and nothing raised.
        """
        try:
            self._submit(_Work(work))
        except UsageError:
            return

    def close(self) -> None:
        """Cancel what runs, end the loop and its thread; safe to call twice, from any thread but its own."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if os.getpid() != self._pid:
            return  # the thread lives in the parent only
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call_off(self, work: _Work[Any]) -> None:
        with self._lock:
            if os.getpid() == self._pid and not self._closed:
                self._loop.call_soon_threadsafe(work.call_off)
                return
        work.call_off()

    def _submit(self, work: _Work[Any]) -> None:
        if os.getpid() != self._pid:
            work.call_off()
            raise UsageError(
                "A model's connection to the swarm does not survive a fork; use the model in the process that "
                "loaded it, not in a DataLoader worker."
            )
        with self._lock:
            if self._closed:
                work.call_off()
                raise UsageError("The connection to the swarm is closed; load the model again.")
            # In a context of its own: tasks that outlive the call (a stream's) would otherwise keep everything
            # alive that the caller's context variables hold, a session among it.
            self._loop.call_soon_threadsafe(work.start, context=contextvars.Context())

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


class _Work(Generic[T]):
    """A coroutine for the loop, its outcome for whoever waits for it; called off at any moment, also before it begins.

    The wait is for a bare lock. `concurrent.futures.Future` waits with a `threading.Condition`, whose methods are
    Python code: Ctrl-C inside them leaves its lock held, and then the loop waits for that for ever.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._task: asyncio.Task[None] | None = None
        self._called_off = False
        self._done = threading.Lock()
        self._done.acquire()
        self._results: list[T] = []
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin, on the loop's thread."""
        if not self._called_off:
            self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            self._results.append(await self._coroutine)
        except BaseException as error:  # for whoever waits, as all others
            self._error = error
        finally:
            self._done.release()

    def wait(self, timeout: float | None) -> T:
        """What comes of it, on another thread. Raises its error, and `TimeoutError` after so many seconds."""
        self._await_done(timeout)
        error, self._error = self._error, None
        if error is None:
            return self._results.pop()
        try:
            # asyncio's own would mean that whoever waits is cancelled.
            raise CancelledError if isinstance(error, asyncio.CancelledError) else error
        finally:
            del error  # whose traceback holds this frame

    def _await_done(self, timeout: float | None) -> None:
        """Raises `TimeoutError` after so many seconds."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        # Ctrl-C that comes just before the main thread falls asleep does not wake it; it is seen when it wakes.
        longest = AWAKE_SECONDS if threading.current_thread() is threading.main_thread() else math.inf
        while True:
            left = min(longest, max(0.0, end - time.monotonic()))
            if self._done.acquire(timeout=-1 if left == math.inf else left):
                return
            if time.monotonic() >= end:
                raise TimeoutError

    def call_off(self) -> None:
        """Cancel it, or keep it from beginning. Runs on the loop's thread, or when there is no loop."""
        self._called_off = True
        if self._task is None:
            self._coroutine.close()
        elif not self._task.done():
            self._task.cancel()
