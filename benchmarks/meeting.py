"""Sessions of one client with Qwen3's shape, whose steps wait now and then for all others, or never.

    python -m benchmarks.meeting [--runs 5] [--tokens 32]

In turns in one swarm of two server processes: tokens/s of eight sessions in all, and how many messages of the client
held how many steps. Printed, not kept.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from statistics import median
from typing import Any

import torch

from benchmarks.workers.local import write
from corolla import AutoDistributedModelForCausalLM
from corolla.cli import measure
from corolla.cli.local_swarm import local_swarm
from corolla.client.sessions import step_batcher
from corolla.wire.frames import Packet
from corolla.wire.messages import Steps

SHAPE, SESSIONS, CONTEXT, WORDS = "qwen3", 8, 16, 50_000
WAYS = {"meeting": step_batcher.MEET_EVERY, "never": 10**9}


def count_steps(view: Any) -> Counter[int]:
    """Messages by the number of steps in them, counted from now on."""
    found: Counter[int] = Counter()
    ask = view.channels.ask

    async def counting(peer: str, packet: Packet) -> Packet:
        if isinstance(packet.message, Steps):
            found[len(packet.message.parts)] += 1
        reply: Packet = await ask(peer, packet)
        return reply

    view.channels.ask = counting
    return found


def main() -> None:
    """Print each run, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    rows = torch.randint(5, WORDS, (SESSIONS, CONTEXT), generator=torch.Generator().manual_seed(1))
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write(SHAPE, "float32", folder)
        with (
            local_swarm(folder) as swarm,
            AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=swarm.peers) as model,
        ):
            counts = count_steps(model.blocks.connection.view)
            measure.sessions(model, rows, options.tokens)  # warms up
            for turn in range(options.runs):
                for way in sorted(WAYS, reverse=bool(turn % 2)):
                    step_batcher.MEET_EVERY = WAYS[way]
                    counts.clear()
                    rates[way].append(measure.sessions(model, rows, options.tokens))
                    print(
                        f"{way:8} {rates[way][-1]:.1f} tokens/s, steps in a message: {dict(sorted(counts.items()))}"
                    )
    print(", ".join(f"{way} {median(found):.1f}" for way, found in rates.items()), "tokens/s, medians")


if __name__ == "__main__":
    main()
