"""What blocks keep of a sequence: keys and values that can be set back, states that cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.covering import covering
from tests.models.every_family import tiny
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from corolla.models.checks.splitting import split_miniature
from corolla.models.span import Span

TOKENS = 9


def span_of(family: str) -> Span:
    """The last two of the blocks, which begin in the middle of the model."""
    torch.set_num_threads(1)
    with split_miniature(tiny(family)) as (_, spans):
        return spans[-1]


def in_steps(span: Span, hidden: Tensor, cuts: tuple[int, ...]) -> Tensor:
    cache = span.new_cache()
    with torch.inference_mode():
        return torch.cat([span.forward(one, cache=cache) for one in torch.tensor_split(hidden, cuts, 1)], 1)


# Of the latter two's code only one token at a time goes on from a state.
@pytest.mark.parametrize(
    ("family", "cuts"),
    covering(
        ["llama", "lfm2", "qwen3_next", "jamba", "falcon_h1"], [(), (1,), (3, 4, 5), (2, 6)], together=1
    ),
)
def test_a_sequence_in_pieces_is_as_in_one_pass(family: str, cuts: tuple[int, ...]) -> None:
    span = span_of(family)
    hidden = torch.randn(2, TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = span.forward(hidden)
    torch.testing.assert_close(in_steps(span, hidden, cuts), wanted, atol=1e-4, rtol=1e-4)


def one_token_late(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What is stored is the state before."""
    before: dict[int, Tensor] = {}

    def late(layer: LinearAttentionLayer, states: Tensor, *args: int, **kwargs: int) -> Tensor:
        update(layer, before.get(id(layer), torch.zeros_like(states)), *args, **kwargs)
        before[id(layer)] = states.clone()
        return states

    return late


def test_a_state_that_is_one_token_old_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    span = span_of("qwen3_next")
    hidden = torch.randn(1, TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(1))
    right = in_steps(span, hidden, (3, 4, 5))
    update = one_token_late(LinearAttentionLayer.update_recurrent_state)
    monkeypatch.setattr(LinearAttentionLayer, "update_recurrent_state", update)
    assert not torch.allclose(in_steps(span, hidden, (3, 4, 5)), right, atol=1e-3)


def test_keys_and_values_are_set_back_and_states_are_not() -> None:
    for family, anywhere in (("llama", True), ("qwen3_next", False)):
        span = span_of(family)
        cache = span.new_cache()
        with torch.inference_mode():
            span.forward(torch.ones(3, TOKENS, span.hidden_size), cache=cache)
        assert (cache.rows, cache.get_seq_length()) == (3, TOKENS)
        assert cache.reaches(0)
        assert cache.reaches(TOKENS)
        assert cache.reaches(5) == anywhere
        if anywhere:
            cache.truncate(5)
            assert cache.get_seq_length() == 5
        cache.reorder_cache(torch.tensor([2, 0]))
        assert cache.rows == 2


def test_position_ids_that_a_loop_keeps_go_back_with_the_tokens() -> None:
    """Where the family's code keeps them depends on the kinds of the span's blocks, not on where these are."""
    span = span_of("qwen4_exp_text")
    hidden = torch.randn(2, TOKENS, span.width, generator=torch.Generator().manual_seed(1))
    hidden[..., span.cuts.hidden.width :] = 3  # digits of token ids
    places = torch.arange(TOKENS) + torch.tensor([[0], [40]])
    cache, order = span.new_cache(), torch.tensor([1, 0])
    with torch.inference_mode():
        for at in range(TOKENS):
            cache.remember(turn=at == 3)
            span.forward(hidden[:, at : at + 1], positions=places[:, at : at + 1], cache=cache)
        cache.reorder_cache(order)
        span.go_back(cache, 6)
        (own,) = [one.indexer_position_ids for one in cache.layers if one.indexer_position_ids is not None]
    assert torch.equal(own[0], places[order, :6])


def test_what_a_sequence_costs() -> None:
    """Keys and values cost by the token, states once."""
    token, states = span_of("llama").cache_bytes
    assert (token > 0, states) == (True, 0)
    token, states = span_of("qwen3_next").cache_bytes
    assert states > token >= 0
