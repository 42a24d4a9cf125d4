"""SIGTERM, Ctrl-C and a parent's end, at every stage of a server's life."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.e2e.processes import COROLLA, environment
from tests.tiny_models import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("model"))


class Talking:
    """A `corolla serve` whose lines are read as they come."""

    def __init__(self, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [*COROLLA, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )

    def until(self, beginning: str) -> list[psutil.Process]:
        """Read until such a line; gives the processes that there are then."""
        assert self.popen.stdout is not None
        lines = []
        for line in self.popen.stdout:
            lines.append(line)
            if line.startswith(beginning):
                process = psutil.Process(self.popen.pid)
                return [process, *process.children(recursive=True)]
        raise AssertionError("".join(lines))

    def rest(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.read()

    def close(self) -> None:
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            stream.close()
        self.popen.kill()
        self.popen.wait()


@pytest.fixture
def talking(tiny: Path, tmp_path: Path) -> Iterator[Talking]:
    server = Talking("serve", str(tiny), "--ready-file", str(tmp_path / "ready.json"), "--die-with-parent")
    yield server
    server.close()


WAYS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "parent": None}
STAGES = ("Opening", "Loading", "Serving", "Others")
# Starting a server takes seconds of both cores: each way and each stage once, all pairs at night.
OFTEN = {("Opening", "SIGTERM"), ("Loading", "parent"), ("Serving", "SIGINT"), ("Others", "SIGTERM")}
PAIRS = [
    pytest.param(stage, way, marks=() if (stage, way) in OFTEN else pytest.mark.nightly)
    for stage in STAGES
    for way in WAYS
]


@pytest.mark.parametrize(("stage", "way"), PAIRS)
def test_a_server_asked_to_stop_leaves_nothing(
    talking: Talking, tmp_path: Path, stage: str, way: str
) -> None:
    family = talking.until(stage)
    number = WAYS[way]
    if number is None:
        assert talking.popen.stdin is not None
        talking.popen.stdin.close()
    else:
        talking.popen.send_signal(number)
    said = talking.rest()
    assert talking.popen.wait(30) == 0
    assert "Traceback" not in said
    assert "error" not in said
    _, alive = psutil.wait_procs(family[1:], timeout=15)
    assert not alive
    assert not list(tmp_path.iterdir())  # neither the ready file nor its temporary twin


def test_ctrl_c_during_the_first_imports_is_silent(tiny: Path) -> None:
    """Sent by the program to itself, from inside the import of torch's first user."""
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['corolla', 'serve', {str(tiny)!r}]\n"
        "from corolla.cli.main import main\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
