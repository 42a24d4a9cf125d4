"""Real servers, real sockets, real signals: whatever happens to them, tokens, losses and prompts stay exact.

The client's work is compared with the undisturbed local model's, see `Client.chat` and `Client.train`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.processes import Processes, processes
from tests.e2e.real_swarm import Client, RealSwarm, Used, something_failed
from tests.tiny_models import write_tiny

from corolla.models.checkpoints.checkpoint import open_checkpoint

NOTICED_SECONDS = 5.0  # within which a hang is found out
# What a slow and busy machine adds to that: the replay, a step, and waiting for a core.
SLACK_SECONDS = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as made:
        yield made


def test_a_replica_takes_over(started: Processes, folder: Path) -> None:
    """A hang, a link that stalls, a departure, a kill: a client chats, another trains, on the same servers."""
    swarm = RealSwarm(started, folder)
    swarm.serve("0:2", "2:4", "0:2", "2:4")
    with (
        swarm.load(tuning_mode="deep_ptune", pre_seq_len=3) as deep,
        swarm.load(tuning_mode="ptune", pre_seq_len=3) as plain,
    ):
        chatting, training = Client(plain, folder), Client(deep, folder)
        hurt: list[str] = []

        def hang(used: Used) -> None:
            hurt.append(used(2))
            swarm.send(hurt[-1], signal.SIGSTOP)

        with something_failed() as noticed:
            assert chatting.chat(hang, sample=True) < NOTICED_SECONDS + SLACK_SECONDS
        assert "silent" in noticed.words[0]
        swarm.send(hurt[-1], signal.SIGCONT)

        stalled = swarm.daemon(training.used(0))
        with something_failed():
            training.train(stalled.suspend, before="backward")
        stalled.resume()

        # The bootstrap peer goes first, for good: those who have joined do not need it.
        swarm.bootstrap.popen.send_signal(signal.SIGKILL)
        victim = training.used(2)
        with something_failed():
            training.train(lambda: swarm.kill(victim), before="forward")

        leaving = chatting.used(0)
        chatting.chat(lambda used: swarm.send(leaving, signal.SIGTERM), sample=False)
        assert swarm.servers[leaving].popen.wait(40) == 0
        training.train(lambda: None, before="forward")
        assert training.used(0) != leaving


@pytest.mark.nightly
def test_the_only_server_comes_back(started: Processes, folder: Path) -> None:
    """Killed with nobody else there; the client waits until the same peer is back, also with other blocks."""
    swarm = RealSwarm(started, folder)
    _, last = swarm.serve("0:2", "2:4")

    def restart(span: str) -> None:
        swarm.kill(last)
        swarm.come_back(last, span)

    with swarm.load(tuning_mode="deep_ptune", pre_seq_len=3) as model:
        client = Client(model, folder)
        with something_failed():
            client.chat(lambda used: restart("2:4"), sample=False)
        with something_failed():
            client.train(lambda: restart("1:4"), before="backward")


# --- at leisure -----------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
def test_kills_one_after_the_other(started: Processes, folder: Path, mode: str | None) -> None:
    """Both servers at once with replicas up; then the only one left of each, which comes back."""
    swarm = RealSwarm(started, folder)
    swarm.serve("0:2", "2:4", "0:2", "1:4")
    with swarm.load(tuning_mode=mode, pre_seq_len=3) as model:
        client = Client(model, folder)
        gone: set[str] = set()

        def kill_both(used: Used) -> None:
            for peer in {used(0), used(3)}:
                swarm.kill(peer)
                gone.add(peer)

        with something_failed():
            took = client.chat(kill_both, sample=mode == "ptune")
        assert took < SLACK_SECONDS + 1.5

        def kill_the_rest() -> None:
            for peer in sorted(set(swarm.servers) - gone):
                swarm.kill(peer)
                swarm.come_back(peer, "0:4")

        with something_failed():
            if mode is None:
                client.chat(lambda used: kill_the_rest(), sample=False, seed=3)
            else:
                client.train(kill_the_rest, before="forward", seed=5)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_smollm2_survives_a_kill_and_a_hang(started: Processes) -> None:
    source = open_checkpoint("smollm2").source.location
    swarm = RealSwarm(started, "smollm2")
    swarm.serve("0:15", "15:30", "0:15", "15:30")
    with swarm.load(tuning_mode="ptune", pre_seq_len=8) as model:
        client, hurt = Client(model, source), []

        def hang(used: Used) -> None:
            hurt.append(used(20))
            swarm.send(hurt[-1], signal.SIGSTOP)

        with something_failed():
            client.chat(hang, sample=True)
        swarm.send(hurt[-1], signal.SIGCONT)
        victim = client.used(0)
        with something_failed():
            client.train(lambda: swarm.kill(victim), before="backward", steps=2)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_server_that_comes_back_after_long_is_used_within_seconds(started: Processes, folder: Path) -> None:
    """However often it was tried in vain before."""
    swarm = RealSwarm(started, folder)
    _, last = swarm.serve("0:2", "2:4")
    with swarm.load() as model:
        client = Client(model, folder)

        def leave_for_long(used: Used) -> None:
            swarm.kill(last)
            timer = threading.Timer(20.0, lambda: swarm.come_back(last, "2:4"))
            timer.start()

        with something_failed():
            took = client.chat(leave_for_long, sample=False)
        assert took > 20
        up = swarm.servers[last].wait_ready().ready_path.stat().st_mtime
        assert time.time() - up < 15
