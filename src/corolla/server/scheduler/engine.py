"""The scheduler: every computation of a server passes through here, on one compute thread.

Invariant: handlers only enqueue and await; model code runs on the compute thread alone. An iteration takes
the most urgent work: all generation steps that are ready, packed into one pass, then pieces of prompts up to
a budget of tokens, or one job (training, or a family that cannot be packed). Within a class the peer that was
given least of the thread comes first. Whatever has waited `AGEING_SECONDS` moves up a class, so nobody
starves. An error goes to whoever awaits it; the loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Protocol, TypeVar

from corolla.errors import RequestRefused
from corolla.server.scheduler.fairness import Shares
from corolla.server.scheduler.pace import PASS_TOKENS, Pace

T = TypeVar("T")

log = logging.getLogger(__name__)

AGEING_SECONDS = 2.0
GATHER_SECONDS = 0.008  # what a generation step waits at most for those of others to share its pass
# Without a job that runs alone (training), until the server tidies up; longer than most clients take between a forward
# and its backward, which would have to ask the system for all of its memory again.
QUIET_SECONDS = 2.0


class Kind(IntEnum):
    """Classes of work, most urgent first."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


class Packable(Protocol):
    """A generation step that may share its passes with others."""

    kind: Kind
    group: Any  # steps of the same group may share a pass
    session: Any  # whose step it is
    tokens_left: int

    def result(self) -> Any:
        """What the step gives, once no tokens are left."""


# Takes (step, tokens) pairs of one group through one pass; gives the error of each, or None.
RunPass = Callable[[list[tuple[Any, int]]], list[BaseException | None]]


@dataclass(eq=False)  # the same work submitted twice is two jobs
class Job:
    """One computation, either `run` or a `step` in as many passes as it takes. Ends in `done`."""

    kind: Kind
    peer: str  # for whom
    arrived: float
    done: asyncio.Future[Any]
    run: Callable[[], Any] | None = None
    step: Packable | None = None
    begun: bool = False

    def urgency(self, now: float) -> tuple[float, float]:
        """Smaller is sooner."""
        return (self.kind - (now - self.arrived) // AGEING_SECONDS, self.arrived)


class Engine:
    """Runs jobs in order of urgency. Made and used inside one event loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        run_pass: RunPass | None = None,
        when_quiet: Callable[[], None] | None = None,
    ) -> None:
        """`run_pass` computes packed steps; `when_quiet` is called on the compute thread when no job has run alone for
        `QUIET_SECONDS`, and again after as long."""
        self.run_pass = run_pass
        self.when_quiet = when_quiet
        self._clock = clock
        self._loud = clock()  # when a job that ran alone ended, or the server tidied up
        self._pace = Pace()
        self._shares = Shares()
        self._lent = 0.0  # seconds of the job at hand that `let_in` gave to others
        self._open: set[Job] = set()  # the loop's side: not yet answered
        self._inbox: queue.SimpleQueue[Sequence[Job] | Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: list[Job] = []  # the compute thread's side: to be computed
        self._letting_in = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._compute, name="corolla-compute", daemon=True)
        self._closed = False

    def start(self) -> None:
        """Begin to run what is submitted."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, kind: Kind, run: Callable[[], T], *, peer: str = "") -> T:
        """The result of `run()`, or its error. Cancelling the caller takes a job back that has not begun.

        `peer` is for whom it is computed; the server's own work has none.

        Raises `RequestRefused` (draining) once the engine is closed.
        """
        job = Job(kind, peer, self._clock(), asyncio.get_running_loop().create_future(), run=run)
        self._enqueue([job])
        result: T = await job.done
        return result

    def steps(self, steps: Sequence[Packable], *, peer: str = "") -> list[asyncio.Future[Any]]:
        """The results of generation steps, which are computed together with each other and with those of others.

        Cancelling one takes its step back if it has not begun. Raises as `submit` does.
        """
        loop, now = asyncio.get_running_loop(), self._clock()
        jobs = [Job(step.kind, peer, now, loop.create_future(), step=step) for step in steps]
        self._enqueue(jobs)
        return [job.done for job in jobs]

    def _enqueue(self, jobs: Sequence[Job]) -> None:
        if self._closed:
            raise RequestRefused("This server is going away; use another.", code="draining")
        for job in jobs:
            self._open.add(job)
            job.done.add_done_callback(partial(self._over, job))
        self._inbox.put(jobs)

    def _over(self, job: Job, _done: asyncio.Future[Any]) -> None:
        self._open.discard(job)

    def post(self, work: Callable[[], None]) -> None:
        """Have `work` done on the compute thread before anything that is submitted later."""
        if not self._closed:
            self._inbox.put(work)

    def forget(self, session: object) -> None:
        """A session has ended: nobody waits for its next step."""
        self.post(lambda: self._pace.generated.forget(id(session)))

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return sum(not job.begun for job in self._open)

    async def close(self) -> None:
        """Stop after the pass at hand, whose awaiters get their results; waiting jobs are cancelled."""
        self._closed = True
        for job in list(self._open):
            if not job.begun:
                job.done.cancel()
        self._inbox.put(None)
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join)
            await asyncio.sleep(0)  # what the thread settled last
        for job in list(self._open):
            job.done.cancel()

    # --- on the compute thread ------------------------------------------------------------------------------

    def _compute(self) -> None:
        while True:
            if not self._receive(wait=not self._ready):
                return
            self._tidy_up()
            if self._ready and self._gather():
                try:
                    self._iterate()
                except Exception as error:  # a mistake of ours; without the thread the server would hang
                    log.exception("The scheduler failed")
                    self._settle([(job, None, error) for job in self._ready])
                    self._ready.clear()

    def _tidy_up(self) -> None:
        now = self._clock()
        if self.when_quiet is not None and now - self._loud >= QUIET_SECONDS:
            self._loud = now
            _do(self.when_quiet)

    def _gather(self) -> bool:
        """Give generation steps that are probably under way a moment to join the pass; False when closed.

        A pass of many rows takes little longer than one of a single row, which is read from the same weights.
        """
        until = time.perf_counter() + GATHER_SECONDS
        while self._steps_missing():
            left = until - time.perf_counter()
            if left <= 0:
                break
            if not self._receive(wait=True, seconds=left):
                return False
        return True

    def _steps_missing(self) -> bool:
        """Whether there are generation steps, and others about to be sent, by the pace of their sessions.

        Those that are at another server meanwhile, as half of a crowd is, come too late to be waited for.
        """
        now = self._clock()
        ready = {id(job.step.session) for job in self._ready if job.step and job.kind is Kind.DECODE}
        return bool(ready) and self._pace.generated.others_due(now, now + GATHER_SECONDS, ready)

    def _receive(self, *, wait: bool, seconds: float = QUIET_SECONDS) -> bool:
        """Take over what has arrived; False when the engine is closed. `seconds` are what it waits at most."""
        try:
            item = self._inbox.get(wait, seconds)
        except queue.Empty:
            return True
        with contextlib.suppress(queue.Empty):
            while item is not None:
                if callable(item):
                    _do(item)
                else:
                    self._ready += item
                item = self._inbox.get_nowait()
            self._inbox.put(None)  # for `_compute`, if this was `let_in`
            return False
        return True

    def _iterate(self) -> None:
        self._ready = [job for job in self._ready if not job.done.cancelled()]
        if not self._ready:
            return
        now = self._clock()
        self._shares.settle({job.peer for job in self._ready})
        job = self._next(now)
        if job.step is None:
            self._run_alone(job)
        else:
            self._run_together(job, now)

    def _next(self, now: float) -> Job:
        """The most urgent of each class's fairest."""
        fairest: dict[Kind, Job] = {}
        for job in self._ready:
            other = fairest.get(job.kind)
            if other is None or self._turn(job) < self._turn(other):
                fairest[job.kind] = job
        return min(fairest.values(), key=lambda job: job.urgency(now))

    def _turn(self, job: Job) -> tuple[float, float]:
        """A job's place within its class."""
        return (self._shares.given(job.peer), job.arrived)

    def _run_alone(self, job: Job) -> None:
        self._ready.remove(job)
        job.begun = True
        assert job.run is not None
        self._lent, started = 0.0, time.perf_counter()
        result, error = _outcome(job.run)
        self._shares.give(job.peer, time.perf_counter() - started - self._lent)
        self._settle([(job, result, error)])
        self._loud = self._clock()

    def _run_together(self, first: Job, now: float) -> None:
        """One pass with `first` and what fits beside it; or two, so that nobody's next token waits for a prompt."""
        taken = self._pack(first, now)
        steps = [one for one in taken if one[0].kind is Kind.DECODE]
        pieces = [one for one in taken if one[0].kind is not Kind.DECODE]
        for part in (steps, pieces) if self._pace.apart(sum(count for _, count in pieces)) else (taken,):
            if part:
                self._run_pass(part, now)

    def _run_pass(self, taken: list[tuple[Job, int]], now: float) -> None:
        for job, _ in taken:
            job.begun = True
        assert self.run_pass is not None
        started = time.perf_counter()
        errors = self.run_pass([(job.step, count) for job, count in taken])
        self._passed(taken, time.perf_counter() - started)
        ended: list[tuple[Job, Any, BaseException | None]] = []
        for (job, _), error in zip(taken, errors, strict=True):
            assert job.step is not None
            if job.step.kind is Kind.DECODE:
                self._pace.generated.arrived(id(job.step.session), now)
            if error is not None:
                ended.append((job, None, error))
            elif not job.step.tokens_left:
                ended.append((job, *_outcome(job.step.result)))
        for job, _, _ in ended:
            self._ready.remove(job)
        self._settle(ended)

    def _passed(self, taken: list[tuple[Job, int]], seconds: float) -> None:
        """Note what a pass has cost, and whom it was for."""
        tokens = sum(count for _, count in taken)
        self._pace.passed(tokens, seconds)
        for job, count in taken:
            self._shares.give(job.peer, seconds * count / max(1, tokens))

    def _pack(self, first: Job, now: float) -> list[tuple[Job, int]]:
        """Steps of `first`'s group with the tokens that each gets in this pass."""
        assert first.step is not None
        group = first.step.group
        steps = [job.step for job in self._ready if job.step is not None and job.step.group is group]
        jobs = {id(job.step): job for job in self._ready}
        steps.sort(key=lambda step: (step.kind, step is not first.step, self._turn(jobs[id(step)])))
        prefilling = {id(step.session) for step in steps if step.kind is not Kind.DECODE}
        for_prompts = self._pace.prefill_budget(now, prefilling) if prefilling else 0
        if len(prefilling) < len(steps):
            for_prompts = min(for_prompts, self._pace.shared_budget())
        budget, taken = PASS_TOKENS, []
        for step in steps:
            room = budget if step.kind is Kind.DECODE else min(budget, for_prompts)
            count = min(step.tokens_left, room)
            if count or not step.tokens_left:
                taken.append((jobs[id(step)], count))
            budget -= count
            for_prompts -= 0 if step.kind is Kind.DECODE else count
        return taken

    def let_in(self) -> None:
        """Called in the middle of a long job: computes the generation steps that have arrived meanwhile."""
        if self._letting_in or not self._receive(wait=False):
            return
        self._ready = [job for job in self._ready if not job.done.cancelled()]  # their sessions may be freed
        steps = [job for job in self._ready if job.kind is Kind.DECODE and job.step is not None]
        if not steps:
            return
        self._letting_in = True
        started = time.perf_counter()
        try:
            self._run_together(steps[0], self._clock())
        finally:
            self._letting_in = False
            self._lent += time.perf_counter() - started

    def _settle(self, ended: list[tuple[Job, Any, BaseException | None]]) -> None:
        if ended and self._loop is not None:
            self._loop.call_soon_threadsafe(_set_results, ended)


def _do(work: Callable[[], None]) -> None:
    """Work that nobody awaits: its error is the operator's to read."""
    try:
        work()
    except Exception:
        log.exception("Work of the compute thread failed")


def _set_results(ended: list[tuple[Job, Any, BaseException | None]]) -> None:
    for job, result, error in ended:
        if job.done.done():  # given up
            continue
        if error is None:
            job.done.set_result(result)
        else:
            job.done.set_exception(error)


def _outcome(run: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """The result of `run()`, or its error as one that a future can carry."""
    try:
        return run(), None
    except (StopIteration, asyncio.CancelledError) as error:  # these would not reach the awaiter
        return None, RuntimeError(f"A computation raised {type(error).__name__}.")
    except BaseException as error:
        return None, error
