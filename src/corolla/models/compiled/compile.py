"""Makes a program of a span's blocks, where that can be done.

Invariant: a program is used only if it gives, on this machine and with these weights, what the family's own code
gives.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import PAGE, CachedSequence, PagePool
from corolla.models.compiled.compile_stacked import StackableBlocks, same_steps, stacked_program
from corolla.models.compiled.operators import Recording
from corolla.models.compiled.program import Program
from corolla.models.compiled.record import record
from corolla.models.kernels.int8 import Int8Linear
from corolla.models.kernels.native import library
from corolla.text import get_logger

log = get_logger(__name__)

MOST_ROWS = 64  # of a compiled pass: with more, the small operators cost little beside the products
RECORDED = (3, 5)  # rows; unlike each other, one, and the sizes of a model
COMPARED = (1, 2, 7)  # rows
PAST = 21  # tokens a row before those that are compared: more than a page
# Of the outputs' norm. In 8 bits an activation that lies on the edge between two steps may go either way.
TOLERANCE, TOLERANCE_INT8 = 1e-4, 5e-2


class CompiledBlocks(StackableBlocks, Protocol):
    """What is asked of the span whose blocks are compiled (`models/span.py: Span`)."""

    start: int
    end: int
    dtype: torch.dtype
    packable: bool
    stackable: bool

    @property
    def cache_bytes(self) -> tuple[int, int]: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def run_packed(self, hidden: Tensor, batch: PackedBatch, *, positions: Tensor) -> Tensor: ...


def compile_blocks(span: CompiledBlocks) -> Program | None:
    """The program of passes over up to `MOST_ROWS` rows that generate, or None where there is none."""
    if library() is None or span.dtype != torch.float32 or span.device.type != "cpu":
        return None
    if not span.packable and not span.stackable:
        return None
    rounded = any(isinstance(one, Int8Linear) for one in span.blocks.modules())
    tolerance = TOLERANCE_INT8 if rounded else TOLERANCE
    try:
        if span.packable:
            program = Program([_record(span, rows) for rows in RECORDED], RECORDED, most=MOST_ROWS)
        else:
            program = stacked_program(span, MOST_ROWS)
        with torch.inference_mode():
            if span.packable:
                same = all(_is_same(span, program, rows, tolerance) for rows in COMPARED)
            else:
                same = same_steps(span, program, tolerance)
    except Exception as reason:  # mostly `NotCompilable`; else what the family's code makes of being watched
        log.info("Blocks %d:%d are not compiled: %s", span.start, span.end, reason)
        return None
    if not same:
        log.warning("Blocks %d:%d are not compiled: that would change their results.", span.start, span.end)
    return program if same else None


def _record(span: CompiledBlocks, rows: int) -> Recording:
    hidden, positions = _inputs(span, rows)
    return record(
        lambda hidden, positions, batch: span.run_packed(hidden, batch, positions=positions),
        hidden,
        positions,
    )


def _inputs(span: CompiledBlocks, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, span.hidden_size, generator=generator, dtype=torch.float32)
    return hidden, torch.arange(PAST, PAST + tokens)


def _is_same(span: CompiledBlocks, program: Program, rows: int, tolerance: float) -> bool:
    """Whether `rows` rows, each with a past of its own, get the same next token's outputs in both ways."""
    pool = PagePool(2 * rows * (PAST // PAGE + 2), dtype=span.dtype, device=span.device)
    cached = [CachedSequence(pool) for _ in range(rows)]
    hidden, _ = _inputs(span, rows * PAST)
    span.run_packed(
        hidden,
        PackedBatch(segments_of([PAST] * rows, cached), pool),
        positions=torch.arange(PAST).repeat(rows),
    )
    hidden, positions = _inputs(span, rows)
    twins = [row.fork() for row in cached]
    wanted = span.run_packed(hidden, PackedBatch(segments_of([1] * rows, twins), pool), positions=positions)
    found = program.run(hidden, positions, PackedBatch(segments_of([1] * rows, cached), pool))
    return bool((found - wanted).norm() <= tolerance * wanted.norm())
