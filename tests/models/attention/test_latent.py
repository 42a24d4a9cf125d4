"""Sessions of multi-head latent attention keep latents, and give what keys and values of all heads would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.every_family import tiny
from tests.mutants import Mistakes
from torch import Tensor
from transformers import DeepseekV3Config

from corolla.models.attention import latent
from corolla.models.attention.latent import Absorbed, latent_blocks
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool
from corolla.models.attention.prefixes import put
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.splitting import split_miniature
from corolla.models.checks.together import can_pack
from corolla.models.families import structure
from corolla.models.span import Span, load_span
from corolla.server import memory
from corolla.server.memory import working_bytes

FAMILIES = ("deepseek_v2", "deepseek_v3", "minicpm3", "youtu")
LENGTHS, PREFIX = (11, 6), 3
PUBLISHED = DeepseekV3Config(
    hidden_size=64, num_hidden_layers=1, intermediate_size=32, first_k_dense_replace=1, vocab_size=8
)


@pytest.fixture(scope="module", params=FAMILIES)
def spans(request: pytest.FixtureRequest) -> Iterator[list[Span]]:
    with split_miniature(tiny(request.param)) as (_, found):
        if not latent_blocks(found[0].blocks):
            pytest.skip("this release of transformers expands before it caches")
        yield found


def pool_of(span: Span) -> PagePool:
    return PagePool(8, dtype=span.dtype, device=span.device)


def in_packed_steps(span: Span, hidden: list[Tensor]) -> Tensor:
    """A prompt each, then three tokens and one of each together."""
    pool = pool_of(span)
    rows, outputs = [CachedSequence(pool) for _ in hidden], []
    with torch.inference_mode():
        for cut in (slice(None, -4), slice(-4, -1), slice(-1, None)):
            parts = [one[cut] for one in hidden]
            places = [
                torch.arange(row.length, row.length + len(one)) for row, one in zip(rows, parts, strict=True)
            ]
            batch = PackedBatch(segments_of([len(one) for one in parts], rows), pool)
            value = span.forward_packed(torch.cat(parts), batch, positions=torch.cat(places))
            outputs.append(torch.split(value, [len(one) for one in parts]))
    return torch.cat([torch.cat(parts) for parts in zip(*outputs, strict=True)])


def inputs(span: Span) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, span.width, generator=generator) for length in LENGTHS]


def alone(span: Span, hidden: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([span.forward(one[None])[0] for one in hidden])


@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_give_the_same(monkeypatch: pytest.MonkeyPatch, spans: list[Span], absorbed: bool) -> None:
    monkeypatch.setattr(Absorbed, "pays", lambda *_: absorbed)
    hidden = inputs(spans[-1])
    torch.testing.assert_close(
        in_packed_steps(spans[-1], hidden), alone(spans[-1], hidden), atol=1e-4, rtol=1e-4
    )
    assert can_pack(spans)


def test_what_is_made_of_latents_at_once_is_bounded_and_reckoned(
    monkeypatch: pytest.MonkeyPatch, spans: list[Span]
) -> None:
    form, tokens = spans[-1].key_values, LENGTHS[0]
    assert form is not None
    assert form.expanded > form.width
    before = working_bytes(spans[-1], rows=1, tokens=tokens, total=tokens, with_gradients=False)
    short = Absorbed(torch.zeros(2, form.width, 8), torch.zeros(2, form.key_dim, 8))
    assert not short.pays(10**6, 10**3)
    monkeypatch.setattr(latent, "MOST_EXPANDED", 10**3)
    assert short.pays(10**6, 10**3)
    monkeypatch.setattr(memory, "MOST_EXPANDED", 0)
    after = working_bytes(spans[-1], rows=1, tokens=tokens, total=tokens, with_gradients=False)
    assert before - after == form.expanded * tokens * spans[-1].dtype.itemsize


def test_a_prefix_stands_before_latents(spans: list[Span]) -> None:
    span, hidden = spans[-1], inputs(spans[-1])
    assert span.key_values is not None
    prefix = torch.randn(len(span.blocks), PREFIX, span.key_values.width).requires_grad_()
    places = torch.cat([torch.arange(PREFIX, PREFIX + len(one)) for one in hidden])
    wanted = torch.cat([span.forward(one[None], prefix=prefix)[0] for one in hidden])
    trained = PackedBatch(segments_of(LENGTHS), prefix=span.by_block(prefix))
    found = span.run_packed(torch.cat(hidden), trained, positions=places)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    weight = torch.randn(wanted.shape)
    gradients = [torch.autograd.grad((one * weight).sum(), [prefix])[0] for one in (found, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    with torch.inference_mode():
        pool = pool_of(span)
        rows = [put(span.by_block(prefix.detach()), span.key_values, pool) for _ in hidden]
        cached = PackedBatch(segments_of(LENGTHS, rows), pool)
        found = span.run_packed(torch.cat(hidden), cached, positions=places)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-4, rtol=1e-4)


def not_rotated(batch: Any, block: int, latent: Tensor, rotary: Tensor) -> None:
    keep(batch, block, latent, rotary.roll(1, -1))


def a_token_late(batch: Any, block: int, latent: Tensor, rotary: Tensor) -> None:
    keep(batch, block, latent.roll(1, 2), rotary)


keep = PackedBatch.keep


@pytest.mark.parametrize("mistake", [not_rotated, a_token_late])
def test_a_planted_mistake_is_noticed(mistakes: Mistakes, spans: list[Span], mistake: Any) -> None:
    mistakes.setattr(PackedBatch, "keep", mistake)
    hidden = inputs(spans[-1])
    assert not torch.allclose(in_packed_steps(spans[-1], hidden), alone(spans[-1], hidden), atol=1e-3)
    assert not can_pack(spans)


def test_a_token_costs_what_its_latents_do_at_published_sizes(tmp_path: Path) -> None:
    structure(PUBLISHED).causal_lm(PUBLISHED).save_pretrained(tmp_path)
    span = load_span(open_checkpoint(str(tmp_path)), 0, 1, dtype=torch.float32, packable=True)
    pool = pool_of(span)
    with torch.inference_mode():
        batch = PackedBatch(segments_of([3], [CachedSequence(pool)]), pool)
        span.forward_packed(torch.randn(3, span.width), batch, positions=torch.arange(3))
        ((_, latents, rotary),) = batch.held(0)
    kept = (latents.nbytes + rotary.nbytes) // 3
    heads, expanded = PUBLISHED.num_attention_heads, PUBLISHED.qk_head_dim + PUBLISHED.v_head_dim
    assert kept == span.cache_bytes[0]
    assert 10 * kept <= 4 * heads * expanded
