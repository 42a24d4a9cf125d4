"""Chained spans compute what the whole model computes, for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.covering import covering
from tests.models.every_family import tiny
from tests.tiny_models import FAMILIES, VOCABULARY, write_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from corolla.errors import CheckpointError, UsageError
from corolla.models.attention.span_cache import SpanCache
from corolla.models.cache import cache_argument
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checks.miniature import random_model
from corolla.models.families import blocks_prefix
from corolla.models.prompts import add_deep
from corolla.models.span import Span, load_span

LAYERS = 4
CUTS = ([0, 2, 4], [0, 1, 3, 4])
CLOSE = 1e-4  # of the largest value: another arrangement of the same arithmetic


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param), layers=LAYERS)


@pytest.fixture(scope="module")
def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def chain_of(checkpoint: Checkpoint, cuts: list[int]) -> list[Span]:
    return [load_span(checkpoint, start, end, dtype=torch.float32) for start, end in pairwise(cuts)]


@contextmanager
def blocks_replaced(whole: PreTrainedModel, run: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The whole model with `run` in the place of all its blocks; its embeddings, norm and head stay."""
    blocks = whole.get_submodule(blocks_prefix(whole.config))

    def output_of(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if block is blocks[0]:
            state["hidden"] = run(arguments[0])
        hidden = state["hidden"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    state: dict[str, Tensor] = {}
    handles = [block.register_forward_hook(output_of) for block in (blocks[0], blocks[-1])]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def prompted(whole: PreTrainedModel, prompts: Tensor, start: int) -> Iterator[None]:
    """The whole model with deep prompts added before its blocks."""
    blocks = whole.get_submodule(blocks_prefix(whole.config))

    def adding(prompt: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _block, arguments: (add_deep(arguments[0], prompt, start), *arguments[1:])

    handles = [
        block.register_forward_pre_hook(adding(prompt)) for block, prompt in zip(blocks, prompts, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded(rows: int, tokens: int) -> Tensor:
    """Row 0 padded on the left, row 1 on the right, the others full."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return mask


def run_chain(spans: list[Span], hidden: Tensor, **arguments: Any) -> Tensor:
    for span in spans:
        hidden = span.forward(hidden, **arguments)
    return hidden


def assert_close(one: Tensor, other: Tensor) -> None:
    scale = 1 + other.abs().max()
    assert (one - other).abs().max() <= CLOSE * scale


def logits_through(whole: PreTrainedModel, spans: list[Span], ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad(), blocks_replaced(whole, lambda hidden: run_chain(spans, hidden, **arguments)):
        return whole(input_ids=ids, attention_mask=arguments.get("mask"), use_cache=False).logits


@pytest.mark.parametrize(
    ("folder", "cuts"),
    covering(FAMILIES, dict(zip(("two", "three"), CUTS, strict=True)), together=1),
    indirect=["folder"],
)
def test_chained_spans_give_the_whole_models_logits(
    whole: PreTrainedModel, checkpoint: Checkpoint, cuts: list[int]
) -> None:
    ids, mask = token_ids(3, 14), padded(3, 14)
    spans = chain_of(checkpoint, cuts)
    with torch.no_grad():
        plain = whole(input_ids=ids, use_cache=False).logits
        masked = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits_through(whole, spans, ids), plain)
    through = logits_through(whole, spans, ids, mask=mask)
    assert torch.equal(through[mask.bool()], masked[mask.bool()])
    assert not torch.allclose(plain[0, 4:], masked[0, 4:], atol=1e-3)  # the mask matters here


def test_two_blocks_swapped_is_noticed(whole: PreTrainedModel, checkpoint: Checkpoint) -> None:
    ids = token_ids(2, 9)
    spans = chain_of(checkpoint, [0, 1, 2, 4])
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
    swapped = logits_through(whole, [spans[1], spans[0], spans[2]], ids)
    assert (swapped - expected).abs().max() > 0.05


def test_positions_are_passed_on(whole: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """As `generate` counts them for left padding: from each row's first real token."""
    ids, mask = token_ids(3, 14), padded(3, 14)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    taken = {"position_ids": positions} if whole.config.model_type != "bloom" else {}
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, use_cache=False, **taken).logits
        spans = chain_of(checkpoint, CUTS[0])
        arguments = {"mask": mask.bool(), "positions": positions}
        with blocks_replaced(whole, lambda hidden: run_chain(spans, hidden, **arguments)):
            through = whole(input_ids=ids, attention_mask=mask, use_cache=False, **taken).logits
    assert torch.equal(through[mask.bool()], expected[mask.bool()])


def cached_steps(
    whole: PreTrainedModel, spans: list[Span], caches: list[SpanCache], ids: Tensor, mask: Tensor, start: int
) -> Tensor:
    """Logits of `ids` [R, T] that come after `start` cached positions, through the spans."""

    def run(hidden: Tensor) -> Tensor:
        for span, cache in zip(spans, caches, strict=True):
            hidden = span.forward(hidden, mask=mask, cache=cache)
        return hidden

    # The whole model's own blocks run too (their results are dropped); it needs a cache of its own to give
    # the same embeddings (learned positions) that it gives in decoding.
    own = DynamicCache()
    with torch.no_grad():
        if start:
            before = ids.new_full((ids.shape[0], start), 3)
            whole(
                input_ids=before,
                attention_mask=mask[:, :start],
                use_cache=True,
                **{cache_argument(whole.forward): own},
            )
        with blocks_replaced(whole, run):
            return whole(
                input_ids=ids, attention_mask=mask, use_cache=True, **{cache_argument(whole.forward): own}
            ).logits


def test_cached_steps_rollback_and_reorder(whole: PreTrainedModel, checkpoint: Checkpoint) -> None:
    ids = token_ids(3, 18)
    mask = torch.ones(3, 18, dtype=torch.long)
    mask[0, :4] = 0
    real = mask.bool()
    spans = chain_of(checkpoint, CUTS[1])
    caches = [span.new_cache() for span in spans]
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def step(start: int, end: int) -> None:
        got = cached_steps(whole, spans, caches, ids[:, start:end], mask[:, :end], start)
        assert_close(got[real[:, start:end]], expected[:, start:end][real[:, start:end]])

    step(0, 10)
    for at in range(10, 15):  # past every window of the sliding layers
        step(at, at + 1)
    for cache in caches:  # rollback, over what a sliding window would have dropped
        cache.truncate(6)
        assert cache.get_seq_length() == 6
    step(6, 9)
    step(9, 10)
    rows = torch.tensor([2, 0, 0, 1])  # reordered and one of them repeated, as beam search does
    for cache in caches:
        cache.reorder_cache(rows)
    got = cached_steps(whole, spans, caches, ids[rows, 10:12], mask[rows, :12], 10)
    assert_close(got, expected[rows, 10:12])


def test_gradients_of_inputs_and_deep_prompts(whole: PreTrainedModel, checkpoint: Checkpoint) -> None:
    mask = padded(2, 10)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randn(LAYERS, 6, whole.config.hidden_size, generator=generator) * 0.3
    spans = chain_of(checkpoint, CUTS[1])
    weight = torch.randn(2, 10, VOCABULARY, generator=generator) * mask.unsqueeze(-1)
    embeddings = whole.get_input_embeddings()(token_ids(2, 10)).detach()

    def gradients(split: bool) -> tuple[Tensor, ...]:
        inputs, deep = embeddings.clone().requires_grad_(), prompts.clone().requires_grad_()
        parts = [deep[span.start : span.end] for span in spans]

        def run(hidden: Tensor) -> Tensor:
            for span, part in zip(spans, parts, strict=True):
                hidden = span.forward(hidden, mask=mask, prompts=part)
            return hidden

        with blocks_replaced(whole, run) if split else prompted(whole, deep, 0):
            logits = whole(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        value = (logits * weight).sum()
        return (value.detach().reshape(1), *torch.autograd.grad(value, [inputs, deep]))

    for one, other in zip(gradients(split=True), gradients(split=False), strict=True):
        assert other.abs().max() > 0
        assert_close(one, other)


def test_deep_prompts_go_on_in_cached_steps(whole: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """A prompt longer than the first step is still added to the positions of the second."""
    hidden = torch.randn(2, 9, whole.config.hidden_size, generator=torch.Generator().manual_seed(3))
    prompts = torch.randn(LAYERS, 5, whole.config.hidden_size, generator=torch.Generator().manual_seed(4))
    (span,) = chain_of(checkpoint, [0, LAYERS])
    cache = span.new_cache()
    with torch.no_grad():
        expected = span.forward(hidden, prompts=prompts)
        parts = [
            span.forward(hidden[:, start:end], cache=cache, prompts=prompts)
            for start, end in ((0, 3), (3, 4), (4, 9))
        ]
        without = span.forward(hidden)
    assert_close(torch.cat(parts, dim=1), expected)
    assert (without - expected).abs().max() > 0.05


def test_a_view_runs_its_blocks_on_the_same_weights(checkpoint: Checkpoint, whole: PreTrainedModel) -> None:
    hidden = torch.randn(2, 9, whole.config.hidden_size, generator=torch.Generator().manual_seed(3))
    (span,) = chain_of(checkpoint, [0, LAYERS])
    view = span.view(1, 3)
    alone = load_span(checkpoint, 1, 3, dtype=torch.float32)
    cache, own = view.new_cache(), alone.new_cache()
    with torch.no_grad():
        for start, end in ((0, 8), (8, 9)):
            part = hidden[:, start:end]
            assert torch.equal(view.forward(part, cache=cache), alone.forward(part, cache=own))
        assert torch.equal(run_chain([span.view(0, 1), view, span.view(3, 4)], hidden), span.forward(hidden))
    held = {parameter.data_ptr() for parameter in span.blocks.parameters()}
    assert {parameter.data_ptr() for parameter in view.blocks.parameters()} < held
    assert span.view(1, 3) is view
    assert len(span.blocks) == LAYERS
    assert view.nbytes() == alone.nbytes()


def test_a_span_holds_only_its_blocks(checkpoint: Checkpoint, whole: PreTrainedModel) -> None:
    span = load_span(checkpoint, 1, 3, dtype=torch.float32)
    blocks = whole.get_submodule(blocks_prefix(whole.config))
    expected = sum(parameter.numel() for block in blocks[1:3] for parameter in block.parameters())
    assert sum(parameter.numel() for parameter in span.model.parameters()) == expected
    assert span.hidden_size == whole.config.hidden_size
    assert (span.start, span.end, span.dtype) == (1, 3, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tiny("mixtral", tmp_path, dtype=torch.bfloat16)
    span = load_span(open_checkpoint(str(tmp_path)), 0, 2, dtype=dtype)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert span.dtype == dtype
    for mine, theirs in zip(span.blocks.parameters(), whole.model.layers[:2].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_loading_takes_none_of_the_caller_s_random_numbers(tmp_path: Path) -> None:
    """A server may start, or come back, in a process that samples; this family draws as it is made."""
    random_model(AutoModelForCausalLM.from_config, tiny("qwen3_5_text")).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    before = torch.random.get_rng_state()
    load_span(checkpoint, 1, 3, dtype=torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_blocks_outside_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_tiny("llama", tmp_path)))
    for start, end in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(UsageError, match=r"has blocks 0:4"):
            load_span(checkpoint, start, end, dtype=torch.float32)
    span = load_span(checkpoint, 1, 3, dtype=torch.float32)
    with pytest.raises(UsageError, match=r"holds 1:3"):
        span.view(0, 2)


def test_a_checkpoint_of_the_base_model_alone_is_read_too(tmp_path: Path) -> None:
    """As bloom's and gpt2's on the hub, whose keys lack the base model's name."""
    whole = AutoModelForCausalLM.from_pretrained(write_tiny("gpt2", tmp_path / "whole"))
    whole.transformer.save_pretrained(tmp_path / "base")
    span = load_span(open_checkpoint(str(tmp_path / "base")), 1, 3, dtype=torch.float32)
    for mine, theirs in zip(span.blocks.parameters(), whole.transformer.h[1:3].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_tensors_that_do_not_fit_the_config_are_one_sentence(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"intermediate_size": 64', '"intermediate_size": 48')
    )
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_span(open_checkpoint(str(tmp_path)), 0, 1, dtype=torch.float32)
