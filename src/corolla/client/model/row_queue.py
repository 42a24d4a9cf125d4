"""One product for the rows of several threads, since one of many rows costs little more than one of a single row."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 256  # of one product
# How long a leader waits for others that are likely to come, in times of the last product: at most, and at least.
PATIENCE = (1.5, 1 / 32)
LONGEST_WAIT = 0.5  # seconds, whatever the last product took

Product = Callable[[Tensor], Tensor]


def _held() -> threading.Lock:
    """To wait for, with `acquire`, until `_wake`.

    An interrupt within `threading.Event` or `Condition`, whose methods are Python, may leave their own lock held for
    ever; a bare lock's are not.
    """
    lock = threading.Lock()
    lock.acquire()
    return lock


def _wake(waiting: threading.Lock) -> None:
    """End the wait for it, now or to come; under the queue's lock, since it may be so already."""
    if waiting.locked():
        waiting.release()


class _Call:
    """One caller's rows, and what becomes of them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.thread = threading.get_ident()
        self.away = -math.inf  # seconds since that thread's last call
        self.result: Tensor | None = None
        self.error: Exception | None = None
        self.woken = _held()  # until it is served, or is to lead

    @property
    def served(self) -> bool:
        return self.result is not None or self.error is not None


class RowQueue:
    """Joins what threads bring while a product is being computed into the next product.

    Whoever comes when nobody is at work leads: waits a moment for the threads that have been away for as long as its
    own, takes its own rows and all that wait, multiplies, hands out the results and lets the next one lead. Steps of
    sessions come back from servers together, and their threads here one after the other; without that moment
    the large table would be read for the first of them, and again for the others. One caller alone waits for nothing,
    and where nobody comes meanwhile the moment is halved. An interrupt in one thread (they come at any point of the
    code) costs the others at most a second computation: calls leave the list when they are served and not before, and
    every caller puts things in order when it leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._came: threading.Lock | None = None  # what a leader waits for, until anybody comes
        self._waiting: list[_Call] = []  # all that are not served, the leader among them
        self._leader: _Call | None = None
        self._away: dict[int, float] = {}  # by thread, since when its last call is served; oldest first
        self._seconds = 0.0  # of the last product
        self._patience = PATIENCE[0]

    def __deepcopy__(self, _memo: Any) -> RowQueue:
        return RowQueue()

    def __reduce__(self) -> tuple[type[RowQueue], tuple[()]]:
        return RowQueue, ()

    @property
    def waiting(self) -> int:
        """Calls that are not served yet."""
        return len(self._waiting)

    def run(self, rows: Tensor, product: Product) -> Tensor:
        """`product(rows)`, [n, H] to [n, V], in one with other threads' rows; n > 0, no gradient.

        An error of the product is raised in all threads whose rows were in it.
        """
        call = _Call(rows)
        try:
            with self._lock:
                call.away = time.perf_counter() - self._away.pop(call.thread, math.inf)
                self._waiting.append(call)
                self._leader = self._leader or call
                if self._came is not None:
                    _wake(self._came)
            if self._leader is not call:
                call.woken.acquire()
            if not call.served:
                self._lead(call, product)
        finally:
            try:
                self._leave(call)
            except BaseException:  # an interrupt: what is left undone would keep the others waiting for ever
                self._leave(call)
                raise
        if call.error is not None:
            raise call.error
        assert call.result is not None
        return call.result

    def _lead(self, call: _Call, product: Product) -> None:
        self._wait(call)
        with self._lock:
            batch = self._batch_of(call)
        started = time.perf_counter()
        try:
            results = _multiply([member.rows for member in batch], product)
        except Exception as error:
            for member in batch:
                member.error = error
        else:
            for member, result in zip(batch, results, strict=True):
                member.result = result
        self._seconds = time.perf_counter() - started

    def _wait(self, leader: _Call) -> None:
        """Let others gather that are likely to come soon."""
        most, here = min(self._patience * self._seconds, LONGEST_WAIT), len(self._waiting)
        until, waited = time.perf_counter() + most, False
        while came := self._to_wait_for(leader, most, until):
            came.acquire(timeout=max(0.0, until - time.perf_counter()))
            waited = True
        if not waited:
            return
        change = 2.0 if len(self._waiting) > here else 0.5
        self._patience = min(max(self._patience * change, PATIENCE[1]), PATIENCE[0])

    def _to_wait_for(self, leader: _Call, soon: float, until: float) -> threading.Lock | None:
        """Held until somebody comes; None where that is not likely any more, or it is time."""
        with self._lock:
            due = time.perf_counter() < until and self._is_due(leader, soon)
            self._came = _held() if due else None
            return self._came

    def _is_due(self, leader: _Call, soon: float) -> bool:
        """Whether a thread that stays away for as long as the leader's has would come `soon`, or just have come."""
        now = time.perf_counter()
        return any(abs(now - since - leader.away) <= soon for since in self._away.values())

    def _batch_of(self, leader: _Call) -> list[_Call]:
        """The leader and those that wait, first come first served, as many as fit."""
        batch, count = [leader], len(leader.rows)
        for call in self._waiting:
            if call is not leader and count + len(call.rows) <= MOST_ROWS:
                batch.append(call)
                count += len(call.rows)
        return batch

    def _leave(self, call: _Call) -> None:
        """Put things in order; done twice it does no harm."""
        with self._lock:
            # Asked once of each: a leader serves others meanwhile, and who leaves the list is to be woken.
            left = []
            for other in self._waiting:
                if other.served:
                    _wake(other.woken)
                elif other is not call:
                    left.append(other)
            self._waiting = left
            self._away[call.thread] = time.perf_counter()
            while len(self._away) > MOST_ROWS:
                del self._away[next(iter(self._away))]
            if self._leader is call:
                self._leader = self._waiting[0] if self._waiting else None
            if self._leader is not None:
                _wake(self._leader.woken)


def _multiply(parts: list[Tensor], product: Product) -> list[Tensor]:
    # Neither the leader's inference mode nor its gradients may come to strangers with the results.
    with torch.inference_mode(False), torch.no_grad():
        if len(parts) == 1:
            return [product(parts[0])]
        return list(torch.split(product(torch.cat(parts)), [len(part) for part in parts]))
