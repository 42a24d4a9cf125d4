"""The processor time of one token of a chat and of one training step, here and in another checkout, in turns.

    python -m benchmarks.cpu_time --beside PATH [--rounds N]

The in-memory swarm of two servers, all in one process, with a tiny random model: so this is what our own code takes,
for the client and the servers together, and hardly any arithmetic. Medians of all rounds. Printed, not kept.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKENS, STEPS = 40, 10  # of a round
WARM = 2  # rounds that are not counted


class Worker:
    """A process that measures the checkout at `root`, a round at a time."""

    def __init__(self, root: Path) -> None:
        paths = os.pathsep.join((str(root / "src"), str(root)))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-W", "ignore", __file__, "--work"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def round(self, what: str) -> float:
        """Milliseconds of processor time of one token, or step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A worker has ended; its error is above.")
        return float(line)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def work() -> None:
    """Measure the round that each line of stdin names."""
    import torch
    from tests.swarm_fixture import MemorySwarm
    from tests.tiny_models import write_tiny

    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        MemorySwarm(write_tiny("llama", Path(folder) / "model"), ((0, 2), (2, 4))) as swarm,
    ):
        model, trained = swarm.model(), swarm.model(tuning_mode="deep_ptune", pre_seq_len=4)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        ids = torch.randint(3, 90, (2, 8))

        def token() -> int:
            model.generate(ids[:1], min_new_tokens=TOKENS, max_new_tokens=TOKENS)
            return TOKENS

        def step() -> int:
            for _ in range(STEPS):
                trained(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return STEPS

        works: dict[str, Callable[[], int]] = {"chat token": token, "training step": step}
        for line in sys.stdin:
            before = time.process_time()
            count = works[line.strip()]()
            print(1000 * (time.process_time() - before) / count, flush=True)


def main() -> None:
    """Measure both in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    if arguments.beside is None:
        parser.error("--beside names another checkout")
    workers = {"beside": Worker(arguments.beside.resolve()), "here": Worker(ROOT)}
    for what in ("chat token", "training step"):
        found: dict[str, list[float]] = {name: [] for name in workers}
        for done in range(WARM + arguments.rounds):
            for name, worker in workers.items():
                took = worker.round(what)
                if done >= WARM:
                    found[name].append(took)
        beside, here = (statistics.median(found[name]) for name in ("beside", "here"))
        spread = statistics.quantiles([a / b for a, b in zip(found["here"], found["beside"], strict=True)])
        print(
            f"{what}: {here:.2f} ms of processor time here, {beside:.2f} beside: {here / beside:.3f}x "
            f"(half of the rounds between {spread[0]:.3f} and {spread[-1]:.3f})"
        )
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
