"""Rows of which padding makes something else in transformers itself (`checks/padding.py` finds out which).

Invariant: such a row is computed by blocks that are told of the padding, or refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch.nn.functional as F
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


def check_windows(
    mask: Tensor | None,
    config: Any,
    *,
    more: tuple[int, int] = (0, 0),
    as_alone: Callable[[], bool] = lambda: True,
) -> None:
    """Raises `UsageError` where a sliding window reaches over padding between tokens (or between a prompt and a text).

    `mask` [R, N] says which columns are tokens; `more` of them stand before it and behind. A local model's window
    counts columns, whatever their positions; a server's, where rows come out `as_alone`, tokens.
    """
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if mask is None or not isinstance(window, int) or mask.shape[1] + sum(more) <= window:
        return
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return
    real = F.pad(mask.bool(), more, value=True)
    before = real.cumsum(1)
    left = F.pad(before, (window, 0))[
        :, : before.shape[1]
    ]  # behind, by the window that ends with each column
    if bool((real & (before - left < before.clamp(max=window))).any()) and as_alone():
        raise UsageError(
            f"Padding stands between tokens (or between a prompt and its text), and this model's window of {window} "
            "tokens reaches over it, which counts in a local model: pad on the right, or give one row at a time, or "
            "rows of one length."
        )
