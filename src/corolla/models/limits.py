"""How long a sequence and how large a token id a model takes; compared here for everybody.

Invariant: raised before anything is computed, and the sentence says which limit and what to give instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

from corolla.errors import UsageError
from corolla.models.attention.rotary import cached_limit
from corolla.text import one_line

UNLIMITED_CONTEXT = 2048  # for models that name no limit of their own (bloom, falcon with alibi)


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read, a soft prompt's included; None where it names no limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def context_limit(config: PretrainedConfig, prompt_tokens: int) -> int:
    """How many tokens of conversation a model can read: its positions without those of its soft prompt."""
    found = positions(config) or UNLIMITED_CONTEXT
    return min(found, cached_limit(config) or found) - prompt_tokens


def check_length(config: PretrainedConfig, prompt_tokens: int, max_length: int, name: str) -> None:
    """Raises `UsageError` when examples of `max_length` tokens with the prompt do not fit the model."""
    limit = positions(config)
    if limit is None or prompt_tokens + max_length <= limit:
        return
    if limit - prompt_tokens < 8:
        raise UsageError(
            f"{prompt_tokens} prompt tokens leave no room for text in the {limit} positions of {name}: give fewer "
            "with --prompt-tokens."
        )
    raise UsageError(
        f"Examples of {max_length} tokens and {prompt_tokens} prompt tokens do not fit the {limit} positions of "
        f"{name}: give --max-length {limit - prompt_tokens} or less."
    )


def check_tokens(ids: Iterable[int], tokenizer: Any, config: PretrainedConfig, name: str) -> None:
    """Raises `UsageError` when one of the tokens has no row in the model's embedding; names the token."""
    rows = config.get_text_config().vocab_size
    beyond = min((index for index in ids if index >= rows), default=None)
    if beyond is not None:
        token = one_line(repr(tokenizer.convert_ids_to_tokens(beyond)), characters=60)
        raise UsageError(
            f"The tokenizer of {name} gives the token {token} (id {beyond}), for which the model's embedding of "
            f"{rows} rows has none: use the tokenizer that the model was trained with, or resize the model's "
            "embedding to the tokenizer and train it first."
        )
