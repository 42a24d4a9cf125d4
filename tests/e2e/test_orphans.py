"""Nothing outlives a command that is killed: no server, no network daemon."""

from __future__ import annotations

import resource
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tests.e2e.processes import COROLLA, START_SECONDS, environment

GONE_SECONDS = 10.0


def family_with_daemons(parent: psutil.Process, daemons: int) -> list[psutil.Process]:
    """Everything below `parent`, once there are so many network daemons."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        family = parent.children(recursive=True)
        if sum(process.name() == "p2pd" for process in family) >= daemons:
            return family
        assert parent.status() != psutil.STATUS_ZOMBIE
        assert time.monotonic() < deadline, [process.name() for process in family]
        time.sleep(0.05)


@pytest.mark.nightly  # test_processes.py kills the parent of such a swarm
def test_a_killed_chat_leaves_no_server(tmp_path: Path) -> None:
    command = [*COROLLA, "chat", "smollm2", "--no-save"]
    with (tmp_path / "log").open("wb") as log:
        chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment())
    family: list[psutil.Process] = []
    try:
        family = family_with_daemons(psutil.Process(chat.pid), 3)  # of the bootstrap peer and two servers
        chat.kill()
        chat.wait()
        _, alive = psutil.wait_procs(family, timeout=GONE_SECONDS)
        assert not alive, [process.cmdline() for process in alive]
    finally:
        for process in [*family, chat]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        assert chat.stdin is not None
        chat.stdin.close()
        chat.wait()


@pytest.mark.parametrize(
    "files", [pytest.param(6, id="at the start", marks=pytest.mark.nightly), pytest.param(9, id="on the way")]
)
def test_a_server_without_open_files_says_so(files: int) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    ended = subprocess.run(
        [*COROLLA, "serve", "smollm2", "--blocks", "0:1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment(),
        preexec_fn=few,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("No more files can be opened") == 1, ended.stderr
    assert "ulimit -n" in ended.stderr
    assert "Traceback" not in ended.stderr
