"""How a server finds out with how many threads a pass is quicker."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from corolla.server.scheduler.execution import (
    LARGE_BATCH,
    MOST_TOKENS,
    Contest,
    FreeCpus,
    ThreadChooser,
)

TURNS = 2500


def play(ratio: Callable[[int], float], seed: int, *, stalls: float = 0.05) -> tuple[float, list[int]]:
    """A contest's time in that of the best choice, and its choices, where way 1 takes `ratio` times way 0.

    Times grow to the double as contexts do, scatter by a fifth, and some turns are held up two to ten times.
    """
    rng, contest = random.Random(seed), Contest()
    spent = least = 0.0
    ways = []
    for turn in range(TURNS):
        way = contest.pick()
        own = ratio(turn) if way else 1.0
        held_up = rng.uniform(2, 10) if rng.random() < stalls else 1.0
        contest.took(way, own * (1 + turn / TURNS) * rng.uniform(0.8, 1.2) * held_up)
        ways.append(way)
        spent, least = spent + own, least + min(1.0, ratio(turn))
    return spent / least, ways


@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.95, 1.0, 1.05, 1.3, 2.0, 4.0])
def test_costs_little_more_than_the_better_way_alone(ratio: float) -> None:
    costs = [play(lambda _turn: ratio, seed)[0] for seed in range(20)]
    assert sum(costs) / len(costs) < 1.04
    assert max(costs) < 1.2


@pytest.mark.parametrize("ratio", [0.7, 1.4])
def test_ends_with_the_quicker_way(ratio: float) -> None:
    for seed in range(20):
        late = play(lambda _turn: ratio, seed)[1][TURNS // 2 :]
        right = sum(way == int(ratio < 1) for way in late) / len(late)
        assert right > 0.93, seed


@pytest.mark.parametrize(("first", "then"), [(0.7, 1.4), (1.6, 0.7)])
def test_follows_when_other_processes_come_or_go(first: float, then: float) -> None:
    for seed in range(20):
        cost, ways = play(lambda turn: first if turn < TURNS // 2 else then, seed)
        assert cost < 1.1, seed
        assert sum(way == int(then < 1) for way in ways[-300:]) > 270, seed


def test_one_stall_decides_nothing() -> None:
    contest = Contest()
    for turn in range(200):
        way = contest.pick()
        contest.took(way, 5.0 if turn == 40 else 1.0 if way == 0 else 1.1)
    assert contest.best == 0


class Clock:
    """A clock that passes move by what the current number of threads takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass
class Asked:
    """A request with so many tokens behind it."""

    behind: int = 0


@pytest.mark.usefixtures("two_threads")
def test_each_class_of_rows_finds_its_own_number_of_threads() -> None:
    clock = Clock()
    used: dict[int, list[int]] = {1: [], 32: [], MOST_TOKENS + 1: []}

    def run_pass(parts: list[tuple[Any, int]]) -> list[BaseException | None]:
        rows, threads = sum(count for _, count in parts), torch.get_num_threads()
        used[rows].append(threads)
        clock.now += (1.0 if threads == 1 else 1.4) if rows == 1 else (1.0 if threads == 2 else 1.4)
        return [None] * len(parts)

    run = ThreadChooser(2, clock, lambda: 0).choosing(run_pass)
    for _ in range(200):
        run([(Asked(), 1)])
        run([(Asked(), 16), (Asked(), 16)])
        run([(Asked(), MOST_TOKENS + 1)])
        assert torch.get_num_threads() == 2
    assert used[1][-20:].count(1) >= 19
    assert used[32][-20:].count(2) >= 19
    assert 1 in used[32]
    assert set(used[MOST_TOKENS + 1]) == {2}


@pytest.mark.usefixtures("two_threads")
def test_long_contexts_do_not_sway_short_ones() -> None:
    """Turn about, as when a chat goes on beside new ones: where much is read, two threads are quicker."""
    clock = Clock()
    used: dict[int, list[int]] = {0: [], 2000: []}

    def run_pass(parts: list[tuple[Any, int]]) -> list[BaseException | None]:
        behind, threads = parts[0][0].behind, torch.get_num_threads()
        used[behind].append(threads)
        clock.now += (2.0 + 0.6 * threads) if not behind else 12.0 / threads
        return [None] * len(parts)

    run = ThreadChooser(2, clock, lambda: 0).choosing(run_pass)
    for turn in range(200):
        for behind in (0, 2000) if turn % 3 else (2000,):
            run([(Asked(behind), 30)])
    assert used[0][-20:].count(1) >= 19
    assert used[2000][-20:].count(2) >= 18


@pytest.mark.usefixtures("two_threads")
def test_threads_are_restored_when_a_pass_raises() -> None:
    clock = Clock()

    def quicker_alone(parts: list[tuple[Any, int]]) -> list[BaseException | None]:
        clock.now += torch.get_num_threads()
        return [None] * len(parts)

    def failing(_parts: list[tuple[Any, int]]) -> list[BaseException | None]:
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    chooser = ThreadChooser(2, clock, lambda: 0)
    for _ in range(60):
        chooser.choosing(quicker_alone)([(Asked(), 1)])
    with pytest.raises(KeyboardInterrupt):
        chooser.choosing(failing)([(Asked(), 1)])
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_passes_that_failed_are_no_evidence() -> None:
    """One that fails at once looks quick."""
    clock = Clock()
    used: list[int] = []

    def run_pass(parts: list[tuple[Any, int]]) -> list[BaseException | None]:
        alone = torch.get_num_threads() == 1
        used.append(torch.get_num_threads())
        failing = alone and len(used) % 2
        clock.now += 0.1 if failing else 2.0 if alone else 1.0
        return [ValueError() if failing else None for _ in parts]

    run = ThreadChooser(2, clock, lambda: 0).choosing(run_pass)
    errors = [run([(Asked(), 1)])[0] for _ in range(300)]
    assert any(errors)
    assert used.count(1) < 60
    assert set(used[-5:]) == {2}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("parts", "others", "used"),
    [
        ([1] * LARGE_BATCH, 2, 1),
        ([1] * LARGE_BATCH, 1, 2),  # a CPU is free
        ([1] * (LARGE_BATCH - 1), 2, 2),  # no crowd
        ([1] * LARGE_BATCH + [16], 2, 2),  # a piece of a prompt among them
    ],
)
def test_a_crowd_on_a_full_machine_gets_half_of_it(parts: list[int], others: int, used: int) -> None:
    found = []

    def run_pass(parts: list[tuple[Any, int]]) -> list[BaseException | None]:
        found.append(torch.get_num_threads())
        return [None] * len(parts)

    ThreadChooser(2, others=lambda: others, cpus=2).choosing(run_pass)([(Asked(), count) for count in parts])
    assert found == [used]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_helpers_that_wait_awake_are_no_others() -> None:
    clock, found = Clock(), []

    def run_pass(parts: list[tuple[Any, int]]) -> list[BaseException | None]:
        clock.now += 0.01
        found.append(torch.get_num_threads())
        return [None] * len(parts)

    run = ThreadChooser(2, clock, lambda: 2, 2).choosing(run_pass)
    run([(Asked(), 1)])  # with two threads
    run([(Asked(), 1)] * LARGE_BATCH)  # right after: one of the two that run is the helper
    clock.now += 1
    run([(Asked(), 1)] * LARGE_BATCH)
    run([(Asked(), 1)] * LARGE_BATCH)  # the last pass had no helper
    assert found == [2, 2, 1, 1]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("threads", "cpus", "others", "used"),
    [(2, 2, 0, 2), (2, 2, 1, 1), (2, 2, 9, 1), (2, 4, 2, 2), (1, 2, 0, 1), (8, 8, 3, 5), (8, 8, 8, 4)],
)
def test_long_work_has_the_cpus_that_nobody_else_uses(
    threads: int, cpus: int, others: int, used: int
) -> None:
    torch.set_num_threads(threads)
    share = FreeCpus(threads, lambda: others, cpus)
    with share.used():
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("two_threads")
def test_long_work_looks_again_on_the_way_and_leaves_all_threads_when_it_fails() -> None:
    running = [1]
    share = FreeCpus(2, lambda: running[0], 2)

    def work() -> None:
        assert torch.get_num_threads() == 1
        running[0] = 0
        share.take()
        assert torch.get_num_threads() == 2
        running[0] = 1
        share.take()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), share.used():
        work()
    assert torch.get_num_threads() == 2
