"""Lines about decoding and prompts with one caller."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.bench import Bench, Pair, Values, cores
from benchmarks.figures import Figure, Line
from benchmarks.processes import NotMeasured, Worker

LLAMA_MISSING = "install llama-cpp-python, built with AVX2, and name its interpreter with --llama-python"


def decode_one(bench: Bench) -> Pair:
    """One session, fp32, beside transformers."""
    client, tokens = bench.client(), bench.size(64, 12)
    ours = partial(client.ask, "decode", rows=1, tokens=tokens)
    return bench.beside_transformers(client, ours, "decode", "decode", rows=1, tokens=tokens)


def decode_batch(bench: Bench) -> Pair:
    """One client's batch of 8."""
    client, tokens = bench.client(), bench.size(32, 6)
    ours = partial(client.ask, "decode", rows=8, tokens=tokens)
    return bench.beside_transformers(client, ours, "batch", "decode", rows=8, tokens=tokens)


def decode_int8(bench: Bench) -> Pair:
    """One session, int8 servers and head, beside llama.cpp on the file that our weights come from."""
    from corolla.models.checkpoints.gguf import embedded_gguf

    client, tokens = bench.client(quantization="int8"), bench.size(64, 12)
    path = str(embedded_gguf())
    workers, about = _llama(bench, path)
    pair = bench.beside_local(
        client,
        partial(client.ask, "decode", rows=1, tokens=tokens),
        workers,
        lambda worker: float(worker.ask("decode", path=path, threads=cores(), tokens=tokens)),
    )
    pair.details["baseline"] = about
    return pair


def _llama(bench: Bench, path: str) -> tuple[list[Worker], dict[str, Any]]:
    try:
        return bench.llama(path)
    except NotMeasured as error:
        raise NotMeasured(LLAMA_MISSING if "llama_cpp" in str(error) else str(error)) from None


def prefill(bench: Bench) -> Pair:
    """A prompt of 512 tokens."""
    client, tokens = bench.client(), bench.size(512, 512)
    ours = partial(client.ask, "prefill", tokens=tokens)
    return bench.beside_transformers(client, ours, "prefill", "prefill", tokens=tokens)


def tenth_turn(bench: Bench) -> Pair:
    """The first token of a chat's tenth turn, beside that of a first turn as long."""
    client, reply = bench.client(), bench.size(24, 2)

    def run() -> tuple[Values, Values]:
        tenth = client.ask("turn", number=10, said=48, reply=reply)
        return (tenth,), (client.ask("turn", number=1, said=48, reply=reply),)

    return Pair(run)


def shared_beginning(bench: Bench) -> Pair:
    """The first token of a second session with the same 1,024 tokens at its beginning, beside the first's."""
    client, shared = bench.client(), bench.size(1024, 128)

    def run() -> tuple[Values, Values]:
        first, second = client.ask("shared_beginning", shared=shared, tail=8)
        return (second,), (first,)

    return Pair(run)


LINES = [
    Line(
        (Figure("decode_1", "decode, 1 session, fp32", "tokens/s", "transformers, local", 2.5, newer=3.5),),
        decode_one,
    ),
    Line(
        (
            Figure(
                "decode_1_int8",
                "decode, 1 session, int8 servers and head",
                "tokens/s",
                "llama.cpp, the same GGUF (Q4_1)",
                0.7,
                newer=0.85,
            ),
        ),
        decode_int8,
        quantization="int8",
    ),
    Line(
        (
            Figure(
                "decode_batch_8",
                "decode, one client, batch of 8",
                "tokens/s",
                "transformers, local batch of 8",
                1.8,
                newer=2.3,
            ),
        ),
        decode_batch,
    ),
    Line(
        (Figure("prefill_512", "prefill of 512 tokens", "tokens/s", "transformers, local", 1.1, newer=1.5),),
        prefill,
    ),
    Line(
        (
            Figure(
                "turn_10",
                "first token of chat turn 10, with 9 turns behind it",
                "s",
                "of turn 1 with as many new tokens",
                1.25,
                at_most=True,
            ),
        ),
        tenth_turn,
    ),
    Line(
        (
            Figure(
                "shared_1024",
                "first token of a 2nd session with the same 1,024-token beginning",
                "s",
                "of the 1st",
                0.15,
                at_most=True,
            ),
        ),
        shared_beginning,
    ),
]
