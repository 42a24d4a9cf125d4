"""Real servers that answer wrongly, slowly, or have lost a cache; a replica is up. See test_real_faults.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.processes import Processes, processes
from tests.e2e.real_swarm import Client, RealSwarm, Used, something_failed
from tests.reference import random_ids
from tests.tiny_models import write_tiny

CACHE_TOKENS = 512
OTHERS = (200, 300)  # tokens of a prompt and of its reply, which together need the whole cache


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as made:
        yield made


@pytest.mark.parametrize("mode", ["ptune", pytest.param("deep_ptune", marks=pytest.mark.nightly)])
def test_servers_that_turn_bad(started: Processes, tmp_path: Path, mode: str) -> None:
    folder = write_tiny("llama", tmp_path / "model")
    swarm = RealSwarm(started, folder)
    orders: dict[str, Path] = {}  # by peer: where a server is told what to do
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        launcher = [sys.executable, "-m", "tests.e2e.odd_server", str(tmp_path / name)]
        [peer] = swarm.serve("0:4", launcher=launcher, extra=("--cache-tokens", str(CACHE_TOKENS)))
        orders[peer] = tmp_path / name
    with swarm.load(tuning_mode=mode, pre_seq_len=3) as model:
        client = Client(model, folder)
        wrong_shapes(client, orders)
        slowness(client, orders)
        eviction(client)


def wrong_shapes(client: Client, orders: dict[str, Path]) -> None:
    """To a chat and to a tuning run."""
    told: list[Path] = []

    def order(peer: str) -> None:
        told.append(orders[peer] / "wrong shape")
        told[-1].touch()

    for turn in (0, 1):
        with something_failed() as noticed:
            if turn:
                client.train(lambda: order(client.used(0)), before="backward")
            else:
                client.chat(lambda used: order(used(0)), sample=True)
        assert "was due" in noticed.words[0]
        assert not told[-1].exists()


def slowness(client: Client, orders: dict[str, Path]) -> None:
    """Is no error; the server is left after some steps."""
    slow: list[str] = []

    def order(used: Used) -> None:
        slow.append(used(0))
        (orders[slow[0]] / "slow").touch()

    client.chat(order, sample=False)
    assert client.used(0) != slow[0]
    (orders[slow[0]] / "slow").unlink()


def eviction(client: Client) -> None:
    """Another session needs all the room while this one is at rest."""

    def crowd_out(_used: Used) -> None:
        length, count = OTHERS
        with client.model.inference_session() as other:
            client.model.generate(
                random_ids(1, length, seed=9), max_new_tokens=count, session=other, do_sample=False
            )

    with something_failed() as noticed:
        client.chat(crowd_out, sample=False)
    assert any("cache is gone" in words for words in noticed.words)
