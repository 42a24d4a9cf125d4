"""Ctrl-C at random instants of some work, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import random, signal

def ring(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, ring)
draw, met = random.Random(1), 0
while met < {times}:
    try:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, {longest}))
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        met += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    check()
end()
print("well", flush=True)
"""


def interrupt_often(functions: str, *, times: int, longest: float) -> None:
    """Interrupt `work` so many times, each within `longest` seconds; `check` comes after each, `end` behind all.

    `functions` is the code that defines these three.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", functions + PROGRAM.format(times=times, longest=longest)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "well", done.stderr
