"""A chat on disk: what a kill leaves of it, and that going on is as if nothing had happened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.chat.engine import ChatEngine
from corolla.chat.sampling import SamplingSettings
from corolla.chat.transcript import ChatInfo, Transcript, latest_chat, read_chat
from corolla.chat.window import Exchange
from corolla.data.render import Renderer, RenderSettings
from corolla.errors import TranscriptError

INFO = ChatInfo("model", "a" * 32, None, {}, {}, None, 400)
ONE, TWO = Exchange("one", "eins\n", (3, 4)), Exchange("two é", "zwei", (5,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = write_tiny("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        yield swarm.model()


def engine(model: Any, journal: Transcript | None = None, context: int = 400) -> ChatEngine:
    renderer = Renderer(byte_tokenizer(), RenderSettings())
    sampling = SamplingSettings(temperature=0, max_new_tokens=12)
    return ChatEngine(
        model, renderer, sampling=sampling, max_context=context, system="Be kind.", journal=journal
    )


def say(chat: ChatEngine, *texts: str) -> list[str]:
    return ["".join(chat.reply(text)) for text in texts]


# --- going on ----------------------------------------------------------------------------------------------


def keep_talking(chat: ChatEngine) -> None:
    say(chat, "one", "two")


def change_of_mind(chat: ChatEngine) -> None:
    say(chat, "one", "two", "three")
    chat.undo()
    chat.undo()


def begin_anew(chat: ChatEngine) -> None:
    say(chat, "one")
    chat.reset()
    say(chat, "two")


def outgrow(chat: ChatEngine) -> None:
    say(chat, *(f"number {number} of many" for number in range(6)))


@pytest.mark.parametrize(
    ("happens", "context"),
    [(keep_talking, 400), (change_of_mind, 400), (begin_anew, 400), (outgrow, 150)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_chat_that_is_gone_on_with_says_what_the_uninterrupted_one_says(
    model: Any, tmp_path: Path, happens: Callable[[ChatEngine], None], context: int
) -> None:
    path = tmp_path / "chat.jsonl"
    with Transcript.begin(INFO, path) as journal, engine(model, journal, context) as chat:
        happens(chat)
        saved = read_chat(path)  # as a kill would leave it now
        tokens, transcript = chat.tokens, chat.transcript()
        expected = say(chat, "and now?", "and then?")
    with engine(model, context=context) as again:
        again.restore(saved.exchanges, saved.kept)
        assert again.tokens == tokens
        assert again.transcript() == transcript
        assert say(again, "and now?", "and then?") == expected


def test_what_is_gone_on_with_is_kept_too(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    with Transcript.begin(INFO, path) as journal, engine(model, journal) as chat:
        say(chat, "one")
    saved = read_chat(path)
    with Transcript.go_on(saved) as journal, engine(model, journal) as chat:
        chat.restore(saved.exchanges, saved.kept)
        say(chat, "two")
    assert [exchange.said for exchange in read_chat(path).exchanges] == ["one", "two"]


# --- the file ----------------------------------------------------------------------------------------------


def written(path: Path) -> Path:
    with Transcript.begin(INFO, path) as journal:
        journal.add(ONE, 1)
        journal.add(TWO, 2)
    return path


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    saved = read_chat(path)
    assert (saved.info, saved.exchanges, saved.kept, saved.cut_off) == (INFO, (ONE, TWO), 2, False)


def test_wherever_a_kill_cuts_it_off_the_whole_lines_count(tmp_path: Path) -> None:
    content = written(tmp_path / "whole.jsonl").read_bytes()
    header = content.index(b"\n") + 1
    for size in range(header, len(content)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:size])
        saved = read_chat(path)
        lines = content[:size].count(b"\n") - 1
        assert saved.exchanges == (ONE, TWO)[:lines]
        assert saved.cut_off == (not content[:size].endswith(b"\n"))
        with Transcript.go_on(saved) as journal:
            journal.add(TWO, 1)
        assert read_chat(path).exchanges == (*(ONE, TWO)[:lines], TWO)


def test_a_line_of_zeros_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl")
    with path.open("ab") as file:
        file.write(b"\0" * 20 + b"\n")
    saved = read_chat(path)
    assert (saved.exchanges, saved.cut_off) == ((ONE, TWO), True)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b'{"said": "x", "reply": "y", "reply_ids": [1.5], "kept": 1}',
        b'{"said": "x", "reply": "y", "reply_ids": [1], "kept": 9}',
        b'{"undo": true, "kept": 0}',
    ],
)
def test_damage_in_the_middle_is_said(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path / "chat.jsonl")
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]) + b"\n")
    with pytest.raises(TranscriptError, match=r"Line 2 of .*chat.jsonl is damaged"):
        read_chat(path)


def test_another_models_chat_is_refused_by_both_names(tmp_path: Path) -> None:
    saved = read_chat(written(tmp_path / "chat.jsonl"))
    saved.check_same(INFO)
    other = ChatInfo("bundle", INFO.model, "b" * 64, {}, {}, None, 400)
    with pytest.raises(TranscriptError, match=r"was with model .*not with bundle \(.*prompt bbbbbbbb\)"):
        saved.check_same(other)


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl")
    with pytest.raises(TranscriptError, match="exists already"):
        Transcript.begin(INFO, path)


def test_two_processes_do_not_write_one_chat(tmp_path: Path) -> None:
    saved = read_chat(written(tmp_path / "chat.jsonl"))
    with (
        Transcript.go_on(saved),
        pytest.raises(TranscriptError, match="Another process is writing"),
    ):
        Transcript.go_on(saved)


def test_the_latest_chat_is_one_in_which_something_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COROLLA_DATA", str(tmp_path))
    with pytest.raises(TranscriptError, match="no chat to go on with"):
        latest_chat()
    with Transcript.begin(INFO) as journal:
        journal.add(ONE, 1)
    os.utime(journal.path, (1, 1))
    with Transcript.begin(INFO, tmp_path / "chats" / "silent.jsonl") as silent:
        assert latest_chat() == journal.path
    assert not silent.path.exists()


def test_a_place_that_cannot_be_written_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_text("a file in the place of a folder")
    monkeypatch.setenv("COROLLA_DATA", str(tmp_path / "data"))
    with pytest.raises(TranscriptError, match=r"Not a directory.*--transcript.*--no-save"):
        Transcript.begin(INFO)


def test_a_full_disk_loses_nothing_of_a_chat(model: Any, tmp_path: Path) -> None:
    """The turn that the disk did not take is written with the next one that it takes."""
    path = tmp_path / "chat.jsonl"
    write, full = os.write, [False]

    def limited(handle: int, content: Any) -> int:
        if not full[0]:
            return write(handle, content)
        if len(content) > 20:
            return write(handle, content[:20])  # as disks do, before they refuse
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch, Transcript.begin(INFO, path) as journal:
        patch.setattr(os, "write", limited)
        with engine(model, journal) as chat:
            say(chat, "one")
            before = path.read_bytes()
            full[0] = True
            with pytest.raises(TranscriptError, match=r"No space left on device.*make room"):
                say(chat, "two")
            assert path.read_bytes() == before
            full[0] = False
            say(chat, "three")
            said = chat.transcript()
    exchanges = read_chat(path).exchanges
    assert [exchange.said for exchange in exchanges] == ["one", "two", "three"]
    assert [exchange.reply for exchange in exchanges] == [m["content"] for m in said[2::2]]
