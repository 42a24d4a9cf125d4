"""Real servers behind lines that are cut, stall in the middle of a tensor, damage a byte, part and heal.

As in test_real_faults.py all work is compared with the undisturbed local model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.links import Link, links
from tests.e2e.processes import Processes, processes
from tests.e2e.real_swarm import Client, RealSwarm, Used, something_failed
from tests.tiny_models import write_tiny

NOTICED_SECONDS = 5.0  # within which a hang is found out
SLACK_SECONDS = 4.0  # what a slow and busy machine adds to that
HIDDEN = 256
BATCH = (8, 128)  # rows × tokens: two micro-batches, each a tensor of half a megabyte
MIDDLE = 200_000  # bytes: within such a tensor, and more than all else that passes meanwhile
TO_SERVER, TO_CLIENT = "to the server", "to the client"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"), hidden_size=HIDDEN)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as made:
        yield made


@pytest.fixture
def link() -> Iterator[Callable[[], Link]]:
    with links() as make:
        yield make


@pytest.mark.nightly  # `test_real_faults.py` has a link that stalls, in every run
@pytest.mark.parametrize("mode", ["deep_ptune", "ptune", None])
def test_bad_lines(started: Processes, folder: Path, link: Callable[[], Link], mode: str | None) -> None:
    swarm = RealSwarm(started, folder)
    swarm.serve("0:2", "2:4", "0:2", "2:4", link=link)
    with swarm.load(tuning_mode=mode, pre_seq_len=3) as model:
        client = Client(model, folder)
        lines(swarm, client, train=mode is not None)
        parted(swarm, client, train=mode is not None)


def lines(swarm: RealSwarm, client: Client, *, train: bool) -> None:
    """One line at a time, a replica being up."""

    def line(block: int) -> Link:
        return swarm.links[client.used(block)]

    with something_failed() as noticed:
        took = client.chat(lambda used: swarm.links[used(2)].cut(), sample=True)
    assert "has ended" in noticed.words[0]
    assert took < SLACK_SECONDS

    during_a_recovery(swarm, client)
    if not train:
        return
    for before, block, direction in (("forward", 0, TO_SERVER), ("backward", 2, TO_CLIENT)):
        hit: list[Link] = []  # chosen at the last moment: who is preferred changes with time

        def stall(hit: list[Link] = hit, block: int = block, direction: str = direction) -> None:
            hit.append(line(block))
            hit[0].stall_after(MIDDLE, direction=direction)

        with something_failed() as noticed:
            took = client.train(stall, before=before, batch=BATCH)
        [stalled] = hit
        assert not stalled.is_armed()
        assert "silent for 4" in noticed.words[0]
        assert took < NOTICED_SECONDS + SLACK_SECONDS
        stalled.heal()

    damaged: list[Link] = []

    def damage() -> None:
        damaged.append(line(0))
        damaged[0].damage_after(MIDDLE, direction=TO_CLIENT)

    with something_failed():
        client.train(damage, before="forward", batch=BATCH)
    assert not damaged[0].is_armed()


def during_a_recovery(swarm: RealSwarm, client: Client) -> None:
    """The replacement's line breaks in the middle of the replay, and its server's before stays silent."""
    hurt: list[Link] = []

    def fail(used: Used) -> None:
        first = used(2)
        both = [peer for peer in swarm.links if swarm.about(peer)["blocks"] == [2, 4]]
        hurt.extend(swarm.links[peer] for peer in sorted(both, key=lambda peer: peer != first))
        hurt[1].after(MIDDLE, hurt[1].cut, direction=TO_SERVER)
        hurt[0].cut()
        hurt[0].hold()

    with something_failed() as noticed:
        client.chat(fail, sample=False, length=300)
    assert not hurt[1].is_armed()
    assert len(noticed.words) > 1
    hurt[0].heal()


def parted(swarm: RealSwarm, client: Client, *, train: bool) -> None:
    """The client from all servers, until it tells its user that it waits."""

    def part(_used: Used | None = None) -> None:
        for one in swarm.links.values():
            one.hold()

    def heal() -> None:
        for one in swarm.links.values():
            one.heal()

    with something_failed(waiting=heal) as noticed:
        client.chat(part, sample=False)
    assert any(words.startswith("Waiting up to") for words in noticed.words)
    if train:
        with something_failed(waiting=heal) as noticed:
            client.train(part, before="backward")
        assert any(words.startswith("Waiting up to") for words in noticed.words)
