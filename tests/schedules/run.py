"""Runs one schedule to its end: every client's result must be the undisturbed one, or the error a true one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from corolla.client.causal_lm import load_distributed
from corolla.client.connection import SwarmConnection
from corolla.client.retry import DEFAULT_PATIENCE
from corolla.errors import SwarmUnavailable
from tests.faults import Injector, describe
from tests.schedules.plan import Schedule, plan
from tests.schedules.workloads import Workload, expected, in_the_swarm, prompt_of, same
from tests.schedules.world import DTYPE, SimulatedSwarm, checkpoint_of

SLACK = 90.0  # seconds by which a client may know later than we that a block has no server


class WrongOutcome(AssertionError):
    """A schedule did not end as it must."""


@dataclass
class Outcome:
    """What happened in one schedule, or several."""

    schedules: int = 0
    missed: int = 0  # no fault hit: does not count
    gave_up: int = 0  # a block was served by nobody for ever, and the error said so
    hits: Counter[str] = field(default_factory=Counter)
    recovered: Counter[str] = field(default_factory=Counter)  # faults after which the work went on exactly

    def add(self, other: Outcome) -> None:
        self.schedules += other.schedules
        self.missed += other.missed
        self.gave_up += other.gave_up
        self.hits += other.hits
        self.recovered += other.recovered

    @property
    def counted(self) -> int:
        """Schedules in which something failed."""
        return self.schedules - self.missed

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which travel between processes."""
        plain = {"schedules": self.schedules, "missed": self.missed, "gave_up": self.gave_up}
        return {**plain, "hits": dict(self.hits), "recovered": dict(self.recovered)}


@cache
def shell_of(family: str, root: Path, index: int) -> list[Any]:
    """A place for one client's distributed model, which is connected anew in every schedule."""
    return []


def client_model(work: Workload, root: Path, index: int, connection: SwarmConnection, checkpoint: Any) -> Any:
    """The client's model with its workload's prompt, in this schedule's swarm."""
    place = shell_of(work.family, root, index)
    if not place:
        model = load_distributed(checkpoint.name, connection=connection, dtype=DTYPE)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        place.append(model)
    model = place[0]
    model.blocks.connection = connection
    model.prompts = prompt_of(work, model.config.hidden_size, model.config.num_hidden_layers)
    return model


def run(seed: int, root: Path) -> Outcome:
    """The schedule of `seed`. Raises `WrongOutcome`, with the command that runs it alone."""
    return run_schedule(plan(seed), root)


def run_schedule(schedule: Schedule, root: Path) -> Outcome:
    """As `run`, for a schedule that was made in another way."""
    random.seed(schedule.seed)
    checkpoint = checkpoint_of(schedule.clients[0].family, root)
    due = [expected(work, Path(checkpoint.name)) for work in schedule.clients]
    swarm = SimulatedSwarm(checkpoint, schedule.servers, schedule.clients)
    try:
        return _Run(schedule, swarm, root).to_the_end(due)
    except WrongOutcome:
        raise
    except Exception as error:
        raise _wrong(schedule, f"{type(error).__name__}: {error}") from error
    finally:
        swarm.close()


class _Run:
    def __init__(self, schedule: Schedule, swarm: SimulatedSwarm, root: Path) -> None:
        self.schedule, self.swarm = schedule, swarm
        names = [f"client-{index}" for index in range(len(schedule.clients))]
        connections = [swarm.connect(name, DEFAULT_PATIENCE) for name in names]
        self.works = [
            in_the_swarm(client_model(work, root, index, connection, swarm.checkpoint), work)
            for index, (work, connection) in enumerate(zip(schedule.clients, connections, strict=True))
        ]
        self.injector = Injector(swarm, frozenset(names))
        for fault in schedule.faults:
            self.injector.fail_at(fault)
        self.outcome = Outcome(schedules=1)

    def to_the_end(self, due: list[list[Tensor]]) -> Outcome:
        """Clients take steps in turns, each compared at once."""
        going = {index: iter(tensors) for index, tensors in enumerate(due)}
        while going:
            for index in list(going):
                if not self._step(index, going[index]):
                    del going[index]
        outcome = self.outcome
        outcome.hits = Counter(self.injector.hits)
        outcome.missed = not outcome.hits
        if not outcome.gave_up:
            outcome.recovered = Counter(outcome.hits)
        return outcome

    def _step(self, index: int, due: Iterator[Tensor]) -> bool:
        """One step of one client; False when it has ended."""
        try:
            found = next(self.works[index], None)
        except SwarmUnavailable as error:
            self._judge(error)
            return False
        wanted = next(due, None)
        if found is None and wanted is None:
            return False
        if found is None or wanted is None or not same(found, wanted):
            raise _wrong(self.schedule, f"client {index} got\n{found}\ninstead of\n{wanted}", self.injector)
        return True

    def _judge(self, error: SwarmUnavailable) -> None:
        alone = self.swarm.unserved_seconds()
        if alone < DEFAULT_PATIENCE - SLACK:
            raise _wrong(
                self.schedule,
                f"gave up although every block was served until {alone:.0f} s ago: {error}",
                self.injector,
            ) from error
        self.outcome.gave_up += 1


def _wrong(schedule: Schedule, what: str, injector: Injector | None = None) -> WrongOutcome:
    hit = "" if injector is None else f"\nhit: {injector.hit_log}"
    return WrongOutcome(
        f"{what}\nservers: {[(one.peer, one.start, one.end) for one in schedule.servers]}"
        f"\nclients: {schedule.clients}\nfaults: {describe(schedule.faults)}{hit}"
        f"\nrun it alone: python -m tests.schedules {schedule.seed}"
    )
