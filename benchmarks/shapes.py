"""Lines about the shapes of today's models, which are not SmolLM2's: random weights, written for the run.

Invariant: both sides read the same files and compute in float32.
"""

from __future__ import annotations

import tempfile
from functools import partial

from benchmarks.bench import Bench, Pair
from benchmarks.figures import Figure, Line
from benchmarks.sizes import SHAPES


def decode(bench: Bench, shape: str, dtype: str, sessions: int) -> Pair:
    """One session beside transformers, or several beside its batch of as many."""
    folder = tempfile.TemporaryDirectory()
    bench.any_local().ask("write", shape=shape, dtype=dtype, folder=folder.name)
    client = bench.new_client(bench.swarm(model=folder.name), model=folder.name, dtype="float32")
    tokens = bench.size(32 if sessions == 1 else 16, 4)
    ours = (
        partial(client.ask, "decode", rows=1, tokens=tokens)
        if sessions == 1
        else partial(client.ask, "sessions", count=sessions, tokens=tokens)
    )
    kind = "decode" if sessions == 1 else "batch"
    pair = bench.beside_transformers(
        client, ours, kind, "decode", folder=folder.name, rows=sessions, tokens=tokens
    )

    if sessions == 1:
        reading = bench.any_local()
        pair.details["memory"] = {
            "bytes a token": reading.ask("token_bytes", folder=folder.name),
            "bytes a second": reading.ask("stream"),
        }

    def clean_up() -> None:
        bench.end_swarm()
        folder.cleanup()

    pair.clean_up = clean_up
    return pair


def _line(shape: str, dtype: str, sessions: int, target: float) -> Line:
    short = {"float32": "", "bfloat16": "_bf16"}[dtype]
    name = f"{'decode_1' if sessions == 1 else f'sessions_{sessions}'}_{shape}{short}"
    what = "1 session" if sessions == 1 else f"{sessions} sessions of one client process, in all"
    title = f"decode, {what}, shape of {SHAPES[shape].name}, checkpoint in {dtype}"
    baseline = "transformers, local" if sessions == 1 else f"transformers, local batch of {sessions}"
    return Line(
        (Figure(name, title, "tokens/s", baseline, target),),
        lambda bench: decode(bench, shape, dtype, sessions),
    )


# What is to be reached with AVX2 and nothing newer; with AVX-512 a third to a half more.
_ONE = {"gemma3": (1.5, 1.8), "qwen3": (1.5, 1.8), "moe": (1.3, 1.5)}
LINES = [
    line
    for shape, (plain, halved) in _ONE.items()
    for line in (
        _line(shape, "float32", 1, plain),
        _line(shape, "bfloat16", 1, halved),
        _line(shape, "float32", 8, 1.0),
    )
]
