"""Checkpoints on the Hugging Face hub: parts of files are read where they are, whole files are fetched.

Invariant: one checkpoint means one commit; what a name pointed to when it was opened is what is read until
the end. Without a network, what the hub's own cache on this machine holds is used, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
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

from corolla.errors import CheckpointError, CorollaError, UnknownModel
from corolla.models.checkpoints.shards import ReadRange, TensorEntry, local_reader, read_entries
from corolla.models.checkpoints.source import INDEX_FILE, SINGLE_FILE, Source, no_safetensors, parse_index

PETALS_SUFFIX = "-petals"  # Petals published copies cut into blocks; the originals hold the same weights
REACH_SECONDS = 5.0


def original_name(name: str) -> str:
    """`bigscience/bloom-7b1-petals` to `bigscience/bloom-7b1`; other names as they are."""
    return name.removesuffix(PETALS_SUFFIX)


class HubRepo(Source):
    """A checkpoint on the hub, at one commit."""

    def __init__(
        self, name: str, *, revision: str | None, token: str | None, cache_dir: str | Path | None
    ) -> None:
        """Finds the commit. Raises `UnknownModel` when there is no such model, or no way to ask."""
        self.location = original_name(name)
        self._revision = revision
        self._token = token
        self._cache_dir = cache_dir
        self._online = hub_answers()
        self._config = self._download("config.json")
        # Files lie in the hub's cache under snapshots/<commit>; from here on that commit is meant.
        self._revision = self.commit = self._config.parent.name

    def config_path(self) -> Path:
        return self._config

    def weight_map(self) -> dict[str, str]:
        try:
            return parse_index(self._download(INDEX_FILE))
        except _NoSuchFile:
            pass
        try:
            return dict.fromkeys(read_entries(self.reader(SINGLE_FILE), SINGLE_FILE), SINGLE_FILE)
        except _NoSuchFile:
            raise no_safetensors(self.location, has_pickles=True) from None

    def reader(self, file: str) -> ReadRange:
        cached = try_to_load_from_cache(self.location, file, self._cache_dir, self._revision)
        if isinstance(cached, str):
            return local_reader(Path(cached))
        return self._remote_reader(file)

    def bring(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> Mapping[str, ReadRange]:
        return {file: local_reader(self.fetch(file)) for file in wanted}

    def fetch(self, file: str) -> Path:
        return self._download(file)

    def optional(self, file: str) -> Path | None:
        try:
            return self._download(file)
        except (_NoSuchFile, UnknownModel):  # the latter: it is not in the cache, and there is no network
            return None

    def loader_arguments(self) -> dict[str, Any]:
        return {
            "revision": self._revision,
            "token": self._token,
            "cache_dir": self._cache_dir,
            "local_files_only": not self._online,
        }

    def _remote_reader(self, file: str) -> ReadRange:
        url = hf_hub_url(self.location, file, revision=self._revision)
        headers = build_hf_headers(token=self._token)

        def read(offset: int, size: int) -> bytes:
            if size == 0:
                return b""
            if not self._online:
                raise _unreachable(self.location)
            wanted = {**headers, "Range": f"bytes={offset}-{offset + size - 1}"}
            try:
                answer: Any = get_session().get(url, headers=wanted, timeout=60.0)
            except HTTPError as error:
                raise _unreachable(self.location) from error
            if answer.status_code == 404:
                raise _NoSuchFile(f"{self.location} has no file {file}.")
            if answer.status_code != 206 or len(answer.content) != size:
                raise CheckpointError(
                    f"{self.location}/{file} cannot be read in parts: the hub answered {answer.status_code}."
                )
            return bytes(answer.content)

        return read

    def _download(self, file: str) -> Path:
        try:
            path = hf_hub_download(
                self.location,
                file,
                revision=self._revision,
                token=self._token,
                cache_dir=self._cache_dir,
                local_files_only=not self._online,
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
                return _NoSuchFile(f"{self.location} has no file {file} on this machine.")
            case LocalEntryNotFoundError():
                return _unreachable(self.location)
            case EntryNotFoundError() if file == "config.json":
                return UnknownModel(f"{self.location} on the hub has no config.json, so it is not a model.")
            case EntryNotFoundError():
                return _NoSuchFile(f"{self.location} has no file {file}.")
            case _:
                return CheckpointError(f"{self.location}/{file} cannot be fetched from the hub: {error}.")


class _NoSuchFile(CheckpointError):
    """The repository does not have this file."""


def hub_answers() -> bool:
    """Whether the hub can be reached now; asked once, since the hub's client waits half a minute in vain."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except HTTPError:
        return False
    return True


def _unreachable(name: str) -> UnknownModel:
    return UnknownModel(
        f"There is no model {name} on this machine, and the hub cannot be reached; give a local folder or "
        "connect to a network."
    )
