"""A client whose server is over a budget comes back when it was told to, not before, and loses nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tests.client.conftest import random_ids
from tests.reference import Prompted, local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.errors import RequestRefused
from corolla.server.peers import Account, Holder

RETRY_AFTER = 0.4
REFUSALS = 3


class Crowded(Account):
    """Full until it has refused often enough."""

    def __init__(self) -> None:
        super().__init__("places", 10**9, retry_after=RETRY_AFTER)
        self.refused_at: list[float] = []

    def take(self, holder: Holder, amount: int = 1, wanted: int = 1) -> None:
        if len(self.refused_at) < REFUSALS:
            self.refused_at.append(time.monotonic())
            raise RequestRefused("All places are taken.", code="busy", retry_after=RETRY_AFTER)
        super().take(holder, amount, wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("busy"))


@pytest.mark.parametrize("account", ["streams", "in_flight"])
def test_a_busy_server_is_asked_again_when_it_said(
    folder: Path, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corolla.server.peers.SMALL_REQUEST", 0)
    with MemorySwarm(folder, [(0, 4)]) as swarm:
        (server,) = swarm.servers.values()
        crowded = Crowded()
        setattr(server.limits, account, crowded)
        model = swarm.model()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        ids = random_ids(1, 5)
        found = model.generate(ids, max_new_tokens=6, do_sample=False)
        Prompted(local_model(folder), torch.zeros(0, 32)).assert_greedy(found, 5)
        gaps = [
            later - earlier
            for earlier, later in zip(crowded.refused_at, crowded.refused_at[1:], strict=False)
        ]
        assert len(gaps) == REFUSALS - 1
        assert min(gaps) >= RETRY_AFTER
        assert max(gaps) < 10 * RETRY_AFTER
