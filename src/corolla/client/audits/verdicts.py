"""Who has been found lying, and who is to be told of it.

Invariant: a peer that was condemned once is never routed to again by this client; a finding ends one piece
of work with a `LyingServer`, and every session that the peer had a part in.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from corolla.errors import LyingServer


@dataclass(frozen=True)
class Finding:
    """One comparison that was not within the tolerance."""

    peer_id: str
    what: str  # forward, backward or step
    start: int
    end: int
    times: float  # how many times the tolerance
    lied: bool  # False: it and `other` disagree, and nobody could decide
    other: str  # who was asked besides
    when: float  # seconds since 1970
    right_before: float | None = None  # when it was last found right

    def sentence(self) -> str:
        """For the user."""
        blocks = f"blocks {self.start}:{self.end}"
        if not self.lied:
            return (
                f"{self.peer_id} and {self.other} disagree about a {self.what} of {blocks} "
                f"({self.times:.1f} times the tolerance), and there is no third to say who is wrong."
            )
        since = (
            "never checked before" if self.right_before is None else f"last right at {_at(self.right_before)}"
        )
        return (
            f"{self.peer_id} gave a wrong {self.what} for {blocks} ({self.times:.1f} times the tolerance; {since}) "
            "and is avoided from now on: do again what it had a part in."
        )


def _at(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))


class Verdicts:
    """The condemned peers of one client."""

    def __init__(self) -> None:
        self.condemned: dict[str, Finding] = {}
        self._untold: list[Finding] = []

    def condemn(self, finding: Finding) -> None:
        """Never use the peer again."""
        if finding.peer_id not in self.condemned:
            self.condemned[finding.peer_id] = finding
            self._untold.append(finding)

    def against(self, peers: Iterable[str]) -> Finding | None:
        """The finding against one of these, if there is one."""
        return next((self.condemned[peer] for peer in peers if peer in self.condemned), None)

    def in_words(self) -> str:
        """For a sentence that says who is not used; empty when nobody was condemned."""
        return f" or were found lying ({', '.join(self.condemned)})" if self.condemned else ""

    def tell(self) -> None:
        """For work that knows no session. Raises `LyingServer` for a finding that ended nothing yet."""
        if self._untold:
            raise self.error(self._untold[0])

    def error(self, finding: Finding) -> LyingServer:
        """The error that ends a piece of work; the finding counts as told."""
        self._untold = [one for one in self._untold if one is not finding]
        return LyingServer(finding.sentence(), peer_id=finding.peer_id)
