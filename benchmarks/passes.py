"""What a generation pass takes by the family's own code, and as one call (`corolla.models.compiled`), in turns.

    python -m benchmarks.passes [--threads N] [--quantization none | int8] [--rows 1 2 8 32 64]

The first half of SmolLM2's blocks, every row with 60 tokens behind it; medians of 60 passes. Printed, not kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.sizes import MODEL
from corolla.cli.common import set_up_libraries
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool, pages_for
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.selfcheck import check_family
from corolla.models.kernels.apply import pack_linears
from corolla.models.span import Span, load_span

PAST, PASSES = 60, 60


def measure(span: Span, rows: int) -> tuple[float, float]:
    """Seconds of a pass by the family's code, and as one call."""
    pool = PagePool(rows * pages_for(PAST + 2 * PASSES), dtype=span.dtype, device=span.device)
    cached = [CachedSequence(pool) for _ in range(rows)]
    past = torch.randn(rows * PAST, span.hidden_size)
    span.run_packed(
        past, PackedBatch(segments_of([PAST] * rows, cached), pool), positions=torch.arange(PAST).repeat(rows)
    )
    hidden = torch.randn(rows, span.hidden_size)
    ways: tuple[Callable[..., Tensor], ...] = (span.run_packed, span.forward_packed)
    times: tuple[list[float], ...] = ([], [])
    for step in range(PASSES):
        for way, own in zip(ways, times, strict=True):
            positions = torch.full((rows,), PAST + step)
            started = time.perf_counter()
            way(hidden, PackedBatch(segments_of([1] * rows, cached), pool), positions=positions)
            own.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quantization", choices=("none", "int8"), default="none")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32, 64])
    arguments = parser.parse_args()
    set_up_libraries()
    torch.set_num_threads(arguments.threads)
    checkpoint = open_checkpoint(MODEL)
    packable = check_family(checkpoint.config)
    span = load_span(checkpoint, 0, checkpoint.num_blocks // 2, dtype=torch.float32, packable=packable)
    pack_linears(span.model, quantization=arguments.quantization)
    if span.compile() is None:
        raise SystemExit("These blocks are not compiled here; there may be no C compiler.")
    with torch.inference_mode():
        for rows in arguments.rows:
            plain, compiled = measure(span, rows)
            print(
                f"{rows:3} rows: {1000 * plain:6.2f} ms by the family's code, {1000 * compiled:6.2f} as one call, "
                f"{plain / compiled:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
