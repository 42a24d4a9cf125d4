"""SIGTERM, Ctrl-C and a parent's end, at every stage of a server's life."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.e2e.processes import Talking, environment
from tests.tiny_models import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("model"))


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
def test_a_server_asked_to_stop_leaves_nothing(tiny: Path, tmp_path: Path, stage: str, way: str) -> None:
    arguments = ("serve", str(tiny), "--ready-file", str(tmp_path / "ready.json"), "--die-with-parent")
    # The first stage comes right behind the imports.
    with contextlib.closing(Talking(*arguments, new=stage == STAGES[0])) as server:
        server.until(stage)
        family = psutil.Process(server.popen.pid).children(recursive=True)
        number = WAYS[way]
        if number is None:
            server.hang_up()
        else:
            server.popen.send_signal(number)
        said = server.lines.read()
        assert server.popen.wait(30) == 0
    assert "Traceback" not in said
    assert "error" not in said
    _, alive = psutil.wait_procs(family, timeout=15)
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
