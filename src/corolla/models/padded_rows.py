"""Rows of which padding makes something else in transformers itself (`checks/padding.py` finds out which).

Invariant: such a row is computed by blocks that are told of the padding, or refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor
from transformers import PretrainedConfig

from corolla.errors import UsageError


def padding_before_tokens(mask: Tensor | None) -> tuple[bool, bool]:
    """Whether a row of the mask [R, T] has padding before all of its tokens, and between them."""
    if mask is None:
        return False, False
    real = mask.bool()
    earlier, later = real.cumsum(1) > 0, real.flip(1).cumsum(1).flip(1) > 0
    return bool((~earlier & later).any()), bool((earlier & ~real & later).any())


def check_front(mask: Tensor | None, takes_padding_in_front: Callable[[], bool]) -> None:
    """Raises `UsageError` for padding before a row's tokens [R, S], where it changes what transformers computes."""
    if (
        mask is None
        or not bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any())
        or takes_padding_in_front()
    ):
        return
    raise UsageError(
        "Padding before a row's tokens changes what transformers itself computes of them with this model, and servers "
        "are sent none: pad on the right, and generate for one row at a time, or for rows of one length."
    )


def refuse_padding() -> NoReturn:
    """Raises `UsageError`: gradients are wanted of rows with padding that changes them."""
    raise UsageError(
        "With padding in front of a row's tokens (or between a prompt and them) transformers itself computes the row "
        "otherwise than alone, and where gradients are wanted servers are sent no padding: pad on the right."
    )


def check_cached_padding(mask: Tensor | None, exact: Callable[[], bool], config: PretrainedConfig) -> None:
    """Raises `UsageError` for padding in the mask [R, N] with which generation goes wrong in transformers itself."""
    if mask is not None and not bool(mask.all()) and not exact():
        raise UsageError(
            f"With padding transformers itself goes on wrongly from the cache of this {config.model_type} model: "
            "generate with rows of one length, or one by one."
        )
