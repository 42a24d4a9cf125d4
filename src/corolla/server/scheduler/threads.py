"""With how many threads a pass or a long job is computed.

Invariant: the number of threads changes how long work takes, never its bits, and is back at what it was after it.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Pass = Sequence[tuple[Any, int]]  # requests of one group, and how many tokens of each
RunPass = Callable[[Pass], list[BaseException | None]]  # the error of each request, or None


def run_pass(parts: Pass) -> list[BaseException | None]:
    """One pass, as its requests are computed."""
    errors: list[BaseException | None] = parts[0][0].run_pass(parts)
    return errors


LARGE_BATCH = 8  # decode steps in one pass
AWAKE_SECONDS = 0.001  # after a pass its helpers have gone to sleep for sure (`GOMP_SPINCOUNT`)
MOST_TOKENS = 64  # larger passes, and jobs that are not passes, take all threads
COST = 0.01  # the share of time that trials may cost
GAPS = (8, 256)  # passes between two trials, at least and at most
TRIALS = 7  # that a verdict is made of; a few passes that were held up do not sway their median
FEWEST_TRIALS = 3
MARGIN = 0.03  # by so much the other way has to be quicker


class Contest:
    """Finds the quicker of two ways, 0 and 1, to do what is done over and over; the times may drift together.

    A trial is compared with the turns right before and after it, since what a pass takes grows with contexts
    and with whatever else the machine does.
    """

    def __init__(self, best: int = 0) -> None:
        """`best` is the way to begin with."""
        self.best = best
        self._ratios: deque[float] = deque(maxlen=TRIALS)  # the other way's time, in those of the best
        self._gap = GAPS[0]
        self._turns = 0  # since the last trial
        self._before: float | None = None
        self._trial: float | None = None

    def pick(self) -> int:
        """The way of the next turn."""
        due = self._turns >= self._gap and self._trial is None
        return 1 - self.best if due else self.best

    def took(self, way: int, seconds: float) -> None:
        """A turn in that way took so long."""
        if way != self.best:
            self._trial = seconds
            return
        if self._trial is not None and self._before is not None:
            self._ratios.append(2 * self._trial / max(self._before + seconds, 1e-9))
            self._trial, self._turns = None, 0
            self._judge()
        self._before = seconds
        self._turns += 1

    def _judge(self) -> None:
        ratio = median(self._ratios)
        if len(self._ratios) >= FEWEST_TRIALS and ratio < 1 - MARGIN:
            self.best = 1 - self.best
            ratio = 1 / max(ratio, 1e-9)
            self._ratios = deque((1 / max(one, 1e-9) for one in self._ratios), maxlen=TRIALS)
        if len(self._ratios) >= FEWEST_TRIALS:
            self._gap = round(min(max((ratio - 1) / COST, GAPS[0]), GAPS[1]))


class ThreadChooser:
    """Runs passes with one thread or all, by a contest for each class of row counts (1, 2-3, 4-7, …).

    A pass of few rows is hundreds of short products. To share one out, sleeping threads have to be woken, which on a
    virtual machine, or beside other busy processes, takes longer than it saves; on an idle one it pays. Neither can
    be read from the hardware, and both change while a server runs, so the passes themselves tell.

    A large batch of decode steps, beside others that use every CPU, gets half of them without a contest: there a pass
    with all may well be the quicker one, but for what it takes from the client and other servers of these sessions.
    """

    def __init__(
        self,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
        others: Callable[[], int] | None = None,
        cpus: int = os.cpu_count() or 1,
    ) -> None:
        """`threads` are all that there are; `others` as in `FreeCpus`."""
        self._ways = (threads, 1)
        self._clock = clock
        self._others = others or others_running
        self._cpus = cpus
        self._awake = (0, 0.0)  # helpers of the last pass, and until when they may wait awake for the next
        self._contests: defaultdict[int, Contest] = defaultdict(Contest)

    def choosing(self, run_pass: RunPass) -> RunPass:
        """`run_pass` with threads chosen for each pass; to be called on the compute thread."""

        def run(parts: Pass) -> list[BaseException | None]:
            tokens = sum(count for _, count in parts)
            if self._ways[0] == 1 or not 0 < tokens <= MOST_TOKENS:
                return run_pass(parts)
            if tokens == len(parts) >= LARGE_BATCH and self._is_full():
                return self._with(self._ways[0] // 2, partial(run_pass, parts))
            return self._timed(self._contests[tokens.bit_length()], partial(run_pass, parts))

        return run

    def _is_full(self) -> bool:
        """Whether others use every CPU; this process's own helpers run too while they wait awake."""
        helpers, until = self._awake
        return self._others() - (helpers if self._clock() < until else 0) >= self._cpus

    def _with(self, threads: int, work: Callable[[], T]) -> T:
        before = torch.get_num_threads()
        _set_threads(threads)
        try:
            return work()
        finally:
            _set_threads(before)
            self._awake = threads - 1, self._clock() + AWAKE_SECONDS

    def _timed(
        self, contest: Contest, work: Callable[[], list[BaseException | None]]
    ) -> list[BaseException | None]:
        way, started = contest.pick(), self._clock()
        errors = self._with(self._ways[way], work)
        if not any(errors):  # a pass that failed was begun twice
            contest.took(way, self._clock() - started)
        return errors


class FreeCpus:
    """Threads for long work: one for each CPU that nobody else uses, but never less than half of all.

    Several servers of a machine train at the same time, on micro-batches of the same step. With threads for all CPUs
    each, every product of one waits for CPUs that another has: on two cores a step took up to a third longer.
    """

    def __init__(
        self, threads: int, others: Callable[[], int] | None = None, cpus: int = os.cpu_count() or 1
    ) -> None:
        """`threads` are all that there are; `others` counts threads that run or could, beside the caller."""
        self._all = threads
        self._others = others or others_running
        self._cpus = cpus

    def take(self) -> None:
        """Set the calling thread's number by what runs now; to be called now and then while the work goes on."""
        if self._all > 1:
            _set_threads(min(self._all, max(self._cpus - self._others(), self._all // 2)))

    @contextmanager
    def used(self) -> Iterator[None]:
        """The calling thread has that many inside, where `take` may be called again."""
        self.take()
        try:
            yield
        finally:
            _set_threads(self._all)


def others_running() -> int:
    """How many threads of the whole machine run or could, beside the caller; 0 where the system does not say."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


def _set_threads(count: int) -> None:
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
