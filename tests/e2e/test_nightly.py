"""What takes longer than a change should wait for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.e2e.processes import corolla, processes

import corolla as public


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_two_servers_that_start_at_once_on_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both want to convert the embedded model; one does, and both come up."""
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "cache"))
    with processes(tmp_path) as started:
        address, servers = started.swarm("smollm2", ["0:15", "15:30"])
        assert len(servers) == 2
        state = json.loads(corolla("status", "--peers", address, "--json").stdout)
        assert state["models"][0]["missing"] == []
        with public.AutoDistributedModelForCausalLM.from_pretrained(
            "smollm2", initial_peers=[address]
        ) as model:
            assert model.generate(torch.tensor([[504]]), max_new_tokens=3, do_sample=False).shape == (1, 4)
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.name.startswith((".", "tmp"))]
    assert not [name for name in left if not name.endswith(".lock")]
