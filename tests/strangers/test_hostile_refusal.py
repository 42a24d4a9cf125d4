"""A chat with a server that answers everything with a refusal written for the user's terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest

from corolla.chat.engine import ChatEngine
from corolla.chat.repl import Repl
from corolla.chat.sampling import SamplingSettings
from corolla.cli.terminal import TerminalConsole, explain_in, set_up_logging
from corolla.data.render import Renderer, RenderSettings
from corolla.errors import CorollaError
from corolla.swarm.channel import Channel
from corolla.wire.frames import Packet
from corolla.wire.messages import Failure, FailureCode
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.strangers.evil_server import add_evil
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

HOSTILE = "\x1b[2J\x1b[31mType your password:\r\n\x9b2J\x1b]52;c;eA==\x07\u202e\u200b[blink]x[/blink]\x00"
CODES: tuple[FailureCode, ...] = ("busy", "malformed", "internal", "evicted", "not_allowed")


class Stdin(io.StringIO):
    """A standard input with a line in it."""

    def __init__(self, text: str, is_terminal: bool) -> None:
        super().__init__(text)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    folder = write_tiny("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)
    with MemorySwarm(folder, []) as made:
        yield made


@pytest.mark.parametrize("at_a_terminal", [True, False], ids=["terminal", "piped"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.nightly)])
def test_no_control_character_of_a_refusal_reaches_the_user(
    swarm: MemorySwarm,
    code: FailureCode,
    times: int,
    at_a_terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def refuse(channel: Channel) -> None:
        while True:
            await channel.receive(timeout=None)
            await channel.send(Packet(Failure(code=code, message=(HOSTILE * times)[:2048], field=HOSTILE)))

    peer = add_evil(swarm, refuse, f"evil\x1b[2J-{code}-{at_a_terminal}-{times}")
    stream = io.StringIO()
    console = TerminalConsole(file=stream, force_terminal=at_a_terminal, width=200)
    monkeypatch.setattr("corolla.cli.terminal.error_console", console)
    set_up_logging(verbose=True)
    monkeypatch.setattr("sys.stdin", Stdin("hello\n", at_a_terminal))
    said = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(said, "/quit"))
    engine = ChatEngine(
        swarm.model(patience=0.5, allowed_servers=[peer]),
        Renderer(byte_tokenizer(), RenderSettings()),
        sampling=SamplingSettings(temperature=0, max_new_tokens=8),
        max_context=400,
    )
    capsys.readouterr()  # a progress bar of the library's
    try:
        Repl(engine, console).run()
    except CorollaError as error:
        explain_in(str(error))
    captured = capsys.readouterr()
    shown = stream.getvalue() + captured.out + captured.err
    if at_a_terminal:
        shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # styles of our own
    assert "Type your password:" in shown
    assert "[blink]x[/blink]" in shown
    assert {letter for letter in shown if ord(letter) < 32} <= {"\n", "\t"}
    assert not set(shown) & set("\x7f\x9b\u202e\u200b")
    assert not re.search(r"^\W*(\[31m)?Type your", shown, re.MULTILINE), "it is part of a sentence of ours"
