"""Packed passes equal each sequence alone, for every family; neighbours, pages and strangers change nothing."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.attention.pools import FilledPool
from tests.tiny_models import FAMILIES, write_tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.errors import UsageError
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import PAGE, BlockTable, CachedSequence, PagePool
from corolla.models.blocks_pass import attention_named
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.prompts import DeepRows
from corolla.models.span import Span, load_span

UNPACKABLE = {"falcon"}
PACKABLE = tuple(family for family in FAMILIES if family not in UNPACKABLE)
START, END = 1, 4  # sliding and full attention, dense and sparse blocks
PROMPT = 3
EXACT = 1e-4  # of the largest value

each_family = pytest.mark.parametrize("family", PACKABLE)


@cache
def span_of(family: str) -> Span:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(str(write_tiny(family, Path(folder))))
        return load_span(checkpoint, START, END, dtype=torch.float32)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new_pool(span: Span, pages: int = 60) -> PagePool:
    return FilledPool(pages, dtype=span.dtype, device=span.device)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT * float(1 + wanted.abs().max()))


def deep_rows(prompts: list[Tensor | None], places: list[tuple[int, int, int]]) -> DeepRows | None:
    """Of those sequences that have prompts."""
    chosen = [(place, own) for place, own in zip(places, prompts, strict=True) if own is not None]
    if not chosen:
        return None
    return DeepRows.of([place for place, _ in chosen], [own for _, own in chosen])


def packed_pass(
    span: Span, pool: PagePool, rows: list[BlockTable], parts: list[Tensor], prompts: list[Tensor | None]
) -> list[Tensor]:
    """The next tokens [T, H] of each row, in one pass; their outputs."""
    starts, lengths = [row.length for row in rows], [len(part) for part in parts]
    ids = [torch.arange(start, start + count) for start, count in zip(starts, lengths, strict=True)]
    segments = segments_of(lengths, rows)
    places = [(one.begin, start, one.count) for one, start in zip(segments, starts, strict=True)]
    with torch.inference_mode():
        output = span.forward_packed(
            torch.cat(parts),
            PackedBatch(segments, pool),
            positions=torch.cat(ids),
            deep=deep_rows(prompts, places),
        )
    return list(torch.split(output, lengths))


def in_steps(
    span: Span, pool: PagePool, sequences: list[Tensor], cuts: list[list[int]], prompts: list[Tensor | None]
) -> list[Tensor]:
    """All sequences, each cut where `cuts` says; the k-th pieces of all go through together."""
    rows = [CachedSequence(pool) for _ in sequences]
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    pieces = [list(torch.tensor_split(one, cut)) for one, cut in zip(sequences, cuts, strict=True)]
    for turn in range(max(map(len, pieces))):
        here = [index for index, own in enumerate(pieces) if turn < len(own)]
        found = packed_pass(
            span,
            pool,
            [rows[index] for index in here],
            [pieces[index][turn] for index in here],
            [prompts[index] for index in here],
        )
        for index, output in zip(here, found, strict=True):
            outputs[index].append(output)
    for row in rows:
        row.free()
    return [torch.cat(own) for own in outputs]


def alone(span: Span, sequence: Tensor, prompts: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return span.forward(sequence[None], prompts=prompts)[0]


LENGTHS = [1, 7, 19, 40]  # less than a sliding window, more than a page
CUTS = [[], [4, 5], [16, 17, 18], [2, 20, 33, 34, 39]]


def sequences_of(span: Span, seed: int = 0) -> list[Tensor]:
    return [noise(length, span.hidden_size, seed=seed + length) for length in LENGTHS]


def prompts_of(span: Span) -> list[Tensor | None]:
    """Those of the first session are longer than it is; the third has none."""
    own = [noise(END - START, PROMPT, span.hidden_size, seed=90 + index) for index in range(4)]
    return [own[0], own[1], None, own[3]]


@each_family
def test_steps_equal_each_sequence_alone(family: str) -> None:
    span = span_of(family)
    sequences, prompts = sequences_of(span), prompts_of(span)
    outputs = in_steps(span, new_pool(span), sequences, CUTS, prompts)
    for output, sequence, own in zip(outputs, sequences, prompts, strict=True):
        assert_same(output, alone(span, sequence, own))


@each_family
def test_gradients_equal_each_sequence_alone(family: str) -> None:
    span = span_of(family)
    sequences, prompts = sequences_of(span), noise(END - START, PROMPT, span.hidden_size, seed=9)
    grads = [noise(*one.shape, seed=50) for one in sequences]
    leaves, deep = [one.clone().requires_grad_() for one in sequences], prompts.clone().requires_grad_()
    outputs = [span.forward(one[None], prompts=deep)[0] for one in leaves]
    wanted = torch.autograd.grad(outputs, [*leaves, deep], grads)

    hidden, shared = torch.cat(sequences).requires_grad_(), prompts.clone().requires_grad_()
    segments = segments_of(LENGTHS)
    output = span.forward_packed(
        hidden,
        PackedBatch(segments),
        positions=torch.cat([torch.arange(length) for length in LENGTHS]),
        deep=DeepRows.of([(one.begin, 0, one.count) for one in segments], [shared] * len(segments)),
    )
    assert_same(output.detach(), torch.cat(outputs).detach())
    found = torch.autograd.grad(output, [hidden, shared], torch.cat(grads))
    for grad, expected in zip(torch.split(found[0], LENGTHS), wanted, strict=False):
        assert_same(grad, expected)
    assert_same(found[1], wanted[-1])


def fragmented_pool(span: Span) -> PagePool:
    """Every other page is taken, and full of what nobody may see."""
    pool = new_pool(span, pages=40)
    keeper = CachedSequence(pool)
    wild = torch.full((40 * PAGE, span.hidden_size), float("nan"))
    packed_pass(span, pool, [keeper], [wild], [None])
    (table,) = keeper.tables
    assert table.pages == list(range(40))
    pool.release(table.pages[::2])
    table.pages = table.pages[1::2]
    return pool


@each_family
def test_pages_apart_give_the_same(family: str) -> None:
    """Not even what earlier rows left in a page is seen: here it is not a number."""
    span, prompts = span_of(family), [None] * len(LENGTHS)
    sequences = sequences_of(span)
    together = in_steps(span, new_pool(span), sequences, CUTS, prompts)
    pool = fragmented_pool(span)
    probe = BlockTable(pool)
    probe.grow(PAGE + 1)
    assert probe.contiguous_from() is None
    probe.free()
    apart = in_steps(span, pool, sequences, CUTS, prompts)
    for output, wanted in zip(apart, together, strict=True):
        assert_same(output, wanted)


@each_family
def test_company_changes_nothing(family: str) -> None:
    """A row's outputs are the same alone, among strangers, and in another order of the same rows."""
    span, sequences = span_of(family), sequences_of(span_of(family))
    prompts = prompts_of(span)
    crowd = in_steps(span, new_pool(span), sequences, CUTS, prompts)
    backwards = in_steps(span, new_pool(span), sequences[::-1], CUTS[::-1], prompts[::-1])[::-1]
    for index, sequence in enumerate(sequences):
        (one,) = in_steps(span, new_pool(span), [sequence], [CUTS[index]], [prompts[index]])
        assert_same(crowd[index], one)
        assert_same(backwards[index], one)


@each_family
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_wild_stranger_harms_nobody(family: str, value: float) -> None:
    span, prompts = span_of(family), [None] * (len(LENGTHS) + 1)
    sequences = sequences_of(span)
    wild = torch.full((9, span.hidden_size), value)
    wanted = in_steps(span, new_pool(span), sequences, CUTS, prompts[1:])
    mixed = [sequences[0], wild, *sequences[1:]]
    found = in_steps(span, new_pool(span), mixed, [CUTS[0], [3, 8], *CUTS[1:]], prompts)
    for output, expected in zip([found[0], *found[2:]], wanted, strict=True):
        assert_same(output, expected)


@each_family
def test_a_pass_inside_a_training_pass(family: str) -> None:
    """Steps computed between any two operators, forward and backward: both give what they give alone."""
    span, pool = span_of(family), new_pool(span_of(family))
    sequences, prompts = sequences_of(span), prompts_of(span)
    hidden = noise(12, span.hidden_size, seed=7)
    grad, deep = noise(12, span.hidden_size, seed=8), noise(END - START, PROMPT, span.hidden_size, seed=6)
    row, steps, stepped = CachedSequence(pool), list(torch.split(sequences[3], 4)), []

    class Between(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            if steps and self.operators % 16 == 0:
                stepped.extend(packed_pass(span, pool, [row], [steps.pop(0)], [prompts[3]]))
            return func(*args, **(kwargs or {}))

    def train() -> tuple[Tensor, ...]:
        leaf, own = hidden.clone().requires_grad_(), deep.clone().requires_grad_()
        output = span.forward_packed(
            leaf,
            PackedBatch(segments_of([12])),
            positions=torch.arange(12),
            deep=DeepRows.of([(0, 0, 12)], [own]),
        )
        return output.detach(), *torch.autograd.grad(output, [leaf, own], grad)

    wanted = train()
    with Between():
        found = train()
    assert not steps
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    assert_same(torch.cat(stepped), alone(span, sequences[3], prompts[3]))


@each_family
def test_a_long_sequence_in_pieces_equals_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention is computed some tokens at a time, forward and backward, behind a cached past too."""
    span = span_of(family)
    hidden, grad = noise(23, span.hidden_size, seed=7), noise(23, span.hidden_size, seed=8)

    def computed() -> list[Tensor]:
        leaf, pool = hidden.clone().requires_grad_(), new_pool(span)
        output = span.forward_packed(leaf, PackedBatch(segments_of([23])), positions=torch.arange(23))
        row = CachedSequence(pool)
        steps = [packed_pass(span, pool, [row], [part], [None])[0] for part in hidden.split([9, 14])]
        return [output.detach(), torch.autograd.grad(output, leaf, grad)[0], torch.cat(steps)]

    whole = computed()
    monkeypatch.setattr("corolla.models.attention.one_sequence.FEW_KEYS_TOKENS", 5)
    for one, other in zip(computed(), whole, strict=True):
        assert_same(one, other)


def test_blocks_of_a_packed_span_say_what_is_missing() -> None:
    span = span_of("llama")
    with (
        attention_named("corolla_packed", span._configs),
        pytest.raises(UsageError, match="without a packed batch"),
    ):
        span.model(inputs_embeds=noise(1, 3, span.hidden_size), use_cache=False)
    assert_same(alone(span, noise(3, span.hidden_size), None), alone(span, noise(3, span.hidden_size), None))
