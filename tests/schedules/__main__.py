"""`python -m tests.schedules SEED [SEED …]` runs schedules alone; `FIRST:LAST` is a range of them."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from tests.schedules.plan import plan
from tests.schedules.run import Outcome, WrongOutcome, run
from tests.schedules.table import lines_of


def main(arguments: list[str]) -> int:
    """Gives the number of schedules that did not end as they must."""
    torch.set_num_threads(1)
    disable_progress_bar()
    failed = []
    if len(arguments) == 1 and ":" not in arguments[0]:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("corolla").setLevel(logging.DEBUG)
        print(plan(int(arguments[0])))
    total, began = Outcome(), time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        for argument in arguments:
            first, _, last = argument.partition(":")
            for seed in range(int(first), int(last or int(first) + 1)):
                try:
                    total.add(run(seed, Path(root)))
                except WrongOutcome as wrong:
                    failed.append(seed)
                    print(f"seed {seed}: {wrong}\n", flush=True)
    print("\n".join(lines_of(total, time.perf_counter() - began)))
    if failed:
        print(f"{len(failed)} did not end as they must: {failed}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
