"""All sessions of a server: those that are open, by name where they have one, and those kept for others to begin with.

Invariant: a name is looked up for the peer that gave it, for nobody else; so what one client's cache holds
can never come into another's. Closed sessions are kept only while nobody needs their room, a few a peer and
not for ever. Whatever an open session takes of the server is given back by `close`, and only there.
"""

from __future__ import annotations

import time

from corolla.server.scheduler.engine import Engine
from corolla.server.sessions.session import Session

KEPT_A_PEER = 8
KEPT_SECONDS = 600.0

Name = tuple[str, str | None]  # a peer, and what it calls the session


class SessionStore:
    """Used on the event loop only. Its length is the number of open sessions."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: set[Session] = set()
        self._named: dict[Name, Session] = {}  # open ones
        self._kept: dict[Name, tuple[Session, float]] = {}  # closed ones, with the time to let them go

    def __len__(self) -> int:
        return len(self._open)

    @property
    def kept_pages(self) -> int:
        """Pages of closed sessions, which anybody who needs room gets."""
        return sum(session.pages for session, _ in self._kept.values())

    def add(self, session: Session) -> None:
        """A session is being opened."""
        self._open.add(session)

    def publish(self, session: Session) -> None:
        """An open session may be found by its name, if it has one; what was kept under that name is let go."""
        if session.name is not None:
            name = (session.peer, session.name)
            self._let_go(name)
            self._named[name] = session

    def opened(self, peer: str, name: str) -> Session | None:
        """The peer's open session of that name, unless it was evicted."""
        session = self._named.get((peer, name))
        return None if session is None or session.evicted else session

    def find(self, peer: str, name: str) -> Session | None:
        """The peer's session of that name, open or kept, unless it was evicted."""
        session, _ = self._kept.get((peer, name), (None, 0.0))
        return self.opened(peer, name) or (None if session is None or session.evicted else session)

    def close(self, session: Session, *, keep: bool = False) -> None:
        """Free the session's cache, or `keep` it under its name for as long as there is room; safe to call twice."""
        if session not in self._open:
            return
        self._open.remove(session)
        self._engine.forget(session)
        name = (session.peer, session.name)
        published = self._named.get(name) is session
        if published:
            del self._named[name]
        if keep and published and session.length and not session.evicted:
            self._keep(name, session)
        else:
            session.close()

    def _keep(self, name: Name, session: Session) -> None:
        session.closed = True
        self._kept[name] = (session, time.monotonic() + KEPT_SECONDS)
        own = [key for key in self._kept if key[0] == session.peer]
        for key in own[:-KEPT_A_PEER]:
            self._let_go(key)
        now = time.monotonic()
        for key in [key for key, (one, until) in self._kept.items() if one.evicted or until <= now]:
            self._let_go(key)

    def _let_go(self, name: Name) -> None:
        session, _ = self._kept.pop(name, (None, 0.0))
        if session is not None:
            session.close()
