"""A server that is lost in the middle costs time and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.covering import covering
from tests.reference import Prompted, local_model, relative
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.errors import MissingBlocks, RequestRefused, SwarmUnavailable

MODES = {"none": None, "ptune": "ptune", "deep_ptune": "deep_ptune"}
each_mode = pytest.mark.parametrize("mode", MODES.values())
GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def swarm(folder: Path) -> Iterator[MemorySwarm]:
    """Two fast servers, and slower replicas that are cut differently."""
    with MemorySwarm(folder, []) as made:
        made.add(0, 2, "a", throughput=1000)
        made.add(2, 4, "b", throughput=1000)
        made.add(0, 3, "spare-1", throughput=10)
        made.add(1, 2, "spare-2", throughput=10)
        made.add(2, 4, "spare-3", throughput=10)
        yield made


def pair(swarm: MemorySwarm, mode: str | None) -> tuple[Any, Prompted]:
    model = swarm.model(tuning_mode=mode, pre_seq_len=3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    local = local_model(swarm.checkpoint.name)
    if mode is None:
        return model, Prompted(local, torch.zeros(0, local.config.hidden_size))
    if model.prompts.deep is not None:
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model, Prompted(local, model.prompts.input, model.prompts.deep)


@pytest.mark.parametrize(("mode", "victim"), covering(MODES, "ab", together=1))
def test_a_server_killed_between_two_tokens(swarm: MemorySwarm, mode: str | None, victim: str) -> None:
    model, local = pair(swarm, mode)
    ids = random_ids(2, 6)
    expected = local.greedy(ids, 12)
    with model.inference_session(max_length=64) as session:
        first = model.generate(ids, max_new_tokens=5, **GREEDY)
        before = swarm.counted()
        swarm.kill(victim)
        second = model.generate(None, max_new_tokens=7, **GREEDY)
        assert torch.equal(torch.cat([first, second], 1), expected)
        # The other server keeps its cache: it is given the new tokens only.
        survivor = {"a": "b", "b": "a"}[victim]
        assert swarm.counted()[survivor] - before[survivor] == 2 * 7
        # Right after the replay, a rollback is as exact.
        session.position = 9
        again = model.generate(None, max_new_tokens=3, **GREEDY)
        assert torch.equal(again, expected[:, 9:12])


@each_mode
def test_a_server_killed_in_the_middle_of_a_rollback(swarm: MemorySwarm, mode: str | None) -> None:
    model, local = pair(swarm, mode)
    ids, other = random_ids(1, 6), random_ids(1, 3, seed=2)
    with model.inference_session(max_length=64) as session:
        model.generate(ids, max_new_tokens=6, **GREEDY)
        session.position = 7
        swarm.kill("b")
        found = model.generate(other, max_new_tokens=5, **GREEDY)
    begun = local.greedy(ids, 6)[:, :7]
    assert torch.equal(found, local.greedy(torch.cat([begun, other], 1), 5)[:, 7:])


def test_a_server_killed_during_beam_search(swarm: MemorySwarm) -> None:
    model, local = pair(swarm, None)
    ids = random_ids(1, 6)
    expected = local.model.generate(ids, max_new_tokens=12, num_beams=4, eos_token_id=None, **GREEDY)
    steps = 0

    class KillAtSix:
        """A logits processor that kills a server in the middle of the search."""

        def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == 6:
                swarm.kill("a")
            return scores

    found = model.generate(ids, max_new_tokens=12, num_beams=4, logits_processor=[KillAtSix()], **GREEDY)
    assert steps >= 12
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mode", "victims", "moment"),
    covering(["ptune", "deep_ptune"], ["a", "b", "ab"], ["before forward", "before backward"]),
)
def test_training_goes_on_exactly(swarm: MemorySwarm, mode: str, victims: str, moment: str) -> None:
    model, local = pair(swarm, mode)
    ids = random_ids(6, 120)
    model(ids, labels=ids).loss.backward()  # a step before, so that streams are open
    model.zero_grad()
    if moment == "before forward":
        _ = [swarm.kill(victim) for victim in victims]
    loss = model(ids, labels=ids).loss
    if moment == "before backward":
        _ = [swarm.kill(victim) for victim in victims]
    loss.backward()
    expected = local.loss(ids, ids)
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-4
    assert relative(model.prompts.input.grad, local.vectors.grad) < 1e-4
    if local.deep is not None:
        assert relative(model.prompts.deep.grad, local.deep.grad) < 1e-4


@each_mode
@pytest.mark.parametrize("beams", [1, 3])
def test_a_request_that_is_too_large_costs_no_replay(folder: Path, mode: str | None, beams: int) -> None:
    with MemorySwarm(folder, [(0, 2)]) as swarm:
        swarm.cache_tokens = 128
        small = swarm.add(2, 4)
        model, local = pair(swarm, mode)
        ids, new = random_ids(1, 20), random_ids(1, 4, seed=1)
        with model.inference_session():
            first = model.generate(ids, max_new_tokens=5, **GREEDY)
            held = swarm.counted()[small]
            for _ in range(2):
                with pytest.raises(RequestRefused, match="ask for fewer tokens") as refused:
                    model.generate(new, max_new_tokens=200, num_beams=beams, **GREEDY)
                assert refused.value.peer_id == small
            before = swarm.counted()
            assert before[small] == held
            second = model.generate(new, max_new_tokens=5, **GREEDY)
        expected = local.greedy(torch.cat([first, new], 1), 5)
        assert torch.equal(torch.cat([first, second], 1), expected)
        after = swarm.counted()
        assert {after[peer] - before[peer] for peer in after} == {1 + 4 + 4}


def test_a_first_call_that_is_too_large_leaves_a_session_for_any_batch(folder: Path) -> None:
    with MemorySwarm(folder, [(0, 2)]) as swarm:
        swarm.cache_tokens = 128
        swarm.add(2, 4)
        model, local = pair(swarm, "ptune")
        ids = random_ids(1, 20)
        with model.inference_session():
            with pytest.raises(RequestRefused, match="ask for fewer tokens"):
                model.generate(ids, max_new_tokens=200, num_beams=3, **GREEDY)
            assert torch.equal(model.generate(ids, max_new_tokens=4, **GREEDY), local.greedy(ids, 4))


def test_a_server_that_comes_back_under_the_same_id_is_replayed(folder: Path) -> None:
    with MemorySwarm(folder, []) as swarm:
        swarm.add(0, 2, "a")
        swarm.add(2, 4, "b")
        model, local = pair(swarm, "deep_ptune")
        ids = random_ids(1, 6)
        with model.inference_session(max_length=64):
            first = model.generate(ids, max_new_tokens=5, **GREEDY)
            swarm.kill("b")
            swarm.add(2, 4, "b")
            second = model.generate(None, max_new_tokens=5, **GREEDY)
        assert torch.equal(torch.cat([first, second], 1), local.greedy(ids, 10))


def test_a_lost_cache_is_replayed_to_the_same_server(swarm: MemorySwarm) -> None:
    model, local = pair(swarm, "ptune")
    ids = random_ids(1, 6)
    with model.inference_session(max_length=64) as session:
        first = model.generate(ids, max_new_tokens=5, **GREEDY)
        for span in session.chain.spans:
            swarm.loop.run(span.drop())
        second = model.generate(None, max_new_tokens=5, **GREEDY)
    assert torch.equal(torch.cat([first, second], 1), local.greedy(ids, 10))


def test_a_hang_is_noticed_and_another_server_takes_over(swarm: MemorySwarm) -> None:
    model, local = pair(swarm, "ptune")
    ids = random_ids(1, 6)
    with model.inference_session(max_length=64):
        first = model.generate(ids, max_new_tokens=3, **GREEDY)
        swarm.stop("b")
        second = model.generate(None, max_new_tokens=3, **GREEDY)
    assert torch.equal(torch.cat([first, second], 1), local.greedy(ids, 6))


def test_with_nobody_left_the_error_names_the_blocks(folder: Path) -> None:
    with MemorySwarm(folder, []) as swarm:
        swarm.add(0, 2, "a")
        with pytest.raises(MissingBlocks, match=r"2.*corolla serve"):
            swarm.model()
        swarm.add(2, 4, "b")
        model = swarm.model(patience=0.5)
        swarm.kill("b")
        with pytest.raises(SwarmUnavailable, match="Gave up"):
            model.generate(random_ids(1, 4), max_new_tokens=2, **GREEDY)


def test_a_server_of_another_model_is_never_used(folder: Path, tmp_path: Path) -> None:
    other = write_tiny("llama", tmp_path / "other", seed=1)
    with MemorySwarm(folder, [(0, 4)]) as swarm, MemorySwarm(other, []) as stranger:
        assert swarm.checkpoint.identity != stranger.checkpoint.identity
        stranger.network, stranger.board, stranger.loop = swarm.network, swarm.board, swarm.loop
        stranger.add(0, 4, "stranger", throughput=1e6)
        model, local = pair(swarm, None)
        found = model.generate(random_ids(1, 5), max_new_tokens=6, **GREEDY)
        assert torch.equal(found, local.greedy(random_ids(1, 5), 6))
        assert stranger.counted()["stranger"] == 0
        swarm.loop.run(stranger.servers["stranger"].engine.close())
        stranger.servers.clear()
        from corolla.swarm.loop import EventLoopThread

        stranger.loop = EventLoopThread()
