"""A sequence whose blocks keep a state goes back, and goes on as if it had never been further."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.models.every_family import tiny
from tests.mutants import Mistakes
from torch import Tensor

from corolla.models.attention import snapshots
from corolla.models.attention.snapshots import OTHERS, SPACING, TURNS, Snapshots
from corolla.models.attention.span_cache import SpanCache
from corolla.models.checks.splitting import split_miniature
from corolla.models.checks.steps import steps_differ
from corolla.models.span import Span

# Recurrences beside attention, in the same block and one token at a time; convolutions; a cache of the family's own;
# blocks that keep nothing.
FAMILIES = ("qwen3_next", "falcon_h1", "lfm2", "minimax", "nemotron_h")
TOKENS, ROWS = 12, 3


@pytest.fixture(scope="module", params=FAMILIES)
def span(request: pytest.FixtureRequest) -> Iterator[Span]:
    config = tiny(request.param)
    with split_miniature(config) as (_, spans):
        spans[-1].steps_differ = steps_differ(config)
        yield spans[-1]


def went_back(span: Span, hidden: Tensor, to: int) -> tuple[Tensor, Tensor]:
    """What comes after `to` when it had been further, with rows in another order since; and what should come."""
    order = torch.tensor([2, 0, 0])
    cache, other = span.new_cache(), span.new_cache()
    with torch.inference_mode():
        for part in (hidden[:, :3], hidden[:, 3:4]):
            span.forward(part, cache=cache)
            cache.remember(turn=True)
        for at in range(4, 10):
            span.forward(hidden[:, at : at + 1], cache=cache)
        cache.reorder_cache(order)
        assert cache.reaches(to)
        span.go_back(cache, to)
        assert cache.get_seq_length() == to
        found = [span.forward(hidden[order][:, at : at + 1], cache=cache) for at in range(to, TOKENS)]
        span.forward(hidden[order][:, :3], cache=other)
        wanted = [span.forward(hidden[order][:, at : at + 1], cache=other) for at in range(3, TOKENS)]
    return torch.cat(found, 1), torch.cat(wanted, 1)[:, to - 3 :]


def inputs(span: Span) -> Tensor:
    return torch.randn(ROWS, TOKENS, span.width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("to", [4, 5, 9])
def test_a_sequence_goes_back(span: Span, to: int) -> None:
    assert span.remembers
    found, wanted = went_back(span, inputs(span), to)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_it_may_do_so_twice_and_in_a_copy(span: Span) -> None:
    hidden, cache = inputs(span), span.new_cache()
    with torch.inference_mode():
        span.forward(hidden[:, :4], cache=cache)
        cache.remember(turn=True)
        wanted = span.forward(hidden[:, 4:8], cache=cache)
        twin = cache.fork()
        for one in (cache, twin, cache):
            span.forward(hidden[:, 8:], cache=one)
            span.go_back(one, 6)
            again = span.forward(hidden[:, 6:8], cache=one)
            torch.testing.assert_close(again, wanted[:, 2:], atol=1e-4, rtol=1e-4)


def test_no_further_than_what_is_remembered(span: Span) -> None:
    cache = span.new_cache()
    with torch.inference_mode():
        span.forward(inputs(span), cache=cache)
    cache.remember(turn=False)
    assert [cache.reaches(length) for length in (0, 1, TOKENS - 1, TOKENS)] == [True, False, False, True]


def of_the_token_before() -> Callable[[SpanCache], Any]:
    """The states when the last snapshot was taken."""
    states, seen = SpanCache._states, dict[int, Any]()

    def older(cache: SpanCache) -> Any:
        now = snapshots.copied(states(cache))
        found, seen[id(cache)] = seen.get(id(cache), now), now
        return found

    return older


PLANTED: dict[str, Any] = {
    "a snapshot one token old": (SpanCache, "_states", of_the_token_before()),
    "rows as they were": (snapshots, "_composed", lambda order, _rows: order),
    "states as they are": (snapshots, "copied", lambda _value, _order=None: {}),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_noticed(mistakes: Mistakes, mistake: str) -> None:
    with split_miniature(tiny("qwen3_next")) as (_, spans):
        span = spans[-1]
        assert torch.allclose(*went_back(span, inputs(span), 9), atol=1e-3)
        where, name, wrong = PLANTED[mistake]
        mistakes.setattr(where, name, wrong)
        assert not torch.allclose(*went_back(span, inputs(span), 9), atol=1e-3)


def test_few_are_kept_and_what_passed_since_the_oldest() -> None:
    kept = Snapshots()
    for length in range(0, 12 * SPACING, SPACING // 4):
        turn = length % 80 == 0
        if kept.is_due(length, turn=turn):
            kept.add(snapshots.Snapshot(length, turn, []))
        kept.record(torch.zeros(1, SPACING // 4, 2), None, length)
    lengths = [one.length for one in kept.taken]
    assert lengths == sorted(set(lengths))
    assert len(lengths) == TURNS + OTHERS
    assert kept.passed[0].start == lengths[0]
    assert kept.nbytes == (12 * SPACING - lengths[0]) * 2 * 4
