"""What a distributed model writes, and how it is read back.

Invariant: what was trained or changed at the client is written, and nothing of a checkpoint as if it were whole:
there is no config.json, and no tensor that is still the checkpoint's.

    prompt.json, …       the prompt (models/checkpoints/prompt_files.py)
    classifier.json      what a classifier's config says of its labels
    model.safetensors    by their names in the state dict: what else is not the checkpoint's (resized embeddings, a
                         trained head), and for a trainer, which reads no other file, the prompt once more
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PretrainedConfig

from corolla.errors import BundleError, UsageError
from corolla.files import write_atomically, write_json
from corolla.json_files import read_object
from corolla.models import families
from corolla.models.checkpoints.prompt_files import (
    PEFT_BASE,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PROMPT_FILE,
    load_prompt,
    save_prompt,
)
from corolla.models.checks.lora import check_adapter
from corolla.models.checks.prefixes import check_prefix
from corolla.models.prompts import KeyValuePrefix, LoraAdapter, Prompt

TABLES = "model.safetensors"
LABELS_FILE = "classifier.json"
LABELS = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")
PROMPTS = "prompts."  # what the names of a prompt's tensors begin with


def save_client_part(model: Any, folder: Path, *, for_trainer: bool) -> None:
    """Write the prompt, and what else was changed. Raises `BundleError`, and `UsageError` when there is nothing."""
    changed = {
        name: one for name, one in model._changes.changed(model).items() if not name.startswith(PROMPTS)
    }
    if model.prompts is None and not changed:
        raise UsageError(
            "A distributed model has no blocks to save and no prompt was trained: load it with "
            "tuning_mode='ptune' to train one, or use the original checkpoint."
        )
    if model.prompts is not None:
        view = model.blocks.connection.view
        save_prompt(
            folder,
            model.prompts,
            config=model.config,
            model_name=view.model_name,
            identity=view.model,
            revision=model._revision,
            head={name: dict(model.named_parameters())[name] for name in sorted(head_names(model))},
        )
        if for_trainer:
            changed |= {PROMPTS + name: one for name, one in model.prompts.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if changed:
            tensors = {name: one.detach().cpu().clone().contiguous() for name, one in changed.items()}
            write_atomically(folder / TABLES, save(tensors, metadata={"format": "pt"}))
        else:
            (folder / TABLES).unlink(missing_ok=True)  # an earlier save's
        if head_names(model):
            write_json(folder / LABELS_FILE, {name: getattr(model.config, name, None) for name in LABELS})
    except OSError as error:
        raise BundleError(f"The model could not be saved to {folder}: {error.strerror or error}.") from error


def head_names(model: Any) -> set[str]:
    """The parameters of a classifier's head, which are trained here; nothing of other models."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return set()
    base, prompt = f"{model.base_model_prefix}.", PROMPTS
    return {name for name, _ in model.named_parameters() if not name.startswith((base, prompt))}


def is_only_a_head(folder: Path) -> bool:
    """Whether a classifier without a prompt was saved there."""
    written = (PROMPT_FILE, PEFT_CONFIG)
    return (folder / LABELS_FILE).is_file() and not any((folder / name).is_file() for name in written)


def labels_of(folder: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved classifier's config said of its labels, but for what is `given`. Raises `BundleError`."""
    saved = {} if folder is None else _read_labels(folder)
    if {"num_labels", "id2label"} & given.keys():
        saved = {name: saved[name] for name in saved.keys() & {"problem_type", "pad_token_id"}}
    return {**saved, **given}


def _read_labels(folder: Path) -> dict[str, Any]:
    path = folder / LABELS_FILE
    if not path.is_file():
        return {}
    content = read_object(path, BundleError, "copy the folder again")
    found = {name: content[name] for name in LABELS if content.get(name) is not None}
    names = found.get("id2label")
    numbers = found.get("num_labels", 1), found.get("pad_token_id", 0)
    if not all(isinstance(one, int) for one in numbers) or not isinstance(names, dict | None):
        raise BundleError(f"{path} does not say which labels there are; copy the folder again.")
    if names is not None:
        found["id2label"] = {int(key): str(value) for key, value in names.items() if str(key).isdecimal()}
    return found


def has_adapters(model: Any, options: dict[str, Any]) -> bool:
    """Whether peft's adapters in the model are what is to be saved. Raises `UsageError` where that is not clear."""
    if options.get("push_to_hub"):
        raise UsageError("Call model.push_to_hub(name) instead of save_pretrained(…, push_to_hub=True).")
    found = bool(getattr(model, "_hf_peft_config_loaded", False))
    if found and model.prompts is not None:
        raise UsageError(
            "This model has a prompt and adapters of peft's, whose files have the same names: set model.prompts = "
            "None to save the adapters, or model.delete_adapter(name) to save the prompt."
        )
    return found


def refuse_blocks(config: PretrainedConfig, state: Mapping[str, Any]) -> None:
    """Raises `UsageError` for a state dict with weights of blocks."""
    pattern = families.block_key_pattern(config)
    block = next((key for key in state if pattern.match(key)), None)
    if block is not None:
        raise UsageError(
            f"This state holds weights of blocks ({block}), which are on the servers: leave them out to load the "
            "client's part, or serve the other checkpoint with `corolla serve`."
        )


def saved_prompt(model: Any, folder: Path, *, name: str, identity: str) -> Prompt:
    """The prompt in `folder` for a model of that name and identity.

    Raises `BundleError`, and `UnsupportedFamily` for a prefix or adapter that the model's blocks cannot take.
    """
    beside = bool(head_names(model))
    prompt = load_prompt(folder, model_name=name, identity=identity, config=model.config, with_head=beside)
    if isinstance(prompt, KeyValuePrefix):
        check_prefix(model.config)
    elif isinstance(prompt, LoraAdapter):
        check_adapter(model.config, prompt.targets)
    return prompt


@dataclass(frozen=True)
class Tables:
    """What a saved model says of embeddings and head, by name, and the file that it stands in."""

    path: Path
    tensors: dict[str, Tensor]


def read_tables(folder: Path, *, with_head: bool) -> Tables:
    """The tables of a saved model; none where they were not changed.

    `with_head` says that the model has a head of its own, which peft writes beside its prompt.
    """
    path, start = folder / TABLES, ""
    if with_head and not path.is_file():
        path, start = folder / PEFT_WEIGHTS, PEFT_BASE  # of peft, beside its prompt
    if not path.is_file():
        return Tables(path, {})
    try:
        # Copied: a mapped file that is truncated later would kill the process.
        found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} is missing or truncated; copy the folder again.") from error
    named = {name.removeprefix(start): tensor for name, tensor in found.items() if name.startswith(start)}
    own = {name: one for name, one in named.items() if not name.startswith(PROMPTS) and ".lora_" not in name}
    return Tables(path, own)


def take_tables(model: Any, tables: Tables) -> None:
    """Give a model that was just made the tables that were saved. Raises `BundleError` where they do not fit it."""
    if not tables.tensors:
        return
    own = dict(model.named_parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, tensor in tables.tensors.items():
        wide = any(own.get(name) is one.weight for one in (embedding, head) if one is not None)
        if (
            name not in own
            or tensor.shape[1:] != own[name].shape[1:]
            or not (wide or tensor.shape == own[name].shape)
        ):
            raise BundleError(f"{tables.path} holds {name}, which does not fit this model: it is another's.")
        if wide and len(tensor) != len(own[name]) and len(tensor) != embedding.num_embeddings:
            model.resize_token_embeddings(len(tensor), mean_resizing=False)
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            own = dict(model.named_parameters())
    try:
        model.load_state_dict(tables.tensors, strict=False)
    except RuntimeError as error:
        raise BundleError(f"{tables.path} does not fit this model: it is another's.") from error
