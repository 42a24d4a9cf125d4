"""LoRA adapters as peft writes and reads them.

Invariant: what an adapter asks for beyond what servers compute is refused when it is read, never left out.

    adapter_config.json          r, alpha, and what they are for single layers
    adapter_model.safetensors    `base_model.model.….layers.3.self_attn.q_proj.lora_A.weight` [r, in], `.lora_B.weight`
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from corolla.errors import BundleError
from corolla.models.families import block_key_pattern, structure
from corolla.models.lora import Layers, linear_layers_of, pieces, places, width
from corolla.models.prompts import LoraAdapter

MOST_ALPHA = 1e30  # beyond, and for what is no number, products are none either
PEFT_MODEL = "base_model.model."  # what names begin with
# Of a layer's name before `.lora_A.weight`, the block and the layer in it.
_HALF = re.compile(r"^(?P<layer>.+)\.lora_(?P<half>[AB])\.weight$")
# What changes nothing in what an adapter computes once it is trained.
_IRRELEVANT = frozenset(
    (
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "qalora_group_size",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "runtime_config",
        "ensure_weight_tying",
    )
)
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Others of its values change the model's own weights as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def lora_of(about: Mapping[str, Any], tensors: Mapping[str, Tensor], config: PretrainedConfig) -> LoraAdapter:
    """The adapter that a folder of peft's holds, for a model of that config. Raises `BundleError`."""
    _check_plain(about)
    blocks = linear_layers_of(config)
    halves = _by_block(tensors, config, len(blocks))
    names = tuple(sorted({name for own in halves for name in own}))
    for index, own in enumerate(halves):
        for name, pair in own.items():
            _check_shapes(f"{name} of block {index}", blocks[index], name, pair)
    rank = max(len(pair["A"]) for own in halves for pair in own.values())
    if rank > config.hidden_size:
        raise BundleError(f"The adapter has rank {rank}, and servers take {config.hidden_size} at most.")
    values = torch.zeros(len(blocks), rank, width(blocks, names), dtype=torch.float32)
    scale = torch.zeros_like(values)
    prefix = structure(config).prefix
    for index, (layers, own) in enumerate(zip(blocks, halves, strict=True)):
        order = places(layers, names)
        scales = {name: (down, up) for name, down, up in pieces(scale[index], order)}
        for name, down, up in pieces(values[index], order):
            if name in own:
                count = len(own[name]["A"])
                down[:count], up[:count] = own[name]["A"], own[name]["B"].t()
                scales[name][0][:count] = 1.0
                scales[name][1][:count] = _scaling(about, f"{prefix}.{index}.{name}", count)
    return LoraAdapter(values, scale, names)


def _check_plain(about: Mapping[str, Any]) -> None:
    for name, value in about.items():
        plain = value in _PLAIN[name] if name in _PLAIN else not value
        if name not in _IRRELEVANT and not plain:
            raise BundleError(
                f"The adapter was made with {name}={value!r:.60}, which servers do not compute: they take plain LoRA "
                "of linear layers (no DoRA, biases, modules_to_save or expert parameters)."
            )


def _by_block(tensors: Mapping[str, Tensor], config: PretrainedConfig, blocks: int) -> list[dict[str, Any]]:
    """Of each block, by layer, the halves A and B."""
    pattern = block_key_pattern(config)
    found: list[dict[str, Any]] = [{} for _ in range(blocks)]
    for key, tensor in tensors.items():
        half = _HALF.match(key.removeprefix(PEFT_MODEL))
        place = None if half is None else pattern.match(half["layer"])
        if half is None or place is None or int(place["index"]) >= blocks:
            raise BundleError(
                f"The adapter holds {key}, which is no half of a linear layer of this model's blocks: with "
                "embeddings, head or other parts it can be had by PeftModel.from_pretrained(model, folder), if it "
                "leaves the blocks alone."
            )
        found[int(place["index"])].setdefault(place["rest"], {})[half["half"]] = tensor
    if not any(found):
        raise BundleError("The adapter holds no layer; copy the folder again.")
    return found


def _check_shapes(what: str, layers: Layers, name: str, pair: Mapping[str, Tensor]) -> None:
    if name not in layers:
        raise BundleError(f"The adapter changes {what}, which is no linear layer by itself there.")
    (place,) = places(layers, [name])
    down, up = pair.get("A"), pair.get("B")
    rank = 0 if down is None or down.ndim != 2 else len(down)
    if (
        not rank
        or down is None
        or up is None
        or (down.shape[1], *up.shape) != (place.inputs, place.outputs, rank)
    ):
        raise BundleError(
            f"The adapter's {what} does not fit this model, where it takes {place.inputs} numbers and gives "
            f"{place.outputs}: it is another model's."
        )


def _scaling(about: Mapping[str, Any], module: str, rank: int) -> float:
    """As peft has it: alpha is divided by the rank, or by its root."""
    patterns = about.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise BundleError("The adapter's alpha_pattern has no value for each layer; copy the folder again.")
    try:
        key = next((one for one in patterns if re.match(rf"(.*\.)?({one})$", module)), None)
    except re.error as error:
        raise BundleError("The adapter's alpha_pattern is no pattern; copy the folder again.") from error
    alpha = about.get("lora_alpha", 8) if key is None else patterns[key]
    if not isinstance(alpha, int | float) or not abs(alpha) <= MOST_ALPHA:
        raise BundleError(f"The adapter's lora_alpha is {alpha!r:.60}, which is no number to multiply by.")
    return float(alpha / math.sqrt(rank) if about.get("use_rslora") else alpha / rank)


@dataclass(frozen=True)
class _Changed:
    """What an adapter has of one layer: A [r, in], B [out, r] and their scaling."""

    path: str  # in the whole model
    down: Tensor
    up: Tensor
    scaling: float


def _layers_of(adapter: LoraAdapter, config: PretrainedConfig) -> Iterator[_Changed]:
    prefix, values = structure(config).prefix, adapter.trained.detach().cpu()
    scale = adapter.scale.cpu().expand_as(values)
    for index, layers in enumerate(linear_layers_of(config)):
        order = places(layers, adapter.targets)
        found = zip(pieces(values[index], order), pieces(scale[index], order), strict=True)
        for (name, down, up), (_, counted, scaled) in found:
            if rank := int((counted[:, 0] != 0).sum()):
                yield _Changed(f"{prefix}.{index}.{name}", down[:rank], up[:rank].t(), float(scaled[0, 0]))


def peft_files(adapter: LoraAdapter, config: PretrainedConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What peft's two files hold of an adapter: tensors by name, and what is special in the config."""
    layers = list(_layers_of(adapter, config))
    tensors: dict[str, Tensor] = {}
    for one in layers:
        tensors[f"{PEFT_MODEL}{one.path}.lora_A.weight"] = one.down.contiguous()
        tensors[f"{PEFT_MODEL}{one.path}.lora_B.weight"] = one.up.contiguous()
    ranks = {one.path: len(one.down) for one in layers}
    alphas = {one.path: one.scaling * len(one.down) for one in layers}
    rank, alpha = max(ranks.values()), next(iter(alphas.values()))
    about = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [one.path for one in layers],
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
    }
    return tensors, about
