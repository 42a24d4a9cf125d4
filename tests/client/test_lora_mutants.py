"""Planted mistakes with an adapter, each caught by the checks that its exactness tests make."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import TWO, random_ids
from tests.client.test_lora import adapted, greedy
from tests.client.test_mutants import prompts_lost_in_a_replay
from tests.mutants import Mistakes, Plant, failing, no_mistake
from tests.reference import local_model, relative
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from torch import Tensor, nn

from corolla.models import lora
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.checkpoints import lora_files
from corolla.models.lora import Adapter, AdapterRows, Layers
from corolla.models.prompts import BlockVectors


def delta_on_the_wrong_slice(patch: Mistakes) -> None:
    """What is for keys is added to values, which come from the same product."""
    whole = AdapterRows.hooks

    def swapped(self: AdapterRows, blocks: Sequence[Layers]) -> Iterator[tuple[nn.Module, lora.Hook]]:
        turned = {"self_attn.k_proj": "self_attn.v_proj", "self_attn.v_proj": "self_attn.k_proj"}
        return whole(self, [{turned.get(name, name): one for name, one in own.items()} for own in blocks])

    patch.setattr(AdapterRows, "hooks", swapped)


def scale_forgotten(patch: Mistakes) -> None:
    patch.setattr(lora_files, "_scaling", lambda *_: 1.0)


def stale_digest(patch: Mistakes) -> None:
    """Every adapter goes by the same name."""
    patch.setattr(BlockVectors, "digest", "0" * 64)


def on_everybodys_rows(patch: Mistakes) -> None:
    patch.setattr(AdapterRows, "_tokens", lambda *_: None)


def one_for_all(patch: Mistakes) -> None:
    """Adapters are told apart by nothing."""
    patch.setattr(Adapter, "is_same", lambda *_: True)


CAUGHT_BY: dict[Plant, tuple[str, ...]] = {
    no_mistake: (),
    delta_on_the_wrong_slice: ("decoding",),
    scale_forgotten: ("decoding",),
    stale_digest: ("changed",),
    prompts_lost_in_a_replay: ("failover",),
    on_everybodys_rows: ("together",),
    one_for_all: ("together",),
}


@dataclasses.dataclass
class Checks:
    """The comparisons of `test_lora.py`, each on its own."""

    swarm: MemorySwarm
    model: Any
    local: Any

    def decoding(self) -> bool:
        ids = random_ids(1, 6)
        near = bool((self.model(ids).logits - self.local(input_ids=ids).logits).abs().max() < 1e-4)
        found = self.model.generate(ids, max_new_tokens=10, do_sample=False)
        return near and torch.equal(found, greedy(self.local, ids, 10))

    def changed(self) -> bool:
        """With other numbers, other tokens: in training and in sessions."""
        ids, kept = random_ids(1, 6), self.model.prompts.trained.data
        with torch.no_grad():
            self.model(ids)
            self.model.generate(ids, max_new_tokens=2, do_sample=False)
            before = self.model(ids).logits
            self.model.prompts.trained.data = kept * 1.5
            differs = bool((self.model(ids).logits - before).abs().max() > 1e-2)
            self.model.prompts.trained.data = kept
        return differs

    def failover(self) -> bool:
        ids = random_ids(1, 6)
        with self.model.inference_session() as session:
            before = self.model.generate(ids, max_new_tokens=4, do_sample=False)
            for span in session.chain.spans:
                self.swarm.loop.run(span.drop())
            after = self.model.generate(None, max_new_tokens=5, do_sample=False)
        return torch.equal(torch.cat([before, after], 1), greedy(self.local, ids, 9))

    def together(self) -> bool:
        """Rows of one pass, as each of them alone; those without an adapter to the last bit."""
        (server, *_) = self.swarm.servers.values()
        span, given = server.span, self.model.prompts.blocks.detached()
        own = given.of(span.start, span.end)
        one = Adapter.of(own["lora"], own["targets"], span.device, span.dtype)
        other = Adapter(one.values.flip(1) * 2, one.targets)
        hidden = torch.randn(4, span.width, generator=torch.Generator().manual_seed(0))
        rows = [(one, [range(1)]), (other, [range(2, 3)]), (one, [range(3, 4)])]
        found = packed(span, hidden, AdapterRows(rows, 4))
        plain = packed(span, hidden, None)
        alone = [packed(span, hidden[at : at + 1], lora.of_all(which, 1)) for which, ((at,),) in rows]
        return torch.equal(found[1], plain[1]) and relative(found[[0, 2, 3]], torch.cat(alone)) < 1e-5


def packed(span: Any, hidden: Tensor, adapters: AdapterRows | None) -> Tensor:
    with torch.inference_mode():
        batch = PackedBatch(segments_of([1] * len(hidden)))
        positions = torch.zeros(len(hidden), dtype=torch.long)
        found: Tensor = span.run_packed(hidden, batch, positions=positions, adapters=adapters)
    return found


NIGHTLY = (scale_forgotten, stale_digest, one_for_all)


@pytest.mark.parametrize(
    "plant",
    [pytest.param(one, marks=[pytest.mark.nightly] if one in NIGHTLY else []) for one in CAUGHT_BY],
    ids=lambda plant: plant.__name__,
)
def test_mutant(plant: Plant, tmp_path: Path, mistakes: Mistakes) -> None:
    folder = write_tiny("llama", tmp_path / "model")
    local = local_model(folder)
    local.generation_config.eos_token_id, local.generation_config.pad_token_id = None, 0
    local = adapted(local, tmp_path / "adapter")
    adapted(local_model(folder), tmp_path / "other", seed=2)
    with MemorySwarm(folder, []) as swarm:
        for span in TWO:
            swarm.add(*span, bundles=[tmp_path / "other"])  # with kernels: keys and values of one product
        swarm.model(prompts=tmp_path / "adapter")  # the family is proven before the mistake
        plant(mistakes)
        model = swarm.model(prompts=tmp_path / "adapter")
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        checks = Checks(swarm, model, local)
        failed = failing(checks, CAUGHT_BY[plant])
    assert failed == set(CAUGHT_BY[plant])
