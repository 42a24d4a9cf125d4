"""Lines about the shapes of today's models, which are not SmolLM2's: random weights, written for the run.

Invariant: both sides read the same files and compute in float32.
"""

from __future__ import annotations

import tempfile
from functools import partial

from benchmarks.bench import Bench, Pair
from benchmarks.figures import Figure, Line
from benchmarks.processes import Worker
from benchmarks.sizes import SHAPES


def written(bench: Bench, shape: str, dtype: str) -> tuple[tempfile.TemporaryDirectory[str], Worker]:
    """The files, and a client of a swarm that serves them."""
    folder = tempfile.TemporaryDirectory()
    bench.any_local().ask("write", shape=shape, dtype=dtype, folder=folder.name)
    return folder, bench.new_client(bench.swarm(model=folder.name), model=folder.name, dtype="float32")


def decode(bench: Bench, shape: str, dtype: str, sessions: int) -> Pair:
    """One session beside transformers, or several beside its batch of as many."""
    folder, client = written(bench, shape, dtype)
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

    pair.clean_up = partial(_clean_up, bench, folder)
    if sessions == 1:
        reading = bench.any_local()
        memory = {
            "bytes a token": reading.ask("token_bytes", folder=folder.name),
            "bytes a second": reading.ask("stream"),
        }
        pair.details["memory"] = memory

        def clean_up() -> None:
            try:  # what memory gives moves with the machine's neighbours: the better of before and after
                memory["bytes a second"] = max(memory["bytes a second"], reading.ask("stream"))
            finally:
                _clean_up(bench, folder)

        pair.clean_up = clean_up
    return pair


def prefill(bench: Bench, shape: str) -> Pair:
    """A prompt of 512 tokens beside transformers."""
    folder, client = written(bench, shape, "float32")
    ours = partial(client.ask, "prefill", tokens=512)
    pair = bench.beside_transformers(client, ours, "prefill", "prefill", folder=folder.name, tokens=512)
    pair.clean_up = partial(_clean_up, bench, folder)
    return pair


def _clean_up(bench: Bench, folder: tempfile.TemporaryDirectory[str]) -> None:
    bench.end_swarm()
    folder.cleanup()


def _line(shape: str, dtype: str, sessions: int, targets: tuple[float, float]) -> Line:
    target, newer = targets
    short = {"float32": "", "bfloat16": "_bf16"}[dtype]
    name = f"{'decode_1' if sessions == 1 else f'sessions_{sessions}'}_{shape}{short}"
    what = "1 session" if sessions == 1 else f"{sessions} sessions of one client process, in all"
    title = f"decode, {what}, shape of {SHAPES[shape].name}, checkpoint in {dtype}"
    baseline = "transformers, local" if sessions == 1 else f"transformers, local batch of {sessions}"
    return Line(
        (Figure(name, title, "tokens/s", baseline, target, newer=newer),),
        lambda bench: decode(bench, shape, dtype, sessions),
    )


# What is to be reached, with AVX2 and nothing newer and with AVX-512, by float32 and by 16-bit checkpoints.
_ONE = {
    "gemma3": ((1.5, 2.0), (1.8, 2.5)),
    "qwen3": ((1.5, 2.0), (1.8, 2.5)),
    "moe": ((1.3, 1.5), (1.5, 1.8)),
}
LINES = [
    line
    for shape, (plain, halved) in _ONE.items()
    for line in (
        _line(shape, "float32", 1, plain),
        _line(shape, "bfloat16", 1, halved),
        _line(shape, "float32", 8, (1.0, 1.3)),
    )
]
# Families whose sequences are more than keys and values, or whose tokens choose: at least as fast as transformers.
for _shape in ("mla", "hybrid"):
    LINES += [_line(_shape, "float32", sessions, (1.0, 1.0)) for sessions in (1, 8)]


def _prefill_line(shape: str) -> Line:
    title = f"prefill of 512 tokens, shape of {SHAPES[shape].name}"
    figure = Figure(f"prefill_512_{shape}", title, "tokens/s", "transformers, local", 1.0)
    return Line((figure,), lambda bench: prefill(bench, shape))


LINES += [_prefill_line(shape) for shape in ("mla", "hybrid", "moe")]
