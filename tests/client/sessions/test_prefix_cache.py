"""Sessions that begin where others stand: forks, and beginnings that are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.reference import Prompted, local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

SPANS = [(0, 2), (2, 4)]


class Twins:
    """A swarm, a model in it, and the same model here."""

    def __init__(self, folder: Path, swarm: MemorySwarm, mode: str | None) -> None:
        self.swarm = swarm
        self.model = swarm.model(**({} if mode is None else {"tuning_mode": mode, "pre_seq_len": 3}))
        prompts = self.model.prompts
        if prompts is not None and prompts.deep is not None:
            prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        self.local = local_model(folder)
        for settings in (self.model.generation_config, self.local.generation_config):
            settings.eos_token_id, settings.pad_token_id = None, 0

    def say(self, session: Any, ids: torch.Tensor | None, count: int) -> torch.Tensor:
        found: torch.Tensor = self.model.generate(ids, max_new_tokens=count, do_sample=False, session=session)
        return found

    def greedy(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """What the local model says, with the prompts as they are now: [1, n + count]."""
        prompts = self.model.prompts
        if prompts is not None:
            return Prompted(self.local, prompts.input, prompts.deep).greedy(ids, count)
        found: torch.Tensor = self.local.generate(ids, max_new_tokens=count, do_sample=False)
        return found

    def computed(self) -> int:
        return sum(self.swarm.counted().values())


@pytest.fixture(params=["llama", "falcon"])
def family(request: pytest.FixtureRequest) -> str:
    """One that can be packed, and one that cannot (nothing is shared; everything must be as exact)."""
    return str(request.param)


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
def test_a_fork_and_its_origin_go_on_by_themselves(tmp_path: Path, family: str, mode: str | None) -> None:
    with MemorySwarm(write_tiny(family, tmp_path), SPANS) as swarm:
        twins = Twins(tmp_path, swarm, mode)
        begun, one, two = random_ids(1, 20), random_ids(1, 3, seed=1), random_ids(1, 4, seed=2)
        session = twins.model.inference_session()
        past = said = twins.say(session, begun, 5)
        before = twins.computed()
        fork = session.fork()
        mine = twins.say(session, one, 6)
        other = twins.say(fork, two, 6)
        assert said.shape[1] == 25
        assert torch.equal(torch.cat([past, mine], 1), twins.greedy(torch.cat([past, one], 1), 6))
        assert torch.equal(torch.cat([past, other], 1), twins.greedy(torch.cat([past, two], 1), 6))
        if family == "llama":  # the 24 cached tokens were not computed again
            assert twins.computed() - before == 2 * ((1 + 3 + 5) + (1 + 4 + 5))
        session.position = 10  # a rollback of the origin does not reach the fork
        twins.say(session, two, 3)
        more = twins.say(fork, None, 4)
        whole = torch.cat([past, other], 1)
        assert torch.equal(torch.cat([whole, more], 1), twins.greedy(whole, 4))
        session.close()
        last = twins.say(fork, one, 4)
        whole = torch.cat([whole, more], 1)
        assert torch.equal(torch.cat([whole, last], 1), twins.greedy(torch.cat([whole, one], 1), 4))
        fork.close()


@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
@pytest.mark.parametrize("still_open", [True, False], ids=["open", "closed"])
def test_a_known_beginning_is_computed_once(tmp_path: Path, mode: str | None, still_open: bool) -> None:
    with MemorySwarm(write_tiny("llama", tmp_path), SPANS) as swarm:
        twins = Twins(tmp_path, swarm, mode)
        begun, one, two = random_ids(1, 80), random_ids(1, 5, seed=1), random_ids(1, 7, seed=2)
        first = twins.model.inference_session()
        found = twins.say(first, torch.cat([begun, one], 1), 4)
        assert torch.equal(found[:, -4:], twins.greedy(torch.cat([begun, one], 1), 4)[:, -4:])
        if not still_open:
            first.close()
        before = twins.computed()
        with twins.model.inference_session() as second:
            found = twins.say(second, torch.cat([begun, two], 1), 4)
        assert torch.equal(found[:, -4:], twins.greedy(torch.cat([begun, two], 1), 4)[:, -4:])
        assert twins.computed() - before == 2 * (7 + 3)
        first.close()


def test_another_prompt_shares_nothing(tmp_path: Path) -> None:
    with MemorySwarm(write_tiny("llama", tmp_path), SPANS) as swarm:
        twins = Twins(tmp_path, swarm, "deep_ptune")
        ids = random_ids(1, 80)
        with twins.model.inference_session() as session:
            twins.say(session, ids, 2)
        for prompt in (twins.model.prompts.deep, twins.model.prompts.input):
            with torch.no_grad():
                prompt += 0.1
            with twins.model.inference_session() as session:
                found = twins.say(session, ids, 6)
            assert torch.equal(found[:, -6:], twins.greedy(ids, 6)[:, -6:])


def test_a_fork_outlives_a_server(tmp_path: Path) -> None:
    """The replacement has never seen the origin: it is given the fork's own history."""
    with MemorySwarm(write_tiny("llama", tmp_path), [*SPANS, (2, 4)]) as swarm:
        twins = Twins(tmp_path, swarm, "deep_ptune")
        begun, one = random_ids(1, 70), random_ids(1, 3, seed=1)
        session = twins.model.inference_session()
        said = twins.say(session, begun, 5)[:, -5:]
        fork = session.fork()
        session.position = 20
        swarm.kill(session.hops[1].peer_id)
        past = torch.cat([begun, said], 1)
        found = twins.say(fork, one, 6)
        assert torch.equal(found[:, -6:], twins.greedy(torch.cat([past, one], 1), 6)[:, -6:])
        found = twins.say(session, one, 6)
        whole = torch.cat([begun[:, :20], one], 1)
        assert torch.equal(found[:, -6:], twins.greedy(whole, 6)[:, -6:])


def test_a_stranger_gets_nothing(tmp_path: Path) -> None:
    """Another client that names the same session begins from nothing, and exactly."""
    with MemorySwarm(write_tiny("llama", tmp_path), SPANS) as swarm:
        twins, stranger = Twins(tmp_path, swarm, None), Twins(tmp_path, swarm, None)
        ids = random_ids(1, 80)
        session, other = twins.model.inference_session(), stranger.model.inference_session()
        twins.say(session, ids, 2)
        before = twins.computed()
        copied = swarm.loop.run(other.chain.fork_from(session.chain, 80, session.chain.version))
        assert copied
        assert all(span.channel is None for span in other.chain.spans)
        other.cache.record(ids, 1, 80, None)
        found = stranger.say(other, ids[:, :2], 4)
        assert torch.equal(found[:, -4:], stranger.greedy(torch.cat([ids, ids[:, :2]], 1), 4)[:, -4:])
        assert twins.computed() - before > 2 * 80


def test_what_was_taken_back_meanwhile_is_not_taken_over(tmp_path: Path) -> None:
    """Between the look at a session's tokens and the copy, another thread rolls it back and goes on."""
    with MemorySwarm(write_tiny("llama", tmp_path), SPANS) as swarm:
        twins = Twins(tmp_path, swarm, None)
        session, other = twins.model.inference_session(), twins.model.inference_session()
        twins.say(session, random_ids(1, 80), 2)
        seen = session.prefix()
        session.position = 10
        twins.say(session, random_ids(1, 90, seed=3), 2)
        assert not swarm.loop.run(other.chain.fork_from(seen.chain, 80, seen.version))
        ids = random_ids(1, 80)
        found = twins.say(other, ids, 4)
        assert torch.equal(found[:, -4:], twins.greedy(ids, 4)[:, -4:])
