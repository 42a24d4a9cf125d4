"""`corolla chat` as it is typed: from a pipe, at a terminal, with a bundle, with mistakes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.e2e.processes import COROLLA, Talking, corolla, environment, processes
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from typer.main import get_command

from corolla.chat.engine import ChatEngine
from corolla.chat.sampling import SamplingSettings
from corolla.chat.transcript import read_chat
from corolla.cli.main import app
from corolla.cli.partner import find_partner, prepare
from corolla.config import SwarmConfig
from corolla.data.render import Renderer, RenderSettings
from corolla.errors import BundleError, CheckpointError, CorollaError, UnknownModel, UsageError
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.prompt_files import save_prompt
from corolla.models.prompts import SoftPrompt
from corolla.swarm.channel import Channel, request
from corolla.swarm.node import Node
from corolla.text import printable
from corolla.tuning.bundle import Bundle, ModelInfo, save_bundle
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, Ping, ServerStatus

SECONDS = 120


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with processes(model.parent) as started:
        yield started.swarm(model, ["0:2", "2:4"])[0]


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    """One whose replies are greedy, short and by a delimiter of its own."""
    checkpoint = open_checkpoint(str(model))
    prompt = SoftPrompt(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    rendering = RenderSettings(delimiter=" ~ ")
    saved = Bundle(
        model=ModelInfo(str(model), checkpoint.identity),
        mode="ptune",
        prompt_tokens=3,
        rendering=rendering,
        stop={},
        training={},
        metrics={},
        sampling={"temperature": 0.0, "max_new_tokens": 7},
    )
    out = model.parent / "bundle"
    history = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    save_bundle(out, saved, prompt, config=checkpoint.config, history=history)
    return out


def expected_chat(
    model: Path, prompts: Path | None, rendering: RenderSettings, tokens: int, said: list[str]
) -> str:
    """What must be printed, by a chat within this process."""
    return counted_chat(model, prompts, rendering, tokens, said)[0]


def counted_chat(
    model: Path, prompts: Path | None, rendering: RenderSettings, tokens: int, said: list[str]
) -> tuple[str, int]:
    """The same, and how many tokens a server computes for it."""
    lines = []
    with MemorySwarm(model, [(0, 4)]) as swarm:
        renderer = Renderer(byte_tokenizer(), rendering)
        sampling = SamplingSettings(temperature=0, max_new_tokens=tokens)
        with ChatEngine(swarm.model(prompts=prompts), renderer, sampling=sampling, max_context=300) as engine:
            for text in said:
                reply = printable("".join(engine.reply(text))).lstrip()
                lines += [f"You: {text}", f"Bot: {reply}", ""]
        (count,) = swarm.counted().values()
    return "".join(line + "\n" for line in lines), count


def test_a_model_is_talked_with_by_its_template(model: Path, address: str) -> None:
    flags = ["--temperature", "0", "--max-new-tokens", "9", "--peers", address]
    found = corolla("chat", str(model), *flags, text="one\ntwo\n")
    assert found.returncode == 0, found.stderr
    heading, _, dialogue = found.stdout.partition("\n")
    assert heading == f"Talking with {model}. /help lists the commands."
    assert dialogue == expected_chat(model, None, RenderSettings(style="template"), 9, ["one", "two"])


def test_a_bundle_is_talked_with_as_it_was_trained(
    model: Path, bundle: Path, address: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    found = corolla("chat", str(bundle), "--peers", address, "--transcript", str(path), text="one\ntwo\n")
    assert found.returncode == 0, found.stderr
    heading, _, dialogue = found.stdout.partition("\n")
    assert "tuned (ptune, 3 prompt tokens)" in heading
    assert dialogue == expected_chat(model, bundle, RenderSettings(delimiter=" ~ "), 7, ["one", "two"])
    # A chat with another partner is not gone on with.
    words = f"was with {bundle}.*not with {model}"
    refused(model, UsageError, words, "--continue", "--transcript", str(path), "--peers", address)


@pytest.mark.nightly
def test_servers_compute_a_bundle_once_for_everybody(model: Path, bundle: Path, tmp_path: Path) -> None:
    """Two chats, which are two peers: both are as ever, and neither has the prompt's tokens computed."""
    rendering = RenderSettings(delimiter=" ~ ")
    expected, tokens = counted_chat(model, bundle, rendering, 7, ["one", "two"])
    with processes(tmp_path) as started:
        address, _ = started.swarm(model, ["0:2", "2:4"], "--bundle", str(bundle))
        for number in (1, 2):
            found = corolla("chat", str(bundle), "--peers", address, text="one\ntwo\n")
            assert found.stdout.partition("\n")[2] == expected
            assert asyncio.run(computed(model, address)) == [number * (tokens - 3)] * 2


async def computed(model: Path, address: str) -> list[int]:
    """What each server says that it has computed for sessions, in tokens."""
    node = await Node.create(initial_peers=[address], client_only=True)
    found = []
    try:
        for record in await node.directory.servers(open_checkpoint(str(model)).identity):
            channel = Channel(await node.transport.open(record.peer_id, PROTOCOL_NAME), side="client")
            status = (await request(channel, Packet(Ping(), {}))).message
            assert isinstance(status, ServerStatus)
            found.append(status.tokens_inference)
            await channel.close()
    finally:
        await node.close()
    return found


@pytest.mark.nightly
def test_without_peers_a_swarm_runs_here_meanwhile(model: Path) -> None:
    found = corolla("chat", str(model), "--temperature", "0", "--max-new-tokens", "5", text="one\n/quit\n")
    assert found.returncode == 0, found.stderr
    assert expected_chat(model, None, RenderSettings(style="template"), 5, ["one"]) in found.stdout


def test_a_killed_chat_goes_on_as_if_nothing_had_happened(
    model: Path, bundle: Path, address: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    command = ["chat", str(bundle), "--peers", address, "--transcript", str(path), "--dtype", "float32"]
    with contextlib.closing(Talking(*command)) as talking:
        talking.say("one")
        talking.until("Bot: ")
        talking.say("two")
        talking.until("You: two")
    said = [exchange.said for exchange in read_chat(path).exchanges]
    assert said in (["one"], ["one", "two"])
    with path.open("ab") as file:
        file.write(b'{"said": "two", "rep')  # had the kill come in the middle of a line
    again = ["chat", "--continue", "--transcript", str(path), "--peers", address]
    found = corolla(*again, text="three\n")
    assert found.returncode == 0, found.stderr
    assert f"Going on with {path}: {len(said)} exchange" in found.stdout
    assert "cut off" in found.stdout
    everything = expected_chat(model, bundle, RenderSettings(delimiter=" ~ "), 7, [*said, "three"])
    last = everything[everything.index("You: three") :]
    assert found.stdout.split()[-len(last.split()) :] == last.split()  # (a tab is printed as spaces)
    assert [exchange.said for exchange in read_chat(path).exchanges] == [*said, "three"]


# --- at a terminal -----------------------------------------------------------------------------------------


@dataclass
class Terminal:
    """A command at a terminal of its own."""

    process: subprocess.Popen[bytes]
    screen: int
    seen: str = ""

    def wait_for(self, text: str) -> str:
        """Read until `text` is on the screen; gives what came before it, and forgets both."""
        while text not in self.seen:
            assert self.look(SECONDS), f"{text!r} did not come; the screen shows {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def look(self, seconds: float) -> bool:
        """Read what comes within so many seconds; whether anything did."""
        ready, _, _ = select.select([self.screen], [], [], seconds)
        if ready:
            self.seen += os.read(self.screen, 4096).decode(errors="replace")
        return bool(ready)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminal(model: Path, address: str) -> Iterator[Terminal]:
    screen, inside = pty.openpty()
    flags = ["--temperature", "0", "--max-new-tokens", "350", "--peers", address, "--style", "delimiter"]
    process = subprocess.Popen(
        [*COROLLA, "chat", str(model), *flags],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment() | {"TERM": "dumb"},
        start_new_session=True,
    )
    os.close(inside)
    yield Terminal(process, screen)
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(screen)


def test_at_a_terminal_interrupts_and_mistakes_do_not_end_the_chat(
    terminal: Terminal, tmp_path: Path
) -> None:
    started = terminal.wait_for("You: ")
    assert re.search(r"About [\d.]+ tokens a second: a reply of 350 .* takes \d+ s\.", started)
    terminal.type("Tell me everything\n")
    terminal.wait_for("Bot: ")
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for("You: ")
    path = tmp_path / "chat.json"
    terminal.type(f"/save {path}\n")
    terminal.wait_for("Saved to")
    terminal.wait_for("You: ")
    terminal.type("x" * 400 + "\n")
    terminal.wait_for("This message takes")
    terminal.wait_for("You: ")
    # A signal that comes in the instant before the terminal is waited on is seen with the next key only.
    while "/quit or Ctrl-D ends the chat." not in terminal.seen:
        terminal.interrupt()
        terminal.look(1.0)
    terminal.wait_for("You: ")
    terminal.type("\x04")
    assert terminal.process.wait(SECONDS) == 0
    (saved,) = json.loads(path.read_text())
    said, reply = (message["content"] for message in saved["messages"])
    assert said == "Tell me everything"
    assert 0 < len(reply.encode()) < 350


# --- what is refused, before anything is started --------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--style=poem", "--style is 'poem'"),
        ("--temperature=-1", "--temperature is -1.0"),
        ("--top-p=7", "--top-p is 7.0; it must be above 0 and at most 1."),
        ("--top-k=-1", "--top-k is -1"),
        ("--max-new-tokens=0", "--max-new-tokens is 0"),
        ("--max-new-tokens=512", "leave no room in a context of 512"),
        ("--max-length=513", "can keep 2 to 512 tokens"),
        ("--max-length=128", "leave no room in a context of 128"),
    ],
)
def test_flags_that_cannot_be(model: Path, flags: str, words: str) -> None:
    refused(model, UsageError, re.escape(words), flags)


def refused(partner: Path | str, kind: type[CorollaError], words: str, *flags: str) -> None:
    with pytest.raises(kind, match=words):
        get_command(app).main(["chat", str(partner), *flags], standalone_mode=False)


def test_partners_that_cannot_be_talked_with(model: Path, bundle: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nobody", UnknownModel, "nobody")
    mute = shutil.copytree(model, tmp_path / "mute")
    for path in mute.glob("*token*"):
        path.unlink()
    refused(mute, CheckpointError, "has no tokenizer that can be read")
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    refused(broken, BundleError, "missing or truncated")
    other = write_tiny("llama", tmp_path / "other", vocab_size=VOCABULARY, seed=1)
    mixed = shutil.copytree(bundle, tmp_path / "mixed")
    about = json.loads((mixed / "bundle.json").read_text())
    about["model"]["name"] = str(other)
    (mixed / "bundle.json").write_text(json.dumps(about))
    refused(mixed, BundleError, "was trained for")
    about["sampling"] = {"mood": "good"}
    (mixed / "bundle.json").write_text(json.dumps(about))
    refused(mixed, BundleError, "mood")


def test_flags_go_before_what_the_bundle_says(bundle: Path) -> None:
    partner = find_partner(str(bundle))
    prepared = prepare(
        partner, SamplingSettings.from_dict(partner.sampling), SwarmConfig(), style="template", max_length=99
    )
    assert prepared.renderer.settings.style == "template"
    assert (prepared.max_context, prepared.sampling.max_new_tokens) == (99, 7)
    assert prepare(partner, SamplingSettings(), SwarmConfig()).max_context == 512 - 3


@pytest.mark.nightly
def test_a_prompt_saved_without_a_bundle_will_do(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    prompt = SoftPrompt(torch.zeros(2, 32), deep_blocks=4)
    save_prompt(
        tmp_path, prompt, config=checkpoint.config, model_name=str(model), identity=checkpoint.identity
    )
    partner = find_partner(str(tmp_path))
    assert (partner.model, partner.prompts, partner.rendering) == (str(model), tmp_path, None)
    assert prepare(partner, SamplingSettings(), SwarmConfig()).renderer.settings.style == "template"
