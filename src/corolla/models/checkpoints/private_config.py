"""A config that differs for one module only: it names an attention of its own.

Invariant: all other settings are those of the config that it stands for, whichever of the two is changed; and
whoever copies or saves it gets that config, so the private name never leaves the module.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from transformers import PretrainedConfig


def with_attention(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """`config` as a module sees it whose attention is the one registered as `name`."""
    family: Any = type(config)
    kind: Any = _private_class(family, name)
    made = kind.__new__(kind)
    object.__setattr__(made, "__dict__", config.__dict__)
    object.__setattr__(made, "_public", config)
    private: PretrainedConfig = made
    return private


@cache
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
