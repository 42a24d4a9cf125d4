"""What the compute thread carries out, and how: how long it takes, with how many threads, in which pieces.

A `Request` is computed in passes or alone. How long the last passes took says how many tokens of a prompt the next one
takes.

A pass is tried with one thread or all. What is computed alone (training) has a thread for each CPU that nobody else
uses, and is cut into pieces of bounded time, between which others' steps are computed. Operators are the pieces;
while others come in between, the longest ones (products over many rows, attention of many tokens) are cut once more,
where each row of a result is of its own rows alone. Nobody pays for that who is alone.

Invariant: the number of threads changes how long work takes, never its bits, and is back at what it was after it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.models.kernels.helpers import AWAKE_SECONDS, others_running
from corolla.swarm.arrivals import ArrivalTracker

T = TypeVar("T")

PASS_TOKENS = 512  # tokens that one packed pass takes at most
SHARED_PASS_SECONDS = 0.02  # what pieces of prompts may add to a pass while others generate
LEAST_PREFILL_TOKENS = 16
WHOLE_PROMPT = 64  # a prompt of so few tokens is not cut: a pass for each piece reads all weights again
SECONDS_A_TOKEN = 0.002  # until it is known
LEAST_TIMED = 64  # tokens; what fewer take says little
SPLIT_SHARE = 0.5  # of what pieces of prompts take, that a decode pass may take to be worth one of its own
GENERATING_SECONDS = 1.0  # how long after a decode step its client is taken to be in the middle of a reply

LARGE_BATCH = 8  # decode steps in one pass
MOST_TOKENS = 64  # larger passes, and jobs that are not passes, take all threads
CONTEXT = 512  # tokens; the least context that makes a class of its own
COST = 0.01  # the share of time that trials may cost
GAPS = (8, 256)  # passes between two trials, at least and at most
FIRST_GAP = 4  # until there is a verdict: of some kinds of passes, few ever come
TRIALS = 7  # that a verdict is made of; a few passes that were held up do not sway their median
FEWEST_TRIALS = 3
MARGIN = 0.03  # by so much the other way has to be quicker
PIECE_SECONDS = 0.01  # what is computed alone goes on for so long before it yields again
LEAST_SHARE = 0.5  # of what comes between, that what it interrupts is given before it is interrupted again
LATELY = 1.0  # seconds since others came in between, for which operators are cut
ROWS = 512  # that a product takes at once then
SCORES = 2**18  # that attention computes at once then, of each head
FEWEST_QUERIES = 32


class Kind(IntEnum):
    """Classes of work, most urgent first."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


class Request:
    """Something to compute for a peer. Made inside the event loop, enqueued once, ends in `done`."""

    passes = False  # computed in passes (`run_pass`) until no tokens are left; else alone, by `result`
    group: object = None  # requests of the same group share passes

    def __init__(
        self, kind: Kind, peer: str, session: object = None, run: Callable[[], Any] | None = None
    ) -> None:
        """`peer` is for whom; `session` is whose step it is, if it is one; `run` is the function, if it is one."""
        self._run = run
        self.kind = kind
        self.peer = peer
        self.session = session
        self.work = 0.0  # of one that is computed alone: see `Speed`
        self.arrived = 0.0  # by the engine's clock
        self.begun = False
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def tokens_left(self) -> int:
        """Tokens that have still to go through the blocks, in passes."""
        return 0

    @property
    def behind(self) -> int:
        """Tokens that its next ones see and that have been through the blocks."""
        return 0

    def run_pass(self, parts: Sequence[tuple[Any, int]]) -> list[BaseException | None]:
        """Take (request, tokens) pairs of this one's group through one pass; the error of each, or None."""
        raise NotImplementedError

    def result(self) -> Any:
        """What `done` is to hold, on the compute thread."""
        return None if self._run is None else self._run()


Pass = Sequence[tuple[Any, int]]  # requests of one group, and how many tokens of each
RunPass = Callable[[Pass], list[BaseException | None]]  # the error of each request, or None


def run_pass(parts: Pass) -> list[BaseException | None]:
    """One pass, as its requests are computed."""
    errors: list[BaseException | None] = parts[0][0].run_pass(parts)
    return errors


class Speed:
    """How long work takes that is computed alone. `work` is in tokens that go through all of the server's blocks."""

    def __init__(self) -> None:
        self._lately: deque[float] = deque(maxlen=16)  # seconds a token
        self._best = SECONDS_A_TOKEN

    def took(self, work: float, seconds: float) -> None:
        """So much work took so long."""
        if work >= LEAST_TIMED:
            self._lately.append(seconds / work)
            self._best = min(self._lately)

    def seconds_of(self, work: float) -> float:
        """How long so much takes, as quickly as it went lately: it was not slower for a reason that has passed."""
        return work * self._best


class PassTimes:
    """What the last passes say about the next: what a prompt token costs, and who is in the middle of a reply."""

    def __init__(self) -> None:
        self._seconds_a_token = SECONDS_A_TOKEN
        self._seconds_a_decode = 0.0
        self.decodes = ArrivalTracker()  # when each session's last decode step was computed

    def prefill_budget(self, now: float, prefilling: set[int]) -> int:
        """Prompt tokens for a pass; few while others than these sessions generate, so that their tokens flow."""
        others = self.decodes.others_arrived(now - GENERATING_SECONDS, prefilling)
        return self.shared_budget() if others else PASS_TOKENS

    def shared_budget(self) -> int:
        """Prompt tokens that delay a decode step by about `SHARED_PASS_SECONDS`."""
        return max(LEAST_PREFILL_TOKENS, int(SHARED_PASS_SECONDS / self._seconds_a_token))

    def splits_decode(self, prompt_tokens: int) -> bool:
        """Whether decode steps are better computed before so many prompt tokens than with them.

        That costs reading the weights once more, so it depends on what a pass of few tokens takes.
        """
        return self._seconds_a_decode < SPLIT_SHARE * prompt_tokens * self._seconds_a_token

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass took so long."""
        if tokens < LEAST_PREFILL_TOKENS:
            self._seconds_a_decode += 0.3 * (seconds - self._seconds_a_decode)
        else:
            self._seconds_a_token += 0.3 * (seconds / tokens - self._seconds_a_token)


class Contest:
    """Finds the quicker of two ways, 0 and 1, to do what is done over and over; the times may drift together.

    A trial is compared with the turns right before and after it, since what a pass takes grows with contexts
    and with whatever else the machine does.
    """

    def __init__(self) -> None:
        self.best = 0
        self._ratios: deque[float] = deque(maxlen=TRIALS)  # the other way's time, in those of the best
        self._gap = FIRST_GAP
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
    """Runs passes with one thread or all, by a contest for each class of row counts (1, 2-3, 4-7, …) and contexts.

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
        self._contests: defaultdict[tuple[int, int], Contest] = defaultdict(Contest)

    def choosing(self, run_pass: RunPass) -> RunPass:
        """`run_pass` with threads chosen for each pass; to be called on the compute thread."""

        def run(parts: Pass) -> list[BaseException | None]:
            tokens = sum(count for _, count in parts)
            if self._ways[0] == 1 or not 0 < tokens <= MOST_TOKENS:
                return run_pass(parts)
            if tokens == len(parts) >= LARGE_BATCH and self._is_full():
                return self._with(self._ways[0] // 2, partial(run_pass, parts))
            # Attention over a long context is work of another kind: long pieces, which threads share well.
            behind = sum(request.behind for request, _ in parts) // CONTEXT
            contest = self._contests[tokens.bit_length(), behind.bit_length()]
            return self._timed(contest, partial(run_pass, parts))

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


def _set_threads(count: int) -> None:
    """The calling thread computes with so many, itself included."""
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-2)


def _joined_numbers(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)


def _added(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class Cut:
    """How an operator is cut by the rows of its first argument here, [..., rows, width]."""

    rows: dict[str, int]  # the dimension of rows in each argument that has them
    results: tuple[Callable[[list[Tensor]], Tensor], ...] = (_joined,)


QUERIES = {"query": -2, "attn_mask": -2}
CUTS = {
    "aten.linear.default": Cut({"input": -2}),
    "aten.mm.default": Cut({"self": -2}),
    "aten.addmm.default": Cut({"mat1": -2}),
    "mkldnn._linear_pointwise.default": Cut({"X": -2}),
    "mkldnn._linear_pointwise.binary": Cut({"X": -2, "other": -2}),
    "aten.scaled_dot_product_attention.default": Cut(QUERIES),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": Cut(QUERIES, (_joined, _joined_numbers)),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": Cut(
        {"query": -2, "grad_out": -2, "out": -2, "logsumexp": -1, "attn_mask": -2},
        (_joined, _added, _added),
    ),
}


@cache
def cut_of(operator: Any) -> tuple[Cut, tuple[str, ...]] | None:
    """How an operator of torch is cut, and its arguments' names; None where it is not."""
    cut = CUTS.get(str(operator))
    names = tuple(one.name for one in operator._schema.arguments) if cut else ()
    return (cut, names) if cut and cut.rows.keys() <= set(names) else None


class Preemptible(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators inside, of a forward or a backward, let others in: `between` is called from time to time before
    one of them, and tells how many seconds it gave to others.

    A piece takes `LEAST_SHARE` times as long at least, so that the computation goes on beside any number of others.
    """

    def __init__(self, between: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._between = between
        self._due = time.perf_counter() + PIECE_SECONDS
        self._came_last = float("-inf")  # when others came in between

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._yield_if_due() - self._came_last < LATELY and (found := cut_of(func)) is not None:
            cut, names = found
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            parts = list(_cut(cut, given))
            if len(parts) > 1:
                return self._in_parts(func, cut, given, parts)
        return func(*args, **(kwargs or {}))

    def _yield_if_due(self) -> float:
        """Let others in if it is time; what the clock says after it."""
        now = time.perf_counter()
        if now < self._due:
            return now
        with torch.inference_mode(False):  # what others begin here, they may go on with elsewhere
            away = self._between()
        after = time.perf_counter()
        if away:
            self._came_last = after
        self._due = after + max(PIECE_SECONDS, LEAST_SHARE * away)
        return after

    def _in_parts(self, func: Any, cut: Cut, given: dict[str, Any], parts: list[dict[str, Tensor]]) -> Any:
        found = []
        for part in parts:
            self._yield_if_due()
            result = func(**(given | part))
            found.append(result if isinstance(result, tuple) else (result,))
        joined = [join(list(one)) for join, one in zip(cut.results, zip(*found, strict=True), strict=True)]
        return joined[0] if len(joined) == 1 else tuple(joined)


def _cut(cut: Cut, given: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The arguments that have rows, some rows after the others; nothing where they are few, or not independent."""
    held = {name: dim for name, dim in cut.rows.items() if isinstance(given.get(name), Tensor)}
    first = given[next(iter(held))]
    count = first.shape[-2] if first.dim() > 1 else 1
    most = max(1, ROWS // max(1, first.shape[:-2].numel()))
    if "query" in held:
        most = max(FEWEST_QUERIES, SCORES // given["key"].shape[-2])
    if count <= most or given.get("is_causal") or any(given[n].shape[d] != count for n, d in held.items()):
        return
    for begin in range(0, count, most):
        end = min(begin + most, count)
        yield {name: given[name].narrow(dim, begin, end - begin) for name, dim in held.items()}
