"""Everything but the baseline stands still, and goes on afterwards, also when the run is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from benchmarks.processes import NotMeasured, Worker, only

# A run that stops its other child, says so, and is then killed.
RUN = """
import subprocess, sys, time
from types import SimpleNamespace
from benchmarks.processes import only
sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
spared = subprocess.Popen(["sleep", "60"], start_new_session=True)
with only(SimpleNamespace(process=spared)):
    print(sleeper.pid, spared.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def children() -> Iterator[tuple[psutil.Popen, psutil.Popen]]:
    both = psutil.Popen(["sleep", "60"]), psutil.Popen(["sleep", "60"])
    yield both
    for child in both:
        child.kill()
        child.wait()


def wait_for(status: str, process: psutil.Process) -> bool:
    """Whether the process comes to be in that state (or no longer in it, after a "not")."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if (process.status() == psutil.STATUS_STOPPED) == (status == "stopped"):
            return True
        time.sleep(0.01)
    return False


class Baseline:
    """What `only` needs of a worker."""

    def __init__(self, process: psutil.Popen) -> None:
        self.process = process


def test_others_stand_still_and_go_on(children: tuple[psutil.Popen, psutil.Popen]) -> None:
    other, baseline = children
    with pytest.raises(KeyboardInterrupt), only(Baseline(baseline)):  # type: ignore[arg-type]  # noqa: PT012
        assert wait_for("stopped", other)
        assert wait_for("going", baseline)
        raise KeyboardInterrupt
    assert wait_for("going", other)


def test_nobody_stays_stopped_when_the_run_is_killed() -> None:
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    stopped, spared = (psutil.Process(int(pid)) for pid in run.stdout.readline().split())
    try:
        assert wait_for("stopped", stopped)
        run.kill()
        run.wait()
        assert wait_for("going", stopped)
    finally:
        run.stdout.close()
        for process in (stopped, spared):
            process.kill()


def test_a_worker_answers_and_says_what_went_wrong() -> None:
    worker = Worker("echo_for_tests_that_is_not_there")
    try:
        with pytest.raises(NotMeasured, match="No module named"):
            worker.ask("anything")
    finally:
        worker.close()
