"""Real `corolla` processes for tests: started with ready files, gone when the block ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tests.e2e.warm import Forked, warm

START_SECONDS = 120.0
COROLLA = [sys.executable, "-m", "corolla"]


def environment() -> dict[str, str]:
    """Ours, with one compute thread a process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def corolla(
    *arguments: str, timeout: float = 120.0, text: str = "", module: str = "corolla", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `text` is its stdin, `variables` are more of its environment.

    With `module` it is another program of this repository.
    """
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(text)
        given.seek(0)
        files = {"stdin": given.fileno(), "stdout": out.fileno(), "stderr": err.fileno()}
        process = warm().start(module, arguments, environment() | variables, **files)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


class Talking:
    """A command that is written to, and whose lines, of both its streams, are read as they come."""

    def __init__(self, *arguments: str, module: str = "corolla", new: bool = False, **variables: str) -> None:
        """With `new` it is started as its user starts it, imports and all."""
        reading, writing = os.pipe()
        files = {"stdout": writing, "stderr": writing}
        own = environment() | variables
        self.popen: subprocess.Popen[bytes] | Forked
        if new:
            command = [sys.executable, "-m", module, *arguments]
            self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, env=own, **files)
        else:
            self.popen = warm().start(module, arguments, own, stdin=None, **files)
        os.close(writing)
        self.lines = os.fdopen(reading, encoding="utf-8")

    def say(self, line: str) -> None:
        """Write a line to it."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n".encode())

    def hang_up(self) -> None:
        """The end of what it reads."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def until(self, beginning: str) -> str:
        """Read until such a line; gives all that was read."""
        read = ""
        for line in self.lines:
            read += line
            if line.startswith(beginning):
                return read
        raise AssertionError(read)

    def close(self) -> None:
        """Kill it, if it has not ended."""
        self.hang_up()
        self.lines.close()
        self.popen.kill()
        self.popen.wait()


@dataclass
class Process:
    """A running command and the content of its ready file."""

    popen: subprocess.Popen[bytes] | Forked
    ready_path: Path
    log_path: Path
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """What others join through."""
        return str(self.about["addresses"][0])

    def wait_ready(self) -> Process:
        """Wait for the ready file; the process's own words are shown when it ends before."""
        deadline = time.monotonic() + START_SECONDS
        while not self.ready_path.exists():
            assert self.popen.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.02)
        self.about = json.loads(self.ready_path.read_text())
        return self

    def end(self) -> None:
        """Kill what is still running, and wait for it and its daemon."""
        family = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.popen.pid).children(recursive=True)
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        psutil.wait_procs(family, timeout=20)


class Processes:
    """Starts commands; ends them all with the block."""

    def __init__(self, folder: Path, launcher: Sequence[str] | None = None) -> None:
        """`launcher` is the beginning of every command line; without one, processes are forked: see `warm.py`."""
        self.folder = folder
        self.launcher = launcher
        self.started: list[Process] = []

    def start(self, name: str, *arguments: str, launcher: Sequence[str] | None = None) -> Process:
        """Start a command without waiting for it; `launcher` where it is not everybody's."""
        ready, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        arguments = (*arguments, "--ready-file", str(ready), "--die-with-parent")
        with log.open("wb") as output:
            process = Process(self._start(launcher or self.launcher, arguments, output.fileno()), ready, log)
        self.started.append(process)
        return process

    def _start(
        self, launcher: Sequence[str] | None, arguments: Sequence[str], output: int
    ) -> subprocess.Popen[bytes] | Forked:
        module, *first = ["corolla"] if launcher is None else launcher[2:]
        if launcher is None or list(launcher[:2]) == [sys.executable, "-m"]:
            files = {"stdin": None, "stdout": output, "stderr": output}
            return warm().start(module, [*first, *arguments], environment(), **files)
        return subprocess.Popen(
            [*launcher, *arguments],
            stdin=subprocess.PIPE,  # which ends with the tests, should they be killed
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
        )

    def swarm(self, model: Path | str, spans: Sequence[str], *extra: str) -> tuple[str, list[Process]]:
        """A server for each span, all ready; gives the join address, the first one's, and the servers."""
        first = self.start(f"server-{len(self.started)}", "serve", str(model), *extra, "--blocks", spans[0])
        address = first.wait_ready().address
        return address, [first, *self.join(address, model, spans[1:], *extra)]

    def join(self, address: str, model: Path | str, spans: Sequence[str], *extra: str) -> list[Process]:
        """A server more for each span, all ready."""
        serve = ("serve", str(model), *extra, "--peers", address, "--blocks")
        servers = [self.start(f"server-{len(self.started)}", *serve, span) for span in spans]
        return [server.wait_ready() for server in servers]


@contextlib.contextmanager
def processes(folder: Path, launcher: Sequence[str] | None = None) -> Iterator[Processes]:
    """See `Processes`."""
    started = Processes(folder, launcher)
    try:
        yield started
    finally:
        for process in reversed(started.started):
            process.end()
