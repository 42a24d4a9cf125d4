"""What the engine has measured and decides by: seconds of computing that each peer was given, how long work takes.

Only numbers are noted here, no requests. Seconds are shared among peers, strangers together like one; how long the
last passes took says how many tokens of a prompt the next one takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

from corolla.swarm.arrivals import ArrivalTracker

KNOWN_SECONDS = 10.0  # of computing, after which a peer has a history
MOST_REMEMBERED = 10_000  # peers
PASS_TOKENS = 512  # tokens that one packed pass takes at most
SHARED_PASS_SECONDS = 0.02  # what pieces of prompts may add to a pass while others generate
LEAST_PREFILL_TOKENS = 16
WHOLE_PROMPT = 64  # a prompt of so few tokens is not cut: a pass for each piece reads all weights again
SECONDS_A_TOKEN = 0.002  # until it is known
LEAST_TIMED = 64  # tokens; what fewer take says little
SPLIT_SHARE = 0.5  # of what pieces of prompts take, that a decode pass may take to be worth one of its own
GENERATING_SECONDS = 1.0  # how long after a decode step its client is taken to be in the middle of a reply


class PeerHistory:
    """For whom a server has computed, and how long: a stranger has to use it up, while others use it too.

    A server has one second of computing a second, so however many identities a stranger makes, few of them are known.
    Written on the compute thread, read anywhere.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}  # whoever was computed for last is last

    def computed(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._seconds[peer] = self._seconds.pop(peer, 0.0) + seconds
        if len(self._seconds) > MOST_REMEMBERED:
            del self._seconds[next(iter(self._seconds))]

    def __len__(self) -> int:
        return len(self._seconds)

    def known(self, peer: str) -> bool:
        """Whether the peer has a history."""
        return self._seconds.get(peer, 0.0) >= KNOWN_SECONDS

    def weights(self, peers: Collection[str]) -> Callable[[str], float]:
        """What each of these counts for where they share something: all new ones together no more than all known."""
        known = sum(self.known(peer) for peer in peers)
        new = min(1.0, known / max(1, len(peers) - known)) if known else 1.0
        return lambda peer: 1.0 if self.known(peer) else new


class Shares:
    """Seconds of computing that each peer was given: whoever had least of it comes first.

    Invariant: between two peers with a history that both always have work, the difference in what they were given
    stays below one request each, however much they ask for. A peer that had nothing to do gathers no credit: it
    begins where the least served of the busy ones stands.

    Virtual time as in Sheng et al. 2024 (arXiv:2401.00588), counted in seconds of computing. A second of one of many
    new peers counts for more: together they get no more than those with a history.
    """

    def __init__(self, history: PeerHistory | None = None) -> None:
        self._history = PeerHistory() if history is None else history
        self._given: dict[str, float] = {}
        self._floor = 0.0  # what the least served of the busy peers has had
        self._weigh = self._history.weights(())

    def after(self, peer: str, seconds: float = 0.0) -> float:
        """The peer's place in the order, once it was given so much more: smaller is sooner."""
        return max(self._floor, self._given.get(peer, 0.0)) + seconds / self._weigh(peer)

    def give(self, peer: str, seconds: float) -> None:
        """The peer was given so much."""
        self._given[peer] = self.after(peer, seconds)
        self._history.computed(peer, seconds)

    def settle(self, busy: Collection[str]) -> None:
        """Only `busy` peers have work now: what others may no longer claim is forgotten."""
        if busy:
            self._floor = max(self._floor, min(self.after(peer) for peer in busy))
        self._weigh = self._history.weights(busy)
        for peer in [peer for peer, given in self._given.items() if given <= self._floor]:
            del self._given[peer]

    def __len__(self) -> int:
        return len(self._given)


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
