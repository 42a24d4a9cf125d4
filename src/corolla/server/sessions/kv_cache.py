"""Room for attention caches: who holds how much, who must go, who waits.

Invariant: the pages reserved never exceed the capacity, and a session never fills more than it reserved.
Where room is missing, idle sessions lose their caches, least recently used first (their clients replay);
then newcomers wait in order of arrival. One peer may have everything that nobody else needs: what it has
beyond its share goes to a peer that stays within its own, idle or not. Used on the event loop only; the
pages themselves are touched by the compute thread alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from corolla.errors import RequestRefused
from corolla.models.attention.pages import PAGE

RETRY_SECONDS = 5.0
IDLE_SECONDS = 5.0  # a session whose last step is so long ago is between two replies
WAIT_SECONDS = 30.0  # in line, before a newcomer is told to come back later
LOOK_AGAIN_SECONDS = 0.5  # how often the head of the line looks for sessions that have become idle


class Holder(Protocol):
    """A session, or something kept of one, as far as its room is concerned."""

    peer: str  # whose it is
    pages: int  # reserved
    last_used: float
    evicted: bool

    @property
    def idle_after(self) -> float | None:
        """Seconds without use after which it may be evicted; None while it must not."""

    def let_go(self) -> None:
        """Free the cache; called when it is evicted."""


class CacheBudget:
    """How many pages all sessions may hold together; `PAGE` tokens of one row in all blocks take one a table."""

    def __init__(
        self,
        capacity: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        share: float = 0.5,
        tables: int = 1,
    ) -> None:
        """`capacity` in pages, of which a peer can count on `share` whatever others do; `tables` is the layout's."""
        self.capacity = capacity
        self._tables = tables
        self._peer_share = share
        self._by_peer: Counter[str] = Counter()  # pages
        self.reserved = 0
        self._clock = clock
        self._holders: list[Holder] = []
        self._line: deque[Holder] = deque()
        self._changed = asyncio.Event()

    def set_aside(self, pages: int) -> None:
        """Take so many pages, which nobody has reserved, out of what sessions may hold, for good."""
        self.capacity -= pages

    @property
    def _share(self) -> float:
        """Pages that a peer can count on."""
        return self._peer_share * self.capacity

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

    def ahead(self, holder: Holder) -> int:
        """How many wait in line before this one."""
        return self._line.index(holder) if holder in self._line else 0

    def used(self, holder: Holder) -> None:
        """Note that it is being used now."""
        holder.last_used = self._clock()

    async def reserve(self, holder: Holder, pages: int, field: str) -> None:
        """Grow or shrink a reservation to `pages`; `field` is the message field that asks for it.

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
        if not self._line and self._resized(holder, pages):
            return
        if pages <= holder.pages:
            self._resized(holder, pages)
            return
        await self._stand_in_line(holder, pages, field)

    async def _stand_in_line(self, holder: Holder, pages: int, field: str) -> None:
        self._line.append(holder)
        deadline = self._clock() + WAIT_SECONDS
        try:
            while True:
                if holder.evicted:  # before there is room: what it holds is not what its client thinks
                    raise RequestRefused("The session's cache is gone; replay it.", code="evicted")
                if self._first_in_line() is holder and self._resized(holder, pages):
                    return
                if self._clock() >= deadline:
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

    def _first_in_line(self) -> Holder:
        """Whose turn it is: the first of those whose peers have not more than their share."""
        return min(self._line, key=lambda one: self._by_peer[one.peer] > self._share)

    async def _change(self) -> None:
        """Wait until room was given back, or long enough for somebody to have become idle."""
        self._changed.clear()
        try:
            async with asyncio.timeout(LOOK_AGAIN_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return

    def _resized(self, holder: Holder, pages: int) -> bool:
        """Whether the reservation is as wanted now, after evictions where these were needed and enough."""
        more = pages - holder.pages
        if more > self.free and not self._evict(more, holder):
            return False
        self._count(holder, more)
        if pages and holder not in self._holders:
            self._holders.append(holder)
        if more < 0:
            self._changed.set()
        return True

    def _count(self, holder: Holder, more: int) -> None:
        holder.pages += more
        self.reserved += more
        self._by_peer[holder.peer] += more
        if not self._by_peer[holder.peer]:
            del self._by_peer[holder.peer]

    def _evict(self, wanted: int, holder: Holder) -> bool:
        """Make room for `wanted` more pages, idle ones and least recently used ones first.

        False, and nobody goes, if that is not enough.
        """
        now, missing = self._clock(), wanted - self.free
        others = [one for one in self._holders if one is not holder]
        idle = [one for one in others if _is_idle(one, now)]
        idle.sort(key=lambda one: (one.idle_after or 0.0, one.last_used))  # closed ones first
        if self._by_peer[holder.peer] + wanted <= self._share:
            idle += self._beyond_share([one for one in others if one not in idle])
        chosen: list[Holder] = []
        for one in idle:
            if missing <= 0:
                break
            chosen.append(one)
            missing -= one.pages
        if missing > 0:
            return False
        for one in chosen:
            one.evicted = True
            self.release(one)
            one.let_go()
        return True

    def _beyond_share(self, holders: list[Holder]) -> list[Holder]:
        """Those at rest whose peers have more than their share, least recently used first."""
        found = [
            one for one in holders if one.idle_after is not None and self._by_peer[one.peer] > self._share
        ]
        return sorted(found, key=lambda one: one.last_used)

    def release(self, holder: Holder) -> None:
        """Give everything back; safe to call twice."""
        self._count(holder, -holder.pages)
        if holder in self._holders:
            self._holders.remove(holder)
        self._changed.set()


def _is_idle(holder: Holder, now: float) -> bool:
    limit = holder.idle_after
    return limit is not None and now - holder.last_used >= limit
