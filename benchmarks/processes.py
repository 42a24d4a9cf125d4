"""Worker processes, and standing still: everything but a baseline is stopped while the baseline runs.

Invariant: no worker outlives the run, also when it is killed: a worker ends with its stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


class NotMeasured(Exception):
    """Why a figure could not be measured, for the table."""


class Worker:
    """A process that obeys commands (see `workers/protocol.py`)."""

    def __init__(
        self, module: str, *, python: str = sys.executable, env: Mapping[str, str | None] | None = None
    ) -> None:
        """`env` adds to the environment, None takes away from it."""
        changed = {**os.environ, **(env or {})}
        self.name = module
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.workers.{module}"],
            cwd=ROOT,
            env={name: value for name, value in changed.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Run a command and wait for its result. Raises `NotMeasured` with its error."""
        self.begin(do, **arguments)
        return self.result()

    def begin(self, do: str, **arguments: Any) -> None:
        """Start a command; its result must be fetched before the next one."""
        assert self.process.stdin is not None
        try:
            print(json.dumps({"do": do, "with": arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise NotMeasured(self.last_words()) from None

    def result(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise NotMeasured(self.last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise NotMeasured(f"{self.name}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process, if it has not ended; what it is at work on is lost."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def last_words(self) -> str:
        """What a process that has ended said last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if self._log.closed:
            return f"the worker {self.name} was closed"
        if self.process.returncode == -signal.SIGKILL:
            return f"the worker {self.name} was killed, perhaps for want of memory"
        self._log.seek(0)
        words = self._log.read().strip().splitlines()
        return f"the worker {self.name} ended: {words[-1] if words else self.process.returncode}"


@contextlib.contextmanager
def only(worker: Worker) -> Iterator[None]:
    """Stop (SIGSTOP) every other process below this one: servers, clients, their network daemons.

    Raises `NotMeasured` where that process has ended.
    """
    if worker.process.poll() is not None:
        raise NotMeasured(worker.last_words())
    spared = _family(psutil.Process(worker.process.pid))
    stopped = [process for process in _family(psutil.Process())[1:] if process not in spared]
    with _guard([process.pid for process in stopped]):
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()


@contextlib.contextmanager
def _guard(pids: Sequence[int]) -> Iterator[None]:
    """A shell that lets these processes go on if this one is killed: stopped, they could not notice it."""
    script = 'cat >/dev/null; kill -CONT "$@" 2>/dev/null'
    guard = subprocess.Popen(
        ["sh", "-c", script, "guard", *map(str, pids)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        guard.communicate()


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]
