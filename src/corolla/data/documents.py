"""Texts to study, and the pieces of them that a model reads at once.

Invariant: the pieces of a document, joined, are its text, but for stretches of nothing but space that are as long as
a piece.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.data.cuts import all_ids
from corolla.errors import UsageError
from corolla.files import read_bounded

KINDS = (".txt", ".md", ".markdown")
ENDS = ".!?\\n\u3002\uff01\uff1f"  # the last three of Chinese and Japanese
# With what ends it, and the space behind that.
SENTENCE = re.compile(rf"[^{ENDS}]*(?:[{ENDS}]+[\"')\]\u201d\u2019]*\s*|$)")


@dataclass(frozen=True)
class Document:
    """A text and what its file is called."""

    name: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A piece of a document, in whole sentences where they fit."""

    document: str
    text: str
    tokens: int  # about


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """Text files, each once. Raises `UsageError` for what is no text, or has none in it."""
    found = {os.path.realpath(path): Path(path) for path in paths}
    if not found:
        raise UsageError("There is nothing to study: name one or more files of text (.txt or .md).")
    return [_read(path) for path in found.values()]


def _read(path: Path) -> Document:
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder: name the files in it that are to be studied.")
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path} is not .txt or .md: turn it into plain text first, and study that.")
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: save it as that first.") from error
    if "\0" in text:
        raise UsageError(f"{path} holds bytes that are no text: turn it into plain text first.")
    if not text.strip():
        raise UsageError(f"{path} holds no text.")
    return Document(path.name, text)


def chunks_of(documents: Sequence[Document], tokenizer: Any, most: int) -> list[Chunk]:
    """The documents in pieces of about `most` tokens at most."""
    return [chunk for one in documents for chunk in _chunks(one, tokenizer, most)]


def _chunks(document: Document, tokenizer: Any, most: int) -> Iterator[Chunk]:
    text, tokens = "", 0
    for piece, count in _pieces(SENTENCE.findall(document.text), tokenizer, most):
        if tokens + count > most:
            if text.strip():
                yield Chunk(document.name, text, tokens)
            text, tokens = "", 0
        text, tokens = text + piece, tokens + count
    if text.strip():
        yield Chunk(document.name, text, tokens)


def _pieces(texts: Sequence[str], tokenizer: Any, most: int) -> Iterator[tuple[str, int]]:
    """Sentences with their numbers of tokens; what is too long by itself is halved."""
    for text, ids in zip(texts, all_ids(tokenizer, texts), strict=True):
        if len(ids) > most and len(text) > 1:
            half = len(text) // 2
            yield from _pieces([text[:half], text[half:]], tokenizer, most)
        else:
            yield text, len(ids)
