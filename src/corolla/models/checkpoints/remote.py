"""Ranges of one file that an HTTP server has.

Invariant: what is given out is exactly the range that was asked for, of the file that it was when it was opened; a
connection that breaks is tried again, and a file that has become another one is never mixed with what it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP client's

from corolla.errors import CheckpointError, UnknownModel

TRIES = 6
FIRST_WAIT = 1.0  # seconds before the second try; twice as long before each further one
SILENCE_SECONDS = 60.0
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class NotInParts(Exception):
    """The server sends whole files only."""


class NoSuchFile(CheckpointError):
    """The repository does not have this file."""


class RemoteFile:
    """A file at `url`; `name` is for messages."""

    def __init__(self, name: str, url: str, headers: Mapping[str, str]) -> None:
        self._name = name
        self._url = url
        self._headers = {
            **headers,
            "Accept-Encoding": "identity",
        }  # ranges of the file, not of a compressed one
        self._size: int | None = None
        self._tag: str | None = None

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises `NotInParts`, `NoSuchFile`, `CheckpointError` for a file that changed, `UnknownModel` for a server that
        stays away.
        """
        if size == 0:
            return b""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                found = self._ask(offset, size)
            except HTTPError as error:
                last = str(error) or type(error).__name__
                continue
            if isinstance(found, bytes):
                return found
            last = found
        raise UnknownModel(
            f"{self._name} could not be read from the hub ({last:.80}): look after your network, then run the "
            "command again; what has come is kept."
        )

    def size(self) -> int:
        """How many bytes the file has. Raises what `read` raises."""
        if self._size is None:
            self.read(0, 1)
        assert self._size is not None  # `_check` has seen it
        return self._size

    def _ask(self, offset: int, size: int) -> bytes | str:
        """The bytes, or why to try again."""
        wanted = {**self._headers, "Range": f"bytes={offset}-{offset + size - 1}"}
        with get_session().stream("GET", self._url, headers=wanted, timeout=SILENCE_SECONDS) as answer:
            status = answer.status_code
            if status in (408, 429) or status >= 500:
                return f"it answers {status}"
            if status == 200:
                raise NotInParts
            if status == 404:
                raise NoSuchFile(f"{self._name} is not there, or no longer: the hub answers 404.")
            if status == 416:
                raise self._changed()
            if status != 206:
                raise CheckpointError(f"{self._name} cannot be read: the hub answers {status}.")
            self._check(answer, offset, size)
            body = bytearray()
            for part in answer.iter_bytes():
                body += part
                if len(body) > size:
                    break
        if len(body) != size:
            return f"{len(body)} of {size} bytes came"
        return bytes(body)

    def _check(self, answer: Any, offset: int, size: int) -> None:
        """Raises `CheckpointError` unless the range is the one asked for, of the file that it was."""
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        tag = answer.headers.get("ETag", "").removeprefix("W/")
        if match is None or (int(match[1]), int(match[2])) != (offset, offset + size - 1):
            raise NotInParts
        whole = int(match[3])
        if self._size not in (None, whole) or (self._tag and tag and self._tag != tag):
            raise self._changed()
        self._size, self._tag = whole, self._tag or tag

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self._name} is no longer the file on the hub that it was when it was opened: run the command again, or "
            "name a revision."
        )
