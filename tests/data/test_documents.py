"""Texts to study: what is read, what is refused in one sentence, and the pieces that a text falls into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tuning.tiny_setup import byte_tokenizer

from corolla.data.documents import Document, chunks_of, read_documents
from corolla.errors import UsageError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.pdf", b"%PDF-1.7", "is not .txt or .md"),
        ("notes", b"text", "is not .txt or .md"),
        ("empty.txt", b" \n\t", "holds no text"),
        ("latin.txt", "Köln".encode("latin-1"), "not text in UTF-8"),
        ("zeros.md", b"a\0b", "no text"),
        ("gone.txt", None, "cannot be read"),
        ("folder.txt", "folder", "is a folder"),
        (f"{'n' * 300}.txt", None, "cannot be read"),
    ],
)
def test_what_is_no_text_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes | str | None, words: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
    with pytest.raises(UsageError, match=words):
        read_documents([path])


def test_files_are_read_once_each_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "b.MD").write_bytes("\ufeffOne.".encode())
    (tmp_path / "a.txt").write_text("Two.")
    paths = [tmp_path / "b.MD", tmp_path / "a.txt", tmp_path / "." / "b.MD"]
    assert read_documents(paths) == [Document("b.MD", "One."), Document("a.txt", "Two.")]
    with pytest.raises(UsageError, match="nothing to study"):
        read_documents([])


@pytest.mark.parametrize(
    "text",
    [
        "One. Two! Three?\nFour\n\n\n  Five, six. " * 9,
        "x" * 200,
        "\n\n\n" + "word " * 60,
        'He said "no."  Then (he left.) ' * 8,
        "\u4e00\u3002\u4e8c\uff01\u4e09\uff1f" * 20,
    ],
)
@pytest.mark.parametrize("most", [16, 50, 10_000])
def test_pieces_joined_are_the_text_and_none_is_too_long(tokenizer: Any, text: str, most: int) -> None:
    documents = [Document("a", text), Document("b", text)]
    found = chunks_of(documents, tokenizer, most)
    for one in documents:
        assert "".join(chunk.text for chunk in found if chunk.document == one.name) == text
    for chunk in found:
        assert chunk.text.strip()
        assert chunk.tokens <= most
        assert chunk.tokens == len(tokenizer(chunk.text, add_special_tokens=False).input_ids)


def test_long_stretches_of_space_are_no_pieces_and_make_none_too_long(tokenizer: Any) -> None:
    found = chunks_of(
        [Document("a", " " * 500 + "One two. " + "\n" * 500 + "Three." + " " * 500)], tokenizer, 32
    )
    assert " ".join(chunk.text.strip() for chunk in found) == "One two. Three."
    assert all(chunk.text.strip() for chunk in found)
    assert max(chunk.tokens for chunk in found) <= 32


def test_pieces_end_where_sentences_do(tokenizer: Any) -> None:
    found = chunks_of([Document("a", "One two three. Four five six. Seven.")], tokenizer, 20)
    assert [chunk.text for chunk in found] == ["One two three. ", "Four five six. ", "Seven."]
