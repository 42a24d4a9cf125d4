"""What a long context takes in a server's cache where blocks see a window, and what a token costs there.

Invariant: both sides are the same random blocks and the same tokens; one keeps everything, as families without
windows do. Sizes of windows and of contexts are real, widths are small. Run it by itself:
`python -m benchmarks.windows`.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import PAGE, CachedSequence, PageLayout, PagePool, pages_for
from corolla.models.attention.windows import layout_of
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.selfcheck import check_family
from corolla.models.span import Span, load_span
from corolla.server.sessions.session import bytes_per_token

PIECE, DECODED = 512, 32
WIDTHS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 65536,
}
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"num_hidden_layers": 8, "sliding_window": 4096},
    "gemma2": {"num_hidden_layers": 8, "sliding_window": 4096},
    "gemma3_text": {"num_hidden_layers": 12, "sliding_window": 512},
}
CONTEXTS = (2048, 8192, 16384)


@dataclass(frozen=True)
class Kept:
    """Bytes that one row holds, and seconds of its next tokens, one by one."""

    bytes: int
    seconds: float


def span_of(family: str) -> Span:
    """All blocks of a random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **WIDTHS, **MODELS[family])
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        span = load_span(
            checkpoint,
            0,
            checkpoint.num_blocks,
            dtype=torch.float32,
            packable=check_family(checkpoint.config),
        )
    return span


def run(span: Span, layout: PageLayout, context: int) -> Kept:
    """A prompt of `context` tokens in pieces, then tokens one by one."""
    tokens, blocks = context + DECODED, span.end - span.start
    pool = PagePool(layout.tables * pages_for(tokens), dtype=span.dtype, device=span.device, layout=layout)
    row, times = CachedSequence(pool), []

    def step(hidden: Tensor) -> None:
        started, begin = time.perf_counter(), row.length
        with torch.inference_mode():
            batch = PackedBatch(segments_of([len(hidden)], [row]), pool)
            span.forward_packed(hidden, batch, positions=torch.arange(begin, begin + len(hidden)))
        row.trim()
        times.append(time.perf_counter() - started)

    for piece in torch.randn(context, span.hidden_size).split(PIECE):
        step(piece)
    for _ in range(DECODED):
        step(torch.randn(1, span.hidden_size))
    page = bytes_per_token(span) * PAGE * (layout.depth or blocks) // blocks
    return Kept((pool.pages - pool.free) * page, median(times[-DECODED:]))


def main() -> None:
    print("| blocks | context | everything kept | windows kept | | token, everything | windows |")
    print("|---|---|---|---|---|---|---|")
    for family, sizes in MODELS.items():
        span = span_of(family)
        for context in CONTEXTS:
            whole, windows = run(span, PageLayout(), context), run(span, layout_of(span), context)
            print(
                f"| {family}, {sizes['num_hidden_layers']} blocks, window {sizes['sliding_window']:,} "
                f"| {context:,} | {whole.bytes / 2**20:.1f} MiB | {windows.bytes / 2**20:.1f} MiB "
                f"| {windows.bytes / whole.bytes:.2f}x "
                f"| {whole.seconds * 1e3:.2f} ms | {windows.seconds * 1e3:.2f} ms |",
                flush=True,
            )


if __name__ == "__main__":
    main()
