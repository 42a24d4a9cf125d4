"""What one peer, and all peers together, may take of a server; who is kept out for a while; and who did what.

Invariant: no account is ever above its total, and everything that a stream took is given back when the stream
ends, however it ends. Room in the attention cache and kept graphs have budgets of their own (`kv_cache.py`,
`leases.py`) by the same share. Used on the event loop only.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cachetools import TTLCache
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.text import get_logger, one_line

log = get_logger(__name__)

MIB = 2**20
SMALL_REQUEST = 128 * 1024  # bytes
LEASE_SECONDS = 60.0
MOST_LEASES = 1024  # a graph takes memory beside its tensors


@dataclass(frozen=True)
class Budgets:
    """Totals of a server, and the share of each that one peer may take."""

    share: float = 0.5
    streams: int = 2048
    sessions: int = 1024
    requests: int = 512  # waiting or being computed
    bytes_in_flight: int = 2048 * MIB  # of requests that arrive or wait, and of their replies
    malformed: int = 20  # requests in `malformed_window` after which a peer is kept out for `kept_out`
    malformed_window: float = 60.0  # seconds
    kept_out: float = 60.0  # seconds
    stream_silence: float = 300.0  # seconds until a stream without a session is closed
    session_silence: float = 600.0  # seconds until the session of a silent client is freed

    @classmethod
    def of_machine(cls, share: float, free_bytes: int) -> Budgets:
        """For a machine with so much free memory, and as many open files as the process may have."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return cls(
            share=share,
            streams=max(16, min(cls.streams, files // 2)),
            bytes_in_flight=max(MIB, free_bytes // 8),
        )

    def of_one(self, total: int) -> int:
        """What one peer may take of `total`."""
        return max(1, int(self.share * total))


class Account:
    """How much of one thing each peer has, and all together."""

    def __init__(self, name: str, total: int, each: int, retry_after: float) -> None:
        """`name` is for people; whoever is refused is told to come back after `retry_after` seconds."""
        self.total = total
        self.each = each
        self.taken = 0
        self._name = name
        self._retry_after = retry_after
        self._by_peer: Counter[str] = Counter()

    def of(self, peer: str) -> int:
        """What the peer has."""
        return self._by_peer[peer]

    def take(self, peer: str, amount: int = 1) -> None:
        """Count it. Raises `RequestRefused` (busy), and nothing is counted.

        A peer that has nothing may take more than its share, so that nothing is refused for ever.
        """
        own = self._by_peer[peer]
        if own and own + amount > self.each:
            self._refuse(f"You have {own} of the {self.each} {self._name} that one peer may have here")
        if self.taken and self.taken + amount > self.total:
            self._refuse(f"All {self.total} {self._name} of this server are taken")
        self._by_peer[peer] += amount
        self.taken += amount

    def _refuse(self, why: str) -> None:
        raise RequestRefused(f"{why}; try again later.", code="busy", retry_after=self._retry_after)

    def give(self, peer: str, amount: int = 1) -> None:
        """It is free again."""
        self.taken -= amount
        self._by_peer[peer] -= amount
        if not self._by_peer[peer]:
            del self._by_peer[peer]

    @contextlib.contextmanager
    def held(self, peer: str, amount: int = 1) -> Iterator[None]:
        """Taken while the body runs. Raises as `take` does."""
        self.take(peer, amount)
        try:
            yield
        finally:
            self.give(peer, amount)


class InFlight:
    """The bytes of one stream's requests, from their headers until their replies were taken."""

    def __init__(self, account: Account, peer: str) -> None:
        self._account = account
        self._peer = peer
        self._costs: deque[int] = deque()  # of each request with tensors that is not yet answered

    def admit(self, nbytes: int) -> RequestRefused | None:
        """Count a request of so many bytes of tensors, or say why not. See `channel.Admit`."""
        # A reply is as large as its request. Small ones are not counted: streams are.
        cost = 2 * nbytes if nbytes > SMALL_REQUEST else 0
        try:
            self._account.take(self._peer, cost)
        except RequestRefused as refusal:
            return refusal
        self._costs.append(cost)
        return None

    def answered(self) -> None:
        """The oldest request's reply was taken."""
        self._account.give(self._peer, self._costs.popleft())

    def close(self) -> None:
        """The stream has ended."""
        while self._costs:
            self.answered()


class PeerLimits:
    """The accounts of a server, and the peers that send what nobody can read."""

    def __init__(self, budgets: Budgets | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.budgets = budgets or Budgets()
        self.streams = self._account("streams", self.budgets.streams, 5.0)
        self.sessions = self._account("sessions", self.budgets.sessions, 5.0)
        self.requests = self._account("requests", self.budgets.requests, 1.0)
        self.in_flight = self._account("bytes in flight", self.budgets.bytes_in_flight, 1.0)
        self._clock = clock
        self._open: dict[str, set[Callable[[], object]]] = {}  # how to end each stream of a peer
        # When a peer sent what nobody can read, the newest few; and until when peers are kept out.
        self._malformed: TTLCache[str, deque[float]] = self._remembered(self.budgets.malformed_window)
        self._out_until: TTLCache[str, float] = self._remembered(self.budgets.kept_out)

    def _remembered(self, seconds: float) -> TTLCache[str, Any]:
        """Peers may be many, and come but once: what is too old to matter is forgotten."""
        return TTLCache(math.inf, seconds, timer=self._clock)

    def _account(self, name: str, total: int, retry_after: float) -> Account:
        return Account(name, total, self.budgets.of_one(total), retry_after)

    @contextlib.contextmanager
    def stream(self, peer: str, end: Callable[[], object]) -> Iterator[None]:
        """A stream of the peer while the body runs; `end` ends it from outside.

        Raises `RequestRefused` (busy) for one too many, and for a peer that is kept out.
        """
        self._check_not_kept_out(peer)
        with self.streams.held(peer):
            self._open.setdefault(peer, set()).add(end)
            try:
                yield
            finally:
                self._open[peer].discard(end)
                if not self._open[peer]:
                    del self._open[peer]

    def malformed(self, peer: str) -> None:
        """The peer sent something that nobody can read; one that does so again and again loses all its streams."""
        now = self._clock()
        times = self._malformed.get(peer) or deque(maxlen=self.budgets.malformed)
        times.append(now)
        self._malformed[peer] = times
        if len(times) == times.maxlen and now - times[0] <= self.budgets.malformed_window:
            self._out_until[peer] = now + self.budgets.kept_out
            del self._malformed[peer]
            for end in list(self._open.get(peer, ())):
                end()

    def _check_not_kept_out(self, peer: str) -> None:
        left = self._out_until.get(peer, 0.0) - self._clock()
        if left > 0:
            raise RequestRefused(
                f"{self.budgets.malformed} of your requests could not be read; come back in {left:.0f} s.",
                code="busy",
                retry_after=left,
            )


@dataclass
class Lease:
    """A forward's output with the graph behind it, and the leaves whose gradients may be asked for."""

    blocks: tuple[int, int]
    output: Tensor
    hidden: Tensor
    prompts: Tensor | None
    nbytes: int
    tokens: int


class Leases:
    """All leases of a server, least recently made first.

    Where there is no room, the peer that has most loses its oldest: nobody can drive out others' leases by
    making many.
    """

    def __init__(self, budget: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`budget` in bytes of saved activations."""
        self.budget = budget
        self._bytes_a_token = 0.0
        self._kept: TTLCache[tuple[str, str], Lease] = TTLCache(math.inf, LEASE_SECONDS, timer=clock)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def held(self) -> int:
        """Bytes of all leases."""
        return sum(lease.nbytes for lease in self._kept.values())

    def may_fit(self, tokens: int) -> bool:
        """Whether the graph of so many tokens is worth making, by what the last one took."""
        return tokens * self._bytes_a_token <= self.budget

    def keep(self, peer: str, key: str, lease: Lease) -> None:
        """Keep it, at the expense of others; one that is larger than the budget is let go."""
        self._bytes_a_token = lease.nbytes / lease.tokens
        self._kept.pop((peer, key), None)
        if lease.nbytes > self.budget:
            return
        self._kept[peer, key] = lease
        while self.held > self.budget or len(self._kept) > MOST_LEASES:
            self._drop_one()

    def _drop_one(self) -> None:
        by_peer: Counter[str] = Counter()  # bytes
        for (peer, _), lease in self._kept.items():
            by_peer[peer] += lease.nbytes
        most = max(by_peer, key=by_peer.__getitem__)
        del self._kept[next(name for name in self._kept if name[0] == most)]

    def take(self, peer: str, key: str) -> Lease | None:
        """The peer's lease, which is kept no longer; None when there is none."""
        lease: Lease | None = self._kept.pop((peer, key), None)
        return lease

    def expire(self) -> None:
        """Let go of what is too old."""
        self._kept.expire()


@dataclass
class _Visit:
    """What a peer has done since it was last told: by what it was for, tokens and seconds with the waiting."""

    streams: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def told(self) -> str:
        """In words; it is forgotten. Empty when it was nothing."""
        tokens, seconds = self.tokens, self.seconds
        self.tokens, self.seconds = Counter(), defaultdict(float)
        return ", ".join(
            f"{count:,} tokens of {what} ({count / max(seconds[what], 1e-9):,.0f} tokens/s)"
            for what, count in sorted(tokens.items())
        )


class Diary:
    """Who uses a server, for what and how fast: lines for its log (`corolla --verbose serve`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._visits: dict[str, _Visit] = {}  # of the peers that are there now

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
            visit.tokens[what] += tokens
            visit.seconds[what] += self._clock() - started

    def tell(self) -> None:
        """Log what those have done who are still here."""
        for peer, visit in self._visits.items():
            if told := visit.told():
                log.info("Peer %s: %s", _short(peer), told)


def _short(peer: str) -> str:
    return f"…{one_line(peer[-8:])}"
