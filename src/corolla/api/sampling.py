"""How one reply's tokens are chosen, one at a time, from a model's scores.

Invariant: a choice depends on the scores, the settings and the seed alone, so neither on other requests nor on the
thread; with temperature 0 and nothing else set it is the token with the largest score, what `generate` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LEAST_TEMPERATURE = 1e-4  # below it there is nothing left to draw


@dataclass(frozen=True)
class Sampling:
    """What a request says of how tokens are chosen; `repetition_penalty` None is the checkpoint's own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None  # how many of the likeliest tokens are told of, besides the chosen one's


class Grammar(Protocol):
    """What may follow; `grammar.Matcher`."""

    def allowed(self, width: int) -> Tensor:
        """Which of `width` tokens may come next, bool [width]."""

    def take(self, token: int) -> None:
        """A token was chosen."""


@dataclass(frozen=True)
class TokenProbability:
    """A token that was chosen, and the likeliest ones where it was, by the model's own scores."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenChooser(LogitsProcessor):  # type: ignore[misc]
    """Chooses for one row, and leaves `generate` nothing but the choice; `probabilities` are noted if asked for."""

    def __init__(self, sampling: Sampling, grammar: Grammar | None = None) -> None:
        self._sampling = sampling
        self._grammar = grammar
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(max(sampling.seed, -(2**63)))  # the least that torch takes
        self._warpers = _warpers(sampling)
        self.probabilities: list[TokenProbability] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raw = scores[:1].detach().float().cpu()
        adjusted = self._adjusted(input_ids[:1].cpu(), raw)
        token = self._draw(input_ids, adjusted)
        if self._sampling.logprobs is not None:
            self.probabilities.append(probability_of(raw[0], token, self._sampling.logprobs))
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._grammar is not None:
            self._grammar.take(token)
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0.0
        return only

    def _adjusted(self, ids: Tensor, scores: Tensor) -> Tensor:
        """With bias, penalties and the grammar; float32 [1, V]."""
        sampling, scores = self._sampling, scores.clone()
        width = scores.shape[1]
        for token, bias in sampling.logit_bias.items():
            if token < width:
                scores[0, token] += bias
        if sampling.repetition_penalty not in (None, 1.0):
            scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
        if self._counts and (sampling.frequency_penalty or sampling.presence_penalty):
            for token, count in self._counts.items():
                scores[0, token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        if self._grammar is not None:
            scores[0].masked_fill_(~self._grammar.allowed(width), -torch.inf)
        return scores

    def _draw(self, ids: Tensor, scores: Tensor) -> int:
        if self._sampling.temperature < LEAST_TEMPERATURE:
            return int(scores[0].argmax())
        warped = self._warpers(ids, scores)
        return int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))


def _warpers(sampling: Sampling) -> Any:
    """In the order in which transformers has them."""
    found = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(max(sampling.temperature, LEAST_TEMPERATURE)))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def probability_of(scores: Tensor, token: int, top: int) -> TokenProbability:
    """A token's log probability by scores float32 [V], beside those of the `top` likeliest."""
    logprobs = scores.log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenProbability(token, float(logprobs[token]), tuple(pairs))
