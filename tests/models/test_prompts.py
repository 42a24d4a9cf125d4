"""Prompt arithmetic: the same prompt in one pass and token by token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from corolla.models import prompts


@pytest.mark.parametrize("cuts", [(10,), (2, 8), (3, 7), (4, 6), (1,) * 10])
def test_deep_prompt_in_pieces_equals_one_pass(cuts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 10, 3, generator=generator)
    prompt = torch.randn(4, 3, generator=generator)
    expected = hidden.clone()
    expected[:, :4] += prompt
    pieces, start = [], 0
    for piece in hidden.split(cuts, dim=1):
        pieces.append(prompts.add_deep(piece, prompt, start))
        start += piece.shape[1]
    assert torch.equal(torch.cat(pieces, 1), expected)


def test_deep_prompt_gets_the_gradient_of_every_row() -> None:
    prompt = torch.zeros(2, 3, requires_grad=True)
    prompts.add_deep(torch.zeros(5, 4, 3), prompt, 0).sum().backward()
    assert prompt.grad is not None
    assert torch.equal(prompt.grad, torch.full((2, 3), 5.0))


def test_prepending_moves_mask_and_positions_along() -> None:
    assert prompts.prepend_mask(torch.tensor([[0, 1]]), 2).tolist() == [[1, 1, 0, 1]]
    assert prompts.prepend_positions(torch.tensor([[0, 0, 1]]), 2).tolist() == [[0, 1, 2, 2, 3]]


def test_sampled_start_is_real_vocabulary_and_follows_its_seed() -> None:
    embedding = nn.Embedding(50, 4)
    first = prompts.initial_vectors(embedding, 8, vocab_size=50, seed=1)
    again = prompts.initial_vectors(embedding, 8, vocab_size=50, seed=1)
    other = prompts.initial_vectors(embedding, 8, vocab_size=50, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = {tuple(row.tolist()) for row in embedding.weight}
    chosen = [tuple(row.tolist()) for row in first]
    assert set(chosen) <= rows
    assert len(set(chosen)) == 8


def test_a_short_text_is_repeated_and_a_long_one_cut() -> None:
    embedding = nn.Embedding(50, 4)
    short = prompts.initial_vectors(embedding, 5, token_ids=torch.tensor([[7, 8]]))
    assert torch.equal(short, embedding.weight[[7, 8, 7, 8, 7]])
    long = prompts.initial_vectors(embedding, 2, token_ids=torch.arange(9))
    assert torch.equal(long, embedding.weight[:2])
