"""What Python and libraries do to a model that holds on to a swarm: copies, pickles, compilers, adapters.

Invariant: copies of a model have weights, prompt and sessions of their own over one connection, which is closed
when the last of them is closed or dropped. An adapter that is meant for blocks is refused, not left out.
"""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any, NoReturn

import torch
from torch import nn

from corolla.client.connection import SwarmConnection
from corolla.client.local_blocks import LocalBlocks
from corolla.errors import UsageError
from corolla.models import families


class SharedConnection:
    """A connection and the models that use it, with the blocks that this client runs itself."""

    def __init__(self, connection: SwarmConnection, local: LocalBlocks | None = None) -> None:
        self.connection = connection
        self.local = local
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()
        # Models hold this object, so it goes when they have gone.
        weakref.finalize(self, connection.close)

    def join(self, model: Any) -> None:
        """`model` uses the connection from now on."""
        self._models.add(model)

    def leave(self, model: Any) -> None:
        """`model` needs it no more; the last one closes it."""
        self._models.discard(model)
        if not self._models:
            self.connection.close()


def copied(model: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` makes of a distributed model.

    It is made anew, since what stands around its blocks belongs to one model, and then given copies of all the rest.
    """
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config, memo), connection=model._shared_connection)
    memo[id(model)] = made
    _copy_around(model, made, model.blocks_at.split("."), memo)
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config, memo)
    made._changes.note(made, but=model._changes.changed(model))
    return made


def _copy_around(source: nn.Module, target: nn.Module, path: list[str], memo: dict[int, Any]) -> None:
    """Give `target` copies of what `source` holds, but for the list of blocks at `path` and what runs it."""
    memo[id(source)] = target
    for tables in ("_parameters", "_buffers"):
        getattr(target, tables).update(copy.deepcopy(getattr(source, tables), memo))
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    for name, child in source._modules.items():
        if name == path[0]:
            if child is not None and path[1:]:
                _copy_around(child, target.get_submodule(name), path[1:], memo)
        else:
            setattr(target, name, copy.deepcopy(child, memo))
    for name, value in vars(source).items():
        if name not in vars(target) or isinstance(value, bool | int | float | str | None):
            target.__dict__[name] = copy.deepcopy(value, memo)


def refuse_shallow_copy() -> NoReturn:
    """Raises `UsageError`."""
    raise UsageError(
        "A distributed model cannot be copied by copy.copy: use copy.deepcopy, which shares the connection and gives "
        "the copy a prompt of its own."
    )


def refuse_pickle() -> NoReturn:
    """Raises `UsageError`."""
    raise UsageError(
        "A distributed model is connected to a swarm, so it cannot be pickled or sent to another process: save its "
        "prompt with model.save_pretrained(folder), and load it there with from_pretrained(…, prompts=folder)."
    )


class AdapterCheck:
    """Looks at each adapter that peft puts into a model once, when the model is called with it for the first time.

    peft looks for the modules that it is to change among those that are there, and is content with some of them; a
    distributed model has no blocks, so what an adapter wants there is looked up in the whole model's structure.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def __call__(self, model: Any) -> None:
        """Raises `UsageError` when an adapter is to change something in the blocks."""
        adapters = vars(model)["peft_config"]
        for name, adapter in adapters.items():
            if self._seen.get(name) is adapter:
                continue
            wanted = _wanted_in_blocks(model.config, adapter)
            if wanted is not None:
                raise UsageError(
                    f"The adapter {name} is to change {wanted}, which is part of the blocks and stays on the servers: "
                    "choose target_modules outside of the blocks, such as head and embeddings, or load the model with "
                    "tuning_mode='lora', which trains LoRA there."
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
