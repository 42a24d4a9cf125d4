"""How many of our files one training step and one token of a chat pass through, client and servers together.

    python -m benchmarks.files [--list]

On the in-memory swarm of two servers, with a tiny random model whose heads are as wide as kernels take them; counted
with `sys.setprofile` in every thread, once everything is warm: the second step, the token after the third.
`transport/memory.py` counts: it stands for `libp2p.py`, through which real steps go. Printed, not kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

import corolla

PACKAGE = str(Path(corolla.__file__).parent)
DESCRIPTION = Path(__file__).parents[1] / "docs" / "architecture.md"
BARS = {"training step": 28, "chat token": 35}
Files = dict[str, set[str]]  # of each file that is passed through: which functions are called


class Counted:
    """The files whose functions were called while `counting`, by any thread that was started after `watch`."""

    def __init__(self) -> None:
        self.files: Files = defaultdict(set)
        self._on = False

    def watch(self) -> None:
        """Look at this thread, and at all that start from now on."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    @contextmanager
    def counting(self) -> Iterator[Files]:
        """The files that are passed through meanwhile, and which of their functions."""
        self.files = defaultdict(set)
        self._on = True
        try:
            yield self.files
        finally:
            self._on = False

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._on and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            file = frame.f_code.co_filename.removeprefix(PACKAGE).lstrip("/")
            self.files[file].add(frame.f_code.co_qualname.replace(".<locals>", ""))


class OneToken:
    """A streamer that counts from the third token to the fourth."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted
        self._seen = 0
        self._open: Any = None
        self.files: Files = {}

    def put(self, tokens: Any) -> None:
        self._seen += 1
        if self._seen == 4:  # the prompt is put too
            self._open = self._counted.counting()
            self.files = self._open.__enter__()
        elif self._seen == 5:
            self._open.__exit__(None, None, None)

    def end(self) -> None:
        """Nothing is left to do."""


def training_step(swarm: MemorySwarm, counted: Counted) -> Files:
    """Files of one step of prompt tuning."""
    model = swarm.model(tuning_mode="deep_ptune", pre_seq_len=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 90, (2, 8))
    for _ in range(2):
        with counted.counting() as files:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return files


def chat_token(swarm: MemorySwarm, counted: Counted) -> Files:
    """Files of one token in the middle of a reply."""
    model, streamer = swarm.model(), OneToken(counted)
    with model.inference_session(max_length=64) as session:
        model.generate(
            torch.randint(3, 90, (1, 8)),
            session=session,
            min_new_tokens=8,
            max_new_tokens=8,
            streamer=streamer,
        )
    return streamer.files


def main() -> None:
    """Count, and print beside the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the files, and what is called of each")
    arguments = parser.parse_args()
    counted = Counted()
    counted.watch()
    with tempfile.TemporaryDirectory() as folder:
        swarm = MemorySwarm(write_tiny("qwen3", Path(folder) / "model"), ((0, 2), (2, 4)))
        found = {"training step": training_step(swarm, counted), "chat token": chat_token(swarm, counted)}
        sys.setprofile(None)
        swarm.close()
    for name, files in found.items():
        print(f"{name}: {len(files)} of our files (at most {BARS[name]})")
        if arguments.list:
            print(
                "".join(f"    {file}: {', '.join(sorted(files[file]))}\n" for file in sorted(files)), end=""
            )
        if unnamed := [file for file in sorted(files) if Path(file).name not in DESCRIPTION.read_text()]:
            print(f"    not named in docs/architecture.md: {', '.join(unnamed)}")


if __name__ == "__main__":
    main()
