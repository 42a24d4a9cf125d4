"""The whole of it over real processes and real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.client.conftest import random_ids
from tests.e2e.processes import Processes, corolla, processes
from tests.reference import Prompted, local_model, relative
from tests.tiny_models import write_tiny
from torch.utils.data import DataLoader

import corolla as public
from corolla.errors import MissingBlocks
from corolla.models.prompts import SoftPrompt

GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as made:
        yield made


def load(address: str, model: Path | str, **arguments: Any) -> Any:
    loaded = public.AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=[address], **arguments
    )
    loaded.generation_config.eos_token_id = None
    loaded.generation_config.pad_token_id = 0
    return loaded


def twin(folder: Path | str, prompts: SoftPrompt) -> Prompted:
    return Prompted(local_model(folder), prompts.input, prompts.deep)


def compare_a_step_and_some_tokens(model: Any, local: Prompted) -> None:
    ids = random_ids(4, 40)
    loss = model(ids, labels=ids).loss
    loss.backward()
    expected = local.loss(ids, ids)
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-4
    assert relative(model.prompts.input.grad, local.vectors.grad) < 1e-4
    if local.deep is not None:
        assert relative(model.prompts.deep.grad, local.deep.grad) < 1e-4
    found = model.generate(ids[:, :6], max_new_tokens=8, **GREEDY)
    local.assert_greedy(found, 6)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_families_over_real_processes(started: Processes, tmp_path: Path, family: str) -> None:
    folder = write_tiny(family, tmp_path / "model")
    address, _ = started.swarm(folder, ["0:2", "2:4"])
    with load(address, folder, tuning_mode="ptune", pre_seq_len=3) as model:
        compare_a_step_and_some_tokens(model, twin(folder, model.prompts))


def test_one_swarm_through_its_life(started: Processes, tmp_path: Path) -> None:
    """Incomplete, then complete, then killed in the middle of a chat and of a training step, then drained."""
    folder = write_tiny("bloom", tmp_path / "model")
    address, _ = started.swarm(folder, ["0:2"])
    with pytest.raises(MissingBlocks, match="2") as caught:
        load(address, folder)
    assert caught.value.blocks == (2, 3)
    assert "corolla serve" in str(caught.value)
    assert "nobody serves blocks 2:4" in corolla("status", "--peers", address).stdout

    servers = started.join(address, folder, ["2:4", "2:4"])
    state = json.loads(corolla("status", "--peers", address, "--json").stdout)
    assert [server["start"] for server in sorted(state["servers"], key=lambda one: one["start"])] == [0, 2, 2]
    assert state["models"][0]["missing"] == []

    with load(address, folder, tuning_mode="deep_ptune", pre_seq_len=3) as model:
        local = twin(folder, model.prompts)
        compare_in_a_notebook(model, local)
        beside_data_workers(model)
        ids = random_ids(1, 6)
        with model.inference_session(max_length=64) as session:
            first = model.generate(ids, max_new_tokens=4, session=session, **GREEDY)
            held = {hop.peer_id for hop in session.hops}
            victim, spare = servers
            if victim.about["peer_id"] not in held:
                victim, spare = spare, victim
            victim.popen.send_signal(signal.SIGKILL)
            second = model.generate(None, max_new_tokens=6, session=session, **GREEDY)
            local.assert_greedy(torch.cat([first, second], 1), 6)
        model.zero_grad()
        local.vectors.grad = local.deep.grad = None
        compare_a_step_and_some_tokens(model, local)

        spare.popen.send_signal(signal.SIGTERM)
        assert spare.popen.wait(30) == 0
        assert not spare.ready_path.exists()
    state = json.loads(corolla("status", "--peers", address, "--json").stdout)
    assert spare.about["peer_id"] not in {server["peer_id"] for server in state["servers"]}


def compare_in_a_notebook(model: Any, local: Prompted) -> None:
    """A notebook's cell runs inside a loop."""

    async def cell() -> None:
        compare_a_step_and_some_tokens(model, local)

    asyncio.run(cell())


def beside_data_workers(model: Any) -> None:
    """DataLoader workers are forks of a process that has our thread."""
    rows = [random_ids(1, 8, seed=n)[0].tolist() for n in range(6)]
    model.zero_grad()
    for batch in DataLoader(rows, batch_size=2, num_workers=2, collate_fn=list):
        ids = torch.tensor(batch)
        model(ids, labels=ids).loss.backward()
    assert model.prompts.input.grad is not None
    model.zero_grad()


def test_an_identity_file_keeps_the_peer_id(started: Processes, tmp_path: Path) -> None:
    identity = tmp_path / "identity"
    first = started.start("first", "bootstrap", "--identity", str(identity)).wait_ready()
    first.popen.send_signal(signal.SIGINT)
    assert first.popen.wait(30) == 0
    second = started.start("second", "bootstrap", "--identity", str(identity)).wait_ready()
    assert second.about["peer_id"] == first.about["peer_id"]
    assert identity.stat().st_mode & 0o077 == 0


SWARM_OF_ONES_OWN = """
import sys, time
from corolla.cli.local_swarm import local_swarm
with local_swarm(sys.argv[1], servers=1) as swarm:
    print(swarm.peers[0], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGINT, id="interrupted", marks=pytest.mark.nightly),
    ],
)
def test_a_local_swarm_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    import subprocess
    import sys

    folder = write_tiny("llama", tmp_path / "model")
    parent = subprocess.Popen(
        [sys.executable, "-c", SWARM_OF_ONES_OWN, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline().startswith(b"/ip4/")
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 4  # a bootstrap peer and a server, a daemon each
        os.kill(parent.pid, number)
        parent.wait(40)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
