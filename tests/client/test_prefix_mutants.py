"""Planted mistakes with a prefix, each caught by the checks that its exactness tests make."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.client.test_mutants import prompts_lost_in_a_replay
from tests.client.test_prefix import P, random_prefix
from tests.mutants import Mistakes, Plant, failing, no_mistake
from tests.reference import Prefixed, local_model, relative
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from torch import Tensor

from corolla.models.prompts import BlockVectors, KeyValuePrefix
from corolla.server.sessions.session import Session
from corolla.server.sessions.step import StepRequest
from corolla.server.training import Sequences


def prefix_shifted_by_one(patch: Mistakes) -> None:
    """Its tokens stand one place nearer to those behind it than they should."""
    whole, ids = Sequences._positions, vars(StepRequest)["_ids"].func

    def early(self: Sequences, device: torch.device) -> Tensor:
        return whole(self, device) - int(self._before > 0)

    patch.setattr(Sequences, "_positions", early)
    patch.setattr(StepRequest, "_ids", property(lambda self: ids(self) - int(self.session.before > 0)))


def stale_digest(patch: Mistakes) -> None:
    """Every prefix goes by the same name."""
    patch.setattr(BlockVectors, "digest", "0" * 64)


def frozen_token_trained(patch: Mistakes) -> None:
    make = KeyValuePrefix.__init__

    def thawed(self: KeyValuePrefix, values: Tensor, frozen: int = 1) -> None:
        make(self, values, 0 * frozen)

    patch.setattr(KeyValuePrefix, "__init__", thawed)


def prefix_rolled_back(patch: Mistakes) -> None:
    """Tokens are cut off as if no prefix came before them."""
    patch.setattr(Session, "cached_tokens", Session.real_tokens)


CAUGHT_BY: dict[Plant, tuple[str, ...]] = {
    no_mistake: (),
    prefix_shifted_by_one: ("gradients", "decoding"),
    stale_digest: ("changed",),
    frozen_token_trained: ("steps",),
    prompts_lost_in_a_replay: ("failover",),
    prefix_rolled_back: ("rollback",),
}


@dataclasses.dataclass
class Checks:
    """The comparisons of `test_prefix.py`, each on its own."""

    swarm: MemorySwarm
    model: Any
    local: Prefixed

    def gradients(self) -> bool:
        ids = random_ids(2, 8)
        self.model.zero_grad()
        self.model(ids, labels=ids).loss.backward()
        self.local.values.grad = None
        self.local.loss(ids, ids).backward()
        found = self.model.prompts.trained.grad
        return relative(found, self.local.values.grad[:, -found.shape[1] :]) < 1e-4

    def steps(self) -> bool:
        ids, before = random_ids(2, 8), self.model.prompts.values[:, :1].detach().clone()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.model(ids, labels=ids).loss.backward()
        kept = {name: one.clone() for name, one in self.model.prompts.state_dict().items()}
        optimizer.step()
        same = torch.equal(self.model.prompts.values[:, :1], before)
        self.model.prompts.load_state_dict(kept)
        return same

    def changed(self) -> bool:
        """After a step of training, another prefix counts, in training and in sessions."""
        ids, kept = random_ids(1, 6), self.model.prompts.trained.data
        with torch.no_grad():
            self.model(ids)
            self.model.generate(ids, max_new_tokens=2, do_sample=False)
            self.model.prompts.trained.data = kept * 1.5
            local = Prefixed(self.local.model, self.model.prompts.values)
            near = bool((self.model(ids).logits - local.logits(ids)).abs().max() < 1e-4)
            found = self.model.generate(ids, max_new_tokens=8, do_sample=False)
            self.model.prompts.trained.data = kept
        return near and torch.equal(found, local.greedy(ids, 8))

    def decoding(self) -> bool:
        ids = random_ids(1, 6)
        found = self.model.generate(ids, max_new_tokens=10, do_sample=False)
        return torch.equal(found, self.local.greedy(ids, 10))

    def rollback(self) -> bool:
        ids = random_ids(1, 6)
        whole = self.local.greedy(ids, 8)
        with self.model.inference_session() as session:
            self.model.generate(ids, max_new_tokens=8, do_sample=False)
            session.position = 9
            return torch.equal(self.model.generate(None, max_new_tokens=5, do_sample=False), whole[:, 9:])

    def failover(self) -> bool:
        ids = random_ids(1, 6)
        with self.model.inference_session() as session:
            before = self.model.generate(ids, max_new_tokens=4, do_sample=False)
            for span in session.chain.spans:
                self.swarm.loop.run(span.drop())
            after = self.model.generate(None, max_new_tokens=5, do_sample=False)
        return torch.equal(torch.cat([before, after], 1), self.local.greedy(ids, 9))


@pytest.mark.parametrize("plant", CAUGHT_BY, ids=lambda plant: plant.__name__)
def test_mutant(plant: Plant, tmp_path: Path, mistakes: Mistakes) -> None:
    folder = write_tiny("llama", tmp_path)
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        plant(mistakes)
        model = swarm.model(tuning_mode="prefix", pre_seq_len=P)
        random_prefix(model)
        local = Prefixed(local_model(folder), model.prompts.values)
        for settings in (model.generation_config, local.model.generation_config):
            settings.eos_token_id, settings.pad_token_id = None, 0
        checks = Checks(swarm, model, local)
        failed = failing(checks, CAUGHT_BY[plant])
    assert failed == set(CAUGHT_BY[plant])
