"""What the chat prints, and what its commands do, with a real model behind it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.chat.engine import ChatEngine
from corolla.chat.repl import HELP, Repl, read_lines
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer, RenderSettings
from corolla.errors import SwarmUnavailable
from corolla.text import printable

Screen = Callable[[], str]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    folder = write_tiny("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as made:
        yield made


@pytest.fixture
def engine(swarm: MemorySwarm) -> Iterator[ChatEngine]:
    with chat_over(swarm) as made:
        yield made


def chat_over(swarm: MemorySwarm) -> ChatEngine:
    sampling = SamplingSettings(temperature=0, max_new_tokens=8)
    return ChatEngine(
        swarm.model(patience=0.2),
        Renderer(byte_tokenizer(), RenderSettings()),
        sampling=sampling,
        max_context=400,
    )


def printed(engine: ChatEngine, lines: Sequence[str] | None) -> list[str]:
    """Everything that is printed, line by line."""
    output = io.StringIO()
    Repl(engine, Console(file=output, width=40)).run(lines)
    return output.getvalue().split("\n")


def reply_line(engine: ChatEngine, index: int) -> str:
    return "Bot: " + printable(engine.transcript()[2 * index + 1]["content"]).lstrip()


def test_lines_and_replies_read_as_a_dialogue(engine: ChatEngine) -> None:
    found = printed(engine, ["one", "two"])
    expected = f"You: one\n{reply_line(engine, 0)}\n\nYou: two\n{reply_line(engine, 1)}\n\n"
    assert found == expected.split("\n")
    assert reply_line(engine, 0) != reply_line(engine, 1)


def test_lines_of_a_pipe_are_read_from_stdin(engine: ChatEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\r\n\n  two  "))
    assert printed(engine, None)[0] == "You: one"
    assert [message["content"] for message in engine.transcript()[::2]] == ["one", "two"]


def test_lines_are_read_one_at_a_time() -> None:
    stream = io.StringIO("one\ntwo\n")
    assert next(read_lines(stream)) == "one"
    assert stream.readline() == "two\n"


@pytest.mark.parametrize("word", ["/quit", "/exit", " /quit "])
def test_quit_ends_the_chat(engine: ChatEngine, word: str) -> None:
    assert printed(engine, [word, "never said"]) == [f"You: {word}", ""]
    assert engine.transcript() == []


def test_undo_and_reset(engine: ChatEngine) -> None:
    found = printed(engine, ["one", "two", "/undo", "three", "/reset", "/undo", "four"])
    assert "Forgotten: two" in found
    assert "The conversation begins anew." in found
    assert "There is nothing to undo." in found
    assert [message["content"] for message in engine.transcript()[::2]] == ["four"]


def test_save_says_where(engine: ChatEngine, tmp_path: Path) -> None:
    path = tmp_path / "my chat.json"
    found = printed(engine, ["one", f"/save {path}", "/save", f"/save {tmp_path}/no/such", "two"])
    assert f"Saved to {path}" in found
    assert "Say where to: /save FILE" in found
    assert any("could not be saved" in line for line in found)
    assert json.loads(path.read_text())[0]["messages"] == engine.transcript()[:2]
    assert len(engine.transcript()) == 4, "the chat went on"


def test_help_and_unknown_commands(engine: ChatEngine) -> None:
    found = printed(engine, ["/help", "/dance now"])
    assert "\n".join(found[1:-2]).startswith(HELP)
    assert "There is no command /dance; /help lists them." in found
    assert engine.transcript() == []


def test_a_reply_of_nothing_is_said_to_be_nothing(swarm: MemorySwarm) -> None:
    with chat_over(swarm) as first:
        "".join(first.reply("one"))
        token = first.tokens[len("one") + len("\n-----\n")]
    with chat_over(swarm) as engine:
        engine._end_ids = frozenset({token})
        assert printed(engine, ["one"]) == ["You: one", "(nothing was said)", ""]


def test_from_a_pipe_an_error_ends_the_chat(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path, vocab_size=VOCABULARY)
    with MemorySwarm(folder, [(0, 4)]) as swarm, chat_over(swarm) as engine:
        swarm.kill(next(iter(swarm.servers)))
        with pytest.raises(SwarmUnavailable):
            printed(engine, ["one", "two"])


def test_nothing_that_steers_the_terminal_is_printed() -> None:
    assert printable("a\x1b[2J\x07\r\x9bb\n\tc é 😀") == "a[2Jb\n\tc é 😀"
