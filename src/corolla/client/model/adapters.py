"""Adapters that peft puts into a model: those of the client's part work, those of blocks must not be left out unsaid.

peft looks for the modules that it is to change among those that are there, and is content with some of them; a
distributed model has no blocks, so what an adapter wants there is looked up in the whole model's structure.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from corolla.errors import UsageError
from corolla.models import families


class AdapterCheck:
    """Looks at each adapter of a model once, when the model is called with it for the first time."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def __call__(self, model: Any) -> None:
        """Raises `UsageError` when an adapter is to change something in the blocks."""
        adapters = vars(model).get("peft_config") or {}
        for name, adapter in adapters.items():
            if self._seen.get(name) is adapter:
                continue
            wanted = _wanted_in_blocks(model.config, adapter)
            if wanted is not None:
                raise UsageError(
                    f"The adapter {name} is to change {wanted}, which is part of the blocks and stays on the servers: "
                    "choose target_modules outside of the blocks, such as head and embeddings, or tune a prompt."
                )
            self._seen[name] = adapter


def _wanted_in_blocks(config: Any, adapter: Any) -> str | None:
    """The first module or parameter of a block that the adapter is meant for; None without one."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(adapter, "target_modules", None)
    parameters = getattr(adapter, "target_parameters", None) or ()
    saved = getattr(adapter, "modules_to_save", None) or ()
    if not (targets or parameters or saved):
        return None
    place = families.structure(config)
    with torch.device("meta"):
        whole = place.causal_lm(copy.deepcopy(config))
    inside = re.compile(rf"{re.escape(place.prefix)}\.\d+\.")
    for key, _ in whole.named_modules():
        if inside.match(key) and (
            (targets and check_target_module_exists(adapter, key)) or _ends_as(key, saved)
        ):
            return str(key)
    for key, _ in whole.named_parameters():
        if inside.match(key) and _ends_as(key, parameters):
            return str(key)
    return None


def _ends_as(key: str, names: Any) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)
