"""Compiled passes over latents: each row's queries are brought to what its pages hold, by one kernel for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.compiled.test_compile import Crowd, error
from transformers import AutoConfig

from corolla.models.attention.latent import latent_blocks
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.miniature import random_model
from corolla.models.families import structure
from corolla.models.kernels.apply import pack_linears
from corolla.models.kernels.native import library
from corolla.models.span import Span, load_span

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler here")

# Widths that the kernels have; more heads than one thread takes at once.
SIZES = {
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "vocab_size": 64,
}
FAMILIES = {"deepseek_v3": {"first_k_dense_replace": 3, "head_dim": 16}, "minicpm3": {}}


@pytest.fixture(scope="module", params=FAMILIES)
def span(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Span:
    config = AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param])
    folder: Path = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random_model(structure(config).causal_lm, config).save_pretrained(folder)
    found = load_span(open_checkpoint(str(folder)), 1, 3, dtype=torch.float32, packable=True)
    if not latent_blocks(found.blocks):
        pytest.skip("this release of transformers expands before it caches")
    pack_linears(found.blocks)
    return found


@pytest.mark.usefixtures("lanes")
def test_they_give_what_the_familys_own_code_gives(span: Span) -> None:
    assert span.compile() is not None
    with torch.inference_mode():
        for lengths in ([5], [1, 40, 16], [15, 17, 3, 3, 8, 21, 30]):
            crowd = Crowd(span, lengths)
            for seed in range(1, 4):
                assert error(*crowd.step(seed)) < 1e-5, (lengths, seed)


@pytest.mark.parametrize("beside", [1, 3])
def test_a_row_is_as_if_it_were_alone(span: Span, beside: int) -> None:
    """Also beside one that has more than one new token, where nothing is compiled."""
    hidden = torch.randn(25, span.width, generator=torch.Generator().manual_seed(1))
    other = torch.randn(4 + beside, span.width)
    pool = PagePool(8, dtype=torch.float32, device=span.device)
    rows = [CachedSequence(pool) for _ in range(2)]
    with torch.inference_mode():
        wanted = span.forward(hidden[None])[0]
        for own, others in ((slice(24), slice(4)), (slice(24, 25), slice(4, 4 + beside))):
            parts = [hidden[own], other[others]]
            batch = PackedBatch(segments_of([len(one) for one in parts], rows), pool)
            places = torch.cat([torch.arange(25)[own], torch.arange(9)[others]])
            found = span.run_packed(torch.cat(parts), batch, positions=places)
            assert error(found[: len(parts[0])], wanted[own]) < 1e-5
