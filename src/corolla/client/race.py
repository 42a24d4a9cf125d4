"""Work that several servers could do, given to one, and to more of them side by side while nobody answers.

Invariant: whoever fails is replaced at once; and each time that all who were asked have failed, or are silent for
longer than a server that works is, or show signs of life for longer than is fair, twice as many are asked as before.
So of n peers that never answer, all have been asked after `FIRST_SECONDS` + `STAGGER_SECONDS` x log2(n + 1), as far as
`MOST_AT_ONCE` goes, and of n that refuse, after as many round trips as that logarithm.
"""

from __future__ import annotations

import asyncio
import resource
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from corolla.errors import PeerSilent, RemoteError
from corolla.swarm.directory.routing import Hop

T = TypeVar("T")

FIRST_SECONDS = (
    2.0  # that the first is waited for: there comes a sign of life each second, over whatever line
)
STAGGER_SECONDS = 1.0  # that more are waited for, once something is wrong
MOST_AT_ONCE = 4096


def most_at_once() -> int:
    """Peers that are asked at a time: each takes a stream, and so one of the files that a process may have open."""
    return min(MOST_AT_ONCE, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class Race(Generic[T]):
    """One piece of work and those who may do it, the best first. Used once, on the event loop."""

    def __init__(
        self,
        hops: Iterable[Hop],
        work: Callable[[Hop, bool], Awaitable[T]],
        *,
        heard: Callable[[str], float],
        fair: Callable[[Hop], float],
        failed: Callable[[RemoteError], Awaitable[None]],
        discard: Callable[[T], Awaitable[None]] | None = None,
    ) -> None:
        """`work` is told whether others have been asked before, so that little should be sent before an answer comes.

        `heard` says when a peer showed a sign of life last, `fair` how many seconds one may work that does so.

        `failed` is told of every failure but the one that `run` raises; `discard` is given what comes too late.
        """
        self._left = deque(hops)
        self._work, self._heard, self._fair, self._failed = work, heard, fair, failed
        self._discard = discard
        self._most = most_at_once()
        self._running: dict[asyncio.Future[T], tuple[Hop, float]] = {}  # and the moment when each was asked
        self._rounds, self._began = 0, 0.0  # how often more were asked, and when last
        self._error: RemoteError | None = None
        self._notes: list[asyncio.Future[None]] = []

    async def run(self) -> tuple[Hop, T]:
        """Who did it first, and the result. Raises the last failure when all have failed.

        Those that have been silent meanwhile count as failed.
        """
        self._began = asyncio.get_running_loop().time()
        try:
            self._ask(1)
            while self._running:
                found = await self._next()
                if found is not None:
                    self._leave_behind()
                    await asyncio.sleep(0)  # it is noted before anybody is chosen again
                    return found
            assert self._error is not None
            await asyncio.gather(*self._notes)
            raise self._error
        finally:
            for task in self._running:
                task.add_done_callback(self._forget)
                task.cancel()

    async def _next(self) -> tuple[Hop, T] | None:
        """The result if there is one; else others have been asked where that is due."""
        done, _ = await asyncio.wait(
            self._running, timeout=self._patience(), return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            hop, _ = self._running.pop(task)
            try:
                return hop, task.result()
            except RemoteError as error:
                if self._error is not None:
                    self._note(self._error)
                self._error = error
        if self._running and done:
            self._ask(len(done))
        elif not self._running or self._patience() == 0.0:
            self._rounds, self._began = self._rounds + 1, asyncio.get_running_loop().time()
            self._ask(2**self._rounds if self._running else 2 ** (self._rounds - 1))
        return None

    def _ask(self, count: int) -> None:
        now = asyncio.get_running_loop().time()
        for _ in range(min(count, len(self._left), self._most - len(self._running))):
            hop = self._left.popleft()
            self._running[asyncio.ensure_future(self._work(hop, self._rounds > 0))] = hop, now

    def _patience(self) -> float | None:
        """Seconds until more should be asked; None where there are no more, or not at a time.

        Those who have taken the place of others have as long as these would have had.
        """
        if not self._left or len(self._running) >= self._most:
            return None
        now = asyncio.get_running_loop().time()
        quiet = (self._until(hop, asked, min(asked, self._began)) for hop, asked in self._running.values())
        return max(0.0, max(quiet) - now)

    def _until(self, hop: Hop, asked: float, began: float) -> float:
        """When somebody counts as silent, who has been asked, and whose time has begun, at these moments."""
        heard = self._heard(hop.peer_id)
        if heard < asked:
            return began + (STAGGER_SECONDS if self._rounds else FIRST_SECONDS)
        return min(heard + FIRST_SECONDS, asked + self._fair(hop))

    def _note(self, error: RemoteError) -> None:
        # In the background: it may take a while to present oneself to a peer that lets only members in.
        self._notes.append(asyncio.ensure_future(self._failed(error)))

    def _leave_behind(self) -> None:
        """Somebody has done the work: what others have not done by now is noted."""
        now = asyncio.get_running_loop().time()
        if self._error is not None:
            self._note(self._error)
        for hop, asked in self._running.values():
            if self._until(hop, asked, asked) <= now:
                self._note(PeerSilent(f"{hop.peer_id} was overtaken.", peer_id=hop.peer_id))

    def _forget(self, task: asyncio.Future[T]) -> None:
        """Of what is given up nobody asks for the error; what had been done at the same moment is undone."""
        if not task.cancelled() and task.exception() is None and self._discard is not None:
            self._notes.append(asyncio.ensure_future(self._discard(task.result())))
