"""Who uses a server, for what and how fast: lines for its log (`corolla --verbose serve`).

Invariant: what is kept is bounded by the peers that are there now. Used on the event loop only.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from corolla.text import one_line

log = logging.getLogger(__name__)


@dataclass
class _Work:
    tokens: int = 0
    seconds: float = 0.0  # from a request to its answer, waiting included


@dataclass
class _Visit:
    streams: int = 0
    done: dict[str, _Work] = field(default_factory=dict)  # since it was last told

    def told(self) -> str:
        """What was done, in words; it is forgotten. Empty when it was nothing."""
        done, self.done = self.done, {}
        return ", ".join(
            f"{work.tokens:,} tokens of {what} ({work.tokens / max(work.seconds, 1e-9):,.0f} tokens/s)"
            for what, work in sorted(done.items())
        )


class Diary:
    """The visits that are going on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._visits: dict[str, _Visit] = {}

    @contextlib.contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """A stream of a peer; its first tells that it came, its last that it has left."""
        visit = self._visits.setdefault(peer, _Visit())
        visit.streams += 1
        if visit.streams == 1:
            log.info("Peer %s came", _short(peer))
        try:
            yield
        finally:
            visit.streams -= 1
            if not visit.streams:
                del self._visits[peer]
                log.info("Peer %s left; %s", _short(peer), visit.told() or "nothing more was done")

    @contextlib.contextmanager
    def work(self, peer: str, what: str, tokens: int) -> Iterator[None]:
        """Work that is done while the block lasts, unless it raises."""
        started = self._clock()
        yield
        visit = self._visits.get(peer)
        if visit is not None:
            work = visit.done.setdefault(what, _Work())
            work.tokens += tokens
            work.seconds += self._clock() - started

    def tell(self) -> None:
        """Log what those have done who are still here."""
        for peer, visit in self._visits.items():
            if told := visit.told():
                log.info("Peer %s: %s", _short(peer), told)


def _short(peer: str) -> str:
    return f"…{one_line(peer[-8:])}"
