"""Lines about many sessions at once."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from functools import partial

from benchmarks.bench import Bench, Pair, Values
from benchmarks.figures import Figure, Line
from benchmarks.processes import Worker

PROCESSES = 8
CROWD = 4  # sessions that decode while somebody sends a long prompt
ALONE_SECONDS = 8.0


def independent(bench: Bench, count: int, quantization: str | None = None) -> Pair:
    """That many sessions of one client process, a thread each."""
    client = bench.client(quantization=quantization)
    tokens = bench.size(24 if count > 8 else 32, 4)
    ours = partial(client.ask, "sessions", count=count, tokens=tokens)
    return bench.beside_transformers(
        client, ours, "batch", "decode", rows=8, tokens=bench.size(32, 6), context=16
    )


def processes(bench: Bench) -> Pair:
    """Eight client processes with a session each."""
    bench.client()  # the swarm, and a client that stays
    clients = [bench.new_client(bench.swarm()) for _ in range(PROCESSES)]
    tokens = bench.size(24, 4)
    ours = partial(_at_once, clients, tokens)
    pair = bench.beside_transformers(
        clients[0], ours, "batch", "decode", rows=8, tokens=bench.size(32, 6), context=16
    )
    pair.clean_up = partial(_close, clients)
    return pair


def _close(clients: Sequence[Worker]) -> None:
    for client in clients:
        client.close()


def _at_once(clients: Sequence[Worker], tokens: int) -> float:
    """Tokens/s in all, from the first's beginning to the last's end; the prompts are behind them by then."""
    for client in clients:
        client.ask("hold")
    for client in clients:
        client.begin("more", tokens=tokens)
    times = [client.result() for client in clients]
    for client in clients:
        client.ask("drop")
    starts, ends = zip(*times, strict=True)
    return float(len(clients) * tokens / (max(ends) - min(starts)))


def long_prompt(bench: Bench) -> Pair:
    """The time between others' tokens while a client sends 4,096 tokens, beside that with nobody else."""
    others = bench.client()
    intruder = bench.new_client(bench.swarm())
    length = bench.size(4096, 256)

    def run() -> tuple[Values, Values]:
        others.ask("crowd_start", count=CROWD)
        begin, end = intruder.ask("intrude", tokens=length)
        beside = _gaps(others.ask("crowd_stop"), begin, end)
        others.ask("crowd_start", count=CROWD)
        begin = time.perf_counter()
        time.sleep(bench.size(int(ALONE_SECONDS), 2))
        end = time.perf_counter()
        alone = _gaps(others.ask("crowd_stop"), begin, end)
        return (statistics.median(beside), max(beside)), (statistics.median(alone), max(alone))

    details = {"others": CROWD, "prompt tokens": length}
    return Pair(run, details, clean_up=intruder.close)


def _gaps(stamps: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Seconds between a session's tokens, wherever they overlap with the time from begin to end."""
    return [
        later - earlier
        for times in stamps
        for earlier, later in itertools.pairwise(times)
        if later > begin and earlier < end
    ]


BATCH = "transformers, local batch of 8"


def _many(count: int, targets: tuple[float, float], quantization: str | None = None) -> Line:
    target, newer = targets
    name, words = f"sessions_{count}", f"decode, {count} sessions of one client process, in all"
    if quantization is not None:
        name, words = f"{name}_{quantization}", f"{words}, {quantization}"
    return Line(
        (Figure(name, words, "tokens/s", BATCH, target, newer=newer),),
        lambda bench: independent(bench, count, quantization),
        quantization=quantization,
    )


_LONG = "token of others while one client sends a 4,096-token prompt"
LINES = [
    _many(8, (1.2, 1.4)),
    _many(32, (1.7, 2.0)),
    Line(
        (Figure("processes_8", "decode, 8 client processes, in all", "tokens/s", BATCH, 0.8, newer=1.0),),
        processes,
    ),
    _many(8, (1.8, 2.0), "int8"),
    _many(32, (2.4, 2.8), "int8"),
    Line(
        (
            Figure("long_prompt", f"next {_LONG}, median", "s", "with nobody else", 2.5, at_most=True),
            Figure("long_prompt_worst", f"next {_LONG}, worst", "s", "with nobody else", 2.5, at_most=True),
        ),
        long_prompt,
    ),
]
