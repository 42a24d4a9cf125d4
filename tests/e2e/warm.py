"""`corolla` processes without the five seconds of imports: forked from one that has done them, once a worker.

What is forked is a process like any other, with its own streams, environment, folder and signals, which ends as any
other does. Where the start itself is tried, or another interpreter is, tests start one of their own.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

MOST_BYTES = 2**20  # of what is said in one message
ROOT = Path(__file__).parents[2]


class Forked:
    """One process, as `subprocess.Popen` has it."""

    def __init__(self, pid: int, ended: int, stdin: IO[bytes] | None) -> None:
        """`ended` is the end of a pipe from which its exit code can be read, as text."""
        self.pid, self.stdin = pid, stdin
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            said = os.read(self._ended, 16)
            os.close(self._ended)
            self.returncode = int(said) if said else -signal.SIGKILL  # with the parent of all
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None and not select.select([self._ended], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that has imported everything."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.e2e.warm", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], cwd=ROOT, stdin=subprocess.DEVNULL, env=self.environment()
        )
        theirs.close()
        self._line = ours

    @staticmethod
    def environment() -> dict[str, str]:
        """What libraries read on import."""
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdin: int | None,
        stdout: int,
        stderr: int,
    ) -> Forked:
        """`python -m module arguments` with these file descriptors; without `stdin`, with a pipe."""
        writing, reading = None, stdin
        if reading is None:
            reading, end = os.pipe()
            writing = os.fdopen(end, "wb", buffering=0)
        ended, ends = os.pipe()
        asked = {"module": module, "arguments": list(arguments), "folder": os.getcwd()}
        asked["environment"] = dict(environment)
        socket.send_fds(self._line, [json.dumps(asked).encode()], [reading, stdout, stderr, ends])
        os.close(ends)
        if stdin is None:
            os.close(reading)
        return Forked(int(self._line.recv(32)), ended, writing)

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._line.close()
        self._process.wait(30)


_warm: list[Warm] = []  # of this worker, if it has one


def warm() -> Warm:
    """This worker's; started when it is first asked for."""
    if not _warm:
        _warm.append(Warm())
    return _warm[0]


def close_warm() -> None:
    """End this worker's, if it has one."""
    while _warm:
        _warm.pop().close()


def _serve(line: socket.socket) -> dict[str, Any] | None:
    """Fork for everyone who asks; what was asked in the child, None at the end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    told: dict[int, int] = {}  # processes, and where their end is told
    while True:
        for one in select.select([line, reader], [], [])[0]:
            if one is reader:
                os.read(reader, 1024)
                _reap(told)
                continue
            data, files, _, _ = socket.recv_fds(line, MOST_BYTES, 4)
            if not data:
                return None
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for other in (*told.values(), reader, writer, line.fileno(), files[3]):
                    os.close(other)
                return json.loads(data) | {"files": files[:3]}
            told[pid] = files[3]
            for file in files[:3]:
                os.close(file)
            line.send(str(pid).encode())


def _reap(told: dict[int, int]) -> None:
    for pid in list(told):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            file = told.pop(pid)
            os.write(file, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(file)


def _become(asked: dict[str, Any]) -> None:
    """The process that was asked for, up to its command."""
    for number, file in enumerate(asked["files"]):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, _stream(number, getattr(sys, name)))
    os.chdir(asked["folder"])
    sys.argv = [asked["module"], *asked["arguments"]]


def _stream(number: int, before: Any) -> TextIO:
    """A standard stream as an interpreter opens it when it starts: one that was a file may be a pipe now."""
    by_lines = number == 2 or os.isatty(number) or "PYTHONUNBUFFERED" in os.environ
    return open(
        number,
        "w" if number else "r",
        buffering=1 if by_lines else -1,
        encoding=before.encoding,
        errors=before.errors,
        closefd=False,
    )


def _import_all() -> None:
    """Kept out of every collection in what is forked, which would walk and so copy all of it again and again."""
    gc.disable()
    import corolla.chat.engine
    import corolla.cli.main
    import corolla.client.model.causal_lm
    import corolla.server.serve  # noqa: F401

    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    _import_all()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        _become(request)
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
