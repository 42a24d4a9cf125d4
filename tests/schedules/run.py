"""Runs one schedule to its end: every client's result must be the undisturbed one, or the error a true one."""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from corolla.client.connection import SwarmConnection
from corolla.client.model.arguments import from_pretrained
from corolla.client.model.causal_lm import load_distributed
from corolla.config import SwarmConfig
from corolla.errors import SwarmUnavailable
from tests.faults import Hit, Injector, describe
from tests.schedules.plan import Schedule, plan
from tests.schedules.workloads import ROUNDED, Workload, expected, in_the_swarm, prompt_of, same
from tests.schedules.world import DTYPE, SimulatedSwarm, checkpoint_of

DEFAULT_PATIENCE = SwarmConfig().patience
SLACK = 90.0  # seconds by which a client may know later than we that a block has no server


class WrongOutcome(AssertionError):
    """A schedule did not end as it must."""


@dataclass
class Outcome:
    """What happened in one schedule, or several."""

    schedules: int = 0
    missed: int = 0  # no client felt any fault: does not count
    gave_up: int = 0  # a block was served by nobody for ever, and the error said so
    hits: Counter[str] = field(default_factory=Counter)  # faults that happened, by kind
    felt: Counter[str] = field(default_factory=Counter)  # those that a client noticed
    recovered: Counter[str] = field(default_factory=Counter)  # those of them after which all went on exactly
    works: Counter[str] = field(default_factory=Counter)  # what clients did in schedules that count

    def add(self, other: Outcome) -> None:
        self.schedules += other.schedules
        self.missed += other.missed
        self.gave_up += other.gave_up
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))

    @property
    def counted(self) -> int:
        """Schedules in which a client felt that something failed."""
        return self.schedules - self.missed

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which travel between processes."""
        plain = {"schedules": self.schedules, "missed": self.missed, "gave_up": self.gave_up}
        return plain | {name: dict(getattr(self, name)) for name in COUNTERS}

    @classmethod
    def of_dict(cls, plain: dict[str, Any]) -> Outcome:
        """The other way round; other keys are left out."""
        counters = {name: Counter(plain[name]) for name in COUNTERS}
        return cls(plain["schedules"], plain["missed"], plain["gave_up"], **counters)


COUNTERS = ("hits", "felt", "recovered", "works")


@cache
def shell_of(family: str, root: Path, index: int) -> list[Any]:
    """A place for one client's distributed model, which is connected anew in every schedule."""
    return []


def client_model(work: Workload, root: Path, index: int, connection: SwarmConnection, checkpoint: Any) -> Any:
    """The client's model with its workload's prompt, in this schedule's swarm."""
    place = shell_of(work.family, root, index)
    if not place:
        model = load_distributed(from_pretrained(checkpoint.name, dtype=DTYPE), connection=connection)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        place.append(model)
    model = place[0]
    model.blocks.connection = connection
    model.prompts = prompt_of(work, model.config)
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


class _Felt(logging.Handler):
    """Which faults clients have noticed: a retry is put down to all before it that nobody had noticed yet."""

    def __init__(self, injector: Injector) -> None:
        super().__init__(logging.INFO)
        self.kinds: Counter[str] = Counter()
        self._injector = injector
        self._unfelt: list[Hit] = []
        self._seen = 0  # of the injector's log

    def emit(self, record: logging.LogRecord) -> None:
        self._note(lambda hit: hit.kind != "slow")

    def look(self, connections: list[SwarmConnection], now: float) -> None:
        """Count the servers that clients have found to be slow, which is no error."""
        self._note(
            lambda hit: (
                hit.kind == "slow" and any(one.view._paces.is_slow(hit.peer, now) for one in connections)
            )
        )

    def _note(self, felt: Callable[[Hit], bool]) -> None:
        self._unfelt += self._injector.log[self._seen :]
        self._seen = len(self._injector.log)
        for hit in [hit for hit in self._unfelt if felt(hit)]:
            self._unfelt.remove(hit)
            self.kinds.update(hit.counts)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the clients' retries while the body runs."""
        log = logging.getLogger("corolla.client.retry")
        level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        try:
            yield
        finally:
            log.removeHandler(self)
            log.setLevel(level)


class _Run:
    def __init__(self, schedule: Schedule, swarm: SimulatedSwarm, root: Path) -> None:
        self.schedule, self.swarm = schedule, swarm
        names = [f"client-{index}" for index in range(len(schedule.clients))]
        self.connections = connections = [swarm.connect(name, DEFAULT_PATIENCE) for name in names]
        self.works = [
            in_the_swarm(client_model(work, root, index, connection, swarm.checkpoint), work)
            for index, (work, connection) in enumerate(zip(schedule.clients, connections, strict=True))
        ]
        self.injector = Injector(swarm, frozenset(names))
        self.felt = _Felt(self.injector)
        for fault in schedule.faults:
            self.injector.fail_at(fault)
        self.outcome = Outcome(schedules=1)

    def to_the_end(self, due: list[list[Tensor]]) -> Outcome:
        """Clients take steps in turns, each compared at once."""
        going = {index: iter(tensors) for index, tensors in enumerate(due)}
        with self.felt.listening():
            while going:
                for index in list(going):
                    if not self._step(index, going[index]):
                        del going[index]
                    self.felt.look(self.connections, self.swarm.loop.time())
        outcome = self.outcome
        outcome.hits, outcome.felt = Counter(self.injector.hits), +self.felt.kinds
        outcome.missed = not outcome.felt
        if outcome.felt:
            outcome.works = Counter(
                f"{work.kind}, {work.mode or 'no prompts'}" for work in self.schedule.clients
            )
        if not outcome.gave_up:
            outcome.recovered = Counter(outcome.felt)
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
        rounding = ROUNDED.get(self.schedule.clients[index].family, 0.0)
        if found is None or wanted is None or not same(found, wanted, rounding):
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
    hit = "" if injector is None else f"\nhit: {injector.log}"
    return WrongOutcome(
        f"{what}\nservers: {[(one.peer, one.start, one.end) for one in schedule.servers]}"
        f"\nclients: {schedule.clients}\nfaults: {describe(schedule.faults)}{hit}"
        f"\nrun it alone: python -m tests.schedules {schedule.seed}"
    )
