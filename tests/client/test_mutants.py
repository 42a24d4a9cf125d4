"""Planted mistakes, each caught by the checks that the exactness tests make.

A check that passes with one of these is not a check: the named mutants are those of the project's definition
of exactness (a position off by one, a dropped mask, prompts lost in a replay, a rollback ignored, two blocks
swapped).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.mutants import Mistakes, Plant, failing, no_mistake
from tests.reference import Prompted, local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.client import training
from corolla.client.sessions.chain import SessionChain
from corolla.client.sessions.span_session import SpanSession
from corolla.models.attention.packing import PackedBatch
from corolla.models.attention.pages import BlockTable, pages_for
from corolla.models.span import Span
from corolla.server.peers import Lease, Leases
from corolla.server.sessions.session import Session
from corolla.server.sessions.step import StepRequest


def position_off_by_one(patch: Mistakes) -> None:
    forward = Span.forward_packed

    def shifted(self: Span, hidden: torch.Tensor, batch: PackedBatch, **extra: Any) -> torch.Tensor:
        past = [one.past for one in batch.segments for _ in range(one.count)]
        extra["positions"] = extra["positions"] + (torch.tensor(past) > 0)
        return forward(self, hidden, batch, **extra)

    patch.setattr(Span, "forward_packed", shifted)


def dropped_mask(patch: Mistakes) -> None:
    cut = training.micro_batches

    def unmasked(rows: int, tokens: int, mask: Any, positions: Any) -> Iterator[training.MicroBatch]:
        return cut(rows, tokens, None, positions)

    patch.setattr(training, "micro_batches", unmasked)


def padding_counted(patch: Mistakes) -> None:
    """A padded row's tokens are cached like any others."""
    make = StepRequest.__init__

    def unmasked(self: StepRequest, *arguments: Any, **extra: Any) -> None:
        make(self, *arguments, **(extra | {"mask": None}))

    patch.setattr(StepRequest, "__init__", unmasked)
    patch.setattr(Session, "same_past", lambda *_: True)


def stranger_seen(patch: Mistakes) -> None:
    """A sequence reads another's first page for its own."""
    make = PackedBatch.__init__

    def mixed(self: PackedBatch, *given: Any, **named: Any) -> None:
        make(self, *given, **named)
        for one, other in pairwise(self.segments):
            for own, theirs in zip(one.parts, other.parts, strict=True):
                if own.table is not None and theirs.table is not None:
                    pages = [theirs.table.pages[0], *own.table.pages[1 : pages_for(own.table.length)]]
                    own._first, own._pages = None, torch.tensor(pages)

    patch.setattr(PackedBatch, "__init__", mixed)


def shared_page_written(patch: Mistakes) -> None:
    patch.setattr(BlockTable, "_copy_on_write", lambda _self, _index: None)


def stale_lease(patch: Mistakes) -> None:
    """A backward goes through the graph of another micro-batch."""
    take = Leases.take

    def wrong(self: Leases, peer: str, key: str) -> Lease | None:
        others = [name for name in self._kept if name != (peer, key)]
        return take(self, *(others[-1] if others else (peer, key)))

    patch.setattr(Leases, "take", wrong)


def prompts_lost_in_a_replay(patch: Mistakes) -> None:
    """A replacement is not given what blocks are given besides: deep prompts, or a prefix."""
    opened = SpanSession.open

    async def forgetful(self: SpanSession, view: Any, **arguments: Any) -> bool:
        replaying = getattr(view, "seen", set()) & {(self.hop.start, self.hop.end)}
        view.seen = getattr(view, "seen", set()) | {(self.hop.start, self.hop.end)}
        return await opened(self, view, **(arguments | ({"vectors": None} if replaying else {})))

    patch.setattr(SpanSession, "open", forgetful)


def rollback_ignored(patch: Mistakes) -> None:
    rearrange = Session.rearrange

    def ignoring(self: Session, rows: int, position: int, order: torch.Tensor | None) -> None:
        rearrange(self, rows, max(position, self.length), order)

    patch.setattr(Session, "rearrange", ignoring)


def rollback_ignored_in_the_history(patch: Mistakes) -> None:
    from corolla.client.sessions.span_session import History

    patch.setattr(History, "truncate", lambda _self, _length: None)


def reorder_ignored(patch: Mistakes) -> None:
    take = SessionChain._take_order

    def identity(self: SessionChain, rows: int) -> torch.Tensor | None:
        order = take(self, rows)
        return order if order is None or len(order) != self._rows else torch.arange(len(order))

    patch.setattr(SessionChain, "_take_order", identity)


def two_blocks_swapped(patch: Mistakes) -> None:
    forward = Span.forward_packed

    def swapped(self: Span, hidden: torch.Tensor, batch: PackedBatch, **extra: Any) -> torch.Tensor:
        blocks, own = self.blocks, list(self.blocks)
        if len(own) > 1 and all(one.sequence is None for one in batch.segments):
            blocks[0], blocks[1] = own[1], own[0]
        try:
            return forward(self, hidden, batch, **extra)
        finally:
            for index, block in enumerate(own):
                blocks[index] = block

    patch.setattr(Span, "forward_packed", swapped)


def gradient_of_one_span_lost(patch: Mistakes) -> None:
    hop_back = training.TrainingPass._backward_hop

    async def lossy(self: training.TrainingPass, micro: Any, stage: training.Stage, grad: Any) -> Any:
        value, piece = await hop_back(self, micro, stage, grad)
        return value, (torch.zeros_like(piece) if stage.hop.start and piece is not None else piece)

    patch.setattr(training.TrainingPass, "_backward_hop", lossy)


CAUGHT_BY: dict[Plant, tuple[str, ...]] = {
    no_mistake: (),
    position_off_by_one: ("decoding", "rollback", "failover"),
    dropped_mask: ("padding",),
    prompts_lost_in_a_replay: ("failover",),
    rollback_ignored: ("rollback",),
    rollback_ignored_in_the_history: ("failover",),
    reorder_ignored: ("beams",),
    two_blocks_swapped: ("logits", "gradients", "padding"),
    gradient_of_one_span_lost: ("gradients", "micro_batches"),
    padding_counted: ("padded_decoding",),
    stranger_seen: ("crowd",),
    shared_page_written: ("beams",),
    stale_lease: ("micro_batches",),
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

    def gradients(self, rows: int = 2, length: int = 8) -> bool:
        ids = random_ids(rows, length)
        self.model.zero_grad()
        self.model(ids, labels=ids).loss.backward()
        deep: Any = self.local.deep
        deep.grad = None
        self.local.loss(ids, ids).backward()
        found, expected = self.model.prompts.deep.grad, deep.grad
        return bool((found - expected).norm() / expected.norm() < 1e-4)

    def micro_batches(self) -> bool:
        """Two of the same size, which are in flight together."""
        return self.gradients(6, 150)

    def padded_decoding(self) -> bool:
        ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
        mask[1, :3] = 0
        settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
        with self._without_prompts():
            found = self.model.generate(ids, **settings)
        return torch.equal(found, self.local.model.generate(ids, **settings))

    def crowd(self) -> bool:
        """Sessions that all generate at the same time, each as if it were alone."""
        prompts = [random_ids(1, 6 + seed, seed=seed) for seed in range(6)]
        start = threading.Barrier(len(prompts))

        def generate(ids: torch.Tensor) -> torch.Tensor:
            start.wait(20)
            found: torch.Tensor = self.model.generate(ids, max_new_tokens=12, do_sample=False)
            return found

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(generate, prompts))
        return all(
            torch.equal(found, self.local.greedy(ids, 12))
            for found, ids in zip(answers, prompts, strict=True)
        )

    @contextlib.contextmanager
    def _without_prompts(self) -> Iterator[None]:
        prompts, self.model.prompts = self.model.prompts, None
        try:
            yield
        finally:
            self.model.prompts = prompts

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
        settings: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False}
        with self._without_prompts():
            found = self.model.generate(ids, **settings)
        return torch.equal(found, self.local.model.generate(ids, **settings))

    def failover(self) -> bool:
        ids, other = random_ids(1, 6), random_ids(1, 3, seed=7)
        with self.model.inference_session(max_length=64) as session:
            self.model.generate(ids, max_new_tokens=8, do_sample=False)
            session.position = 9
            before = self.model.generate(other, max_new_tokens=3, do_sample=False)
            for span in session.chain.spans:
                self.swarm.loop.run(span.drop())
            after = self.model.generate(None, max_new_tokens=5, do_sample=False)
            found = torch.cat([before, after], 1)
        begun = self.local.greedy(ids, 8)[:, :9]
        return torch.equal(found, self.local.greedy(torch.cat([begun, other], 1), 8)[:, 9:])


@pytest.mark.parametrize("plant", CAUGHT_BY, ids=lambda plant: plant.__name__)
def test_mutant(plant: Plant, tmp_path: Path, mistakes: Mistakes) -> None:
    folder = write_tiny("llama", tmp_path)
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        model = swarm.model(tuning_mode="deep_ptune", pre_seq_len=3)
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.prompts.input.data.mul_(4)
        local = Prompted(local_model(folder), model.prompts.input, model.prompts.deep)
        for settings in (model.generation_config, local.model.generation_config):
            settings.eos_token_id, settings.pad_token_id = None, 0
        checks = Checks(swarm, model, local)
        plant(mistakes)
        failed = failing(checks, CAUGHT_BY[plant])
    assert failed == set(CAUGHT_BY[plant])
