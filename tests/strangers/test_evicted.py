"""An honest chat whose room strangers took begins again where it was, and a new one begins beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.server.block_server import BlockServer
from corolla.server.peers import Budgets, PeerLimits
from corolla.swarm.channel import Channel, request
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, OpenSession
from tests.client.conftest import random_ids
from tests.reference import Prompted, local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

STREAMS = [pytest.param(40), pytest.param(400, marks=pytest.mark.nightly)]


async def shut(swarm: MemorySwarm, peer: str, server: BlockServer, streams: int) -> list[Channel]:
    """As many identities as there are streams open a session each; the server lets go of whoever was there."""
    message = OpenSession(model=server.model, start=0, end=4, rows=1, max_tokens=1)
    opened = []
    for _ in range(streams):
        stream = await swarm.network.transport().open(peer, PROTOCOL_NAME)
        opened.append(Channel(stream, side="client"))
        await request(opened[-1], Packet(message))
    return opened


@pytest.mark.parametrize("streams", STREAMS)
def test_a_chat_goes_on_and_another_begins_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    for module in ("handlers", "sessions.session"):
        monkeypatch.setattr(f"corolla.server.{module}.IDLE_SECONDS", 0.0)  # nobody waits for it here
    folder = write_tiny("llama", tmp_path / "model")
    with MemorySwarm(folder, [(0, 4)]) as swarm:
        ((peer, server),) = swarm.servers.items()
        server.limits = PeerLimits(Budgets(streams=streams))
        reference = Prompted(local_model(folder), torch.zeros(0, 32))
        model, ids = swarm.model(), random_ids(1, 5)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        with model.inference_session() as session:
            begun = say(model, ids, session)
            strangers = swarm.loop.run(shut(swarm, peer, server, streams))
            assert server.limits.streams.taken == streams
            found = torch.cat([begun, say(model, None, session)], dim=1)
        reference.assert_greedy(found, 5)
        new = swarm.model()
        new.generation_config = model.generation_config
        reference.assert_greedy(new.generate(ids, max_new_tokens=6, do_sample=False), 5)
        assert len(strangers) == streams


def say(model: Any, ids: Any, session: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids, max_new_tokens=6, do_sample=False, session=session)
    return found
