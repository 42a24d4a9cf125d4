"""What differs between model families, as far as splitting is concerned.

Invariant: everything is read off the family's own classes. Nothing here knows a tensor's value, nor a family's
name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from corolla.errors import UnsupportedFamily

# Outputs that only a whole model on one machine can give, with the names that people know them by.
INNER_OUTPUTS: Mapping[str, str] = {
    "output_hidden_states": "hidden states between the blocks",
    "output_attentions": "attention weights",
    "output_router_logits": "router logits",
}

USE_ANOTHER = "use a text-only decoder such as llama, qwen3 or bloom"

MOST_OF_BLOCK = 8  # layers
TIES = "_tied_weights_keys"  # a model's attribute: which of its weights are others

_inspected: dict[type[PretrainedConfig], Structure] = {}
_tied: dict[str, Mapping[str, str]] = {}


@dataclass(frozen=True)
class Structure:
    """Where the blocks of a family live."""

    causal_lm: type[PreTrainedModel]  # e.g. LlamaForCausalLM
    holder: type[PreTrainedModel]  # the model whose forward runs the blocks, e.g. LlamaModel, OPTDecoder
    blocks: str  # the holder's attribute that is the ModuleList of blocks, e.g. "layers", "h"
    prefix: str  # path of the blocks in the state dict of the causal LM, e.g. "model.layers"
    optional_prefix: str  # what a checkpoint of the base model alone leaves out, e.g. "model."
    outside: frozenset[str]  # names of all weights that are in no block
    may_tie: bool  # whether each model says for itself which weights its blocks have in common


def structure(config: PretrainedConfig) -> Structure:
    """Find the blocks of this config's family by looking at its own classes (once a process).

    Raises `UnsupportedFamily` when transformers has no causal model for the config, or when its blocks are
    not one list.
    """
    known = _inspected.get(type(config))
    if known is None:
        known = _inspected[type(config)] = _inspect(config)
    return known


def blocks_prefix(config: PretrainedConfig, part: type[PreTrainedModel] | None = None) -> str:
    """Path of the list of blocks in the state dict of `part` (None: the `...ForCausalLM`), e.g. `model.layers`."""
    found = structure(config)
    if part is None or part is found.causal_lm:
        return found.prefix
    inner = found.prefix.removeprefix(found.optional_prefix)
    return inner if part is base_class(config) else f"{part.base_model_prefix}.{inner}"


def base_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The family's model without a head, e.g. `LlamaModel`. Raises `UnsupportedFamily`."""
    return _class_among(AutoModel, config, "base model")


def classifier_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The family's classifier of sequences, e.g. `LlamaForSequenceClassification`. Raises `UnsupportedFamily`."""
    return _class_among(AutoModelForSequenceClassification, config, "class for sequence classification")


def _class_among(auto: Any, config: PretrainedConfig, what: str) -> type[PreTrainedModel]:
    structure(config)  # raises where the family cannot be split at all
    if type(config) not in auto._model_mapping:
        raise UnsupportedFamily(f"transformers has no {what} of type {config.model_type}: use another model.")
    found = auto._model_mapping[type(config)]
    kind: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return kind


def block_key_pattern(config: PretrainedConfig) -> re.Pattern[str]:
    """Matches a checkpoint's key of a block's tensor; groups `index` and `rest`.

    Checkpoints of a base model alone (gpt2, bloom on the hub) leave the base model's name out of their keys. Numbers
    are as torch writes them: "03", for which it has no module, is no block.
    """
    found = structure(config)
    inner = found.prefix.removeprefix(found.optional_prefix)
    return re.compile(
        rf"^(?:{re.escape(found.optional_prefix)})?{re.escape(inner)}"
        r"\.(?P<index>0|[1-9][0-9]{0,8})\.(?P<rest>.+)$"
    )


def has_experts(config: PretrainedConfig) -> bool:
    """Whether tokens choose among experts somewhere in the model."""
    return any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )


def depth_of(config: PretrainedConfig) -> int:
    """How many blocks the model of this config has."""
    return int(config.num_hidden_layers) // layers_of_block(config)


def layers_of_block(config: PretrainedConfig) -> int:
    """How many of the layers that a config counts, each with a cache of its own, one block is: the fewest that it can
    count."""
    if not isinstance(getattr(type(config), "num_hidden_layers", None), property):
        return 1
    tried = copy.copy(config)
    for count in range(1, MOST_OF_BLOCK + 1):
        tried.num_hidden_layers = count
        if tried.num_hidden_layers:
            return count
    return 1


def slice_config(config: PretrainedConfig, start: int, end: int) -> PretrainedConfig:
    """A copy for blocks [start, end): fewer layers, and its per-layer lists cut accordingly."""
    sliced = copy.deepcopy(config)
    depth, of_block = config.num_hidden_layers, layers_of_block(config)
    start, end = start * of_block, end * of_block
    overrides = layer_overrides(config)
    for name, value in list(vars(sliced).items()):
        if is_per_layer(config, name, value):
            setattr(sliced, name, value[start:end])
    sliced.num_hidden_layers = end - start
    if overrides:
        sliced.per_layer_config = {at - start: own for at, own in overrides.items() if start <= at < end}
    if getattr(config, "num_kv_shared_layers", None):
        sliced.num_kv_shared_layers = max(0, end - max(start, depth - config.num_kv_shared_layers))
    _fix_computed(config, sliced, start, end)
    # What a checkpoint asks to be given besides hidden states is the whole model's to give.
    for option in INNER_OUTPUTS:
        if getattr(sliced, option, None):
            setattr(sliced, option, False)
    sliced.return_dict = True
    return sliced


def is_per_layer(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Whether an attribute of a config lists something of each of its layers."""
    if not isinstance(value, list) or len(value) != config.num_hidden_layers:
        return False
    if "layer" in name:
        return True
    numbers = len(value) > 2 and all(type(one) in (int, float) for one in value)
    return numbers and "token" not in name and name not in _lists_of_other_things(cast(Any, type(config)))


@lru_cache
def _lists_of_other_things(kind: Any) -> frozenset[str]:
    """Attributes that are lists of another length than a config of that kind has layers, by its own defaults."""
    try:
        usual = kind()
        depth = int(usual.num_hidden_layers)
    except Exception:  # it cannot be made without values, or is no model's
        return frozenset()
    lists = (name for name, value in vars(usual).items() if isinstance(value, list) and len(value) != depth)
    return frozenset(lists)


def layer_overrides(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """What single layers of a config have of their own, by their index; nothing for most."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(at): own for at, own in config.to_dict()["per_layer_config"].items()}


def largest(config: PretrainedConfig, name: str) -> int | None:
    """A size that a config names once, or for each layer: the largest. None where it does not name it."""
    own = [one[name] for one in layer_overrides(config).values() if name in one]
    listed = vars(config).get(config.attribute_map.get(name, name))
    if listed is None and not own and not layer_overrides(config):
        listed = getattr(config, name, None)
    sizes = [*own, *(listed if isinstance(listed, list | tuple) else [listed])]
    return max((int(one) for one in sizes if one is not None), default=None)


def _fix_computed(config: PretrainedConfig, sliced: PretrainedConfig, start: int, end: int) -> None:
    """The same of lists that a family's config computes from a block's place in the whole model."""
    lists: dict[str, list[Any]] = {}
    for kind in type(config).__mro__:
        for name, member in vars(kind).items():
            if "layer" in name and isinstance(member, property):
                value = getattr(config, name)
                if isinstance(value, list) and len(value) == config.num_hidden_layers:
                    lists[name] = value[start:end]
    if any(getattr(sliced, name) != value for name, value in lists.items()):
        kind = type(config)
        sliced.__class__ = type(kind.__name__, (kind,), {**lists, "__module__": kind.__module__})


def _inspect(config: PretrainedConfig) -> Structure:
    causal_class = _causal_class(config)
    try:
        with torch.device("meta"):
            model: Any = causal_class(slice_config(config, 0, 1))
    except Exception as error:  # whatever the family's own code makes of the config
        refuse_encoder_and_decoder(config)
        raise _not_buildable(config, error) from error
    base_name = str(causal_class.base_model_prefix)
    prefix = f"{base_name}." if hasattr(model, base_name) else ""
    lists = _lists_of(getattr(model, base_name, model), 1)
    if (
        len(lists) != 1
    ):  # of lists that have one part here the blocks are those of which a deeper model has more
        with torch.device("meta"):
            deeper: Any = causal_class(slice_config(config, 0, 2))
        longer = _lists_of(getattr(deeper, base_name, deeper), 2)
        lists = [one for one in lists if one in longer]
    if len(lists) != 1:
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be split: their blocks are not one list of layers."
        )
    path = prefix + lists[0]
    owner, _, attribute = path.rpartition(".")
    holder = model.get_submodule(owner)
    if not isinstance(holder, PreTrainedModel):
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be split: their blocks are run by a part of the model "
            f"({type(holder).__name__}), not by a model; {USE_ANOTHER}."
        )
    return Structure(
        causal_lm=causal_class,
        holder=type(holder),
        blocks=attribute,
        prefix=path,
        optional_prefix=prefix,
        outside=frozenset(name for name in model.state_dict() if not name.startswith(f"{path}.")),
        may_tie=TIES in vars(holder),
    )


def _not_buildable(config: PretrainedConfig, error: Exception) -> UnsupportedFamily:
    missing = "it lacks " if isinstance(error, KeyError) else ""
    if isinstance(error, TypeError) and "NoneType" in str(error):
        error = TypeError("a value that it leaves out is computed with")
    reason = missing + " ".join(str(error).split()).rstrip(".")
    return UnsupportedFamily(
        f"This config of type {config.model_type} describes no model that can be built ({reason:.200})."
    )


def refuse_what_cannot_be_built(config: PretrainedConfig) -> None:
    """Raises `UnsupportedFamily` for a config of no model.

    Looks at the whole model, without its numbers: for when a part of it, or a miniature, has failed.
    """
    found = structure(config)
    try:
        with torch.device("meta"):
            found.causal_lm(slice_config(config, 0, depth_of(config)))
    except Exception as error:  # as above
        raise _not_buildable(config, error) from error


def tied_weights(config: PretrainedConfig) -> Mapping[str, str]:
    """Of weights that blocks have in common and a checkpoint holds once: each block's names with those that it holds.

    Names are a block's index and what follows, as in "7.shared.weight".
    """
    found = structure(config)
    if not found.may_tie:
        return {}
    key = config.to_json_string(use_diff=False)
    if key not in _tied:
        with torch.device("meta"):
            whole: Any = found.holder(copy.deepcopy(config))
        _tied[key] = names_of_blocks(whole.all_tied_weights_keys, found.blocks)
    return _tied[key]


def names_of_blocks(ties: Mapping[str, str], blocks: str) -> dict[str, str]:
    """Of names of a model's weights those that are in its list `blocks`, without the list's own."""
    prefix = f"{blocks}."
    pairs = ((target, source) for target, source in ties.items() if target.startswith(prefix))
    return {target.removeprefix(prefix): source.removeprefix(prefix) for target, source in pairs}


def keep_ties(model: Any, ties: Mapping[str, str]) -> None:
    """Have the loader know these of a model's tied weights, and no others."""
    setattr(model, TIES, dict(ties))
    model.all_tied_weights_keys = dict(ties)


def _causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedFamily(
            f"Models of type {config.model_type} are not causal language models that Corolla can split; "
            f"{USE_ANOTHER}."
        )
    found = mapping[type(config)]
    causal_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    parts = type(config).sub_configs
    if causal_class.config_class in parts.values() or not hasattr(config, "num_hidden_layers"):
        refuse_encoder_and_decoder(config)
        raise UnsupportedFamily(
            f"Models of type {config.model_type} have no blocks of their own, and those of the models in them "
            f"({', '.join(parts)}) are not split; {USE_ANOTHER}."
        )
    return causal_class


def refuse_encoder_and_decoder(config: PretrainedConfig) -> None:
    """Raises `UnsupportedFamily` for what is both: the reason of most failures, where it is so."""
    # A causal model of such a family says of its own config that it is none.
    if any(getattr(one, "is_encoder_decoder", False) for one in (config, type(config))):
        raise UnsupportedFamily(
            f"Models of type {config.model_type} are an encoder and a decoder, which Corolla does not split; "
            f"{USE_ANOTHER}."
        )


def _lists_of(base: nn.Module, depth: int) -> list[str]:
    """Paths of the lists of `depth` modules with weights that are nearest to the root of a base model of as many
    blocks; where there is one list only, of any length."""
    found = [
        (name, len(module))
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    ]
    least = min((name.count(".") for name, _ in found), default=0)
    lists = [(name, length) for name, length in found if name.count(".") == least]
    if len(lists) > 1:  # of something else that there are several of
        lists = [one for one in lists if one[1] == depth]
    return [name for name, _ in lists]
