"""`corolla study` as its user meets it: mistakes are one sentence before anything is started; it ends in a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.conftest import Refused
from tests.e2e.processes import corolla, processes
from tests.tuning.study_setup import OTHER, TEXT
from tests.tuning.tiny_setup import write_model

from corolla.tuning.bundle import load_bundle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def peers(tiny: Path) -> Iterator[list[str]]:
    with processes(tiny.parent) as started:
        yield ["--peers", started.swarm(tiny, ["0:4"])[0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["notes.pdf"], "notes.pdf is not .txt or .md"),
        (["empty.txt"], "empty.txt holds no text"),
        (["lamp.txt", "gone.txt"], "gone.txt cannot be read"),
        (["lamp.txt", "--questions", "1"], "--questions is 1"),
        (["lamp.txt", "--chunk-tokens", "3"], "--chunk-tokens is 3"),
        (["lamp.txt", "--prompt-tokens", "0"], "--prompt-tokens is 0"),
        (["lamp.txt", "--resume"], "There is no my-notes.questions.jsonl"),
        (["lamp.txt", "--facts", "gone.jsonl"], "gone.jsonl"),
        (["lamp.txt", "--max-length", "99"], "more than --max-length 99"),
        (["lamp.txt", "--chunk-tokens", "20", "--questions", "4"], "parts: give --questions"),
        (["lamp.txt", "--out", "old"], "old.questions.jsonl holds the questions of a study"),
    ],
)
def test_a_mistake_is_one_sentence(
    refused: Refused, tiny: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "lamp.txt").write_text(TEXT)
    (tmp_path / "old.questions.jsonl").write_text("{}\n")
    assert words in refused("study", *arguments, "--model", tiny)
    assert not list(tmp_path.glob("*.run"))


@pytest.mark.nightly
def test_documents_become_a_bundle_to_chat_with(tiny: Path, tmp_path: Path, peers: list[str]) -> None:
    for name, text in {"lamp.txt": TEXT, "bread.md": OTHER}.items():
        (tmp_path / name).write_text(text)
    documents = [str(tmp_path / "lamp.txt"), str(tmp_path / "bread.md")]
    small = ["--questions", "10", "--question-tokens", "6", "--answer-tokens", "5", "--chunk-tokens", "200"]
    small += [
        "--steps",
        "2",
        "--prompt-tokens",
        "4",
        "--max-length",
        "64",
        "--out",
        str(tmp_path / "notes"),
        "--model",
        str(tiny),
    ]
    done = corolla("study", *documents, *small, *peers)
    assert done.returncode == 0, done.stderr
    for words in (
        "2 parts; 10 questions",
        "questions 10/10",
        "will take about",
        "text in context",
        "corolla chat",
    ):
        assert words in done.stdout, words
    assert load_bundle(tmp_path / "notes").training["documents"] == ["lamp.txt", "bread.md"]
    again = corolla("study", *documents, *small, *peers)
    assert "notes exists already" in again.stderr
