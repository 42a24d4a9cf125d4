"""Compiled steps of blocks that keep states equal the family's own code, in changing company and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.every_family import tiny
from tests.mutants import Mistakes
from torch import Tensor

from corolla.models.attention.span_cache import SpanCache
from corolla.models.attention.stacked import StackedCaches
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.miniature import random_model
from corolla.models.compiled import program as programs
from corolla.models.compiled.program import Program
from corolla.models.families import structure
from corolla.models.kernels.apply import Quantization, pack_linears
from corolla.models.kernels.native import library
from corolla.models.span import Span, load_span

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler here")

# The delta rule, Mamba's second kind beside attention and within one block, convolutions without a recurrence.
COMPILED = ("qwen3_5_text", "olmo_hybrid", "bamba", "falcon_h1", "mamba2", "lfm2")
# Widths that the kernel for 8 bits has.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_attention_heads": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
LEFT_ALONE = ("kimi_linear",)  # attention over latents
LENGTHS = (3, 9, 5)
# Normalizing a short vector makes a rounding large.
CLOSE: dict[Quantization, float] = {"none": 1e-4, "int8": 0.05}
COMPANIES = ([0, 1, 2], [2, 0], [1], [0, 1, 2], [2, 1], [0])


def span_of(family: str, folder: Path, quantization: Quantization = "none") -> Span:
    config = tiny(family)
    for name, value in (SHAPE if quantization == "int8" else {}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    random_model(structure(config).causal_lm, config).save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    span = load_span(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32, stackable=True)
    pack_linears(span.model, quantization=quantization)
    return span


def begun(span: Span) -> list[SpanCache]:
    caches = [span.new_cache() for _ in LENGTHS]
    for length, cache in zip(LENGTHS, caches, strict=True):
        span.forward(torch.randn(1, length, span.hidden_size), cache=cache)
    return caches


def stepped(span: Span, caches: list[SpanCache], company: list[int], hidden: list[Tensor]) -> Tensor:
    own = [caches[at] for at in company]
    places = [torch.tensor([[one.tokens]]) for one in own]
    return torch.cat(list(span.forward_stacked(hidden, own, places)))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("family", "quantization"), [*((family, "none") for family in COMPILED), (COMPILED[0], "int8")]
)
def test_steps_are_compiled_and_compute_the_same(
    family: str, quantization: Quantization, tmp_path: Path
) -> None:
    span, close = span_of(family, tmp_path, quantization), CLOSE[quantization]
    assert span.compile() is not None
    with torch.inference_mode():
        caches = begun(span)
        twins = [one.fork() for one in caches]
        for company in COMPANIES:
            hidden = [torch.randn(1, 1, span.hidden_size) for _ in company]
            found = stepped(span, caches, company, hidden)
            wanted = [span.forward(own, cache=twins[at]) for at, own in zip(company, hidden, strict=True)]
            assert error(found, torch.cat(wanted)) < close
        for one, other in zip(caches, twins, strict=True):
            both = [StackedCaches([own], span.latent_blocks).states for own in (one, other)]
            assert all(error(*pair) < close for pair in zip(*both, strict=True))


@pytest.mark.parametrize("family", COMPILED[:1])
def test_a_step_has_the_same_bits_in_any_company(family: str, tmp_path: Path) -> None:
    """Of as many rows, since a product of few is added up in another order."""
    span = span_of(family, tmp_path)
    with torch.inference_mode():
        caches = begun(span)
        hidden = [torch.randn(1, 1, span.hidden_size) for _ in caches]
        found = []
        for company in ([0, 1, 2], [2, 1, 0]):
            own = [cache.fork() for cache in caches]
            found.append(stepped(span, own, company, [hidden[at] for at in company]))
    assert torch.equal(found[0], found[1].flip(0))


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_others_are_left_to_their_own_code(family: str, tmp_path: Path) -> None:
    assert span_of(family, tmp_path).compile() is None


@pytest.mark.parametrize("mistake", ["old states", "what was before"])
def test_a_program_that_computes_something_else_is_not_used(
    mistake: str, tmp_path: Path, mistakes: Mistakes, caplog: pytest.LogCaptureFixture
) -> None:
    run = Program.run_stacked

    def forgetful(self: Program, hidden: Tensor, stacked: StackedCaches, *, positions: Tensor) -> Any:
        before = [one.clone() for one in stacked.states]
        found = run(self, hidden, stacked, positions=positions)
        for one, was in zip(stacked.states, before, strict=True):
            one.copy_(was)
        return found

    if mistake == "old states":
        mistakes.setattr(Program, "run_stacked", forgetful)
    else:
        mistakes.setattr(programs._Piece, "attend", lambda self, _: self._views[0].zero_())
    assert span_of("qwen3_5_text", tmp_path).compile() is None
    assert "would change their results" in caplog.text
