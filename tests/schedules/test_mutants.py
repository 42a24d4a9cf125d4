"""Mistakes planted into the client's recovery, each of which makes schedules fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corolla.client.sessions.chain import SessionChain
from corolla.client.sessions.span_session import History, Progress, SpanSession
from corolla.client.training import MicroBatch, Stage, TrainingPass
from tests.faults import Fault
from tests.mutants import Mistakes, Plant, assert_is_planted, no_mistake
from tests.schedules.plan import Schedule
from tests.schedules.run import WrongOutcome, run_schedule
from tests.schedules.workloads import Workload
from tests.schedules.world import ServerPlan

SERVERS = (ServerPlan("main-0", 0, 1, 100.0), ServerPlan("main-1", 1, 4, 100.0))


def schedule(mode: str | None, kind: str, variant: int, *faults: Fault) -> Schedule:
    return Schedule(0, SERVERS, (Workload("llama", mode, kind, variant),), faults, lost=False)


# Restarts in the middle of replies, so that histories are replayed; for training, after some of the forwards.
RESTARTS = [Fault("restart", "main-1", n=n) for n in range(3, 30, 4)]
CHATS = {
    f"{kind} {variant}": schedule("deep_ptune", kind, variant, *RESTARTS)
    for kind in ("rollback", "beams", "greedy")
    for variant in (0, 1, 2)
}
TRAININGS = {
    f"training {peer} {n}": schedule("deep_ptune", "training", 1, Fault("restart", peer, n=n))
    for n in (1, 2)
    for peer in ("main-0", "main-1")
}
SCHEDULES = CHATS | TRAININGS


def position_off_by_one_in_a_replay(patch: Mistakes) -> None:
    inputs = History.inputs

    def shifted(self: History) -> Any:
        past = inputs(self)
        return None if past is None else (past[0], past[1] + torch.arange(past[1].shape[1]).gt(2))

    patch.setattr(History, "inputs", shifted)


def prompts_lost_in_a_replay(patch: Mistakes) -> None:
    opened, seen = SpanSession.open, set()

    async def forgetful(self: SpanSession, view: Any, **arguments: Any) -> bool:
        key = (id(view), self.hop.start)
        again = key in seen
        seen.add(key)
        return await opened(self, view, **(arguments | ({"vectors": None} if again else {})))

    patch.setattr(SpanSession, "open", forgetful)


def rollback_ignored_in_a_replay(patch: Mistakes) -> None:
    patch.setattr(History, "truncate", lambda _self, _length: None)


def reorder_ignored_in_a_replay(patch: Mistakes) -> None:
    select = History.select_rows

    def lazy(self: History, rows: torch.Tensor) -> None:
        past = self.inputs()
        same = past is not None and past[0].shape[0] == len(rows)
        select(self, torch.arange(len(rows)) if same else rows)

    patch.setattr(History, "select_rows", lazy)


def step_after_a_replay_reordered_twice(patch: Mistakes) -> None:
    mend = SessionChain._mend

    async def forgetful(self: SessionChain, progress: Progress) -> tuple[SpanSession, Tensor]:
        order = self.spans[progress.done].history.order
        span, output = await mend(self, progress)
        span.history.order = order
        return span, output

    patch.setattr(SessionChain, "_mend", forgetful)


def wrong_stage_rerun_in_backward(patch: Mistakes) -> None:
    reroute = TrainingPass._reroute

    async def confused(self: TrainingPass, micro: MicroBatch, stage: Stage) -> list[Stage]:
        other = next(one for one in micro.stages if one is not stage) if len(micro.stages) > 1 else stage
        return await reroute(self, micro, Stage(stage.hop, other.inputs, None))

    patch.setattr(TrainingPass, "_reroute", confused)


CAUGHT_BY: dict[Plant, str] = {
    no_mistake: "",
    position_off_by_one_in_a_replay: "greedy",
    prompts_lost_in_a_replay: "greedy",
    rollback_ignored_in_a_replay: "rollback",
    reorder_ignored_in_a_replay: "beams",
    step_after_a_replay_reordered_twice: "beams",
    wrong_stage_rerun_in_backward: "training",
}


@pytest.mark.parametrize("plant", CAUGHT_BY, ids=lambda plant: plant.__name__)
def test_mutant(plant: Plant, root: Path, mistakes: Mistakes) -> None:
    plant(mistakes)
    due = CAUGHT_BY[plant]
    failed = set()
    for name, one in SCHEDULES.items():
        if not name.startswith(due):
            continue
        try:
            assert run_schedule(one, root).hits
        except WrongOutcome as wrong:
            assert_is_planted(wrong)
            failed.add(name)
    assert bool(failed) is bool(due), f"failed: {sorted(failed)}"
