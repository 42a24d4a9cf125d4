"""What a recovery costs: who is replayed, who keeps a cache, who is left alone. In virtual time, exact in fp64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.faults import Fault, Frame, Injector
from tests.reference import local_model
from tests.schedules.world import DTYPE, ServerPlan, SimulatedSwarm, checkpoint_of

from corolla.client.model.arguments import from_pretrained
from corolla.client.model.causal_lm import load_distributed
from corolla.client.sessions import span_session
from corolla.errors import SwarmUnavailable

LONG = {"max_new_tokens": 40, "do_sample": False}
SHORT: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


class Bench:
    """A swarm with one client, its model, and a count of what each server was sent."""

    def __init__(self, root: Path, servers: Sequence[ServerPlan], patience: float = 600.0) -> None:
        checkpoint = checkpoint_of("llama", root)
        self.swarm = SimulatedSwarm(checkpoint, servers)
        self.connection = self.swarm.connect("client", patience)
        self.model = load_distributed(
            from_pretrained(checkpoint.name, dtype=DTYPE), connection=self.connection
        )
        self.local = local_model(checkpoint.name, DTYPE)
        for settings in (self.model.generation_config, self.local.generation_config):
            settings.eos_token_id, settings.pad_token_id = None, 0
        self.injector = Injector(self.swarm, frozenset({"client"}))
        self.sent: Counter[tuple[str, str]] = Counter()
        self.injector.watch = self._count

    def _count(self, frame: Frame) -> None:
        self.sent[frame.peer, frame.message] += 1

    def on_loop(self, what: Any, *arguments: Any) -> Any:
        async def run() -> Any:
            return what(*arguments)

        return self.swarm.loop.run(run())

    def inference(self, peer: str) -> int:
        """Rows × tokens that a server computed in its present life."""
        return self.swarm.counters("inference")[peer]


@pytest.fixture
def bench(root: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(root, request.param)
    yield made
    made.swarm.close()


TWO = [ServerPlan("a", 0, 2, 100.0), ServerPlan("b", 2, 4, 100.0)]
SPARE = [*TWO, ServerPlan("spare", 1, 4, 30.0)]
ONE_EACH = pytest.mark.parametrize("bench", [TWO], indirect=True, ids=["two"])
WITH_SPARE = pytest.mark.parametrize("bench", [SPARE], indirect=True, ids=["spare"])


def begun(bench: Bench) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A session some tokens long, and what it must say in the end."""
    ids = random_ids(1, 30)
    expected = bench.local.generate(ids, max_new_tokens=46, do_sample=False)
    session = bench.model.inference_session(max_length=200)
    bench.model.generate(ids, session=session, **LONG)
    bench.sent.clear()
    return session, expected, ids


@ONE_EACH
@pytest.mark.parametrize("kind", ["evict", "restart"])
def test_only_the_server_that_lost_its_cache_is_replayed_in_one_piece(bench: Bench, kind: str) -> None:
    session, expected, _ = begun(bench)
    kept = bench.inference("a")
    bench.injector.fail_at(Fault(kind, "b", n=3))
    bench.model.generate(None, session=session, **SHORT)
    assert torch.equal(session.output_ids, expected)
    assert bench.injector.hits[kind] == 1
    assert bench.inference("a") - kept == 6  # new tokens only
    # Six steps, one of them twice, and one message with everything that came before.
    assert bench.sent["b", "Step"] == 6 + 1 + 1
    assert bench.sent["b", "OpenSession"] == 1
    assert bench.sent["a", "OpenSession"] == 0


@ONE_EACH
def test_a_long_history_is_replayed_in_large_chunks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_session, "REPLAY_TOKENS", 32)
    session, expected, _ = begun(bench)
    bench.injector.fail_at(Fault("restart", "b", n=3))
    bench.model.generate(None, session=session, **SHORT)
    assert torch.equal(session.output_ids, expected)
    assert bench.sent["b", "Step"] == 6 + 1 + 3  # 71 tokens in pieces of 32


def grown(bench: Bench, session: Any, count: int) -> None:
    """A call that needs far more room than what is reserved."""
    bench.model.generate(None, session=session, max_new_tokens=count, do_sample=False)


@ONE_EACH
def test_a_busy_server_is_not_asked_again_before_it_said_and_its_cache_is_kept(bench: Bench) -> None:
    session, _, ids = begun(bench)
    asked: list[float] = []
    bench.injector.watch = lambda frame: (
        asked.append(bench.swarm.loop.time()) if (frame.peer, frame.message) == ("b", "Step") else None
    )
    before, began = bench.inference("b"), bench.swarm.loop.time()
    bench.injector.fail_at(Fault("full", "b", returns=80.0))
    grown(bench, session, 60)
    assert torch.equal(session.output_ids, bench.local.generate(ids, max_new_tokens=100, do_sample=False))
    assert bench.inference("b") - before == 60  # nothing was replayed
    waits = [moment - began for moment in asked]
    # The server waits 30 s for room before it says "busy" with 5 s to wait; 80 s hold three such rounds.
    assert waits[1] >= 35
    assert waits[2] >= 70
    assert bench.swarm.loop.time() - began < 120
    assert not bench.connection.view.health._failures


@WITH_SPARE
def test_a_busy_server_is_left_where_there_is_another(bench: Bench) -> None:
    session, _, ids = begun(bench)
    bench.injector.fail_at(Fault("full", "b", returns=5000.0))
    grown(bench, session, 60)
    assert torch.equal(session.output_ids, bench.local.generate(ids, max_new_tokens=100, do_sample=False))
    assert bench.swarm.loop.time() < 60
    assert bench.sent["spare", "OpenSession"] == 1
    assert bench.sent["a", "OpenSession"] == 0


@WITH_SPARE
def test_a_server_a_hundred_times_slower_than_announced_is_left(bench: Bench) -> None:
    session, expected, _ = begun(bench)
    bench.on_loop(bench.swarm.slow_down, "b", 100.0)
    began = bench.swarm.loop.time()
    bench.model.generate(None, session=session, **SHORT)
    assert torch.equal(session.output_ids, expected)
    assert bench.sent["b", "Step"] == 4  # so many are needed to be sure
    assert bench.sent["spare", "OpenSession"] == 1
    assert bench.swarm.loop.time() - began < 4.1
    # Another session does not begin there either.
    bench.sent.clear()
    bench.model.generate(random_ids(1, 5), **SHORT)
    assert bench.sent["b", "OpenSession"] == 0


@WITH_SPARE
def test_training_leaves_a_slow_server_too(bench: Bench) -> None:
    ids = random_ids(1, 5)
    bench.on_loop(bench.swarm.slow_down, "b", 100.0 * ids.shape[1])
    for _ in range(6):
        bench.model(ids, use_cache=False)
    assert bench.sent["b", "Forward"] == 4
    assert bench.sent["spare", "Forward"] == 2


@ONE_EACH
def test_a_slow_server_is_used_where_there_is_no_other(bench: Bench) -> None:
    session, expected, _ = begun(bench)
    bench.on_loop(bench.swarm.slow_down, "b", 100.0)
    bench.model.generate(None, session=session, **SHORT)
    assert torch.equal(session.output_ids, expected)
    assert bench.sent["b", "OpenSession"] == 0


@pytest.mark.parametrize("bench", [[*TWO, ServerPlan("late", 2, 4, 30.0)]], indirect=True, ids=["moved"])
def test_a_server_that_came_back_with_other_blocks_is_asked_once_and_routed_anew(bench: Bench) -> None:
    bench.on_loop(bench.swarm.kill, "late")
    session, expected, _ = begun(bench)
    bench.on_loop(bench.swarm.kill, "b")
    bench.on_loop(bench.swarm.start, "b", (0, 2))
    began = bench.swarm.loop.time()
    bench.on_loop(lambda: bench.injector.later(20.0, lambda: bench.swarm.start("late")))
    bench.model.generate(None, session=session, **SHORT)
    assert torch.equal(session.output_ids, expected)
    assert bench.sent["b", "OpenSession"] == 1  # the only time that it is asked for what it no longer has
    assert bench.sent["late", "OpenSession"] == 1
    assert 20 <= bench.swarm.loop.time() - began < 30


@ONE_EACH
@pytest.mark.parametrize("how", ["empty", "error", "slow"])
def test_work_goes_on_without_a_directory(bench: Bench, how: str) -> None:
    session, expected, _ = begun(bench)
    bench.on_loop(bench.swarm.directory_gone, True, how)
    bench.injector.fail_at(Fault("restart", "b", n=2))
    bench.model.generate(None, session=session, **SHORT)
    assert torch.equal(session.output_ids, expected)
    assert bench.swarm.loop.time() < 30


def test_a_block_that_nobody_serves_is_named_when_patience_ends(root: Path) -> None:
    bench = Bench(root, TWO, patience=45.0)
    try:
        session, *_ = begun(bench)
        bench.injector.fail_at(Fault("hang", "b", n=2))
        with pytest.raises(
            SwarmUnavailable,
            match=r"Gave up on a generation step after 4\d s: .* blocks 2, 3 of .* was silent",
        ):
            bench.model.generate(None, session=session, **SHORT)
        assert bench.swarm.loop.time() < 60
    finally:
        bench.swarm.close()
