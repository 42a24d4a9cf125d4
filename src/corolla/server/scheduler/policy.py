"""Which request is computed next, and how many tokens of a prompt a pass takes.

Only seconds and moments are noted here, no requests; the engine decides with them.
"""

from __future__ import annotations

from collections.abc import Collection

from corolla.swarm.arrivals import ArrivalTracker

PASS_TOKENS = 512  # tokens that one packed pass takes at most
SHARED_PASS_SECONDS = 0.02  # what pieces of prompts may add to a pass while others generate
LEAST_PREFILL_TOKENS = 16
SPLIT_SHARE = 0.5  # of what pieces of prompts take, that a decode pass may take to be worth one of its own
GENERATING_SECONDS = 1.0  # how long after a decode step its client is taken to be in the middle of a reply


class Shares:
    """Seconds of computing that each peer was given: whoever had least of it comes first.

    Invariant: between two peers that both always have work, the difference in what they were given stays below
    one request each, however much they ask for. A peer that had nothing to do gathers no credit: it begins where
    the least served of the busy ones stands.

    Virtual time as in Sheng et al. 2024 (arXiv:2401.00588), counted in seconds of computing.
    """

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._floor = 0.0  # what the least served of the busy peers has had

    def given(self, peer: str) -> float:
        """The peer's place in the order: smaller is sooner."""
        return max(self._floor, self._given.get(peer, 0.0))

    def give(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._given[peer] = self.given(peer) + seconds

    def settle(self, busy: Collection[str]) -> None:
        """Only `busy` peers have work now: what others may no longer claim is forgotten."""
        if busy:
            self._floor = max(self._floor, min(self.given(peer) for peer in busy))
        for peer in [peer for peer, given in self._given.items() if given <= self._floor]:
            del self._given[peer]

    def __len__(self) -> int:
        return len(self._given)


class PassTimes:
    """What the last passes say about the next: what a prompt token costs, and who is in the middle of a reply."""

    def __init__(self) -> None:
        self._seconds_a_token = 0.002
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
