"""Planted mistakes, each caught by the checks that the exactness tests make.

A check that passes with one of these is not a check: the named mutants are those of the project's definition
of exactness (a position off by one, a dropped mask, prompts lost in a replay, a rollback ignored, two blocks
swapped).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.reference import Prompted, local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.client.chain import SessionChain, SpanSession
from corolla.models.span import Span
from corolla.server.kv_cache import CachedSession

Plant = Callable[[pytest.MonkeyPatch], None]


def no_mistake(_patch: pytest.MonkeyPatch) -> None:
    """The checks pass on the code as it is."""


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    forward = Span.forward

    def shifted(self: Span, hidden: torch.Tensor, **extra: Any) -> torch.Tensor:
        past = extra["cache"].get_seq_length() if extra.get("cache") is not None else 0
        if past and extra.get("positions") is None:
            extra["positions"] = (past + 1 + torch.arange(hidden.shape[1])).expand(hidden.shape[0], -1)
        return forward(self, hidden, **extra)

    patch.setattr(Span, "forward", shifted)


def dropped_mask(patch: pytest.MonkeyPatch) -> None:
    forward = Span.forward

    def unmasked(self: Span, hidden: torch.Tensor, **extra: Any) -> torch.Tensor:
        return forward(self, hidden, **(extra | {"mask": None}))

    patch.setattr(Span, "forward", unmasked)


def prompts_lost_in_a_replay(patch: pytest.MonkeyPatch) -> None:
    opened = SpanSession.open

    async def forgetful(self: SpanSession, view: Any, **arguments: Any) -> None:
        replaying = getattr(view, "seen", set()) & {(self.hop.start, self.hop.end)}
        view.seen = getattr(view, "seen", set()) | {(self.hop.start, self.hop.end)}
        await opened(self, view, **(arguments | ({"deep": None} if replaying else {})))

    patch.setattr(SpanSession, "open", forgetful)


def rollback_ignored(patch: pytest.MonkeyPatch) -> None:
    step = CachedSession.step

    def ignoring(self: CachedSession, hidden: torch.Tensor, *, position: int, **extra: Any) -> torch.Tensor:
        return step(self, hidden, position=max(position, self.length), **extra)

    patch.setattr(CachedSession, "step", ignoring)


def rollback_ignored_in_the_history(patch: pytest.MonkeyPatch) -> None:
    from corolla.client.history import History

    patch.setattr(History, "truncate", lambda _self, _length: None)


def reorder_ignored(patch: pytest.MonkeyPatch) -> None:
    take = SessionChain._take_order

    def identity(self: SessionChain, rows: int) -> torch.Tensor | None:
        order = take(self, rows)
        return order if order is None or len(order) != self._rows else torch.arange(len(order))

    patch.setattr(SessionChain, "_take_order", identity)


def two_blocks_swapped(patch: pytest.MonkeyPatch) -> None:
    forward = Span.forward

    def swapped(self: Span, hidden: torch.Tensor, **extra: Any) -> torch.Tensor:
        blocks, own = self.blocks, list(self.blocks)
        if len(own) > 1 and extra.get("cache") is None:
            blocks[0], blocks[1] = own[1], own[0]
        try:
            return forward(self, hidden, **extra)
        finally:
            for index, block in enumerate(own):
                blocks[index] = block

    patch.setattr(Span, "forward", swapped)


def gradient_of_one_span_lost(patch: pytest.MonkeyPatch) -> None:
    from corolla.client.training import TrainingPass

    hop_back = TrainingPass._backward_hop

    async def lossy(self: TrainingPass, micro: Any, hop: Any, inputs: Any, grad: Any) -> Any:
        value, piece = await hop_back(self, micro, hop, inputs, grad)
        return value, (torch.zeros_like(piece) if hop.start and piece is not None else piece)

    patch.setattr(TrainingPass, "_backward_hop", lossy)


CAUGHT_BY: dict[Plant, tuple[str, ...]] = {
    no_mistake: (),
    position_off_by_one: ("decoding", "rollback", "failover"),
    dropped_mask: ("padding",),
    prompts_lost_in_a_replay: ("failover",),
    rollback_ignored: ("rollback",),
    rollback_ignored_in_the_history: ("failover",),
    reorder_ignored: ("beams",),
    two_blocks_swapped: ("logits", "gradients", "padding"),
    gradient_of_one_span_lost: ("gradients",),
}


@dataclasses.dataclass
class Checks:
    """The comparisons of the exactness tests, each on its own."""

    swarm: MemorySwarm
    model: Any
    local: Prompted

    def logits(self) -> bool:
        ids = random_ids(2, 8)
        return bool((self.model(ids).logits - self.local.logits(ids)).abs().max() < 1e-4)

    def padding(self) -> bool:
        ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
        mask[1, 2:5] = 0
        difference = self.model(ids, attention_mask=mask).logits - self.local.logits(ids, mask)
        return bool((difference * mask[..., None]).abs().max() < 1e-4)

    def gradients(self) -> bool:
        ids = random_ids(2, 8)
        self.model.zero_grad()
        self.model(ids, labels=ids).loss.backward()
        assert self.local.deep is not None
        self.local.deep.grad = None
        self.local.loss(ids, ids).backward()
        found, expected = self.model.prompts.deep.grad, self.local.deep.grad
        return bool((found - expected).norm() / expected.norm() < 1e-4)

    def decoding(self) -> bool:
        ids = random_ids(1, 6)
        found = self.model.generate(ids, max_new_tokens=10, do_sample=False)
        return torch.equal(found, self.local.greedy(ids, 10))

    def rollback(self) -> bool:
        ids = random_ids(1, 6)
        with self.model.inference_session(max_length=64) as session:
            self.model.generate(ids, max_new_tokens=8, do_sample=False)
            session.position = 5
            found = self.model.generate(random_ids(1, 3, seed=7), max_new_tokens=8, do_sample=False)
        return torch.equal(found, self.local.greedy(torch.cat([ids[:, :5], found[:, :3]], 1), 8)[:, 5:])

    def beams(self) -> bool:
        ids = random_ids(1, 6)
        prompts, self.model.prompts = self.model.prompts, None
        settings: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False}
        found = self.model.generate(ids, **settings)
        self.model.prompts = prompts
        return torch.equal(found, self.local.model.generate(ids, **settings))

    def failover(self) -> bool:
        ids, other = random_ids(1, 6), random_ids(1, 3, seed=7)
        with self.model.inference_session(max_length=64) as session:
            self.model.generate(ids, max_new_tokens=8, do_sample=False)
            session.position = 9
            before = self.model.generate(other, max_new_tokens=3, do_sample=False)
            for span in session._chain._spans:
                self.swarm.loop.run(span.drop())
            after = self.model.generate(None, max_new_tokens=5, do_sample=False)
            found = torch.cat([before, after], 1)
        begun = self.local.greedy(ids, 8)[:, :9]
        return torch.equal(found, self.local.greedy(torch.cat([begun, other], 1), 8)[:, 9:])


@pytest.mark.parametrize("plant", CAUGHT_BY, ids=lambda plant: plant.__name__)
def test_mutant(plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny("llama", tmp_path)
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        model = swarm.model(tuning_mode="deep_ptune", pre_seq_len=3)
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.prompts.input.data.mul_(4)
        local = Prompted(local_model(folder), model.prompts.input, model.prompts.deep)
        for settings in (model.generation_config, local.model.generation_config):
            settings.eos_token_id, settings.pad_token_id = None, 0
        checks = Checks(swarm, model, local)
        plant(monkeypatch)
        names = [field for field in vars(Checks) if not field.startswith("_")]
        outcome = {name: _passes(getattr(checks, name)) for name in names}
    failed = {name for name, passed in outcome.items() if not passed}
    if plant is no_mistake:
        assert not failed
    assert set(CAUGHT_BY[plant]) <= failed


def _passes(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except Exception:  # a mutant may also break in other ways
        return False
