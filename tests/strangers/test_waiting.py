"""Servers that keep a client waiting: patience ends it, and so does whoever waits."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from corolla.errors import SwarmUnavailable
from tests.reference import random_ids
from tests.schedules.world import ServerPlan
from tests.strangers.simulated import Strange, alive, check_reply
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

PATIENCE = 60.0
HONEST = [ServerPlan("honest", 0, 4, 100.0)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("waiting")


@pytest.fixture
def lonely(root: Path) -> Iterator[Strange]:
    """A swarm without any honest server."""
    made = Strange(root, [], patience=PATIENCE)
    yield made
    made.close()


def test_patience_applies_to_signs_of_life(lonely: Strange) -> None:
    lonely.add("evil", alive)
    model = lonely.model()
    ids = random_ids(1, 6)
    began = lonely.swarm.loop.time()
    with pytest.raises(SwarmUnavailable, match=r"Gave up .* after 60 s: .* signs of life"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(SwarmUnavailable, match="Gave up"):
        model(ids, labels=ids)
    assert lonely.swarm.loop.time() - began <= 2 * PATIENCE + 1


def test_a_wait_is_stopped_from_another_thread(tmp_path: Path) -> None:
    """In real time: whoever waits is told at once, and the session goes on afterwards."""
    with MemorySwarm(write_tiny("llama", tmp_path), [(0, 4)]) as swarm:
        model = swarm.model(patience=600.0)
        (server,) = swarm.servers
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        session = model.inference_session()
        ids = random_ids(1, 6)
        model.generate(ids, max_new_tokens=2, session=session, do_sample=False)
        swarm.stop(server)
        ended: list[BaseException] = []
        waits = threading.Event()

        def wait() -> None:
            waits.set()
            try:
                model.generate(None, max_new_tokens=2, session=session, do_sample=False)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        waits.wait()
        session.stop()
        thread.join(3.0)
        assert not thread.is_alive()
        assert isinstance(ended[0], concurrent.futures.CancelledError)
        swarm.loop.run(_resumed(swarm, server))
        model.generate(None, max_new_tokens=3, session=session, do_sample=False)
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(session.output_ids, expected)
        session.close()


async def _resumed(swarm: MemorySwarm, server: str) -> None:
    swarm.network.resume(server)


def test_an_honest_client_waits_as_before(root: Path) -> None:
    strange = Strange(root, HONEST)
    check_reply(strange.model(), strange.checkpoint.name)
    strange.close()
