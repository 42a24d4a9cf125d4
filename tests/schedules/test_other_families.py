"""The same schedules over families whose sequences are more than keys and values, or whose cuts more than a stream.

A state that is remembered and replayed, or differs after steps; attention of a kind of its own, and token ids beside
hidden states; latents; keys and values that later blocks take from earlier ones, and several streams with inputs of
each block; weights that blocks have in common, and first embeddings in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from corolla.models import blocks_pass
from corolla.models.attention.packing import PackedBatch
from corolla.models.attention.snapshots import copied
from corolla.models.attention.span_cache import SpanCache
from corolla.models.checks.tracing import replaced
from corolla.models.cut_layout import CutLayout, CutTensors
from tests.faults import Fault
from tests.mutants import Mistakes, Plant, assert_is_planted
from tests.schedules.plan import Schedule, plan
from tests.schedules.run import Outcome, WrongOutcome, run_schedule
from tests.schedules.workloads import Workload
from tests.schedules.world import ServerPlan

FAMILIES = ("qwen3_5_text", "minicpm3", "gemma3n_text", "zamba", "zaya", "deepseek_v4", "diffllama", "zamba2")
WITHOUT_PROMPTS = ("gemma3n_text", "zamba", "zaya", "deepseek_v4", "zamba2")
SLOW = ("deepseek_v4", "zamba2")  # tried at night only
NEEDS_IDS = ("deepseek_v4",)
FIRST, EACH, NIGHTLY = 7_000, 1, 60


def of_family(family: str, seed: int) -> Schedule:
    """The schedule of a seed, with other clients.

    Prompts are in front of the tokens only, and there are none where a family makes more of ids than of embeddings,
    which are all that the reference gives it, or generates from none. One whose blocks need the ids is not trained.
    """
    found = plan(seed)
    mode = None if family in WITHOUT_PROMPTS else "ptune"
    clients = tuple(
        replace(
            one,
            family=family,
            mode=None if one.mode is None else mode,
            kind="greedy" if family in NEEDS_IDS and one.kind == "training" else one.kind,
        )
        for one in found.clients
    )
    servers = tuple(replace(one, bundles=False) for one in found.servers)
    return replace(found, clients=clients, servers=servers)


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=[pytest.mark.nightly] if one in SLOW else []) for one in FAMILIES],
)
def test_schedules_end_as_if_nothing_had_failed(family: str, root: Path) -> None:
    for seed in range(FIRST, FIRST + EACH):
        run_schedule(of_family(family, seed), root)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_schedules(family: str, root: Path, scaled: Callable[[float], int]) -> None:
    outcome, seed = Outcome(), FIRST + EACH
    while outcome.counted < scaled(NIGHTLY):
        outcome.add(run_schedule(of_family(family, seed), root))
        seed += 1
    assert outcome.felt.total() >= outcome.counted


# --- mistakes, each in the family that it would harm --------------------------------------------------------------

FURTHER = 233  # a chat that goes back three times, each time less far, so that snapshots are used
SERVERS = (ServerPlan("main-0", 0, 1, 100.0), ServerPlan("main-1", 1, 4, 100.0))


def passes(family: str, root: Path) -> bool:
    """Whether chats that go back, while servers start anew, end as they must."""
    restarts = tuple(Fault("restart", "main-1", n=n) for n in (4, 9))
    for kind, variant in (("rollback", 0), ("rollback", FURTHER), ("greedy", 0)):
        work = Workload(family, None, kind, variant)
        for faults in ((), restarts):
            try:
                run_schedule(Schedule(0, SERVERS, (work,), faults, lost=False), root)
            except WrongOutcome as wrong:
                assert_is_planted(wrong)
                return False
    return True


def a_snapshot_of_an_earlier_token(patch: Mistakes) -> None:
    states, record = SpanCache._states, SpanCache.record
    seen: dict[int, list[Any]] = {}

    def recorded(self: SpanCache, hidden: Tensor, positions: Tensor | None) -> None:
        record(self, hidden, positions)
        seen[id(self)] = [*seen.get(id(self), [])[-1:], copied(states(self))]

    patch.setattr(SpanCache, "record", recorded)
    patch.setattr(SpanCache, "_states", lambda self: seen.get(id(self), [states(self)])[0])


def a_latent_that_is_not_rotated(patch: Mistakes) -> None:
    keep = PackedBatch.keep
    patch.setattr(
        PackedBatch,
        "keep",
        lambda self, block, latent, rotary: keep(self, block, latent, rotary.roll(1, -1)),
    )


def side_inputs_of_the_wrong_blocks(patch: Mistakes) -> None:
    of_block = CutTensors.of_block
    patch.setattr(CutTensors, "of_block", lambda self, block: of_block(self, max(self.cut, block - 1)))


def a_stream_that_is_dropped(patch: Mistakes) -> None:
    join = CutLayout.join

    def without_the_last(self: CutLayout, crossed: CutTensors, cut: int) -> Tensor:
        joined = join(self, crossed, cut).clone()
        if 0 < cut < self.depth:
            joined[..., self.hidden.width - self.hidden.size[-1] : self.hidden.width] = 0
        return joined

    patch.setattr(CutLayout, "join", without_the_last)


def an_index_of_another_block(patch: Mistakes) -> None:
    # Of one like it, since kinds of blocks alternate.
    def wrong(args: Any, kwargs: Any, name: str, place: int, value: Any) -> Any:
        return replaced(args, kwargs, name, place, value % 2 if name == "layer_idx" else value)

    patch.setattr(blocks_pass, "replaced", wrong)


MISTAKES = {
    "qwen3_5_text": [a_snapshot_of_an_earlier_token],
    "minicpm3": [a_latent_that_is_not_rotated],
    "gemma3n_text": [side_inputs_of_the_wrong_blocks, a_stream_that_is_dropped],
    "zamba": [an_index_of_another_block],
}
PLANTED = [(family, mistake) for family, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.mark.nightly
@pytest.mark.parametrize(("family", "mistake"), PLANTED)
def test_a_planted_mistake_is_noticed(family: str, mistake: Plant, root: Path, mistakes: Mistakes) -> None:
    assert passes(family, root)
    mistake(mistakes)
    assert not passes(family, root)
