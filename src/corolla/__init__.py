"""Corolla: prompt-tune and chat with a language model whose blocks run on a swarm of machines.

Invariant: these are the public names; importing them costs nothing until one is used.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AutoDistributedModelForCausalLM",
    "CorollaError",
    "InferenceSession",
    "MissingBlocks",
    "SessionLimit",
    "SoftPrompt",
    "SwarmUnavailable",
    "UsageError",
    "__version__",
]

if TYPE_CHECKING:
    from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
    from corolla.client.sessions.session import InferenceSession
    from corolla.errors import CorollaError, MissingBlocks, SessionLimit, SwarmUnavailable, UsageError
    from corolla.models.prompts import SoftPrompt

_HOMES = {
    "AutoDistributedModelForCausalLM": "corolla.client.model.causal_lm",
    "InferenceSession": "corolla.client.sessions.session",
    "SoftPrompt": "corolla.models.prompts",
} | dict.fromkeys(
    ("CorollaError", "MissingBlocks", "SessionLimit", "SwarmUnavailable", "UsageError"), "corolla.errors"
)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used; `DistributedLlamaForCausalLM` and its siblings are made then."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    family = re.fullmatch(r"Distributed(\w+(?:ForCausalLM|LMHeadModel))", name)
    if family is not None:
        from corolla.client.model.causal_lm import distributed_class
        from corolla.errors import UnsupportedFamily

        try:
            return distributed_class(family[1])
        except UnsupportedFamily as error:
            raise AttributeError(str(error)) from error
    raise AttributeError(f"module 'corolla' has no attribute {name!r}")
