"""Rotary embeddings whose frequencies depend on how long a sequence is (`dynamic`, `longrope`).

Invariant: a sequence's embeddings are those that the family's code gives it when it is run alone by a new model. The
family's own modules look at the longest sequence of a pass, and remember it.

Up to `LengthThreshold.tokens` tokens the frequencies are the same for all sequences. Beyond, those of a sequence that
is run whole are exact; a cache holds what was computed with others, so sessions end there (`shell.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from corolla.errors import SessionLimit, UsageError
from corolla.models.attention.packing import Segment, current_batch

LONGEST = 2**24  # tokens; frequencies that are the same up to here depend on nothing

_real: ContextVar[Tensor | None] = ContextVar("corolla_real_tokens", default=None)


@dataclass(frozen=True)
class LengthThreshold:
    """Where frequencies begin to depend on the length."""

    tokens: int  # the longest sequence with the frequencies of all shorter ones
    gradual: bool  # whether they differ between any two lengths beyond, and not only from those before

    def check(self, positions: Tensor, real: Tensor | None, *, cached: bool) -> None:
        """Whether a pass over `positions` int64 [R, T] can be exact; `real` bool [R, T] is False for padding.

        A batch's frequencies are those of its longest row, padding included, while here each row is computed as
        if alone. Raises `UsageError` where that is not the same, `SessionLimit` for a cache beyond the threshold.
        """
        longest = int(positions.max()) + 1
        if longest <= self.tokens:
            return
        if cached:
            self.check_cached(longest)
        alone = positions if real is None else torch.where(real, positions, -1)
        lengths = alone.max(dim=1).values + 1
        if bool((lengths[lengths > 0] < (longest if self.gradual else self.tokens + 1)).any()):
            raise UsageError(
                f"The rotary embeddings of this model depend on the longest sequence of a batch beyond "
                f"{self.tokens} tokens: give it rows of unequal lengths one by one."
            )

    def check_cached(self, tokens: int) -> None:
        """Raises `SessionLimit` when so many tokens a row are too many for a cache."""
        if tokens > self.tokens:
            raise SessionLimit(
                f"The rotary embeddings of this model change beyond {self.tokens} tokens, which attention caches "
                f"cannot follow, and this call may need {tokens}: ask for fewer tokens, or pass use_cache=False."
            )


@contextmanager
def padded(real: Tensor | None) -> Iterator[None]:
    """In the pass inside, `real` bool [R, T] says which new tokens are not padding; None: all are real."""
    token = _real.set(real)
    try:
        yield
    finally:
        _real.reset(token)


class RotaryByLength(nn.Module):
    """Stands in for such a module of a family and keeps it inside, as it was when it was new."""

    def __init__(self, own: nn.Module, threshold: LengthThreshold) -> None:
        super().__init__()
        self.own = own
        self.threshold = threshold

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the family's own: `position_ids` int64 [R, T], or [1, N] of a packed pass."""
        if int(position_ids.max()) < self.threshold.tokens:
            return self.own(x, position_ids, *args, **kwargs)
        batch, real = current_batch(), _real.get()
        if batch is not None:
            parts, dim = _of_segments(position_ids, batch.segments), -2
        elif real is not None and position_ids.ndim == 2:
            parts, dim = _rows(position_ids, real), 0
        else:
            parts, dim = [position_ids], 0
        return _joined([_as_new(self.own)(x, part, *args, **kwargs) for part in parts], dim)


def _of_segments(position_ids: Tensor, segments: list[Segment]) -> list[Tensor]:
    return [position_ids[..., one.begin : one.end] for one in segments]


def _rows(position_ids: Tensor, real: Tensor) -> list[Tensor]:
    """Each row's, [1, T]; padding stands at no place."""
    return [row[None] for row in torch.where(real, position_ids, 0)]


def _joined(parts: list[Any], dim: int) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(one, dim) for one in zip(*parts, strict=True))
    return torch.cat(parts, dim)


def _as_new(own: nn.Module) -> nn.Module:
    """A copy that keeps to itself what it remembers."""
    twin = copy.copy(own)
    twin._buffers = {name: None if one is None else one.clone() for name, one in own._buffers.items()}
    return twin


def by_length(model: nn.Module) -> None:
    """Put a `RotaryByLength` in the place of each module that is one; to be done before the model has run."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            threshold = _threshold_of(child) if _is_rotary(child) else None
            if threshold is not None:
                setattr(module, name, RotaryByLength(child, threshold))


def length_threshold(model: nn.Module) -> LengthThreshold | None:
    """The first threshold of a model's rotary embeddings, if their frequencies depend on the length."""
    thresholds = [_threshold_of(one) for one in model.modules() if _is_rotary(one)]
    found = [one for one in thresholds if one is not None]
    return min(found, key=lambda one: one.tokens) if found else None


def cached_limit(config: PretrainedConfig) -> int | None:
    """How many tokens a session may have, prompts included, where rotary embeddings change before the config's end."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [one for one in (rope, *rope.values()) if isinstance(one, dict)]
    thresholds = [
        part.get("original_max_position_embeddings") for part in parts if part.get("rope_type") == "longrope"
    ]
    return min((int(one) for one in thresholds if one), default=None)


def _is_rotary(module: nn.Module) -> bool:
    return "Rotary" in type(module).__name__ and any("inv_freq" in name for name, _ in module.named_buffers())


def _threshold_of(rotary: nn.Module) -> LengthThreshold | None:
    kinds = getattr(rotary, "layer_types", None)
    thresholds = [_threshold_of_kind(rotary, {"layer_type": kind}) for kind in kinds] if kinds else []
    found = [one for one in thresholds or [_threshold_of_kind(rotary, {})] if one is not None]
    return min(found, key=lambda one: one.tokens) if found else None


def _threshold_of_kind(rotary: nn.Module, arguments: dict[str, Any]) -> LengthThreshold | None:
    """Found by asking: the place of one token is looked up in shorter and longer sequences."""
    device = next(rotary.buffers()).device

    def at_length(tokens: int) -> Tensor:
        places = torch.tensor([[1, tokens - 1]], device=device)
        given = _as_new(rotary)(torch.zeros(1, 2, 1, dtype=torch.float32, device=device), places, **arguments)
        table: Tensor = given[0] if isinstance(given, tuple) else given
        return table[..., 0, :]

    try:
        plain = at_length(2)
        longest = at_length(LONGEST)
    except (TypeError, KeyError):  # called otherwise: not one of those that look at the length
        return None
    if torch.equal(plain, longest):
        return None
    low, high = 2, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        if torch.equal(plain, at_length(middle)):
            low = middle
        else:
            high = middle
    return LengthThreshold(low, gradual=not torch.equal(at_length(low + 1), at_length(LONGEST)))
