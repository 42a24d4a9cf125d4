"""The scheduler: every computation of a server passes through here, on one compute thread.

Invariant: the event loop only enqueues and awaits; model code runs on the compute thread alone. An iteration takes
the most urgent request: all decode steps that are ready, packed into one pass, then pieces of prompts up to a budget
of tokens, or one request that is computed alone (training). Within a class the peer that was given least of the
thread comes first. Whatever has waited `AGEING_SECONDS` moves up a class, so nobody starves. What is computed alone
may take minutes; again and again it yields (`yield_to_others`) to decode steps, and to prompts of peers that were
given no more than its own. An error goes to whoever awaits it; the loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from corolla.errors import RequestRefused
from corolla.models.kernels.helpers import flush_denormals
from corolla.server.scheduler.execution import (
    PASS_TOKENS,
    WHOLE_PROMPT,
    Kind,
    PassTimes,
    Request,
    RunPass,
    Speed,
    run_pass,
)
from corolla.text import get_logger

T = TypeVar("T")

log = get_logger(__name__)

AGEING_SECONDS = 2.0
GATHER_SECONDS = 0.008  # what a decode step waits at most for those of others to share its pass
# Without a request that is computed alone (training), until the server tidies up; longer than most clients take
# between a forward and its backward, which would have to ask the system for all of its memory again.
QUIET_SECONDS = 2.0
PREEMPTING_TOKENS = 128  # of prompts that come in between at a time, at most
PROMPT_CREDIT = 1.0  # seconds of computing that a prompt's peer may be ahead of what it comes before
KNOWN_SECONDS = 10.0  # of computing, after which a peer has a history
MOST_REMEMBERED = 10_000  # peers
GOING_AWAY = "This server is going away; use another."


class PeerHistory:
    """For whom a server has computed, and how long: a stranger has to use it up, while others use it too.

    A server has one second of computing a second, so however many identities a stranger makes, few of them are known.
    Written on the compute thread, read anywhere.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}  # whoever was computed for last is last

    def computed(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._seconds[peer] = self._seconds.pop(peer, 0.0) + seconds
        if len(self._seconds) > MOST_REMEMBERED:
            del self._seconds[next(iter(self._seconds))]

    def __len__(self) -> int:
        return len(self._seconds)

    def known(self, peer: str) -> bool:
        """Whether the peer has a history."""
        return self._seconds.get(peer, 0.0) >= KNOWN_SECONDS

    def weights(self, peers: Collection[str]) -> Callable[[str], float]:
        """What each of these counts for where they share something: all new ones together no more than all known."""
        known = sum(self.known(peer) for peer in peers)
        new = min(1.0, known / max(1, len(peers) - known)) if known else 1.0
        return lambda peer: 1.0 if self.known(peer) else new


class Shares:
    """Seconds of computing that each peer was given: whoever had least of it comes first.

    Invariant: between two peers with a history that both always have work, the difference in what they were given
    stays below one request each, however much they ask for. A peer that had nothing to do gathers no credit: it
    begins where the least served of the busy ones stands.

    Virtual time as in Sheng et al. 2024 (arXiv:2401.00588), counted in seconds of computing. A second of one of many
    new peers counts for more: together they get no more than those with a history.
    """

    def __init__(self, history: PeerHistory | None = None) -> None:
        self._history = PeerHistory() if history is None else history
        self._given: dict[str, float] = {}
        self._floor = 0.0  # what the least served of the busy peers has had
        self._weigh = self._history.weights(())

    def after(self, peer: str, seconds: float = 0.0) -> float:
        """The peer's place in the order, once it was given so much more: smaller is sooner."""
        return max(self._floor, self._given.get(peer, 0.0)) + seconds / self._weigh(peer)

    def give(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._given[peer] = self.after(peer, seconds)
        self._history.computed(peer, seconds)

    def settle(self, busy: Collection[str]) -> None:
        """Only `busy` peers have work now: what others may no longer claim is forgotten."""
        if busy:
            self._floor = max(self._floor, min(self.after(peer) for peer in busy))
        self._weigh = self._history.weights(busy)
        for peer in [peer for peer, given in self._given.items() if given <= self._floor]:
            del self._given[peer]

    def __len__(self) -> int:
        return len(self._given)


class Engine:
    """Computes requests in order of urgency. Made and used inside one event loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        run_pass: RunPass = run_pass,
        when_quiet: Callable[[], None] | None = None,
        history: PeerHistory | None = None,
    ) -> None:
        """`run_pass` computes a pass; `when_quiet` is called on the compute thread when nothing was computed alone for
        `QUIET_SECONDS`, and again after as long; `history` notes for whom was computed."""
        self.run_pass = run_pass
        self._when_quiet = when_quiet
        self._clock = clock
        # When the last request that was computed alone had ended, or `when_quiet` was called last.
        self._quiet_since = clock()
        self._times = PassTimes()
        self._speed = Speed()
        self._shares = Shares(history)
        self._alone: Request | None = None  # that is being computed, unless it has yielded
        self._alone_since = self._alone_seconds = 0.0  # when it was last given time, and how much before
        self._open: set[Request] = set()  # the loop's side: not yet answered
        self._inbox: queue.SimpleQueue[Sequence[Request] | Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: list[Request] = []  # the compute thread's side: to be computed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._compute, name="corolla-compute", daemon=True)
        self._closed = False

    def start(self) -> None:
        """Begin to compute what is enqueued."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def enqueue(self, requests: Sequence[Request]) -> None:
        """Have these computed; cancelling `done` takes one back that has not begun.

        Raises `RequestRefused` (draining) once the engine is closed.
        """
        if self._closed:
            raise RequestRefused(GOING_AWAY, code="draining")
        now = self._clock()
        for request in requests:
            request.arrived = now
            self._open.add(request)
            request.done.add_done_callback(lambda _, one=request: self._open.discard(one))  # type: ignore[misc]
        self._inbox.put(requests)

    async def submit(self, kind: Kind, run: Callable[[], T], *, peer: str = "", work: float = 0.0) -> T:
        """The result of `run()`, or its error. Raises as `enqueue` does. The server's own work is for no peer."""
        request = Request(kind, peer, run=run)
        request.work = work
        self.enqueue([request])
        result: T = await request.done
        return result

    def post(self, work: Callable[[], None]) -> None:
        """Have `work` done on the compute thread before anything that is enqueued later."""
        if not self._closed:
            self._inbox.put(work)

    def forget(self, session: object) -> None:
        """A session has ended: nobody waits for its next step."""
        self.post(lambda: self._times.decodes.forget(id(session)))

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return sum(not request.begun for request in self._open)

    def seconds_of(self, work: float) -> float:
        """About how long so much `work` takes at least, by what was computed here lately."""
        return self._speed.seconds_of(work)

    async def close(self) -> None:
        """Stop after the pass at hand, whose awaiters get their results, or where what is computed alone yields."""
        self._closed = True
        for request in list(self._open):
            if not request.begun:
                request.done.cancel()
        self._inbox.put(None)
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join)
            await asyncio.sleep(0)  # what the thread settled last
        for request in list(self._open):
            request.done.cancel()

    # --- on the compute thread ------------------------------------------------------------------------------

    def _compute(self) -> None:
        flush_denormals()
        while True:
            if not self._receive(wait=not self._ready):
                return
            self._tidy_up()
            if self._ready and self._gather():
                try:
                    self._iterate()
                except Exception as error:  # a mistake of ours; without the thread the server would hang
                    log.exception("The scheduler failed")
                    self._settle([(request, None, error) for request in self._ready])
                    self._ready.clear()

    def _tidy_up(self) -> None:
        now = self._clock()
        if self._when_quiet is not None and now - self._quiet_since >= QUIET_SECONDS:
            self._quiet_since = now
            _do(self._when_quiet)

    def _gather(self) -> bool:
        """Give decode steps that are probably under way a moment to join the pass; False when closed.

        A pass of many rows takes little longer than one of a single row, which is read from the same weights.
        """
        until = time.perf_counter() + GATHER_SECONDS
        while self._decodes_due() and (left := until - time.perf_counter()) > 0:
            if not self._receive(wait=True, seconds=left):
                return False
        return True

    def _decodes_due(self) -> bool:
        """Whether there are decode steps, and others about to be sent, by the intervals of their sessions.

        Those that are at another server meanwhile, as half of many are, come too late to be waited for.
        """
        now = self._clock()
        ready = {id(one.session) for one in self._ready if one.kind is Kind.DECODE and one.group is not None}
        return bool(ready) and self._times.decodes.others_due(now, now + GATHER_SECONDS, ready)

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
            self._inbox.put(None)  # for `_compute`, if this was `yield_to_others`
            return False
        return True

    def _iterate(self) -> None:
        self._drop_cancelled()
        if not self._ready:
            return
        now = self._clock()
        self._shares.settle({request.peer for request in self._ready})
        request = self._next(now)
        if request.passes:
            self._run_together(request, now)
        else:
            self._run_alone(request)

    def _drop_cancelled(self) -> None:
        self._ready = [one for one in self._ready if not one.done.cancelled()]  # their sessions may be freed

    def _next(self, now: float) -> Request:
        """The most urgent of each class's fairest; those of one peer in order of arrival."""
        firsts: dict[tuple[Kind, str], Request] = {}
        for request in self._ready:
            firsts.setdefault((request.kind, request.peer), request)
        fairest: dict[Kind, Request] = {}
        for request in sorted(firsts.values(), key=self._turn, reverse=True):
            fairest[request.kind] = request
        return min(
            fairest.values(), key=lambda one: (one.kind - (now - one.arrived) // AGEING_SECONDS, one.arrived)
        )

    def _turn(self, request: Request) -> tuple[float, float]:
        """A request's place within its class: by what its peer will have had after it, so that short ones go first."""
        return (self._shares.after(request.peer, self._speed.seconds_of(request.work)), request.arrived)

    def _run_alone(self, request: Request) -> None:
        self._ready.remove(request)
        request.begun = True
        self._alone, self._alone_since, self._alone_seconds = request, time.perf_counter(), 0.0
        result, error = _outcome(request.result)
        self._charge(request)
        self._alone = None
        if error is None:
            self._speed.took(request.work, self._alone_seconds)
        self._settle([(request, result, error)])
        self._quiet_since = self._clock()

    def _charge(self, alone: Request) -> None:
        """Note the time that the request which is computed alone was given since the last call."""
        now = time.perf_counter()
        self._shares.give(alone.peer, now - self._alone_since)
        self._alone_seconds += now - self._alone_since
        self._alone_since = now

    def yield_to_others(self) -> float:
        """Called in the middle of what is computed alone: a pass of what comes before it; the seconds that this took.

        Raises what ends the computation where nobody waits for it any more."""
        alone = self._alone
        if alone is None:
            return 0.0
        if not self._receive(wait=False):
            raise RequestRefused(GOING_AWAY, code="draining")
        if alone.done.cancelled():
            raise asyncio.CancelledError
        self._charge(alone)
        self._drop_cancelled()
        first, began = self._comes_before(alone), time.perf_counter()
        if first is None:
            return 0.0
        self._alone = None
        try:
            self._run_together(first, self._clock(), PREEMPTING_TOKENS)
        finally:
            self._alone, self._alone_since = alone, time.perf_counter()
        return self._alone_since - began

    def _comes_before(self, alone: Request) -> Request | None:
        """A decode step, or else the prompt of the peer that was given least, if not much more than `alone`'s."""
        steps = [one for one in self._ready if one.passes]
        self._shares.settle({alone.peer, *(one.peer for one in steps)})
        first = min(steps, key=lambda one: (one.kind, self._turn(one)), default=None)
        if first is None or first.kind is Kind.DECODE:
            return first
        ahead = self._shares.after(first.peer) - self._shares.after(alone.peer)
        return first if ahead <= PROMPT_CREDIT else None

    def _run_together(self, first: Request, now: float, most: int = PASS_TOKENS) -> None:
        """A pass with `first` and what fits beside it, with at most so many tokens of prompts; or two, so that no next
        token waits for a prompt."""
        taken = self._pack(first, now, most)
        decodes = [one for one in taken if one[0].kind is Kind.DECODE]
        prompts = [one for one in taken if one[0].kind is not Kind.DECODE]
        split = self._times.splits_decode(sum(count for _, count in prompts))
        for part in (decodes, prompts) if split else (taken,):
            if part:
                self._run_pass(part, now)

    def _run_pass(self, taken: list[tuple[Request, int]], now: float) -> None:
        for request, _ in taken:
            request.begun = True
        started = time.perf_counter()
        errors = self.run_pass(taken)
        seconds, tokens = time.perf_counter() - started, sum(count for _, count in taken)
        self._times.passed(tokens, seconds)
        ended: list[tuple[Request, Any, BaseException | None]] = []
        for (request, count), error in zip(taken, errors, strict=True):
            self._shares.give(request.peer, seconds * count / max(1, tokens))
            if request.kind is Kind.DECODE:
                self._times.decodes.arrived(id(request.session), now)
            if error is not None:
                ended.append((request, None, error))
            elif not request.tokens_left:
                ended.append((request, *_outcome(request.result)))
        for request, _, _ in ended:
            self._ready.remove(request)
        self._settle(ended)

    def _pack(self, first: Request, now: float, most: int) -> list[tuple[Request, int]]:
        """`first` and what shares a pass with it, with the tokens that each gets in this pass."""
        group = [one for one in self._ready if one is first or (one.group is first.group is not None)]
        group.sort(key=lambda one: (one.kind, one is not first, self._turn(one)))
        prefilling = {id(one.session) for one in group if one.kind is not Kind.DECODE}
        for_prompts = self._times.prefill_budget(now, prefilling) if prefilling else 0
        if len(prefilling) < len(group):
            most = min(most, self._times.shared_budget())
        for_prompts = min(for_prompts, most)
        budget, taken = PASS_TOKENS, []
        for one in group:
            decode = one.kind is Kind.DECODE
            short = for_prompts > 0 and not one.begun and one.tokens_left <= WHOLE_PROMPT
            count = min(one.tokens_left, budget if decode or short else min(budget, for_prompts))
            for_prompts -= 0 if decode else min(count, for_prompts)
            if count or not one.tokens_left:
                taken.append((one, count))
            budget -= count
        return taken

    def _settle(self, ended: list[tuple[Request, Any, BaseException | None]]) -> None:
        if ended and self._loop is not None:
            self._loop.call_soon_threadsafe(_set_results, ended)


def _do(work: Callable[[], None]) -> None:
    """Work that nobody awaits: its error is the operator's to read."""
    try:
        work()
    except Exception:
        log.exception("Work of the compute thread failed")


def _set_results(ended: list[tuple[Request, Any, BaseException | None]]) -> None:
    for request, result, error in ended:
        if request.done.done():  # given up
            continue
        if error is None:
            request.done.set_result(result)
        else:
            request.done.set_exception(error)


def _outcome(run: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """The result of `run()`, or its error as one that a future can carry."""
    try:
        return run(), None
    except (StopIteration, asyncio.CancelledError) as error:  # these would not reach the awaiter
        return None, RuntimeError(f"A computation raised {type(error).__name__}.")
    except BaseException as error:
        return None, error
