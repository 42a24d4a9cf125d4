"""Where a checkpoint's files are, and what every such place can do.

Invariant: a file is named by an index or is the one file that there is; names that lead out of the
checkpoint are refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.errors import CheckpointError, UnknownModel
from corolla.json_files import read_object
from corolla.models.checkpoints.shards import ReadRange, TensorEntry, local_reader, read_entries

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Source(ABC):
    """Where a checkpoint's files are."""

    location: str  # what transformers' own loaders (tokenizers) take: a folder or a hub name
    commit: str | None = None  # what fixes the content for ever, where there is such a thing

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
    def size(self, file: str) -> int:
        """How many bytes one file has."""

    def entries(self, file: str) -> dict[str, TensorEntry]:
        """The tensors of one file, by name, without fetching it."""
        return read_entries(self.reader(file), f"{self.location}/{file}")

    def prepare(self, files: Collection[str]) -> None:  # noqa: B027  # most places have nothing to make
        """Make what has to be made before tensors of these files are read."""

    def bring(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> Mapping[str, ReadRange]:
        """Reads of these tensors' bytes, by file; what is elsewhere is brought here first."""
        return {file: self.reader(file) for file in wanted}

    @abstractmethod
    def fetch(self, file: str) -> Path:
        """The whole file, here."""

    @abstractmethod
    def optional(self, file: str) -> Path | None:
        """A small file, here; None where the checkpoint has none."""

    def loader_arguments(self) -> dict[str, Any]:
        """What transformers' own loaders have to be told besides `location`."""
        return {}


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

    def size(self, file: str) -> int:
        return self.fetch(file).stat().st_size

    def fetch(self, file: str) -> Path:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the checkpoint's index names it.")
        return path

    def optional(self, file: str) -> Path | None:
        path = self.folder / file
        return path if path.is_file() else None


def parse_index(path: Path) -> dict[str, str]:
    """The weight map of an index file; file names that leave the folder are refused."""
    weight_map = read_json(path).get("weight_map")
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
            f"{place} holds only pickled weights (.bin), which can run code when read; convert it to "
            "safetensors."
        )
    return CheckpointError(f"{place} holds no safetensors file, so there are no weights to read.")


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, or a `CheckpointError` that names it."""
    return read_object(path, CheckpointError, "download or copy it again")
