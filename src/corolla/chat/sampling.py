"""How replies are drawn.

Invariant: a chat depends on these settings alone, never on what a checkpoint's generation config suggests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from corolla.errors import BundleError, UsageError


@dataclass(frozen=True)
class SamplingSettings:
    """Raises `UsageError` for values that cannot be meant. `temperature` 0 takes the likeliest token always.

    `top_k` 0 and `top_p` 1 leave all tokens in; `max_new_tokens` is the most that one reply may have;
    `seed` None draws differently each time.
    """

    temperature: float = 0.6
    top_k: int = 100
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"--temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if self.top_k < 0:
            raise UsageError(f"--top-k is {self.top_k}; it must be 1 or more, or 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; it must be above 0 and at most 1.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"--repetition-penalty is {self.repetition_penalty}; it must be above 0.")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> Self:
        """A bundle's saved settings; `changes` that are not None take precedence. Raises `BundleError`."""
        names = {item.name for item in dataclasses.fields(cls)}
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            saved = cls(**values)
        except (TypeError, UsageError) as error:
            raise BundleError(f"The saved sampling settings are not valid ({error}).") from error
        return dataclasses.replace(saved, **{name: given[name] for name in names & set(given)})

    def generate_arguments(self) -> dict[str, Any]:
        """What to call `generate` with; everything is said, so that no default of a checkpoint slips in."""
        common = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return {**common, "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
        return {
            **common,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
