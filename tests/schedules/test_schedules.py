"""Random schedules of faults: whatever fails, the work ends as if nothing had, or with a true error.

As many as fit the time in `make test`, 2,000 that count in `make nightly`: those in which a client has felt a
fault. The table at the end of the run says what was covered. One alone: `python -m tests.schedules SEED`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import KINDS
from tests.schedules.plan import plan
from tests.schedules.run import Outcome, run

Note = Callable[[str, Any], None]

CHUNKS = 4
SECONDS = 5.0  # of each chunk
LEAST = 5  # schedules that count, of each chunk, however slow the machine
NIGHTLY_CHUNKS = 20
NIGHTLY_SCHEDULES = 100  # that count, of each chunk
FIRST_OF_A_CHUNK = 100_000


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_schedules_end_as_if_nothing_had_failed(chunk: int, root: Path, record_property: Note) -> None:
    outcome, began = Outcome(), time.perf_counter()
    seed = chunk * FIRST_OF_A_CHUNK
    while time.perf_counter() - began < SECONDS or outcome.counted < LEAST:
        outcome.add(run(seed, root))
        seed += 1
    record_property("schedules", outcome.as_dict() | {"seconds": time.perf_counter() - began})


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chunk", range(NIGHTLY_CHUNKS))
def test_many_schedules(
    chunk: int, root: Path, record_property: Note, scaled: Callable[[float], int]
) -> None:
    outcome, began = Outcome(), time.perf_counter()
    seed = (CHUNKS + chunk) * FIRST_OF_A_CHUNK
    while outcome.counted < scaled(NIGHTLY_SCHEDULES):
        outcome.add(run(seed, root))
        seed += 1
    record_property("schedules", outcome.as_dict() | {"seconds": time.perf_counter() - began})
    assert outcome.felt.total() >= outcome.counted


def test_schedules_draw_every_kind_of_fault_and_all_work() -> None:
    drawn = [plan(seed) for seed in range(500)]
    assert {fault.kind for one in drawn for fault in one.faults} == set(KINDS)
    assert {(work.mode, work.kind) for one in drawn for work in one.clients} == {
        (mode, kind)
        for mode in (None, "ptune", "deep_ptune", "prefix")
        for kind in ("greedy", "sampled", "beams", "rollback", "fork", "training")
    }
    assert any(fault.peer is None for one in drawn for fault in one.faults)
    assert any(fault.also for one in drawn for fault in one.faults)
    assert any(one.lost for one in drawn)


@pytest.mark.parametrize("seed", [3, pytest.param(4, marks=pytest.mark.nightly)])
def test_a_seed_gives_the_same_run_again(seed: int, root: Path) -> None:
    assert run(seed, root) == run(seed, root)
