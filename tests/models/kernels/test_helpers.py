"""Helpers sleep while something trains, and spin again when it has been quiet."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from corolla.models.kernels.helpers import Spinning, others_running
from corolla.models.kernels.native import library

SECONDS = 30


def idle_owners() -> int:
    return sum(thread.name == "corolla-idle-helpers" for thread in threading.enumerate())


def until_spinning(spinning: Spinning) -> None:
    end = time.monotonic() + SECONDS
    while spinning.paused:
        assert time.monotonic() < end, "helpers were never let spin again"
        threading.Event().wait(0.01)


def test_a_pause_ends_by_itself() -> None:
    spinning = Spinning(quiet=0.05, allowed=True)
    assert not spinning.paused
    spinning.pause()
    assert spinning.paused
    until_spinning(spinning)


def test_each_piece_of_training_prolongs_it() -> None:
    spinning = Spinning(quiet=0.3, allowed=True)
    spinning.pause()
    first = spinning._until
    spinning.pause()
    assert spinning._until >= first
    assert spinning.paused
    until_spinning(spinning)
    spinning.pause()  # and it can begin anew
    assert spinning.paused
    until_spinning(spinning)


def test_however_often_it_is_asked_for_one_thread_does_it() -> None:
    before = idle_owners()
    spinning = Spinning(quiet=0.2, allowed=True)
    callers = [threading.Thread(target=spinning.pause) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert idle_owners() <= before + 1
    until_spinning(spinning)


def test_a_user_s_own_process_is_left_alone() -> None:
    before, spinning = idle_owners(), Spinning()
    spinning.pause()
    assert not spinning.paused
    assert idle_owners() == before


SCRIPT = """
import os, sys, threading, time, torch
from corolla.models.kernels.helpers import Spinning

def spent():
    # Processor time while helpers wait, each time for a moment, for work that takes next to none.
    value, rest = torch.ones(1 << 18), threading.Event()
    value.add_(1)
    before = time.process_time()
    for _ in range(20):
        value.add_(1)
        rest.wait(0.01)
    return time.process_time() - before

torch.set_num_threads(os.cpu_count())
spinning = Spinning(quiet=60, allowed=True)
awake, end = spent(), time.monotonic() + 20
spinning.pause()
while spent() > awake / 2:
    if time.monotonic() > end:
        sys.exit("helpers go on spinning")
"""


@pytest.mark.skipif(
    library() is None or sys.platform != "linux" or (os.cpu_count() or 1) < 2,
    reason="needs the C kernels, libgomp and two CPUs",
)
def test_helpers_really_sleep_meanwhile() -> None:
    """Helpers that spin for milliseconds burn time while they wait; in a pause they do not."""
    environment = os.environ | {"GOMP_SPINCOUNT": "100000"}
    environment.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_busy_threads_are_seen() -> None:
    """Wherever the system tells; this thread does not count, and one that turns in place does."""
    busy = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        assert all(others_running() >= 1 for _ in range(20)) == Path("/proc/loadavg").exists()
    finally:
        busy.kill()
        busy.communicate()
