"""A chat that goes on, and a bundle, know their swarm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.e2e.processes import corolla, processes

from corolla.cli.chat import chosen_swarm
from corolla.cli.partner import Partner
from corolla.cli.saved_swarm import going_on, read_saved, to_saved
from corolla.cli.tune import TuneJob
from corolla.config import SwarmConfig
from corolla.data.render import RenderSettings
from corolla.errors import UsageError
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.prompts import SoftPrompt
from corolla.tuning.bundle import Bundle, ModelInfo, save_bundle

USED = SwarmConfig(
    wire="int8",
    mixed=True,
    quantization="bfloat16",
    identity=Path("/me"),
    trust=("b", "a"),
    audit=0.25,
    patience=9.0,
    local_blocks=2,
    peers=("x", "y"),
)


def saved(options: SwarmConfig) -> SwarmConfig:
    return read_saved(json.loads(json.dumps(to_saved(options))), Path("chat"))


def nothing(_name: str) -> bool:
    return False


def test_a_chats_swarm_is_as_it_was() -> None:
    assert going_on(saved(USED), SwarmConfig(patience=9.0), nothing) == USED


def test_what_is_typed_goes_before_it() -> None:
    given = SwarmConfig(audit=0.0, local_blocks=0, trust=None, identity=Path("/new"), peers=("z",))
    names = {"peers", "audit", "local_blocks", "trust", "invite"}
    client = going_on(saved(USED), given, names.__contains__)
    assert client.peers == ("z",)
    assert (client.audit, client.local_blocks, client.trust, client.identity) == (0.0, 0, None, Path("/new"))
    assert client.wire == "int8"
    assert going_on(saved(USED), SwarmConfig(peers=("environed",)), nothing).peers == ("x", "y")


@pytest.mark.parametrize("peers", [(), ("local",)])
def test_a_chat_without_a_swarm_stays_on_this_machine(peers: tuple[str, ...]) -> None:
    kept = saved(SwarmConfig(peers=peers))
    assert going_on(kept, SwarmConfig(peers=("environed",)), nothing).peers == ()


@pytest.mark.parametrize("content", [{"peers": "x"}, {"peers": [1]}, {"wire": 3}, {"trust": {}}])
def test_what_is_not_of_that_form(content: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="does not say where its swarm is"):
        read_saved(content, Path("bot"))


def test_a_bundles_swarm_is_asked_last() -> None:
    job = TuneJob(client=SwarmConfig(trust=("t",), peers=("x",), audit=0.5))
    partner = Partner("m", prompts=Path("o"), swarm=job.notes()["swarm"])
    client = chosen_swarm(SwarmConfig(), partner, None, nothing)
    assert client == SwarmConfig(trust=("t",), peers=("x",))
    given = SwarmConfig(trust=("u",), peers=("environed",))
    assert chosen_swarm(given, partner, None, nothing) == given


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with processes(model.parent) as started:
        yield started.swarm(model, ["0:4"])[0]


def test_continue_needs_no_peers(
    model: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "chat.jsonl")
    begin = corolla(
        "chat", str(model), "--peers", address, "--transcript", path, "--max-new-tokens", "5", text="a\n"
    )
    assert begin.returncode == 0, begin.stderr
    monkeypatch.setenv("COROLLA_PEERS", "nonsense")
    again = corolla("chat", "--continue", "--transcript", path, text="b\n")
    assert again.returncode == 0, again.stderr
    assert "Going on with" in again.stdout


@pytest.mark.nightly
def test_a_bundle_needs_none_either(model: Path, address: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    described = Bundle(
        model=ModelInfo(str(model), checkpoint.identity),
        mode="ptune",
        prompt_tokens=3,
        rendering=RenderSettings(),
        stop={},
        training={"swarm": to_saved(SwarmConfig(peers=(address,)))},
        metrics={},
        sampling={"max_new_tokens": 5},
    )
    prompt = SoftPrompt(torch.zeros(3, 32))
    save_bundle(
        tmp_path / "bot", described, prompt, config=checkpoint.config, history=[{"step": 1, "loss": 1.0}]
    )
    found = corolla("chat", str(tmp_path / "bot"), "--no-save", text="a\n")
    assert found.returncode == 0, found.stderr
    assert f"Joining the swarm that the bundle was trained in: {address}\n" in found.stdout
