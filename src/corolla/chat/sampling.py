"""How the next token is chosen, checked when it is set.

Invariant: settings that exist can be handed to `generate` as they are, and say everything that decides the
choice: what a checkpoint's own generation config says about it does not show through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from corolla.config import check_kinds
from corolla.errors import BundleError, UsageError

LEAST, MOST = 1e-4, 1e4  # of what scores are divided by: float32 has no room for much smaller or larger ones


@dataclass(frozen=True)
class SamplingSettings:
    """Greedy at `temperature` 0. Raises `UsageError` for values that mean nothing."""

    temperature: Annotated[float, "0: the likeliest token"] = 0.6
    top_k: Annotated[int, "Choose among so many tokens; 0: all"] = 100
    top_p: Annotated[float, "Among this share of likelihood"] = 1.0
    repetition_penalty: Annotated[float, "Above 1: fewer repetitions"] = 1.0
    max_new_tokens: Annotated[int, "Longest reply, in tokens"] = 128
    seed: Annotated[int | None, "Makes replies repeatable"] = None  # None: different every time
    allow_empty: Annotated[bool, "--allow-empty/--no-allow-empty", "Whether a reply may be empty"] = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.temperature != 0 and not LEAST <= self.temperature <= MOST:
            raise UsageError(
                f"--temperature is {self.temperature}; it must be 0 (greedy), or from {LEAST} to {MOST}."
            )
        if self.top_k < 0:
            raise UsageError(f"--top-k is {self.top_k}; it must be 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; it must be above 0 and at most 1.")
        if not LEAST <= self.repetition_penalty <= MOST:
            raise UsageError(
                f"--repetition-penalty is {self.repetition_penalty}; it must be from {LEAST} to {MOST} (1 changes "
                "nothing)."
            )
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {self.max_new_tokens}; a reply needs at least 1.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:  # torch takes no other
            raise UsageError(f"--seed is {self.seed}; it must be from {-(2**63)} to {2**64 - 1}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingSettings:
        """A bundle's sampling settings; what they do not name stays at its default. Raises `BundleError`."""
        for name in values.keys() - {field.name for field in fields(cls)}:
            raise BundleError(
                f"The bundle's sampling setting {name}={values[name]!r} is not one that is known."
            )
        try:
            return cls(**values)
        except UsageError as error:
            raise BundleError(f"The bundle's sampling settings are not valid: {error}") from error

    def generate_arguments(self) -> dict[str, Any]:
        """Arguments of `generate`; with the neutral values where there is nothing to sample."""
        sample = self.temperature > 0
        return {
            "do_sample": sample,
            "temperature": self.temperature if sample else 1.0,
            "top_k": self.top_k if sample else 50,  # `generate` warns of any other where it is greedy
            "top_p": self.top_p if sample else 1.0,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_new_tokens,
            "num_beams": 1,
            "num_return_sequences": 1,
        }
