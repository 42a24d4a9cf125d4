"""The CPU kernels beside `F.linear`, and what a one-token step through blocks is made of.

Every figure is a median, the kernels interleaved in one run; weights rotate through more memory than the caches
hold, as they do while a model decodes. One JSON line each. (Not named `kernels.py`: transformers would import it
in place of the optional package of that name.)

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_kernels.py            # products, gradients, blocks
    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_kernels.py --sets     # the C kernels, for each instruction set
    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu_kernels.py --compile  # and torch.compile of one block
    GOMP_SPINCOUNT=10000 python benchmarks/cpu_kernels.py --attention   # of several tokens, beside torch
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from corolla.models.attention.one_sequence import attend_one
from corolla.models.attention.one_token_rows import Rules, attend_stretch
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool, pages_for
from corolla.models.kernels.apply import Quantization, pack_linears
from corolla.models.kernels.client import HalfLinear
from corolla.models.kernels.int8 import Int8Linear
from corolla.models.kernels.isa import VARIABLE
from corolla.models.kernels.linear import BOUNDS, Backends, FrozenLinear, NarrowLinear, PackedLinear
from corolla.models.kernels.narrow import Narrow, as_it_is
from corolla.models.kernels.native import instruction_sets, library

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # SmolLM2's, [out, in]
HEAD = (49152, 576)
FUSED = (3072, 576)  # gate and up, which are one product
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
SOME_ROWS = (1, 2, 8, 32)
ATTENTION = (9, 3, 64)  # SmolLM2's heads, those of keys, and their width
ROTATED_BYTES = 100e6
PAST = 200  # tokens in the cache of a step

Call = Callable[[], Any]


def interleaved(calls: dict[str, Call], *, seconds: float = 0.1) -> dict[str, float]:
    """Median time of each call in ms."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) * 1e3 for name, found in times.items()}


def report(what: str, figures: dict[str, float], **about: Any) -> None:
    """One JSON line."""
    print(json.dumps({"what": what, **about, "ms": {k: round(v, 4) for k, v in figures.items()}}), flush=True)


def kernels(shape: tuple[int, int], copies: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """Layers of every kind, `copies` of each with weights of its own."""
    weights = [torch.randn(*shape) * 0.05 for _ in range(copies)]
    return {
        "F.linear": [lambda value, weight=weight: F.linear(value, weight) for weight in weights],
        "packed": [PackedLinear(weight) for weight in weights],
        "int8": [Int8Linear(weight, pieces=1) for weight in weights],
        "int8, 2 pieces": [Int8Linear(weight, pieces=2) for weight in weights],
        "16 bit": [HalfLinear(weight.bfloat16()) for weight in weights],
    }


def products(shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    """Forward, without gradients."""
    copies = max(1, int(ROTATED_BYTES / (shape[0] * shape[1] * 4)))
    layers = kernels(shape, copies)
    if shape != HEAD:
        del layers["16 bit"]  # the client's table only
    turn = [0]

    def run(name: str, value: Tensor) -> Tensor:
        turn[0] += 1
        return layers[name][turn[0] % copies](value)

    for count in rows:
        value = torch.randn(count, shape[1])
        with torch.inference_mode():
            calls = {name: lambda name=name, value=value: run(name, value) for name in layers}
            report("product", interleaved(calls), shape=shape, rows=count)


def forms(shape: tuple[int, int]) -> dict[str, Callable[[], FrozenLinear]]:
    """What makes a layer of random weights, for each form that the C kernels read."""
    rows, columns = shape
    steps = (rows, columns // 32)

    def own(narrow: Narrow) -> NarrowLinear:
        return NarrowLinear(narrow, backends=Backends(("own",) * (len(BOUNDS) + 1), "torch"))

    return {
        "float32": lambda: own(as_it_is(torch.randn(shape))),
        "bfloat16": lambda: own(Narrow("bfloat16", torch.randn(shape).bfloat16())),
        "bytes (Q8_0)": lambda: own(
            Narrow("bytes", torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(steps).half())
        ),
        "nibbles (Q4_1)": lambda: own(
            Narrow(
                "nibbles",
                torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
                torch.rand(steps).half(),
                torch.rand(steps).half(),
            )
        ),
        "int8": lambda: Int8Linear(torch.randn(shape)),
    }


def use(instruction_set: str) -> None:
    """Have the C kernels of this set from now on."""
    os.environ[VARIABLE] = instruction_set
    library.cache_clear()


def by_instruction_set(shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    """Each C kernel for each set that this CPU has: how many times as fast as `F.linear`, in turns."""
    copies = max(1, int(ROTATED_BYTES / (shape[0] * shape[1] * 4)))
    names = instruction_sets()
    layers: dict[str, list[Callable[[Tensor], Tensor]]] = {
        form: [make() for _ in range(copies)] for form, make in forms(shape).items()
    }
    plain = [partial(F.linear, weight=torch.randn(shape)) for _ in range(copies)]
    turn = itertools.count()
    for form, count in itertools.product(layers, rows):
        value, ratios = torch.randn(count, shape[1]), {}
        calls: dict[str, Call] = {
            "F.linear": lambda value=value: plain[next(turn) % copies](value),
            "ours": lambda value=value, own=layers[form]: own[next(turn) % copies](value),
        }
        for name in names:
            use(name)
            with torch.inference_mode():
                times = interleaved(calls, seconds=0.05)
            ratios[name] = round(times["F.linear"] / times["ours"], 2)
        about = {"what": "times as fast as F.linear", "form": form, "shape": shape, "rows": count}
        print(json.dumps(about | ratios), flush=True)


def gradients(shape: tuple[int, int], rows: int) -> None:
    """Forward and the gradient for the input."""
    value = torch.randn(rows, shape[1], requires_grad=True)
    outer = torch.randn(rows, shape[0])
    layers = {name: made[0] for name, made in kernels(shape, 1).items()}
    calls = {
        name: lambda layer=layer: torch.autograd.grad(layer(value), value, outer)
        for name, layer in layers.items()
    }
    report("forward and gradient", interleaved(calls), shape=shape, rows=rows)


def model(blocks: int, quantization: Quantization | None, pieces: int = 1) -> Any:
    """Blocks of SmolLM2's size with random weights; None for plain layers."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8,
        max_position_embeddings=8192,
    )
    made = LlamaModel(config).eval().requires_grad_(False)
    made.norm = torch.nn.Identity()
    if quantization is not None:
        pack_linears(made, quantization=quantization, pieces=pieces)
    return made


class Step:
    """One token for each of `rows` sessions through a model, its cache of PAST tokens put back afterwards."""

    def __init__(self, made: Any, rows: int) -> None:
        self.model = made
        self.cache = DynamicCache()
        self.value = torch.randn(rows, 1, 576)
        made(inputs_embeds=torch.randn(rows, PAST, 576), past_key_values=self.cache, use_cache=True)

    def __call__(self) -> None:
        self.model(inputs_embeds=self.value, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)


def steps(blocks: int, rows: int) -> None:
    """A decode step through `blocks` blocks, whole and without its products."""
    variants: dict[str, Any] = {
        "plain": model(blocks, None),
        "packed": model(blocks, "none"),
        "int8": model(blocks, "int8"),
        "int8, 2 pieces": model(blocks, "int8", 2),
    }
    with torch.inference_mode():
        calls: dict[str, Call] = {name: Step(made, rows) for name, made in variants.items()}
        report("step", interleaved(calls, seconds=1.0), blocks=blocks, rows=rows, past=PAST)


def compiled() -> None:
    """One block, eager with packed layers and compiled with plain ones (which inductor packs by itself).

    The packed layers themselves cannot be compiled: inductor takes oneDNN's operator for packed constants only.
    """
    inductor: Any = importlib.import_module("torch._inductor.config")
    with torch.inference_mode():
        eager = Step(model(1, "none"), 1)
        plain = Step(model(1, None), 1)
        other = model(1, None)
        other.layers[0] = torch.compile(other.layers[0], dynamic=True)
        with inductor.patch(freezing=True):
            begun = time.perf_counter()
            fast = Step(other, 1)
            fast()
            fast()
            seconds = time.perf_counter() - begun
            calls: dict[str, Call] = {"eager": plain, "eager, packed": eager, "compiled": fast}
            report("compile", interleaved(calls, seconds=2.0), compile_seconds=round(seconds, 1))


def attention(heads: int, kv_heads: int, dim: int, count: int, past: int) -> None:
    """Of `count` tokens of one sequence behind `past` others: our kernel's, beside torch's."""
    pool = PagePool(pages_for(past + count), dtype=torch.float32, device=torch.device("cpu"))
    cache = pool.store(0, torch.empty(1, kv_heads, 1, dim), torch.empty(1, kv_heads, 1, dim))
    for side in cache:
        side.normal_()
    row = CachedSequence(pool)
    for new in (past, count) if past else (count,):
        batch = PackedBatch(segments_of([new], [row]), pool)
    (one,) = batch.segments[0].parts
    query = torch.randn(1, count, heads, dim).transpose(1, 2)
    turned = [side.transpose(0, 1).unsqueeze(0) for side in cache]

    def by_torch() -> Tensor:
        return attend_one(query, one.cached(turned[0]), one.cached(turned[1]), one, Rules())

    with torch.inference_mode():
        calls: dict[str, Call] = {
            "torch": by_torch,
            "ours": partial(attend_stretch, query, cache, one.pages, past, Rules()),
        }
        shape = (heads, kv_heads, dim)
        report("attention", interleaved(calls), shape=shape, tokens=count, behind=past)


def main() -> None:
    """Print the figures asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sets", action="store_true")
    parser.add_argument("--attention", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
    }
    print(json.dumps({"what": "machine", **about}), flush=True)
    if options.compile:
        compiled()
        return
    if options.attention:
        for count, past in itertools.product((30, 128, 512), (0, 500, 2000)):
            attention(*ATTENTION, count, past)
        return
    if options.sets:
        by_instruction_set(FUSED, SOME_ROWS)
        return
    for shape in SHAPES:
        products(shape, ROWS)
        gradients(shape, 512)
    products(HEAD, (1, 8, 32))
    for rows in (1, 8, 32):
        steps(options.blocks, rows)


if __name__ == "__main__":
    main()
