"""A config as one module of a model sees it, where that module's attention is not the model's.

Invariant: whoever changes, copies or saves either of the two finds the model's own.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

from transformers import PretrainedConfig


def with_attention(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """`config` as a module sees it whose attention is the one registered as `name`; the rest is `config`'s own.

    Whichever of the two is changed, both are; whoever copies or saves it gets `config`, so the name never leaves
    the module.
    """
    family: Any = type(config)
    kind: Any = _private_class(family, name)
    made = kind.__new__(kind)
    object.__setattr__(made, "__dict__", config.__dict__)
    object.__setattr__(made, "_public", config)
    private: PretrainedConfig = made
    return private


@lru_cache
def _private_class(family: Any, name: str) -> Any:
    def deepcopy(self: Any, memo: dict[int, Any]) -> PretrainedConfig:
        found: PretrainedConfig = copy.deepcopy(self._public, memo)
        return found

    def reduce(self: Any, _protocol: Any) -> Any:
        return copy.copy, (self._public,)

    def set_public(self: Any, value: Any) -> None:
        self._public._attn_implementation = value

    members = {
        "__slots__": ("_public",),
        "__module__": family.__module__,
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce,
        "_attn_implementation": property(lambda _self: name, set_public),
    }
    return type(family.__name__, (family,), members)
