"""What the last passes say about the next: how many tokens of prompts it takes, and whether steps go first.

Invariant: only durations and times of steps are noted here, no jobs; the engine decides with them.
"""

from __future__ import annotations

from corolla.swarm.arrivals import ArrivalTracker

PASS_TOKENS = 512  # tokens that one packed pass takes at most
SHARED_PASS_SECONDS = 0.02  # what pieces of prompts may add to a pass while others generate
LEAST_PREFILL_TOKENS = 16
APART = 0.5  # of what pieces of prompts take, that a generation pass may take to be worth one of its own
GENERATING_SECONDS = (
    1.0  # how long after a generation step its client is taken to be in the middle of a reply
)


class Pace:
    """What the last passes say about the next: what a prompt token costs, and who is in the middle of a reply."""

    def __init__(self) -> None:
        self._seconds_a_token = 0.002
        self._seconds_a_step = 0.0
        self.generated = ArrivalTracker()  # when each session's last generation step was computed

    def prefill_budget(self, now: float, prefilling: set[int]) -> int:
        """Prompt tokens for a pass; few while others than these sessions generate, so that their tokens flow."""
        others = self.generated.others_arrived(now - GENERATING_SECONDS, prefilling)
        return self.shared_budget() if others else PASS_TOKENS

    def shared_budget(self) -> int:
        """Prompt tokens that delay a generation step by about `SHARED_PASS_SECONDS`."""
        return max(LEAST_PREFILL_TOKENS, int(SHARED_PASS_SECONDS / self._seconds_a_token))

    def apart(self, tokens: int) -> bool:
        """Whether generation steps are better computed before so many prompt tokens than with them.

        That costs reading the weights once more, so it depends on what a pass of few tokens takes.
        """
        return self._seconds_a_step < APART * tokens * self._seconds_a_token

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass took so long."""
        if tokens < LEAST_PREFILL_TOKENS:
            self._seconds_a_step += 0.3 * (seconds - self._seconds_a_step)
        else:
            self._seconds_a_token += 0.3 * (seconds / tokens - self._seconds_a_token)
