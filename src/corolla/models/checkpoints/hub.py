"""Checkpoints on the Hugging Face hub: parts of files are read where they are, and only what is needed is fetched.

Invariant: one checkpoint means one commit; what a name pointed to when it was opened is what is read until
the end. A file of which nearly all is needed goes whole to the hub's own cache, where other programs find it; of
others the pieces are kept that hold the tensors (`pieces.py`). Without a network, what is on this machine is used, and
nothing is waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP client's
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from tqdm.auto import tqdm

from corolla.errors import CheckpointError, CorollaError, UnknownModel
from corolla.files import write_atomically
from corolla.models.checkpoints.pieces import PIECE_BYTES, Pieces
from corolla.models.checkpoints.remote import NoSuchFile, NotInParts, RemoteFile
from corolla.models.checkpoints.shards import ReadRange, TensorEntry, local_reader, read_entries
from corolla.models.checkpoints.source import INDEX_FILE, SINGLE_FILE, Source, no_safetensors, parse_index
from corolla.places import cache_root
from corolla.text import one_line

PETALS_SUFFIX = "-petals"  # Petals published copies cut into blocks; the originals hold the same weights
CONFIG_FILE = "config.json"
REACH_SECONDS = 5.0
NEARLY_ALL = 0.9  # of a file: then it is fetched whole
HEADER_STARTS = (0, 8)  # where the two reads begin that a safetensors file's header takes


def original_name(name: str) -> str:
    """`bigscience/bloom-7b1-petals` to `bigscience/bloom-7b1`; other names as they are."""
    return name.removesuffix(PETALS_SUFFIX)


class HubRepo(Source):
    """A checkpoint on the hub, at one commit."""

    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | Path | None,
        endpoint: str | None = None,
        piece_bytes: int = PIECE_BYTES,
        model_file: str | None = None,
    ) -> None:
        """Finds the commit. Raises `UnknownModel` when there is no such model, or no way to ask.

        `endpoint` is where the hub is, if not where its client thinks. `model_file` is the one that is all of the
        model (a GGUF file), where there need not be a config.
        """
        self.location = original_name(name)
        self._revision = revision
        self._token = token
        self._cache_dir = cache_dir
        self._endpoint = endpoint
        self._piece_bytes = piece_bytes
        self._online = hub_answers(endpoint)
        if model_file is not None:
            self._revision = self.commit = self._commit_of(model_file)
        else:
            # Files lie in the hub's cache under snapshots/<commit>; from here on that commit is meant.
            self._revision = self.commit = self.config_path().parent.name
        self._pieces_root = (
            cache_root(cache_dir) / "pieces" / f"{self.location.replace('/', '--')}@{self.commit}"
        )
        self._remote: dict[str, RemoteFile] = {}
        self._whole_only: set[str] = set()  # files that the server does not send in parts

    def config_path(self) -> Path:
        return self._download(CONFIG_FILE)

    def _commit_of(self, file: str) -> str:
        """The commit that is meant, noted for when there is no network."""
        noted = (
            cache_root(self._cache_dir)
            / "pieces"
            / f"{self.location.replace('/', '--')}@{self._revision or 'main'}.commit"
        )
        if not self._online:
            with contextlib.suppress(OSError):
                return noted.read_text()
            raise _unreachable(f"{self.location}/{file}")
        url = hf_hub_url(self.location, file, revision=self._revision, endpoint=self._endpoint)
        try:
            found = get_hf_file_metadata(url, token=self._token)
        except (HfHubHTTPError, HTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
            raise self._explained(error, file) from error
        if found.commit_hash is None:
            raise CheckpointError(f"The hub does not say which commit of {self.location} holds {file}.")
        _note(noted, found.commit_hash.encode())
        return found.commit_hash

    def weight_map(self) -> dict[str, str]:
        try:
            return parse_index(self._download(INDEX_FILE))
        except NoSuchFile:
            pass
        try:
            return dict.fromkeys(read_entries(self.reader(SINGLE_FILE), SINGLE_FILE), SINGLE_FILE)
        except NoSuchFile:
            raise no_safetensors(self.location, has_pickles=True) from None

    def reader(self, file: str) -> ReadRange:
        cached = self._cached(file)
        return self._read_there(file) if cached is None else local_reader(cached)

    def size(self, file: str) -> int:
        """The file's size, noted when it was first asked for. Raises `NotInParts`."""
        noted = self._pieces_root / file / "size"
        with contextlib.suppress(OSError, ValueError):
            return int(noted.read_text())
        if not self._online:
            raise _unreachable(self.location)
        size = self._remote_file(file).size()
        _note(noted, str(size).encode())
        return size

    def bring(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> Mapping[str, ReadRange]:
        readers: dict[str, ReadRange] = {}
        to_fetch: list[tuple[str, Pieces, list[int]]] = []
        for file, entries in wanted.items():
            pieces, missing = self._in_pieces(file, entries)
            if pieces is None:
                readers[file] = local_reader(self._cached(file) or self._download(file))
            else:
                readers[file] = pieces.read
                to_fetch.append((file, pieces, missing))
        total = sum(pieces.nbytes(missing) for _, pieces, missing in to_fetch)
        if not total:
            return readers
        with _Bar(total=total, unit="B", unit_scale=True, desc=self.location) as bar:
            for file, pieces, missing in to_fetch:
                try:
                    pieces.bring(missing, bar.update)
                except NotInParts:
                    readers[file] = local_reader(self._download(file))
        return readers

    def _in_pieces(self, file: str, entries: Sequence[TensorEntry]) -> tuple[Pieces | None, list[int]]:
        """The file's pieces, and which to fetch; None where the whole file is here, or better fetched whole."""
        if self._cached(file) is not None:
            return None, []
        try:
            size = self.size(file)
        except NotInParts:
            return None, []
        fetch = self._remote_file(file).read if self._online else self._away
        pieces = Pieces(self._pieces_root / file, size, fetch, self._piece_bytes)
        missing = pieces.missing((entry.offset, entry.size) for entry in entries)
        return (None, []) if pieces.nbytes(missing) >= NEARLY_ALL * size else (pieces, missing)

    def _cached(self, file: str) -> Path | None:
        """The whole file, if the hub's own cache has it."""
        cached = try_to_load_from_cache(self.location, file, self._cache_dir, self._revision)
        return Path(cached) if isinstance(cached, str) else None

    def _read_there(self, file: str) -> ReadRange:
        """Reads of small parts of a file that is not here; its header is noted, for when there is no network."""

        def read(offset: int, size: int) -> bytes:
            noted = self._pieces_root / file / f"{offset}+{size}"
            if offset in HEADER_STARTS:
                with contextlib.suppress(OSError):
                    if len(content := noted.read_bytes()) == size:
                        return content
            if file in self._whole_only:
                return local_reader(self._download(file))(offset, size)
            if not self._online:
                raise _unreachable(self.location)
            try:
                found = self._remote_file(file).read(offset, size)
            except NotInParts:
                self._whole_only.add(file)
                return local_reader(self._download(file))(offset, size)
            if offset in HEADER_STARTS:
                _note(noted, found)
            return found

        return read

    def _remote_file(self, file: str) -> RemoteFile:
        if file not in self._remote:
            url = hf_hub_url(self.location, file, revision=self._revision, endpoint=self._endpoint)
            headers = build_hf_headers(token=self._token)
            self._remote[file] = RemoteFile(f"{self.location}/{file}", url, headers)
        return self._remote[file]

    def _away(self, _offset: int, _size: int) -> bytes:
        raise _unreachable(self.location)

    def fetch(self, file: str) -> Path:
        return self._download(file)

    def optional(self, file: str) -> Path | None:
        try:
            return self._download(file)
        except (NoSuchFile, UnknownModel):  # the latter: it is not in the cache, and there is no network
            return None

    def loader_arguments(self) -> dict[str, Any]:
        return {
            "revision": self._revision,
            "token": self._token,
            "cache_dir": self._cache_dir,
            "local_files_only": not self._online,
        }

    def _download(self, file: str) -> Path:
        try:
            path = hf_hub_download(
                self.location,
                file,
                revision=self._revision,
                token=self._token,
                cache_dir=self._cache_dir,
                local_files_only=not self._online,
                endpoint=self._endpoint,
                # The library's own is silent where transformers' is.
                tqdm_class=_Bar if file.endswith((".safetensors", ".gguf")) else None,
            )
        except (HfHubHTTPError, HTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
            raise self._explained(error, file) from error
        return Path(path)

    def _explained(self, error: Exception, file: str) -> CorollaError:
        match error:
            case HFValidationError():
                return UnknownModel(
                    f"There is no model {self.location}: it is neither a folder nor a file here, nor a name "
                    "that the hub allows."
                )
            case GatedRepoError():
                return UnknownModel(
                    f"The hub shows {self.location} only to those who accepted its terms; accept them there "
                    "and give your token."
                )
            case RevisionNotFoundError():
                return UnknownModel(f"{self.location} has no revision {self._revision} on the hub.")
            case RepositoryNotFoundError():
                return UnknownModel(
                    f"There is no model {self.location}: it is neither a folder nor a file here, nor on the "
                    "hub (a private one needs a token)."
                )
            case LocalEntryNotFoundError() if file == INDEX_FILE and not self._online:
                return NoSuchFile(f"{self.location} has no file {file} on this machine.")
            case LocalEntryNotFoundError():
                return _unreachable(self.location)
            case EntryNotFoundError() if file == CONFIG_FILE:
                return UnknownModel(
                    f"{self.location} on the hub has no config.json, so it is not a model{self._of_gguf_files()}."
                )
            case EntryNotFoundError():
                return NoSuchFile(f"{self.location} has no file {file}.")
            case _:
                return CheckpointError(f"{self.location}/{file} cannot be fetched from the hub: {error}.")

    def _of_gguf_files(self) -> str:
        """What else the repository holds, for people."""
        with contextlib.suppress(HfHubHTTPError, HTTPError, OSError):
            found = HfApi(self._endpoint, token=self._token).model_info(
                self.location, revision=self._revision
            )
            files = sorted(
                one.rfilename for one in found.siblings or () if one.rfilename.lower().endswith(".gguf")
            )
            if files:
                return f" by itself: name one of its files, as {self.location}/{one_line(files[0])}"
        return ""


class _Bar(tqdm):  # type: ignore[misc]
    """A bar of bytes, on terminals only."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **{**more, "disable": None})


def _note(path: Path, content: bytes) -> None:
    """Keep something small for the next start, where that is possible."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def hub_answers(endpoint: str | None = None) -> bool:
    """Whether the hub can be reached now; asked once, since the hub's client waits half a minute in vain."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(endpoint or constants.ENDPOINT, timeout=REACH_SECONDS)
    except HTTPError:
        return False
    return True


def _unreachable(name: str) -> UnknownModel:
    return UnknownModel(
        f"There is no model {name} on this machine, and the hub cannot be reached; give a local folder or "
        "connect to a network."
    )
