"""The sizes that figures are measured at, which need no library to be read."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "smollm2"
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class DemoSizes:
    """What `corolla demo` trains with (see `corolla/cli/demo.py`)."""

    steps: int = 20
    batch: int = 6
    max_length: int = 256  # tokens of an example, as wherever nothing else is asked for
    held_out: int = 32  # conversations


DEMO = DemoSizes()
