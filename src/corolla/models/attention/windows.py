"""How far back each block of a span looks, and the layout of pages that follows from it.

Invariant: a window is what the family's own code has called attention with, once with the first tokens of a
sequence and once with a later one. Where the two differ, or the blocks' keys and values have not all the same
shape, everything is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from corolla.models.attention.one_token_rows import Rules
from corolla.models.attention.packing import PackedBatch, Segment, segments_of
from corolla.models.attention.pages import MARGIN, CachedSequence, PageLayout, PagePool
from corolla.models.span import Span

MOST_TABLES = 8  # about; each table costs every row some microseconds a pass

Window = int | None
Call = tuple[Window, torch.Size, torch.Size]  # with the shapes of a token's keys and values


class _WatchedBatch(PackedBatch):
    """Notes how attention is called, in `calls`."""

    def __init__(self, segments: Sequence[Segment], pool: PagePool, calls: set[tuple[int, Call]]) -> None:
        super().__init__(segments, pool)
        self.calls = calls

    def keep(self, block: int, latent: Tensor, rotary: Tensor) -> None:
        self.calls.add((block, (None, latent[0, :, 0].shape, rotary[0, :, 0].shape)))
        super().keep(block, latent, rotary)

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        self.calls.add((block, (rules.window, key[0, :, 0].shape, value[0, :, 0].shape)))
        return super().attend(block, query, key, value, rules)


def layout_of(span: Span, margin: int = MARGIN) -> PageLayout:
    """The layout for the caches of a span and its views; runs the span on a few tokens.

    A span that cannot be packed has caches of its own, which keep everything.
    """
    if not span.packable:
        return PageLayout()
    calls = _calls(span)
    windows = {block: window for block, (window, _, _) in calls}
    shapes = {call[1:] for _, call in calls}
    if len(windows) != len(calls) or len(shapes) > 1 or set(windows.values()) <= {None}:
        return PageLayout()
    groups: dict[Window, list[int]] = defaultdict(list)
    for block, window in sorted(windows.items()):
        groups[window].append(block)
    # As deep as the smallest group: pages of the others are full then, but for their last table's.
    depth = max(min(map(len, groups.values())), -(-len(windows) // MOST_TABLES))
    tables = [(window, blocks) for window, group in groups.items() for blocks in _cut(group, depth)]
    return PageLayout(
        windows=tuple(window for window, _ in tables),
        places={
            block: (table, place)
            for table, (_, blocks) in enumerate(tables)
            for place, block in enumerate(blocks)
        },
        margin=margin,
    )


def _calls(span: Span) -> set[tuple[int, Call]]:
    """How each block calls attention for a sequence's first two tokens, and for its third."""
    pool = PagePool(1, dtype=span.dtype, device=span.device)
    row = CachedSequence(pool)
    calls: set[tuple[int, Call]] = set()
    with torch.inference_mode():
        for start, count in ((0, 2), (2, 1)):
            span.run_packed(
                torch.zeros(count, span.width, dtype=span.dtype, device=span.device),
                _WatchedBatch(segments_of([count], [row]), pool, calls),
                positions=torch.arange(start, start + count, device=span.device),
            )
    return calls


def _cut(blocks: list[int], depth: int) -> Iterator[list[int]]:
    for start in range(0, len(blocks), depth):
        yield blocks[start : start + depth]
