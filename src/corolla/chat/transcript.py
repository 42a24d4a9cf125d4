"""A chat on disk, written as it goes: a header, then a line of JSON for each thing that happened.

Invariant: the header is there whole before anything else; every line that ends in a line break was written
whole, so a kill loses at most the line that was being written. Only its owner can read the file.

    {"format": 1, "corolla": …, "partner": …, "model": …, "prompt": …, "rendering": …, "sampling": …, …}
    {"said": …, "reply": …, "reply_ids": […], "kept": 3}       kept: the exchanges that the model still sees
    {"undo": true, "kept": 2}
    {"reset": true}
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from corolla.chat.window import Exchange
from corolla.errors import TranscriptError
from corolla.files import read_bounded, write_atomically
from corolla.json_files import JsonError, parse_object
from corolla.models.checkpoints.prompt_files import DEEP_WEIGHTS, PEFT_WEIGHTS
from corolla.places import data_root
from corolla.text import one_line
from corolla.version import __version__

FORMAT_VERSION = 1


def chats_folder() -> Path:
    """Where chats are kept."""
    return data_root() / "chats"


def prompt_digest(folder: Path) -> str:
    """Which vectors a bundle's folder holds."""
    digest = hashlib.sha256()
    for name in (PEFT_WEIGHTS, DEEP_WEIGHTS):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ChatInfo:
    """Whom a chat is with, and how."""

    partner: str  # what was given to `corolla chat`: a bundle's folder or a model's name
    model: str  # the checkpoint's identity
    prompt: str | None  # the digest of the bundle's vectors
    rendering: dict[str, Any]
    sampling: dict[str, Any]
    system: str | None
    max_context: int
    revision: str | None = None
    swarm: dict[str, Any] = field(default_factory=dict)  # where it is and how it is used


@dataclass(frozen=True)
class SavedChat:
    """What a transcript says."""

    path: Path
    info: ChatInfo
    exchanges: tuple[Exchange, ...]
    kept: int  # so many of the newest exchanges are what the model sees
    size: int  # bytes, without a last line that was cut off
    cut_off: bool

    def check_same(self, info: ChatInfo) -> None:
        """Raises `TranscriptError` when the chat was with another model or bundle."""
        if (self.info.model, self.info.prompt) != (info.model, info.prompt):
            raise TranscriptError(
                f"The chat in {self.path} was with {self.info.partner} (model {self.info.model[:8]}, "
                f"{_prompt_name(self.info.prompt)}), not with {info.partner} (model {info.model[:8]}, "
                f"{_prompt_name(info.prompt)}): go on with the one that it was with, or begin without --continue."
            )


def _prompt_name(prompt: str | None) -> str:
    return "no prompt" if prompt is None else f"prompt {prompt[:8]}"


class Transcript:
    """The file of a chat that is under way; held by one process at a time."""

    def __init__(self, path: Path, handle: int, size: int, *, fresh: bool) -> None:
        self.path = path
        self._handle = handle
        self._size = size
        self._fresh = fresh  # nothing was said yet
        self._waiting = b""  # lines that the disk did not take

    @classmethod
    def begin(cls, info: ChatInfo, path: Path | None = None) -> Transcript:
        """A new file, in the user's data directory unless `path` is given. Raises `TranscriptError`."""
        header = {"format": FORMAT_VERSION, "corolla": __version__, **asdict(info)}
        content = _line(header)
        try:
            if path is None:
                folder = chats_folder()
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
            elif path.exists():
                raise TranscriptError(
                    f"{path} exists already: go on with the chat in it with --continue, or give another file."
                )
            write_atomically(path, content, mode=0o600)
            return cls(path, _opened(path), len(content), fresh=True)
        except OSError as error:
            raise TranscriptError(
                f"The chat cannot be kept in {path or chats_folder()} ({error.strerror or error}): name a file "
                "elsewhere with --transcript, or do not keep it, with --no-save."
            ) from error

    @classmethod
    def go_on(cls, saved: SavedChat) -> Transcript:
        """Append to a chat's file; a last line that was cut off is removed. Raises `TranscriptError`."""
        try:
            handle = _opened(saved.path)
            os.ftruncate(handle, saved.size)
        except OSError as error:
            raise _not_written(saved.path, error) from error
        return cls(saved.path, handle, saved.size, fresh=False)

    def add(self, exchange: Exchange, kept: int) -> None:
        """Note an exchange. Raises `TranscriptError`; the next call, or `close`, tries again."""
        self._write(
            {
                "said": exchange.said,
                "reply": exchange.reply,
                "reply_ids": list(exchange.reply_ids),
                "kept": kept,
            }
        )

    def undo(self, kept: int) -> None:
        """Note that the last exchange is forgotten. Raises `TranscriptError`."""
        self._write({"undo": True, "kept": kept})

    def reset(self) -> None:
        """Note that all is forgotten. Raises `TranscriptError`."""
        self._write({"reset": True})

    def _write(self, content: dict[str, Any]) -> None:
        self._fresh = False
        self._waiting += _line(content)
        self._flush()

    def _flush(self) -> None:
        try:
            left = memoryview(self._waiting)
            while left:
                left = left[os.write(self._handle, left) :]
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)  # no half line before the next attempt
            raise _not_written(self.path, error) from error
        self._size += len(self._waiting)
        self._waiting = b""

    def close(self) -> None:
        """Let go of the file; removes it when nothing was said. Safe to call twice."""
        if self._handle < 0:
            return
        with contextlib.suppress(OSError, TranscriptError):
            if self._fresh:
                self.path.unlink()
            elif self._waiting:
                self._flush()
        os.close(self._handle)
        self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _line(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _opened(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise TranscriptError(f"Another process is writing the chat in {path}: end it first.") from error
    return handle


def _not_written(path: Path, error: OSError) -> TranscriptError:
    return TranscriptError(
        f"The chat could not be written to {path} ({error.strerror or error}): make room or give another "
        "--transcript; what was said before is kept, corolla chat --continue goes on with it."
    )


# --- reading ----------------------------------------------------------------------------------------------


def latest_chat() -> Path:
    """The file of the chat that was last written to. Raises `TranscriptError` when there is none."""

    def changed(path: Path) -> float:
        return path.stat().st_mtime

    for path in sorted(chats_folder().glob("*.jsonl"), key=changed, reverse=True):
        with path.open("rb") as file:
            if file.readline() and file.readline().endswith(b"\n"):  # something was said
                return path
    raise TranscriptError(f"There is no chat to go on with in {chats_folder()}; name one with --transcript.")


def read_chat(path: Path) -> SavedChat:
    """Read a transcript. Raises `TranscriptError`; a last line that was cut off is left out."""
    try:
        content = read_bounded(path)
    except OSError as error:
        raise TranscriptError(f"The chat in {path} cannot be read ({error.strerror or error}).") from error
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines(keepends=True)
    cut_off = len(whole) < len(content)
    if lines and not cut_off and len(lines) > 1 and _parsed(lines[-1]) is None:
        whole, cut_off = whole[: -len(lines.pop())], True
    info = _info(path, _parsed(lines[0]) if lines else None)
    exchanges: list[Exchange] = []
    kept = 0
    for number, line in enumerate(lines[1:], start=2):
        happened = _parsed(line)
        try:
            kept = _apply(happened, exchanges)
        except (KeyError, ValueError, IndexError, msgspec.ValidationError) as error:
            raise TranscriptError(
                f"Line {number} of {path} is damaged: give another --transcript."
            ) from error
    return SavedChat(path, info, tuple(exchanges), kept, len(whole), cut_off)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_object(line)
    except JsonError:
        return None


def _info(path: Path, header: dict[str, Any] | None) -> ChatInfo:
    if header is None or header.get("format") != FORMAT_VERSION:
        raise TranscriptError(f"{path} is not a chat that this version of Corolla has kept.")
    try:
        return msgspec.convert(header, ChatInfo)
    except msgspec.ValidationError as error:
        raise TranscriptError(f"The header of {path} is not a chat's ({one_line(error)}).") from error


def _apply(happened: dict[str, Any] | None, exchanges: list[Exchange]) -> int:
    """Do to `exchanges` what a line says; gives how many the model sees."""
    if happened is None:
        raise ValueError
    if happened.get("reset"):
        exchanges.clear()
        return 0
    if happened.get("undo"):
        exchanges.pop()
    else:
        exchanges.append(msgspec.convert(happened, Exchange))
    kept = happened["kept"]
    if not isinstance(kept, int) or not 0 <= kept <= len(exchanges):
        raise ValueError
    return kept
