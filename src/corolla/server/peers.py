"""What one peer, and all peers together, may take of a server; who is kept out for a while; and who did what.

Invariant: no account is ever above its total, and everything that a stream took is given back when the stream
ends, however it ends. Room in the attention cache has a budget of its own (`kv_cache.py`) by the same rules.
Identities cost nothing, so what is held but not used is the first to go when somebody else asks (`choose_evictions`).
What a peer has given, or had computed, is kept under that peer's names only (`PeerCache`): nobody finds another's.
"""

from __future__ import annotations

import contextlib
import math
import resource
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from cachetools import TTLCache
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.scheduler.engine import PeerHistory
from corolla.text import get_logger, one_line

log = get_logger(__name__)

H = TypeVar("H", bound="Holder")
K = TypeVar("K", bound="Sized")

MIB = 2**20
SMALL_REQUEST = 128 * 1024  # bytes
LEASE_SECONDS = 60.0
CLEARLY = 1.1  # times an equal share, of which a peer may be deprived though it is in use
MOST_LEASES = 1024  # a graph takes memory beside its tensors


@dataclass(frozen=True)
class Budgets:
    """Totals of a server, and the share of each that one peer may take while there is room."""

    share: float = 0.5
    streams: int = 2048
    bytes_in_flight: int = 2048 * MIB  # of requests that arrive or wait, and of their replies
    malformed: int = 20  # requests in `malformed_window` after which a peer is kept out for `kept_out`
    malformed_window: float = 60.0  # seconds
    kept_out: float = 60.0  # seconds
    first_request: float = 30.0  # seconds until a stream that has asked nothing is closed
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


class Holder(Protocol):
    """What holds something that others may need: a stream, or the cache of a session."""

    peer: str  # whose it is

    @property
    def last_used(self) -> float:
        """When; whoever has never done anything counts as if that were long ago."""

    @property
    def idle_after(self) -> float | None:
        """Seconds without use after which anybody may have what it holds; None while nobody may."""

    def on_evicted(self) -> None:
        """What it held is another's now."""


def is_idle(holder: Holder, now: float) -> bool:
    """Whether what it holds is not being used."""
    return holder.idle_after is not None and now - holder.last_used >= holder.idle_after


def choose_evictions(
    held: Mapping[H, int], asker: Holder, amount: int, missing: int, history: PeerHistory, now: float
) -> list[H]:
    """Who lets go of `missing` for an asker that is to hold `amount` more; nobody, where it is not fair or enough.

    Max-min fairness between peers: in use or not, one gets from another what leaves that no less than it will have
    itself, or what that has beyond an equal share. What is not in use goes to whoever has no more than its holder's
    peer. So a newcomer always gets in, and shares shrink as more come; what many new identities have counts for more
    (`PeerHistory.weights`). First goes what nobody needs, then what those hold who have most, the oldest first.
    """
    mine = Counter[str]()
    for one, count in held.items():
        mine[one.peer] += count
    weigh = history.weights(mine.keys() | {asker.peer})
    before, after = (count / weigh(asker.peer) for count in (mine[asker.peer], mine[asker.peer] + amount))
    equal = (sum(mine.values()) + amount) / sum(map(weigh, mine.keys() | {asker.peer}))

    def level(one: Holder) -> float:
        return mine[one.peer] / weigh(one.peer)

    def order(one: Holder) -> tuple[bool, bool, bool, float]:
        return one.idle_after != 0, level(one) <= 2 * after, not is_idle(one, now), one.last_used

    def is_fair(one: Holder, count: int) -> bool:
        has = level(one)
        left = has - count / weigh(one.peer)
        return left >= after or has > CLEARLY * max(after, equal) or (is_idle(one, now) and has >= before)

    chosen: list[H] = []
    for one in sorted((one for one in held if one is not asker and one.idle_after is not None), key=order):
        if missing > 0 and is_fair(one, held[one]):
            chosen.append(one)
            mine[one.peer] -= held[one]
            missing -= held[one]
    return chosen if missing <= 0 else []


class Account:
    """How much of one thing each holder has, and all together. Used on the event loop only.

    Invariant: never more than the total, but for a peer that wants more than there is when nobody has anything, so
    that nothing is refused for ever. Whoever has most leaves as much free as its share says, for others to come.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        share: float = 0.5,
        retry_after: float = 1.0,
        history: PeerHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is for people; whoever is refused is told to come back after `retry_after` seconds."""
        self.total = total
        self.taken = 0
        self._name = name
        self._share = share
        self._retry_after = retry_after
        self._history = PeerHistory() if history is None else history
        self._clock = clock
        self._held: dict[Holder, int] = {}
        self._by_peer: Counter[str] = Counter()

    def of(self, peer: str) -> int:
        """What the peer has."""
        return self._by_peer[peer]

    def holders(self, peer: str) -> list[Holder]:
        """What of the peer holds something."""
        return [one for one in self._held if one.peer == peer]

    def take(self, holder: Holder, amount: int = 1, wanted: int = 1) -> None:
        """Count it, at the expense of others where that is fair; `wanted` is what it comes to in the end, if more.

        Raises `RequestRefused` (busy); nothing has changed then.
        """
        own, left = self._by_peer[holder.peer], self.total - self.taken - amount
        if own and (1 - self._share) * (own + amount) > self._share * left and self._has_most(holder.peer):
            self._refuse(f"You have {own} of the {self.total} {self._name} of this server")
        if left < 0 and self.taken:
            whole = max(amount, wanted)
            others = choose_evictions(self._held, holder, whole, -left, self._history, self._clock())
            if not others:
                self._refuse(f"All {self.total} {self._name} of this server are taken")
            for one in others:
                self.give(one)
                one.on_evicted()
        self._held[holder] = self._held.get(holder, 0) + amount
        self._by_peer[holder.peer] += amount
        self.taken += amount

    def _has_most(self, peer: str) -> bool:
        weigh = self._history.weights(self._by_peer.keys())
        own = self._by_peer[peer] / weigh(peer)
        return all(count / weigh(other) <= own for other, count in self._by_peer.items())

    def _refuse(self, why: str) -> None:
        raise RequestRefused(f"{why}; try again later.", code="busy", retry_after=self._retry_after)

    def give(self, holder: Holder, amount: int | None = None) -> None:
        """So much of what it has, or all of it, is free again; safe to call twice."""
        held = self._held.get(holder, 0)
        amount = held if amount is None else min(amount, held)
        self._held[holder] = held - amount
        if held == amount:
            self._held.pop(holder)
        self.taken -= amount
        self._by_peer[holder.peer] -= amount
        if not self._by_peer[holder.peer]:
            del self._by_peer[holder.peer]


class InFlight:
    """The bytes of one stream's requests, counted as they arrive, until their replies were taken."""

    def __init__(self, account: Account, stream: Holder, clock: Callable[[], float]) -> None:
        self._account = account
        self._stream = stream
        self._clock = clock
        self._counted = 0  # of the request that arrives now
        self._reply = 0  # of the reply that is due, where it is larger than its request
        self.since: float | None = None  # when that began, if it is a large one

    def admit(self, nbytes: int, whole: int) -> RequestRefused | None:
        """Count so many more bytes of the request that arrives, or say why not. See `channel.Admit`."""
        if whole <= SMALL_REQUEST:  # streams are counted
            return None
        self.since = self._clock() if self.since is None else self.since
        try:  # a reply is as large as its request
            self._account.take(self._stream, 2 * nbytes, 2 * whole - self._counted)
        except RequestRefused as refusal:
            self._account.give(self._stream, self.complete())
            return refusal
        self._counted += 2 * nbytes
        return None

    def complete(self) -> int:
        """The request has arrived: what was counted for it."""
        counted, self._counted, self.since = self._counted, 0, None
        return counted

    def expect_reply(self, nbytes: int) -> None:
        """Count the present request's reply, which is larger than that. Raises `RequestRefused` (busy)."""
        self._account.take(self._stream, nbytes, nbytes)
        self._reply = nbytes

    def answered(self, counted: int) -> None:
        """A request's reply was taken."""
        self._account.give(self._stream, counted + self._reply)
        self._reply = 0


class PeerLimits:
    """The accounts of a server, and the peers that send what nobody can read."""

    def __init__(self, budgets: Budgets | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.budgets = budgets or Budgets()
        self.history = PeerHistory()
        self.clock = clock
        self.streams = self._account("streams", self.budgets.streams, 5.0)
        self.in_flight = self._account("bytes in flight", self.budgets.bytes_in_flight, 1.0)
        # When a peer sent what nobody can read, the newest few; and until when peers are kept out.
        self._malformed: TTLCache[str, deque[float]] = self._remembered(self.budgets.malformed_window)
        self._out_until: TTLCache[str, float] = self._remembered(self.budgets.kept_out)

    def _remembered(self, seconds: float) -> TTLCache[str, Any]:
        """Peers may be many, and come but once: what is too old to matter is forgotten."""
        return TTLCache(math.inf, seconds, timer=self.clock)

    def _account(self, name: str, total: int, retry_after: float) -> Account:
        share = self.budgets.share
        return Account(
            name, total, share=share, retry_after=retry_after, history=self.history, clock=self.clock
        )

    @contextlib.contextmanager
    def stream(self, stream: Holder) -> Iterator[None]:
        """A stream while the body runs. Raises `RequestRefused` (busy), as for a peer that is kept out."""
        self._check_not_kept_out(stream.peer)
        self.streams.take(stream)
        try:
            yield
        finally:
            self.streams.give(stream)
            self.in_flight.give(stream)

    def malformed(self, peer: str) -> None:
        """The peer sent something that nobody can read; one that does so again and again loses all its streams."""
        now = self.clock()
        times = self._malformed.get(peer) or deque(maxlen=self.budgets.malformed)
        times.append(now)
        self._malformed[peer] = times
        if len(times) == times.maxlen and now - times[0] <= self.budgets.malformed_window:
            self._out_until[peer] = now + self.budgets.kept_out
            del self._malformed[peer]
            for stream in self.streams.holders(peer):
                stream.on_evicted()

    def _check_not_kept_out(self, peer: str) -> None:
        left = self._out_until.get(peer, 0.0) - self.clock()
        if left > 0:
            raise RequestRefused(
                f"{self.budgets.malformed} of your requests could not be read; come back in {left:.0f} s.",
                code="busy",
                retry_after=left,
            )


class Sized(Protocol):
    """What takes memory."""

    @property
    def nbytes(self) -> int:
        """Of memory."""


class PeerCache(Generic[K]):
    """Things that peers have names for, least recently kept first.

    Where there is no room, the peer that has most loses its oldest: nobody can drive out others' things by
    making many. For any thread: requests ask on the event loop, and what is old goes on the compute thread.
    """

    def __init__(self, budget: int, *, seconds: float, most: int, clock: Callable[[], float]) -> None:
        """`budget` in bytes; each is kept for so many `seconds`, and so many of them at `most`."""
        self.budget = budget
        self._most = most
        self._kept: TTLCache[tuple[str, str], K] = TTLCache(math.inf, seconds, timer=clock)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    @property
    def held(self) -> int:
        """Bytes of all."""
        with self._lock, self._kept.timer:  # nothing grows too old in between
            return sum(one.nbytes for one in self._kept.values())

    def keep(self, peer: str, key: str, one: K) -> None:
        """Keep it, at the expense of others; one that is larger than the budget is let go."""
        with self._lock, self._kept.timer:
            self._kept.pop((peer, key), None)
            if one.nbytes > self.budget:
                return
            self._kept[peer, key] = one
            while self.held > self.budget or len(self._kept) > self._most:
                self._drop_one()

    def _drop_one(self) -> None:
        by_peer: Counter[str] = Counter()  # bytes
        for (peer, _), one in self._kept.items():
            by_peer[peer] += one.nbytes
        most = max(by_peer, key=by_peer.__getitem__)
        del self._kept[next(name for name in self._kept if name[0] == most)]

    def take(self, peer: str, key: str) -> K | None:
        """What the peer calls so, which is kept no longer; None when there is none."""
        with self._lock:
            one: K | None = self._kept.pop((peer, key), None)
        return one

    def expire(self) -> None:
        """Let go of what is too old."""
        with self._lock:
            self._kept.expire()


@dataclass
class Lease:
    """A forward's output with the graph behind it, and the leaves whose gradients may be asked for."""

    blocks: tuple[int, int]
    output: Tensor
    hidden: Tensor
    given: dict[str, Tensor]  # what blocks were given besides, by name
    nbytes: int
    tokens: int


class Leases(PeerCache[Lease]):
    """All leases of a server."""

    def __init__(self, budget: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`budget` in bytes of saved activations."""
        super().__init__(budget, seconds=LEASE_SECONDS, most=MOST_LEASES, clock=clock)
        self._bytes_a_token = 0.0

    def may_fit(self, tokens: int) -> bool:
        """Whether the graph of so many tokens is worth making, by what the last one took."""
        return tokens * self._bytes_a_token <= self.budget

    def keep(self, peer: str, key: str, one: Lease) -> None:
        """See `PeerCache`."""
        self._bytes_a_token = one.nbytes / one.tokens
        super().keep(peer, key, one)


class UsageLog:
    """Who uses a server, for what and how fast: lines for its log (`corolla --verbose serve`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._visits = Counter[str]()  # streams of the peers that are there now
        # Of each, by what it was for, since it was last told: tokens, and seconds with the waiting.
        self._done: defaultdict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    @contextlib.contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """A stream of a peer; its first tells that it came, its last that it has left."""
        self._visits[peer] += 1
        if self._visits[peer] == 1:
            log.info("Peer %s came", _short(peer))
        try:
            yield
        finally:
            self._visits[peer] -= 1
            if not self._visits[peer]:
                del self._visits[peer]
                log.info("Peer %s left; %s", _short(peer), self._told(peer) or "nothing more was done")

    @contextlib.contextmanager
    def work(self, peer: str, what: str, tokens: int) -> Iterator[None]:
        """Work that is done while the block lasts, unless it raises."""
        started = self._clock()
        yield
        if peer in self._visits:
            before, seconds = self._done[peer, what]
            self._done[peer, what] = before + tokens, seconds + self._clock() - started

    def tell(self) -> None:
        """Log what those have done who are still here."""
        for peer in self._visits:
            if told := self._told(peer):
                log.info("Peer %s: %s", _short(peer), told)

    def _told(self, peer: str) -> str:
        """In words; it is forgotten. Empty when it was nothing."""
        done = {what: self._done.pop((who, what)) for who, what in list(self._done) if who == peer}
        return ", ".join(
            f"{tokens:,} tokens of {what} ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"
            for what, (tokens, seconds) in sorted(done.items())
        )


def _short(peer: str) -> str:
    return f"…{one_line(peer[-8:])}"
