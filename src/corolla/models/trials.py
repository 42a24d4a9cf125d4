"""What a family's code keeps of a sequence, and does with it, found by trying a span with a few tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corolla.models.attention.latent import expanded_width, expanding
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool
from corolla.models.attention.prefixes import KeyValueForm
from corolla.models.attention.span_cache import SpanCache


class TriedSpan(Protocol):
    """What is asked of the span (`models/span.py: Span`)."""

    cache_name: str
    dtype: torch.dtype

    @property
    def width(self) -> int: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def remembers(self) -> bool: ...

    def new_cache(self) -> SpanCache: ...

    def forward(self, hidden: Tensor, *, cache: SpanCache | None = None) -> Tensor: ...

    def run(self, hidden: Tensor, hooks: Any, arguments: dict[str, Any]) -> Tensor: ...

    def go_back(self, cache: SpanCache, length: int) -> None: ...

    def run_packed(self, hidden: Tensor, batch: PackedBatch, *, positions: Tensor) -> Tensor: ...


def goes_one_by_one(span: TriedSpan) -> bool:
    """Whether states are continued by one token at a time only, as some families' code does it."""
    hidden, cache = _noise(span, 1, 5), span.new_cache()
    with torch.inference_mode():
        whole = span.forward(hidden)
        # The first pass is no continuation, and the second is the one in question.
        span.forward(hidden[:, :2], cache=cache)
        found = span.run(hidden[:, 2:], [], _arguments(span, cache, torch.arange(2, 5)))
    return not _close(span, found, whole[:, 2:])


def masks_new_tokens(span: TriedSpan) -> bool:
    """Whether the family's code knows masks of the new tokens only, as that of recurrences alone."""
    # Some code takes the first of a token's several columns, and only fails for two tokens.
    return not _takes(span, 1, 2) or (_takes(span, 2, 2) and not _takes(span, 2, 3))


def _takes(span: TriedSpan, new: int, columns: int) -> bool:
    """Whether behind one token, `new` ones with a mask of so many columns give as many."""
    hidden, cache = _noise(span, 1, 1 + new), span.new_cache()
    mask = torch.ones(1, columns, dtype=torch.long, device=span.device)
    with torch.inference_mode():
        span.forward(hidden[:, :1], cache=cache)
        arguments = _arguments(span, cache, torch.arange(1, 1 + new)) | {"attention_mask": mask}
        try:
            return span.run(hidden[:, 1:], [], arguments).shape[1] == new
        except (RuntimeError, IndexError, ValueError):  # of its shape
            return False


def remembers(span: TriedSpan) -> bool:
    """Whether snapshots bring states back: after going back, and with rows in another order, all is as before."""
    hidden, cache = _noise(span, 2, 6), span.new_cache()
    order = torch.tensor([1, 0], device=span.device)
    with torch.inference_mode():
        span.forward(hidden[:, :3], cache=cache)
        cache.remember(turn=True)
        wanted = [span.forward(hidden[:, at : at + 1], cache=cache) for at in (3, 4, 5)]
        cache.reorder_cache(order)
        span.go_back(cache, 4)
        found = [span.forward(hidden[order][:, at : at + 1], cache=cache) for at in (4, 5)]
    return _close(span, torch.cat(found, 1)[order], torch.cat(wanted[1:], 1))


def measured_bytes(span: TriedSpan) -> tuple[int, int]:
    """Memory that a token takes in the caches of all blocks, and that of their states, once for a sequence."""
    cache, sizes = span.new_cache(), []
    probe = torch.zeros(1, 1, span.width, dtype=span.dtype, device=span.device)
    with torch.inference_mode():
        span.forward(probe, cache=cache)
        if span.remembers:
            cache.remember(turn=True)
        for _ in range(2):
            sizes.append(cache.nbytes)
            span.forward(probe, cache=cache)
    token, passed = sizes[1] - sizes[0], probe.nbytes if span.remembers else 0
    return token, sizes[0] - (token - passed)


def cached_form(span: TriedSpan) -> KeyValueForm | None:
    """The form of what each block caches of a token, if it is one, and nothing else is cached."""
    cache = span.new_cache()
    with torch.inference_mode():
        probe = torch.zeros(1, 1, span.width, dtype=span.dtype, device=span.device)
        span.forward(probe, cache=cache)
        form = cache.form
        return form and replace(form, expanded=expanded_width(span.blocks, form, probe))


def seen_once(span: TriedSpan, layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Those layers that in each packed pass are called once, with all of its tokens, of sequences of unlike lengths.

    Not those that make keys and values of latents, which are called for past tokens too, or not at all where their
    weights are read as matrices. Experts are called with some tokens.
    """
    pool = PagePool(8, dtype=span.dtype, device=span.device)
    rows = [CachedSequence(pool), CachedSequence(pool)]
    fit, seen = set(layers), Counter[tuple[nn.Module, int]]()

    def count(layer: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        seen[layer, args[0][..., 0].numel() if args else 0] += 1

    handles = [layer.register_forward_hook(count) for layer in fit]
    try:
        for lengths in ((3, 4), (2, 1)):
            seen.clear()
            starts, total = [row.length for row in rows], sum(lengths)
            places = [torch.arange(start, start + new) for start, new in zip(starts, lengths, strict=True)]
            with torch.inference_mode():
                batch = PackedBatch(segments_of(lengths, rows), pool)
                span.run_packed(_noise(span, 1, total)[0], batch, positions=torch.cat(places).to(span.device))
            fit &= {layer for (layer, tokens), times in seen.items() if (tokens, times) == (total, 1)}
            fit -= {layer for layer, tokens in seen if tokens != total}
            seen.clear()
            with torch.inference_mode():
                for attention in expanding(span.blocks):
                    _, latents, rotary = batch.held(attention.layer_idx)[0]
                    attention.expand_kv(latents[:, :, :1], rotary[:, :, :1])
            fit -= {layer for layer, _ in seen}
    finally:
        for handle in handles:
            handle.remove()
    return fit


def _noise(span: TriedSpan, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, tokens, span.width, generator=generator).to(span.device, span.dtype)


def _arguments(span: TriedSpan, cache: SpanCache, positions: Tensor) -> dict[str, Any]:
    return {"use_cache": True, span.cache_name: cache, "position_ids": positions[None].to(span.device)}


def _close(span: TriedSpan, one: Tensor, other: Tensor) -> bool:
    rounding = 1e-4 if span.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(one, other, rtol=0.0, atol=rounding * float(other.abs().max()))
