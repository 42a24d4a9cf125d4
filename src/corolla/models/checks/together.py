"""Which requests of a family may share a pass: packed all of them, or steps of one token as a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool
from corolla.models.checks.miniature import EDGE, close
from corolla.models.span import Span
from corolla.text import get_logger

log = get_logger(__name__)

STEPS = 5  # of one token


def can_pack(spans: list[Span]) -> bool:
    """Whether packed passes of a miniature's spans equal passes of each sequence by itself, of unlike lengths.

    With a cache and without one, gradients too; sequences that are run whole lie on both sides of the length at
    which rotary embeddings change, if they do.
    """
    width, device = spans[0].width, spans[0].device
    cached = [torch.randn(length, width).to(device) for length in (EDGE, EDGE - 4)]
    across = [torch.randn(length, width).to(device) for length in (EDGE + 3, EDGE - 4, EDGE + 1)]
    try:
        return _same_packed_steps(spans, cached) and _same_packed_gradients(spans, across)
    except Exception as error:  # whatever the family's own attention code makes of missing masks and caches
        log.info("Packed passes are not for this family: %s", error)
        return False


def can_stack(spans: list[Span]) -> bool:
    """Whether steps of one token of several requests, as a batch, equal steps of each by itself.

    Their sequences are of unlike lengths, one request is of two rows, and the company changes.
    """
    width, device = spans[0].width, spans[0].device
    sizes = ((1, EDGE), (2, EDGE - 3), (1, EDGE - 1))
    hidden = [torch.randn(rows, length, width).to(device) for rows, length in sizes]
    try:
        with torch.inference_mode():
            return spans[0].cuts.plain and _same_stacked_steps(spans, hidden)
    except Exception as error:  # whatever the family's own code makes of others' caches
        log.info("Stacked steps are not for this family: %s", error)
        return False


def _same_stacked_steps(spans: list[Span], hidden: list[Tensor]) -> bool:
    wanted = [_steps(spans, [one], ([0],) * STEPS)[0] for one in hidden]
    found = _steps(spans, hidden, ([0, 1, 2], [2, 0], [1], [0, 1, 2], [2, 1, 0], [0, 1], [2]))
    return all(close(one, other) for one, other in zip(found, wanted, strict=True))


def _steps(spans: list[Span], hidden: list[Tensor], companies: Sequence[list[int]]) -> list[Tensor]:
    """What the last `STEPS` tokens of sequences give, with what is before them cached; who steps together when."""
    caches = [[span.new_cache() for span in spans] for _ in hidden]
    outputs: list[list[Tensor]] = [[] for _ in hidden]
    for sequence, kept in zip(hidden, caches, strict=True):
        value = sequence[:, :-STEPS]
        for span, cache in zip(spans, kept, strict=True):
            value = span.forward(value, cache=cache)
    for company in companies:
        at = [caches[one][0].tokens for one in company]
        both = list(zip((hidden[one] for one in company), at, strict=True))
        values: Sequence[Tensor] = [one[:, place : place + 1] for one, place in both]
        places = [torch.full((len(one), 1), place, device=one.device) for one, place in both]
        for index, span in enumerate(spans):
            own = [caches[one][index] for one in company]
            if len(company) > 1:
                values = span.forward_stacked(values, own, places)
            else:
                values = [span.forward(values[0], cache=own[0])]
        for row, value in zip(company, values, strict=True):
            outputs[row].append(value)
    return [torch.cat(one, 1) for one in outputs]


def _alone(spans: list[Span], hidden: Tensor) -> Tensor:
    """One sequence [T, H], by itself."""
    output = hidden[None]
    for span in spans:
        output = span.forward(output)
    return output[0]


def _same_packed_steps(spans: list[Span], hidden: list[Tensor]) -> bool:
    """All but the last four tokens of each at once, then two together, then one, then the other."""
    pools = [PagePool(8, dtype=torch.float32, device=span.device) for span in spans]
    rows = [[CachedSequence(pool) for _ in hidden] for pool in pools]
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
    weight = torch.randn(sum(lengths), spans[-1].width_behind).to(spans[-1].device)
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
    ranges = [torch.arange(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
    return torch.cat(ranges).to(parts[0].device)
