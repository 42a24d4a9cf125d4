"""How long work takes, as the last of it says, and so how many tokens of a prompt a pass takes."""

from __future__ import annotations

from collections import deque

from corolla.swarm.arrivals import ArrivalTracker

PASS_TOKENS = 512  # tokens that one packed pass takes at most
SHARED_PASS_SECONDS = 0.02  # what pieces of prompts may add to a pass while others generate
LEAST_PREFILL_TOKENS = 16
SECONDS_A_TOKEN = 0.002  # until it is known
LEAST_TIMED = 64  # tokens; what fewer take says little
SPLIT_SHARE = 0.5  # of what pieces of prompts take, that a decode pass may take to be worth one of its own
GENERATING_SECONDS = 1.0  # how long after a decode step its client is taken to be in the middle of a reply


class Speed:
    """How long work takes that is computed alone. `work` is in tokens that go through all of the server's blocks."""

    def __init__(self) -> None:
        self._lately: deque[float] = deque(maxlen=16)  # seconds a token
        self._best = SECONDS_A_TOKEN

    def took(self, work: float, seconds: float) -> None:
        """So much work took so long."""
        if work >= LEAST_TIMED:
            self._lately.append(seconds / work)
            self._best = min(self._lately)

    def seconds_of(self, work: float) -> float:
        """How long so much takes, as quickly as it went lately: it was not slower for a reason that has passed."""
        return work * self._best


class PassTimes:
    """What the last passes say about the next: what a prompt token costs, and who is in the middle of a reply."""

    def __init__(self) -> None:
        self._seconds_a_token = SECONDS_A_TOKEN
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
