"""Ctrl-C and Ctrl-D are answered at once, whatever a server does: here one that shows signs of life for ever."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from corolla.chat.engine import ChatEngine
from corolla.chat.repl import Repl
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer, RenderSettings
from corolla.errors import RemoteError, SwarmUnavailable
from corolla.swarm.channel import Channel
from corolla.tuning.batches import prepare
from corolla.tuning.settings import TuneSettings
from corolla.tuning.tune import tune
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.strangers.evil_server import add_evil
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from tests.tuning.tiny_setup import conversations

SECONDS = 1.0  # 0.2 are promised, on a machine that has nothing else to do


async def alive(channel: Channel) -> None:
    """Say nothing to any request, but that it is being worked on."""
    with contextlib.suppress(RemoteError):
        await channel.receive(timeout=None)
        ASKED.set()
        async with channel.heartbeat():
            await channel.stream.read(1)  # which never comes, before the client hangs up


ASKED = threading.Event()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.nightly)])
def swarm(folder: Path, request: pytest.FixtureRequest) -> Iterator[MemorySwarm]:
    ASKED.clear()
    with MemorySwarm(folder, []) as made:
        for number in range(request.param):
            add_evil(made, alive, f"evil-{number}")
        yield made


def chat_over(swarm: MemorySwarm, patience: float = 600.0) -> ChatEngine:
    return ChatEngine(
        swarm.model(patience=patience),
        Renderer(byte_tokenizer(), RenderSettings()),
        sampling=SamplingSettings(temperature=0, max_new_tokens=8),
        max_context=400,
    )


class When:
    """Does something once the server has been asked; `took` are the seconds from then to the end of the block."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._began = 0.0
        self.took = 0.0

    def _run(self) -> None:
        assert ASKED.wait(60)
        self._began = time.monotonic()
        self._act()

    def __enter__(self) -> When:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.took = time.monotonic() - self._began
        self._thread.join()


def ctrl_c() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The other end of a terminal that is stdin."""
    outside, inside = pty.openpty()
    with os.fdopen(inside) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        said = iter(["hello"])
        monkeypatch.setattr("builtins.input", lambda _prompt: next(said, None) or stdin.readline() or end())
        yield outside
    os.close(outside)


def end() -> Any:
    raise EOFError


def test_ctrl_c_ends_a_reply_and_the_chat_goes_on(swarm: MemorySwarm, terminal: int) -> None:
    output = io.StringIO()
    with chat_over(swarm) as engine:
        repl = Repl(engine, Console(file=output))
        os.write(terminal, b"/quit\n")  # typed ahead: it is for later, and ends no reply
        with When(ctrl_c) as pressed:
            repl.run()
        assert pressed.took < SECONDS
        assert "(stopped)" in output.getvalue()
        assert engine.transcript() == []
        # The same chat, once an honest server has come.
        swarm.loop.run(killed(swarm))
        swarm.add(0, 4)
        said = "".join(engine.reply("hello again"))
        with chat_over(swarm) as other:
            assert "".join(other.reply("hello again")) == said


async def killed(swarm: MemorySwarm) -> None:
    for number in range(10):
        with contextlib.suppress(KeyError):
            swarm.network.kill(f"evil-{number}")


def test_ctrl_d_ends_a_reply_and_the_chat(swarm: MemorySwarm, terminal: int) -> None:
    engine = chat_over(swarm)
    with When(lambda: os.write(terminal, b"\x04")) as typed:
        Repl(engine, Console(file=io.StringIO())).run()
        engine.close()
    assert typed.took < SECONDS


def test_ctrl_c_ends_a_chat_with_a_pipe(swarm: MemorySwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand another\n"))
    engine = chat_over(swarm)
    with When(ctrl_c) as pressed:
        with pytest.raises(KeyboardInterrupt):
            Repl(engine, Console(file=io.StringIO())).run()
        engine.close()
    assert pressed.took < SECONDS


def test_a_chat_with_a_pipe_ends_with_its_patience(swarm: MemorySwarm) -> None:
    with chat_over(swarm, patience=1.0) as engine, pytest.raises(SwarmUnavailable, match="Gave up"):
        Repl(engine, Console(file=io.StringIO())).run(["hello", "and another"])


def test_ctrl_c_ends_a_tuning_run(swarm: MemorySwarm, tmp_path: Path) -> None:
    model = swarm.model(patience=600.0, tuning_mode="ptune", pre_seq_len=2)
    settings = TuneSettings(steps=2, batch_size=2, held_out=2, rendering=RenderSettings(max_length=32))
    prepared = prepare(byte_tokenizer(), settings, conversations())
    with When(ctrl_c) as pressed, pytest.raises(KeyboardInterrupt):
        tune(model, settings, prepared, tmp_path / "out")
    assert pressed.took < SECONDS
    model.close()


def test_a_program_that_has_had_enough(swarm: MemorySwarm) -> None:
    with chat_over(swarm) as engine:
        began = time.monotonic()
        assert list(engine.reply("hello", enough=ASKED.is_set)) == []
        assert time.monotonic() - began < 60
        assert engine.transcript() == []


@pytest.mark.parametrize("step", ["forward", "generate"])
def test_ctrl_c_ends_a_call(swarm: MemorySwarm, step: str) -> None:
    model = swarm.model(patience=600.0)
    ids = torch.tensor([[5, 6, 7]])
    calls = {
        "forward": lambda: model(ids, labels=ids),
        "generate": lambda: model.generate(ids, max_new_tokens=2),
    }
    with When(ctrl_c) as pressed, pytest.raises(KeyboardInterrupt):
        calls[step]()
    assert pressed.took < SECONDS
    began = time.monotonic()
    model.close()
    assert time.monotonic() - began < SECONDS
