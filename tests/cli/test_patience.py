"""Waiting for servers: how long is an option, and what is waited for is one line on the terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from corolla.config import SwarmConfig
from corolla.errors import UsageError

# A client under a command's own logging that finds a block unserved fifty times, in virtual time.
PROGRAM = """
from tests.client.test_retry import MISSING, failing, retry
from tests.virtual_time import VirtualLoopThread
from corolla.cli.terminal import set_up_logging
set_up_logging(False)
loop = VirtualLoopThread()
loop.run(retry().run(failing(50, MISSING, [], loop), what="a generation step"))
loop.close()
"""


@pytest.mark.parametrize("command", ["chat", "tune"])
def test_patience_is_an_option(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "corolla", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert "--patience" in done.stdout
    assert "600" in done.stdout


@pytest.mark.parametrize("patience", [-1.0, float("inf"), float("nan")])
def test_a_patience_that_is_no_time_is_refused(patience: float) -> None:
    with pytest.raises(UsageError, match="patience is"):
        SwarmConfig(patience=patience)


def test_a_wait_is_one_line_when_it_begins_and_one_when_it_is_over() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    begun, over = done.stderr.splitlines()
    assert begun.startswith("Waiting up to ")
    assert "s to go on with a generation step: Block 3 is served by nobody; start one." in begun
    assert over.startswith("Going on after ")
