"""Mute peers and peers that are gone beside an honest server, over real processes and sockets."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import corolla
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.loop import EventLoopThread
from corolla.swarm.node import Node
from corolla.wire.messages import PROTOCOL_NAME
from tests.e2e.processes import processes
from tests.reference import local_model, random_ids
from tests.tiny_models import write_tiny

pytestmark = pytest.mark.nightly

MUTE, GONE = 3, 2
LATE = 10.0  # seconds that a first reply may come later than without them
USUAL = 10.0  # what joining, loading and a reply may take by themselves on a busy machine


async def stranger(address: str, checkpoint: Any, *, stays: bool) -> Node:
    """A peer that announces all blocks as the fastest, and accepts streams without a word, or is gone."""
    node = await Node.create(initial_peers=[address])

    async def mute(_stream: Any) -> None:
        await asyncio.Event().wait()

    await node.transport.serve(PROTOCOL_NAME, mute)
    record = ServerRecord(
        peer_id=node.transport.peer_id,
        model=checkpoint.identity,
        model_name=checkpoint.name,
        num_blocks=checkpoint.num_blocks,
        start=0,
        end=checkpoint.num_blocks,
        dtype="float32",
        throughput=1e9,
    )
    await node.directory.announce(record, 300.0)
    if not stays:
        await node.close()
    return node


def test_a_new_client_reaches_the_honest_server(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    ids = random_ids(1, 6)
    with processes(tmp_path) as started:
        address, _ = started.swarm(folder, ["0:4"])
        loop = EventLoopThread()
        nodes = [loop.run(stranger(address, checkpoint, stays=i < MUTE)) for i in range(MUTE + GONE)]
        try:
            began = time.monotonic()
            with corolla.AutoDistributedModelForCausalLM.from_pretrained(
                folder, initial_peers=[address]
            ) as model:
                found = model.generate(ids, max_new_tokens=4, do_sample=False)
            took = time.monotonic() - began
        finally:
            for node in nodes[:MUTE]:
                loop.run(node.close())
            loop.close()
    assert torch.equal(found, local_model(folder).generate(ids, max_new_tokens=4, do_sample=False))
    assert took < USUAL + LATE
