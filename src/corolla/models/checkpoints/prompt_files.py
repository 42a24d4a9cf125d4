"""Prompts on disk: safetensors and JSON, in peft's own adapter layout where peft has one (all but `deep_ptune`).

Invariant: a prompt is read back only for the model identity that it was trained for; files are replaced
whole or not at all.

    prompt.json                  which model, which mode, which shapes
    adapter_config.json          ptune, prefix, lora: what peft reads
    adapter_model.safetensors    ptune: `prompt_embeddings` [P, H]; prefix: [P, blocks × D], as peft's CARTRIDGE; lora:
                                 see `lora_files.py`
    prompts.safetensors          deep_ptune: `input` [P, H] and `deep` [blocks, P, H]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PretrainedConfig

from corolla.errors import BundleError, CheckpointError
from corolla.files import write_atomically, write_json
from corolla.json_files import load_object
from corolla.models.checkpoints.lora_files import lora_of, peft_files
from corolla.models.checkpoints.source import read_json
from corolla.models.families import depth_of
from corolla.models.prompts import KeyValuePrefix, LoraAdapter, Prompt, SoftPrompt

PROMPT_FILE = "prompt.json"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_BASE = "base_model."  # what the names of the model's own tensors begin with
DEEP_WEIGHTS = "prompts.safetensors"
# peft's types; of PREFIX_TUNING the projection is applied when it is saved.
MODES = {"PROMPT_TUNING": "ptune", "CARTRIDGE": "prefix", "PREFIX_TUNING": "prefix", "LORA": "lora"}
FORMAT_VERSION = 1


def save_prompt(
    folder: Path,
    prompt: Prompt,
    *,
    config: PretrainedConfig,
    model_name: str,
    identity: str,
    revision: str | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a prompt for the model of that name and identity. Raises `BundleError` when it cannot be written.

    peft is told where the model can be loaded from, which is not always its name, and given a classifier's `head` by
    its names in the model.
    """
    beside = {f"{PEFT_BASE}{name}": one.detach().cpu().contiguous() for name, one in (head or {}).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        given = None if prompt.blocks is None else prompt.blocks.values.detach().float().cpu()
        if isinstance(prompt, SoftPrompt) and given is not None:
            vectors = prompt.input.detach().float().cpu().contiguous()
            write_atomically(folder / DEEP_WEIGHTS, save({"input": vectors, "deep": given.contiguous()}))
        else:
            if isinstance(prompt, LoraAdapter):
                vectors, tensors = prompt.trained[0], peft_files(prompt, config)[0]
            else:
                vectors = _peft_vectors(prompt)
                tensors = {"prompt_embeddings": vectors}
            write_atomically(folder / PEFT_WEIGHTS, save(tensors | beside))
            kind = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]} if beside else {}
            write_json(folder / PEFT_CONFIG, _peft_config(prompt, config, model_name, revision) | kind)
        write_json(
            folder / PROMPT_FILE,
            {
                "format": FORMAT_VERSION,
                "model": model_name,
                "identity": identity,
                "mode": prompt.mode,
                "prompt_tokens": prompt.length,
                "hidden_size": int(vectors.shape[1]),
                "blocks": 0 if given is None else int(given.shape[0]),
            },
        )
    except OSError as error:
        raise BundleError(f"The prompt could not be saved to {folder}: {error.strerror or error}.") from error


def load_prompt(
    folder: Path,
    *,
    model_name: str,
    identity: str,
    config: PretrainedConfig | None = None,
    with_head: bool = False,
) -> Prompt:
    """Read a prompt back. Raises `BundleError` for another model's, and for files that cannot be read.

    With the model's `config` a folder that peft itself wrote is read, too; nobody can tell for which model that was,
    as long as it is as wide and deep. An adapter needs it in any case. A classifier's head beside a prompt is left to
    others `with_head`.
    """
    if config is not None and is_pefts(folder):
        return _load_peft_prompt(folder, model_name, config, with_head=with_head)
    about = read_prompt_info(folder)
    if about["identity"] != identity:
        raise BundleError(
            f"The prompt in {folder} was trained for {about['model']} (identity {about['identity'][:12]}), "
            f"not for {model_name} (identity {identity[:12]}): load it with the model that it belongs to."
        )
    if about["mode"] == "lora" and config is not None:
        return lora_of(_peft_info(folder), _read_tensors(folder / PEFT_WEIGHTS), config)
    deep_mode = about["mode"] == "deep_ptune"
    tensors = _read_tensors(folder / (DEEP_WEIGHTS if deep_mode else PEFT_WEIGHTS))
    vectors = tensors.get("input" if deep_mode else "prompt_embeddings")
    deep = tensors.get("deep")
    shape = (about["prompt_tokens"], about["hidden_size"])
    if vectors is None or tuple(vectors.shape) != shape or deep_mode != (deep is not None):
        raise BundleError(f"The prompt in {folder} is not what its {PROMPT_FILE} says; copy it again.")
    if about["mode"] == "prefix":
        return _prefix_of(folder, vectors, about["blocks"], _frozen_tokens(_peft_info(folder)))
    if deep is None:
        return SoftPrompt(vectors)
    if deep.ndim != 3 or deep.shape[:2] != (about["blocks"], about["prompt_tokens"]):
        raise BundleError(f"The prompt in {folder} is not what its {PROMPT_FILE} says; copy it again.")
    prompt = SoftPrompt(vectors, about["blocks"], int(deep.shape[2]))
    assert prompt.deep is not None
    prompt.deep.data.copy_(deep)
    return prompt


def is_pefts(folder: Path) -> bool:
    """Whether a folder holds what peft alone has written."""
    return not (folder / PROMPT_FILE).exists() and (folder / PEFT_CONFIG).exists()


def _peft_vectors(prompt: SoftPrompt | KeyValuePrefix) -> Tensor:
    """What peft calls `prompt_embeddings`: [P, H], or of a prefix [P, blocks × D]."""
    if isinstance(prompt, SoftPrompt):
        return prompt.input.detach().float().cpu().contiguous()
    return prompt.values.detach().float().cpu().transpose(0, 1).flatten(1).contiguous()


def _prefix_of(folder: Path, vectors: Tensor, blocks: int, frozen: int) -> KeyValuePrefix:
    """The other way round. Raises `BundleError`."""
    if blocks < 1 or vectors.shape[1] % blocks or not 0 <= frozen < vectors.shape[0]:
        raise BundleError(f"The prefix in {folder} is not what its files say; copy it again.")
    return KeyValuePrefix(vectors.reshape(len(vectors), blocks, -1).transpose(0, 1), frozen)


def _peft_info(folder: Path) -> dict[str, Any]:
    path = folder / PEFT_CONFIG
    try:
        about = read_json(path)
        kind = about["peft_type"]
    except (CheckpointError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read; copy the folder again.") from error
    if not isinstance(kind, str):
        raise BundleError(f"{path} does not say what kind of adapter it is of; copy the folder again.")
    return about


def read_pefts_info(folder: Path) -> dict[str, Any]:
    """What peft says of its adapter, with our name for its `mode`. Raises `BundleError`."""
    about = _peft_info(folder)
    mode = MODES.get(str(about["peft_type"]))
    if mode is None:
        raise BundleError(
            f"{folder} holds peft's {about['peft_type']}, and Corolla reads {', '.join(MODES)}."
        )
    return about | {"mode": mode}


def _frozen_tokens(about: dict[str, Any]) -> int:
    """How many first tokens peft leaves as they are: of a CARTRIDGE one, if it says nothing, and otherwise none."""
    found = about.get("num_frozen_tokens", 1) if about["peft_type"] == "CARTRIDGE" else 0
    return found if isinstance(found, int) else -1


def _load_peft_prompt(folder: Path, model_name: str, config: PretrainedConfig, *, with_head: bool) -> Prompt:
    about, blocks = _peft_info(folder), depth_of(config)
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    kind, parts = about["peft_type"], about.get("num_transformer_submodules") or 1
    if kind not in MODES or parts != 1:
        raise BundleError(
            f"{folder} holds peft's {kind}, and prompts= takes {', '.join(MODES)}: load it "
            "with PeftModel.from_pretrained(model, folder), if it leaves the blocks alone."
        )
    if not (folder / PEFT_WEIGHTS).exists():
        raise BundleError(f"{folder} lacks {PEFT_WEIGHTS}: copy it again, or save it with safetensors.")
    tensors = _read_tensors(folder / PEFT_WEIGHTS)
    if kind == "LORA":
        return lora_of(about, tensors, config)
    vectors = tensors.pop("prompt_embeddings", None)
    if vectors is None or vectors.ndim != 2 or vectors.shape[0] != about.get("num_virtual_tokens"):
        raise BundleError(f"The prompt in {folder} is not what its {PEFT_CONFIG} says; copy it again.")
    if with_head:
        tensors = {name: one for name, one in tensors.items() if not name.startswith(PEFT_BASE)}
    if tensors:
        raise BundleError(
            f"{folder} holds more than a prompt ({min(tensors)}): load it with "
            "PeftModel.from_pretrained(model, folder)."
        )
    if MODES[kind] == "prefix":
        if about.get("num_layers") != blocks:
            raise BundleError(
                f"The prefix in {folder} is for a model of {about.get('num_layers')} blocks "
                f"({about.get('base_model_name_or_path')}), and {model_name} has {blocks}: load it with its own model."
            )
        return _prefix_of(folder, vectors, blocks, _frozen_tokens(about))
    if vectors.shape[1] != width:
        raise BundleError(
            f"The prompt in {folder} is for a model of width {vectors.shape[1]} "
            f"({about.get('base_model_name_or_path')}), and {model_name} has {width}: load it with its own model."
        )
    return SoftPrompt(vectors)


def read_prompt_info(folder: Path) -> dict[str, Any]:
    """The content of `prompt.json`. Raises `BundleError`."""
    path = folder / PROMPT_FILE
    try:
        about: dict[str, Any] = load_object(path)
        kinds = {
            "model": str,
            "identity": str,
            "mode": str,
            "prompt_tokens": int,
            "hidden_size": int,
            "blocks": int,
        }
        bad = [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]
    except FileNotFoundError as error:
        raise BundleError(f"{folder} holds no {PROMPT_FILE}, so it is not a saved prompt.") from error
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} cannot be read; copy the bundle again.") from error
    if bad or about.get("format") != FORMAT_VERSION:
        raise BundleError(f"{path} is not of a form that this version of Corolla reads.")
    return about


def _peft_config(
    prompt: Prompt, config: PretrainedConfig, model_name: str, revision: str | None
) -> dict[str, Any]:
    about = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config._name_or_path or model_name,
        "revision": revision,
        "inference_mode": True,
    }
    if isinstance(prompt, LoraAdapter):
        return about | peft_files(prompt, config)[1]
    about |= {
        "num_virtual_tokens": prompt.length,
        "num_transformer_submodules": 1,
        "num_layers": depth_of(config),
    }
    if isinstance(prompt, SoftPrompt):
        return about | {
            "peft_type": "PROMPT_TUNING",
            "token_dim": int(prompt.input.shape[1]),
            "num_attention_heads": config.num_attention_heads,
            "prompt_tuning_init": "RANDOM",
        }
    # Of a token's numbers in a block half are keys, which peft takes apart by the heads that are cached.
    width = int(prompt.values.shape[2]) // 2
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return about | {
        "peft_type": "CARTRIDGE",
        "token_dim": width,
        "num_attention_heads": max(1, width // head),
        "num_frozen_tokens": int(prompt.frozen.shape[1]),
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """By name; every number is finite in float32, in which prompts are kept. Raises `BundleError`."""
    try:
        # Copied: a mapped file that is truncated later would kill the process.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} is missing or truncated; copy the bundle again.") from error
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise BundleError(
                f"{path} holds numbers in {name} that are not finite, as a training that has run away leaves: take an "
                "earlier checkpoint of it."
            )
    return tensors
