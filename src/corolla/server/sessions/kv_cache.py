"""Room for attention caches: who holds how much, who must go, who waits.

Invariant: the pages reserved never exceed the capacity, and a session never fills more than it reserved.
Where room is missing, sessions lose their caches (their clients replay) as `peers.choose_evictions` says: idle ones,
and those of peers that have more than whoever asks. Then newcomers wait in order of arrival. Used on the event loop
only; the pages themselves are touched by the compute thread alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from corolla.errors import RequestRefused
from corolla.models.attention.pages import PAGE
from corolla.server.peers import Holder, choose_evictions
from corolla.server.scheduler.engine import PeerHistory

RETRY_SECONDS = 5.0
IDLE_SECONDS = 5.0  # a session whose last step is so long ago is between two replies
WAIT_SECONDS = 30.0  # in line, before a newcomer is told to come back later
LOOK_AGAIN_SECONDS = 0.5  # how often the head of the line looks for sessions that have become idle


class CacheHolder(Holder, Protocol):
    """A session, or something kept of one, as far as its room is concerned."""

    pages: int  # reserved
    last_used: float
    evicted: bool


class CacheBudget:
    """How many pages all sessions may hold together; `PAGE` tokens of one row in all blocks take one a table."""

    def __init__(
        self,
        capacity: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        tables: int = 1,
        history: PeerHistory | None = None,
    ) -> None:
        """`capacity` in pages; `tables` is the layout's."""
        self.capacity = capacity
        self._tables = tables
        self._history = PeerHistory() if history is None else history
        self._by_peer: Counter[str] = Counter()  # pages
        self.reserved = 0
        self.clock = clock
        self._holders: list[CacheHolder] = []
        self._line: deque[CacheHolder] = deque()
        self._changed = asyncio.Event()

    def set_aside(self, pages: int) -> None:
        """Take so many pages, which nobody has reserved, out of what sessions may hold, for good."""
        self.capacity -= pages

    @property
    def free(self) -> int:
        """Pages that nobody has reserved."""
        return self.capacity - self.reserved

    def tokens(self, pages: int) -> int:
        """Tokens that are cached in so many pages, in all blocks; blocks with a window may see far more go by."""
        return pages * PAGE // self._tables

    @property
    def free_tokens(self) -> int:
        """Tokens that fit for sure into what nobody has reserved."""
        return self.tokens(self.free)

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line)

    def of(self, peer: str) -> int:
        """Pages that the peer's sessions have reserved."""
        return self._by_peer[peer]

    def ahead(self, holder: CacheHolder) -> int:
        """How many wait in line before this one."""
        return self._line.index(holder) if holder in self._line else 0

    async def reserve(self, holder: CacheHolder, pages: int, field: str) -> None:
        """Grow a reservation to `pages`, which is more; `field` is the message field that asks for it.

        Raises `RequestRefused`, and leaves the reservation as it was: too_large, busy after `WAIT_SECONDS` in
        line, evicted when others took this one's own room while it waited for more.
        """
        if pages > self.capacity:
            raise RequestRefused(
                f"This session would need room for {self.tokens(pages)} of the {self.tokens(self.capacity)} "
                "tokens that the server can cache: ask for fewer tokens or rows.",
                code="too_large",
                field=field,
            )
        if self.reserve_now(holder, pages):
            return
        await self._stand_in_line(holder, pages, field)

    def reserve_now(self, holder: CacheHolder, pages: int) -> bool:
        """The same where nobody waits in line and there is room, or can be made; False, and nothing changes, else."""
        return pages <= self.capacity and not self._line and self._grown(holder, pages)

    async def _stand_in_line(self, holder: CacheHolder, pages: int, field: str) -> None:
        self._line.append(holder)
        deadline = self.clock() + WAIT_SECONDS
        try:
            while True:
                if holder.evicted:  # before there is room: what it holds is not what its client thinks
                    raise RequestRefused("The session's cache is gone; replay it.", code="evicted")
                if self._first_in_line() is holder and self._grown(holder, pages):
                    return
                if self.clock() >= deadline:
                    raise RequestRefused(
                        f"The server's attention cache is full, {self.ahead(holder)} ahead of you.",
                        code="busy",
                        field=field,
                        retry_after=RETRY_SECONDS,
                    )
                await self._change()
        finally:
            self._line.remove(holder)
            self._changed.set()

    def _first_in_line(self) -> CacheHolder:
        """Whose turn it is: the first of those whose peers have least."""
        weigh = self._history.weights({one.peer for one in self._line})
        return min(self._line, key=lambda one: self._by_peer[one.peer] / weigh(one.peer))

    async def _change(self) -> None:
        """Wait until room was given back, or long enough for somebody to have become idle."""
        self._changed.clear()
        try:
            async with asyncio.timeout(LOOK_AGAIN_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return

    def _grown(self, holder: CacheHolder, pages: int) -> bool:
        """Whether the reservation is as wanted now, after evictions where these were needed and enough."""
        more = pages - holder.pages
        if more > self.free and not self._evict(more, holder):
            return False
        self._count(holder, more)
        if holder not in self._holders:
            self._holders.append(holder)
        return True

    def _count(self, holder: CacheHolder, more: int) -> None:
        holder.pages += more
        self.reserved += more
        self._by_peer[holder.peer] += more
        if not self._by_peer[holder.peer]:
            del self._by_peer[holder.peer]

    def _evict(self, wanted: int, holder: CacheHolder) -> bool:
        """Make room for `wanted` more pages; False, and nobody goes, if that would not be fair or enough."""
        held = {one: one.pages for one in self._holders}
        missing, now = wanted - self.free, self.clock()
        chosen = choose_evictions(held, holder, wanted, missing, self._history, now)
        for one in chosen:
            one.evicted = True
            self.release(one)
            one.on_evicted()
        return bool(chosen)

    def release(self, holder: CacheHolder) -> None:
        """Give everything back; safe to call twice."""
        self._count(holder, -holder.pages)
        if holder in self._holders:
            self._holders.remove(holder)
        self._changed.set()
