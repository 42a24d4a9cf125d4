"""How likely the tokens of a prompt are: what evaluation harnesses ask for.

Invariant: each token's probability is that which the local model gives it behind all tokens before it; memory for
scores is bounded, however long the prompt is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import torch

from corolla.api.sampling import TokenProbability, probability_of

SCORES_BYTES = 64 * 2**20  # of one piece of a prompt


@torch.no_grad()
def score_prompt(
    model: Any, session: Any, ids: Sequence[int], top: int, wanted: Callable[[], bool]
) -> tuple[TokenProbability | None, ...]:
    """The probabilities of `ids`, and of the `top` likeliest in their places; None for the first. `session` is empty.

    Afterwards the session holds them. Raises `CancelledError` once they are not `wanted` any more.
    """
    width = max(1, SCORES_BYTES // (4 * int(model.config.get_text_config().vocab_size)))
    found: list[TokenProbability | None] = [None]
    for start in range(0, len(ids), width):
        if not wanted():
            raise CancelledError
        part = torch.tensor([list(ids[start : start + width])], device=model.device)
        output = model(part, use_cache=True, **{model.cache_name: session.cache})
        scores = output.logits[0].float().cpu()
        following = ids[start + 1 : start + 1 + len(scores)]
        found += [probability_of(row, token, top) for row, token in zip(scores, following, strict=False)]
    return tuple(found)
