"""Whether a family's blocks can take the tokens of many sequences in one pass.

Invariant: where they can, packed passes of a miniature's spans gave, for sequences of unlike lengths, what passes
of each by itself give, with a cache and without one, and the gradients too. Sequences that are run whole lie on
both sides of the length at which rotary embeddings change, if they do.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import BlockTable, PagePool
from corolla.models.checks.miniature import EDGE, close
from corolla.models.span import Span

log = logging.getLogger(__name__)


def can_pack(spans: list[Span]) -> bool:
    """Whether packed passes of a miniature's spans equal passes of each sequence by itself."""
    width = spans[0].hidden_size
    cached = [torch.randn(length, width) for length in (EDGE, EDGE - 4)]
    across = [torch.randn(length, width) for length in (EDGE + 3, EDGE - 4, EDGE + 1)]
    try:
        return _same_packed_steps(spans, cached) and _same_packed_gradients(spans, across)
    except Exception as error:  # whatever the family's own attention code makes of missing masks and caches
        log.info("Packed passes are not for this family: %s", error)
        return False


def _alone(spans: list[Span], hidden: Tensor) -> Tensor:
    """One sequence [T, H], by itself."""
    output = hidden[None]
    for span in spans:
        output = span.forward(output)
    return output[0]


def _same_packed_steps(spans: list[Span], hidden: list[Tensor]) -> bool:
    """All but the last four tokens of each at once, then two together, then one, then the other."""
    pools = [PagePool(8, dtype=torch.float32, device=torch.device("cpu")) for _ in spans]
    rows = [[BlockTable(pool) for _ in hidden] for pool in pools]
    outputs: list[list[Tensor]] = [[] for _ in hidden]
    with torch.inference_mode():
        expected = [_alone(spans, one) for one in hidden]
        for cut in (slice(None, -4), slice(-4, -2), slice(-2, -1), slice(-1, None)):
            parts = [one[cut] for one in hidden]
            starts = [row.length for row in rows[0]]
            value = torch.cat(parts)
            for span, pool, own in zip(spans, pools, rows, strict=True):
                batch = PackedBatch(segments_of([len(part) for part in parts], own), pool)
                value = span.forward_packed(value, batch, positions=_places(starts, parts))
            for kept, output in zip(outputs, torch.split(value, [len(part) for part in parts]), strict=True):
                kept.append(output)
    return all(close(torch.cat(kept), one) for kept, one in zip(outputs, expected, strict=True))


def _same_packed_gradients(spans: list[Span], hidden: list[Tensor]) -> bool:
    lengths = [len(one) for one in hidden]
    weight = torch.randn(sum(lengths), spans[0].hidden_size)
    alone = [one.detach().requires_grad_() for one in hidden]
    value = torch.cat([_alone(spans, one) for one in alone])
    expected = torch.autograd.grad((value * weight).sum(), alone)
    inputs = torch.cat(hidden).requires_grad_()
    output = inputs
    for span in spans:
        batch = PackedBatch(segments_of(lengths))
        output = span.forward_packed(output, batch, positions=_places([0] * len(hidden), hidden))
    (gradient,) = torch.autograd.grad((output * weight).sum(), [inputs])
    return close(output, value) and close(gradient, torch.cat(expected))


def _places(starts: list[int], parts: list[Tensor]) -> Tensor:
    return torch.cat(
        [torch.arange(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
    )
