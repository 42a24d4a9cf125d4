"""How the cost of a token grows: with sessions, with context, with blocks. Each is a plot.

Invariant: a point has its baseline measured beside it; where the number of blocks changes, both sides run
the same model, cut after that many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.bench import Bench, Pair

Point = tuple[int, Pair]


@dataclass(frozen=True)
class Growth:
    """One plot: milliseconds a token over something that grows. A pair's values are tokens/s."""

    name: str
    title: str
    x: str
    baseline: str
    points: Callable[[Bench], Iterator[Point]]


def over_sessions(bench: Bench) -> Iterator[Point]:
    """Sessions of one client process; the baseline is one local batch of as many rows."""
    client, tokens = bench.client(), bench.size(16, 3)
    for count in (1, 2, 4, 8, 16, 32, 64) if not bench.options.quick else (1, 2):
        ours = partial(client.ask, "sessions", count=count, tokens=tokens)
        yield (
            count,
            bench.beside_transformers(
                client, ours, "decode" if count == 1 else "batch", "decode", rows=count, tokens=tokens
            ),
        )


def over_context(bench: Bench) -> Iterator[Point]:
    """One session with that many tokens behind it."""
    client, tokens = bench.client(), bench.size(16, 3)
    for context in (128, 256, 512, 1024, 2048, 4096) if not bench.options.quick else (128, 256):
        size: dict[str, Any] = {"rows": 1, "tokens": tokens, "context": context}
        ours = partial(client.ask, "decode", **size)
        yield context, bench.beside_transformers(client, ours, "decode", "decode", **size)


def over_blocks(bench: Bench) -> Iterator[Point]:
    """One session of a model that ends after that many blocks, on two servers (one for one block)."""
    tokens = bench.size(24, 3)
    for blocks in (1, 2, 5, 10, 15, 20, 25, 30) if not bench.options.quick else (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            bench.any_local().ask("cut", blocks=blocks, folder=folder)
            client = bench.new_client(bench.swarm(model=folder), model=folder)
            ours = partial(client.ask, "decode", rows=1, tokens=tokens)
            more = {"rows": 1, "tokens": tokens, "folder": folder}
            yield blocks, bench.beside_transformers(client, ours, "decode", "decode", **more)
            bench.end_swarm()


GROWTHS = [
    Growth(
        "growth_sessions",
        "Cost of a token by independent sessions of one client process",
        "sessions",
        "transformers, local batch of as many rows",
        over_sessions,
    ),
    Growth(
        "growth_context",
        "Cost of a token by context, one session",
        "tokens of context",
        "transformers, local",
        over_context,
    ),
    Growth(
        "growth_blocks",
        "Cost of a token by blocks of the model, one session",
        "blocks",
        "transformers, local",
        over_blocks,
    ),
]
