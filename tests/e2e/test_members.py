"""A guarded swarm of real processes: strangers stay out, the invited come in, the revoked go."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.e2e.processes import Process, Processes, corolla, processes
from tests.tiny_models import write_tiny

from corolla.swarm.transport.identity import prepare_identity


class GuardedSwarm:
    """A guarded bootstrap peer, and a guarded server that trusts its invitations."""

    def __init__(self, started: Processes, folder: Path) -> None:
        self.folder = folder
        self.model = str(write_tiny("llama", folder / "model", vocab_size=VOCABULARY))
        byte_tokenizer().save_pretrained(self.model)
        self.issuer = folder / "issuer"
        prepare_identity(self.issuer)
        self.first = started.start(
            "first", "bootstrap", "--guarded", "--identity", str(self.issuer)
        ).wait_ready()
        self.server = self._server(started)

    def _server(self, started: Processes) -> Process:
        identity = self.folder / "server"
        token = self.run("me", "invite", "--identity", str(self.issuer)).stdout
        arguments = ("--peers", self.first.address, "--identity", str(identity), "--invite", token.strip())
        issuer = str(self.first.about["peer_id"])
        return started.start("server", "serve", self.model, *arguments, "--trust-issuer", issuer).wait_ready()

    def run(self, user: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """A command by somebody with a data folder of their own."""
        return corolla(*arguments, text=text, XDG_DATA_HOME=str(self.folder / f"home-{user}"))

    def status(self, user: str) -> subprocess.CompletedProcess[str]:
        return self.run(user, "status", "--peers", self.first.address)

    def chat(self, user: str, *extra: str) -> subprocess.CompletedProcess[str]:
        options = ("--max-new-tokens", "3", "--temperature", "0", "--style", "delimiter")
        return self.run(
            user, "chat", self.model, "--peers", self.first.address, *options, *extra, text="hello\n"
        )


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[GuardedSwarm]:
    with processes(tmp_path) as started:
        yield GuardedSwarm(started, tmp_path)


def test_a_guarded_swarm(swarm: GuardedSwarm) -> None:
    stranger = swarm.chat("stranger")
    assert stranger.returncode == 2, stranger.stderr
    assert stranger.stderr.startswith("error: ")
    assert stranger.stderr.count("\n") == 1
    assert "lets only members in" in stranger.stderr
    assert "corolla join" in stranger.stderr

    token = swarm.run("me", "invite", "--identity", str(swarm.issuer)).stdout.strip()
    chatted = swarm.chat("friend", "--invite", token)
    assert chatted.returncode == 0, chatted.stderr

    friend = swarm.run("friend", "join").stdout.strip()
    revoked = swarm.run("me", "revoke", friend, "--identity", str(swarm.issuer))
    assert revoked.returncode == 0, revoked.stderr
    refused = swarm.status("friend")
    assert refused.returncode == 2
    assert "revoked" in refused.stderr
