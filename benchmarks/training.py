"""Lines about prompt tuning; the baseline is peft's on the same model."""

from __future__ import annotations

from functools import partial

from benchmarks.bench import Bench, Pair
from benchmarks.figures import Figure, Line


def dense(bench: Bench, mode: str) -> Pair:
    """A step of 8 × 256 tokens without padding, a label at each; peft's is always its plain prompt."""
    size = {"rows": bench.size(8, 2), "length": bench.size(256, 64)}
    client = bench.client(tuning_mode=mode)
    return bench.beside_transformers(client, partial(client.ask, "train", **size), "train", "train", **size)


def chitchat(bench: Bench, padding: str) -> Pair:
    """Steps on the demo's batches: ours with the trainer's collator and loss, peft's with padding."""
    client, count = bench.client(tuning_mode="ptune"), bench.size(3, 1)
    ours = partial(client.ask, "chitchat", count=count)
    return bench.beside_transformers(client, ours, "train", "chitchat", count=count, padding=padding)


def _dense(mode: str, target: float, newer: float) -> Line:
    title = f"training step, 8 × 256 dense tokens, `{mode}`"  # noqa: RUF001
    return Line(
        (Figure(f"train_{mode}", title, "tokens/s", "peft `ptune`, local", target, newer=newer),),
        lambda bench: dense(bench, mode),
    )


def _chitchat(padding: str, words: str, target: float, newer: float) -> Line:
    title = "real tokens/s on the demo's chitchat batches"
    figure = Figure(
        f"chitchat_{padding}", title, "tokens/s", f"peft, local, padded to {words}", target, newer=newer
    )
    return Line((figure,), lambda bench: chitchat(bench, padding))


LINES = [
    _dense("ptune", 1.2, 1.6),
    _dense("deep_ptune", 1.1, 1.5),
    _chitchat("longest", "the longest of the batch", 1.6, 2.2),
    _chitchat("max_length", "`max_length`", 2.0, 2.3),
]
