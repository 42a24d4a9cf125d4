"""What a computation takes beyond weights and caches, as it is estimated and as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The peak of a process of its own: what it has taken once, it does not give back.
PROGRAM = """
import sys, torch
from pathlib import Path
from tests.server.world import HIDDEN, span_of
from corolla.server.memory import working_bytes
from corolla.server.training import Sequences
family, with_gradients = sys.argv[1], sys.argv[2] == "backward"
tokens = 10_000 if (family, with_gradients) == ("gpt_oss", False) else 2500  # more than a heap leaves unused
span = span_of(family, torch.float32)
def peak():  # of this program alone: `getrusage` counts what started it as well
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
def compute(tokens):
    hidden = torch.randn(1, tokens, HIDDEN)
    work = Sequences(span, {"hidden": hidden, "lengths": torch.tensor([tokens])})
    work.backward(False, hidden) if with_gradients else work.forward()
    return peak()
taken = -compute(64) + compute(tokens)
estimate = working_bytes(span, rows=1, tokens=tokens, total=tokens, with_gradients=with_gradients)
print(taken, estimate)
"""


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gemma2", "backward"),
        *(
            pytest.param(family, kind, marks=pytest.mark.nightly)
            for family in ("llama", "bloom", "gpt_oss")
            for kind in ("forward", "backward")
        ),
    ],
)
def test_the_estimate_of_memory_is_not_too_low(family: str, kind: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, family, kind], cwd=root, capture_output=True, text=True, check=True
    )
    taken, estimate = map(int, done.stdout.split()[-2:])
    assert taken < estimate < 5 * taken
