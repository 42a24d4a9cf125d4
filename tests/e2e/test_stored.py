"""A quantized checkpoint over real processes: what a server says of its memory, and the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.client.conftest import random_ids
from tests.e2e.processes import Processes, processes
from tests.e2e.test_processes import load
from tests.reference import local_model
from tests.stored_models import write_stored


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as made:
        yield made


@pytest.mark.nightly
def test_two_servers_of_it(started: Processes, tmp_path: Path) -> None:
    stored, plain = write_stored("gptq", tmp_path, hidden_size=128, intermediate_size=256, head_dim=32)
    address, servers = started.swarm(stored, ["0:2", "2:4"])
    for server in servers:
        line = next(
            one
            for one in server.log_path.read_text().splitlines()
            if one.startswith("Stored as GPTQ, 4 bits")
        )
        assert "MiB in the checkpoint and" in line
    local = local_model(plain)
    local.generation_config.eos_token_id = None
    ids = random_ids(2, 6)
    with load(address, stored) as model:
        found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert found.tolist() == local.generate(ids, max_new_tokens=8, do_sample=False).tolist()
