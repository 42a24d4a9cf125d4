"""What a generation pass takes by the family's own code, and as one call (`corolla.models.compiled`), in turns.

    python -m benchmarks.passes [--shape gemma3 | qwen3 | moe | mla | hybrid] [--dtype bfloat16] [--threads N]
                                [--quantization none | int8] [--rows 1 2 8 32 64]

All blocks of a shape of `sizes.SHAPES`, with random weights, or the first half of SmolLM2's; every row with 60 tokens
behind it. Then the head's product, beside transformers' own, and for one row how fast weights were read, beside how
fast this machine reads memory in the same run. Medians of 40 passes. Printed, not kept.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sizes import MODEL, SHAPES
from benchmarks.workers.local import stream, write
from corolla.cli.common import set_up_libraries
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool, pages_for
from corolla.models.attention.stacked import StackedCaches
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checks.selfcheck import check_family, steps_stack
from corolla.models.kernels.apply import exact_linear, pack_linears, weight_bytes
from corolla.models.kernels.autotune import Autotuner
from corolla.models.span import Span, load_span

PAST, PASSES = 60, 40


def in_turns(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(PASSES):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def passes(span: Span, rows: int) -> dict[str, float]:
    """Seconds of a pass by the family's code, and as one call."""
    return packed(span, rows) if span.packable else stacked(span, rows)


def stacked(span: Span, rows: int) -> dict[str, float]:
    """Of blocks that keep states: sessions' steps side by side, their states put together and handed out again."""
    caches = [span.new_cache() for _ in range(rows)]
    for cache in caches:
        span.forward(torch.randn(1, PAST, span.width), cache=cache)
    hidden = [torch.randn(1, 1, span.width) for _ in caches]
    program = span.compile()

    def one(run: Callable[..., Tensor]) -> None:
        together = StackedCaches(caches, span.latent_blocks)
        places = [torch.full((1, 1), caches[0].get_seq_length())] * rows
        output = run(torch.cat(hidden), together, positions=torch.cat(places))
        together.commit(output, hidden, places)

    quicker = span.run_stacked if program is None else program.run_stacked
    return in_turns({"plain": partial(one, span.run_stacked), "compiled": partial(one, quicker)})


def packed(span: Span, rows: int) -> dict[str, float]:
    """Of blocks that keep keys and values only."""
    pool = PagePool(rows * pages_for(PAST + 2 * PASSES), dtype=span.dtype, device=span.device)
    cached = [CachedSequence(pool) for _ in range(rows)]
    past = torch.randn(rows * PAST, span.width)
    span.run_packed(
        past, PackedBatch(segments_of([PAST] * rows, cached), pool), positions=torch.arange(PAST).repeat(rows)
    )
    hidden = torch.randn(rows, span.width)

    def one(run: Callable[..., Tensor]) -> None:
        batch = PackedBatch(segments_of([1] * rows, cached), pool)
        run(hidden, batch, positions=torch.full((rows,), cached[0].length))

    return in_turns({"plain": partial(one, span.run_packed), "compiled": partial(one, span.forward_packed)})


def head_of(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Linear:
    """A head of the checkpoint's size with weights as `dtype` has them, computing in float32."""
    config = checkpoint.config
    weight = torch.randn(config.vocab_size, config.hidden_size).to(dtype).float()
    head = nn.Linear(1, 1, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def read_bytes(span: Span) -> int:
    """Bytes of weights that one token needs: of a mixture, those of the experts that it is sent to."""
    whole = weight_bytes(span.blocks)
    config = span.config
    chosen, count = (getattr(config, name, 0) for name in ("num_experts_per_tok", "num_local_experts"))
    experts = [one for name, one in span.blocks.named_modules() if name.endswith("experts")]
    return whole - sum(weight_bytes(one) * (count - chosen) // count for one in experts)


def report(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Measure and print."""
    packable, stackable = check_family(checkpoint.config), steps_stack(checkpoint.config)
    blocks = checkpoint.num_blocks if arguments.shape else checkpoint.num_blocks // 2
    span = load_span(checkpoint, 0, blocks, dtype=torch.float32, packable=packable, stackable=stackable)
    pack_linears(span.model, quantization=arguments.quantization)
    if span.compile() is None:
        print("These blocks are not compiled here.")
    speed = stream()
    print(f"memory is read at {speed / 1e9:.1f} GB/s")
    for rows in arguments.rows:
        found = passes(span, rows)
        print(
            f"{rows:3} rows: {1000 * found['plain']:6.2f} ms by the family's code, "
            f"{1000 * found['compiled']:6.2f} as one call, {found['plain'] / found['compiled']:.2f}x",
            flush=True,
        )
        if rows == 1:
            _share("blocks", read_bytes(span), found["compiled"], speed)
    head = head_of(checkpoint, getattr(torch, arguments.dtype))
    product = exact_linear(head.weight, None, autotuner=Autotuner())
    for rows in arguments.rows:
        value = torch.randn(rows, head.weight.shape[1])
        found = in_turns({"plain": partial(F.linear, value, head.weight), "ours": partial(product, value)})
        print(
            f"head, {rows:3} rows: {1000 * found['plain']:6.2f} ms by torch, {1000 * found['ours']:6.2f} ours"
        )
        if rows == 1:
            _share("head", product.weight_bytes(), found["ours"], speed)


def _share(what: str, read: int, seconds: float, speed: float) -> None:
    print(
        f"          {what}: {read / 1e6:.0f} MB at {read / seconds / 1e9:.1f} GB/s, {read / seconds / speed:.0%}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quantization", choices=("none", "int8"), default="none")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32, 64])
    arguments = parser.parse_args()
    set_up_libraries()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            write(arguments.shape, arguments.dtype, folder)
        report(open_checkpoint(folder if arguments.shape else MODEL), arguments)


if __name__ == "__main__":
    main()
