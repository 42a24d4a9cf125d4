"""Sessions by the names that their clients gave them, so that others can begin where they stand.

Invariant: a name is looked up for the peer that gave it, for nobody else; so what one client's cache holds
can never come into another's. Closed sessions are kept only while nobody needs their room, a few a peer and
not for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from corolla.server.sessions.sessions import CachedSession

KEPT_A_PEER = 8
KEPT_SECONDS = 600.0


class NamedSessions:
    """Open and kept sessions of all peers. Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[tuple[str, str], CachedSession] = {}
        self._kept: dict[tuple[str, str], tuple[CachedSession, float]] = {}  # with the time to let it go

    def __len__(self) -> int:
        return len(self._open) + len(self._kept)

    @property
    def kept_pages(self) -> int:
        """Pages of closed sessions, which anybody who needs room gets."""
        return sum(session.pages for session, _ in self._kept.values())

    def add(self, peer: str, name: str, session: CachedSession) -> None:
        """Name an open session; what was kept under that name is let go."""
        self._let_go((peer, name))
        self._open[peer, name] = session

    def opened(self, peer: str, name: str) -> CachedSession | None:
        """The peer's open session of that name, unless it was evicted."""
        session = self._open.get((peer, name))
        return None if session is None or session.evicted else session

    def find(self, peer: str, name: str) -> CachedSession | None:
        """The peer's session of that name, unless it was evicted."""
        session = self._kept.get((peer, name), (None, 0.0))[0]
        return self.opened(peer, name) or (None if session is None or session.evicted else session)

    def keep(self, peer: str, name: str, session: CachedSession) -> bool:
        """Keep a session that is being closed; False when there is nothing to keep under that name."""
        if self._open.get((peer, name)) is not session or session.evicted or not session.length:
            return False
        del self._open[peer, name]
        session.closed = True
        self._kept[peer, name] = (session, self._clock() + KEPT_SECONDS)
        own = [key for key in self._kept if key[0] == peer]
        for key in own[:-KEPT_A_PEER]:
            self._let_go(key)
        self._expire()
        return True

    def remove(self, peer: str, name: str, session: CachedSession) -> None:
        """The open session has ended; its name is free again."""
        if self._open.get((peer, name)) is session:
            del self._open[peer, name]

    def _expire(self) -> None:
        now = self._clock()
        for key in [key for key, (one, until) in self._kept.items() if one.evicted or until <= now]:
            self._let_go(key)

    def _let_go(self, key: tuple[str, str]) -> None:
        session, _ = self._kept.pop(key, (None, 0.0))
        if session is not None:
            session.close()
