"""The event loop on its own thread."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.interrupts import interrupt_often

from corolla.errors import UsageError
from corolla.swarm.loop import AWAKE_SECONDS, EventLoopThread, _Work

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    loop = EventLoopThread()
    yield loop
    loop.close()


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


async def forever(started: threading.Event, ended: threading.Event) -> None:
    started.set()
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


def test_results_and_errors_come_back(loop: EventLoopThread) -> None:
    async def wrong() -> None:
        raise UsageError("No.")

    assert loop.run(answer()) == 42
    with pytest.raises(UsageError, match="No"):
        loop.run(wrong())


def test_many_threads_share_it(loop: EventLoopThread) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(loop.run(answer()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [42] * 8


def test_it_works_beside_a_running_loop(loop: EventLoopThread) -> None:
    async def cell() -> int:
        return loop.run(answer())

    assert asyncio.run(cell()) == 42


def test_a_timeout_cancels_the_work(loop: EventLoopThread) -> None:
    started, ended = threading.Event(), threading.Event()
    with pytest.raises(TimeoutError):
        loop.run(forever(started, ended), timeout=0.05)
    assert ended.wait(5)


def test_the_main_thread_looks_up_from_a_wait() -> None:
    """Ctrl-C between its last look for one and falling asleep does not wake it."""
    work = _Work(forever(threading.Event(), threading.Event()))
    lock, waits = work._done, []

    class Lock:
        def acquire(self, timeout: float) -> bool:
            waits.append(timeout)
            return lock.acquire(timeout=timeout)

    work._done = Lock()  # type: ignore[assignment]
    with pytest.raises(TimeoutError):
        work.wait(4 * AWAKE_SECONDS)
    assert len(waits) >= 4
    assert max(waits) <= AWAKE_SECONDS
    work.call_off()


def test_close_cancels_what_runs(loop: EventLoopThread) -> None:
    started, ended = threading.Event(), threading.Event()
    loop.run_soon(forever(started, ended))
    assert started.wait(5)
    loop.close()
    loop.close()
    assert ended.is_set()
    assert loop.closed
    with pytest.raises(UsageError, match="closed"):
        loop.run(answer())
    loop.run_soon(answer())
    assert not [thread for thread in threading.enumerate() if thread is loop._thread]


def test_it_does_not_wait_for_itself(loop: EventLoopThread) -> None:
    async def inside() -> None:
        loop.run(answer())

    with pytest.raises(RuntimeError, match="await"):
        loop.run(inside())


def _in_child(loop: EventLoopThread, results: multiprocessing.SimpleQueue[str]) -> None:
    try:
        loop.run(answer())
    except UsageError as error:
        results.put(str(error))
    loop.run_soon(answer())
    loop.close()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_worker_is_told(loop: EventLoopThread) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(loop, results))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert "DataLoader worker" in results.get()
    assert loop.run(answer()) == 42


INTERRUPTED = """
import asyncio, os, signal, threading
from corolla.swarm.loop import EventLoopThread

loop = EventLoopThread()
ended = threading.Event()

async def work():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()

try:
    loop.run(work())
except KeyboardInterrupt:
    assert ended.wait(5)
    loop.close()
    print("interrupted")
"""


OFTEN = """
import asyncio
from corolla.swarm.loop import EventLoopThread

loop = EventLoopThread()

async def answer():
    await asyncio.sleep(0)
    return 42

def work():
    for _ in range(3):
        loop.run(answer())

def check():
    assert loop.run(answer(), timeout=20) == 42

end = loop.close
"""


def test_ctrl_c_at_any_instant_leaves_the_loop_as_it_was() -> None:
    interrupt_often(OFTEN, times=8000, longest=400e-6)


def test_ctrl_c_cancels_the_work() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "interrupted\n", done.stderr
    assert done.returncode != -signal.SIGINT
