"""The servers that a client knows: what they announce, whom it avoids and why, how fast they are, who was found lying.

Invariant: records are no older than `REFRESH_SECONDS`, or the newest that could be had at once. Peers that failed
lately are used only where nobody else can be, and then after a rest that grows with each failure; a busy one is left
alone as long as it asked for. What a peer says for itself counts a few times and no more. A peer that answers is
forgiven its failures, but not that it disagreed with another; one that was condemned is never routed to again by this
client, and a finding ends one piece of work with a `LyingServer`, and every session that the peer had a part in.
What a server announced of its speed is believed as far as it does not contradict what it was found to be.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from corolla.config import SwarmConfig
from corolla.errors import LyingServer, SwarmUnavailable
from corolla.swarm.directory.directory import Directory, ServerRecord
from corolla.swarm.directory.routing import KINDS, Hop, block_seconds, numerics_of
from corolla.text import get_logger
from corolla.wire.messages import SILENCE_SECONDS

log = get_logger(__name__)

REFRESH_SECONDS = 10.0
KEPT_SECONDS = 300.0  # that a server stays known which a directory that was cut short no longer names
SLOW_READ_SECONDS = 0.5  # a directory that takes longer is not waited for where older records will do
FIRST_AVOIDANCE = 2.0  # seconds for which others are preferred; doubles with each failure in a row
LONGEST_AVOIDANCE = 60.0
# The same of a peer that has never answered this client: longer than a try takes, so that tries never go round in a
# circle of peers of which no one answers.
STRANGERS_AVOIDANCE = 5 * SILENCE_SECONDS
STRANGERS_LONGEST = 600.0
FIRST_REST = 0.1  # seconds for which a peer is left alone after failing twice in a row; doubles likewise
LONGEST_REST = 5.0
LONGEST_WAIT = (
    60.0  # seconds for a peer that shows signs of life, where others are; doubles with each failure
)
DOUBT_SECONDS = 600.0  # for which others are preferred to servers that disagree
BUSY_SECONDS = 2.0  # how long a busy server is left alone that does not say how long
SHORTEST_BUSY = 0.1
# A refusal that is nobody's fault (the session was given up, say) is believed so often in so many seconds.
MOST_EXCUSES = 3
EXCUSE_SECONDS = 60.0

# A server counts as slow after so many exchanges in a row, each of which took so many times what it announced
# and more than a line and a full house explain. The margins are wide: leaving costs a replay.
SLOW_FACTOR = 20.0
SLOW_SECONDS = 0.25
SLOW_LINE = 250_000.0  # bytes/s that any line is taken to carry
SLOW_IN_A_ROW = 4
SLOW_MEMORY_SECONDS = 120.0  # then its word is believed again

BELIEF = 2.0  # what a server announces counts within so many times of what it was found to take
FEW_TOKENS = 16  # of an exchange that says how long a token takes
ENOUGH = 4  # of these: the first ones come while a server warms up
NEWEST = 0.2  # weight of the newest of them in their average

Clock = Callable[[], float]  # seconds
What = Literal["forward", "backward", "step"]


class Records:
    """Who serves the model, as the directory last said."""

    def __init__(
        self,
        directory: Directory,
        model: str,
        config: SwarmConfig,
        clock: Clock,
        moved: Callable[[str], None],
    ) -> None:
        """`moved` hears of a peer that has come back with other blocks."""
        self.known: list[ServerRecord] = []  # those that compute in numerics that there are
        self.by_numerics: dict[str, list[ServerRecord]] = {}  # in the order of `routing.KINDS`
        # Seconds of a token in a block, of peers that say how fast they are.
        self.announced: dict[str, float] = {}
        self.untrusted = 0  # servers of the model that the user has left out
        self.cut_short = False  # the directory was not read to its end: there may be others
        self._directory = directory
        self._model = model
        self._allowed = None if config.trust is None else frozenset(config.trust)
        self._blocked = frozenset(config.blocked)
        self._clock = clock
        self._moved = moved
        self._by_peer: dict[str, ServerRecord] = {}
        self._named: dict[str, float] = {}  # when the directory last named each of these
        self._refreshed = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def of(self, peer: str) -> ServerRecord | None:
        """The peer's record; None for one that is not in the directory."""
        return self._by_peer.get(peer)

    def outdated(self) -> None:
        """A server is not what its record says; there is a newer one, or there will be."""
        self._refreshed = float("-inf")

    async def renew(self) -> None:
        """Read the directory if that was long ago. A slow one is waited for only while no record at all is known."""
        if self._clock() - self._refreshed <= REFRESH_SECONDS:
            return
        if self._reading is None:
            self._reading = asyncio.create_task(self.refresh())
            self._reading.add_done_callback(self._read)
            await asyncio.wait({self._reading}, timeout=SLOW_READ_SECONDS)
        if not self.known and self._reading is not None:
            await asyncio.shield(self._reading)

    async def refresh(self) -> None:
        """Ask the directory again.

        Where it does not answer, or knows nothing any more, the records at hand stay: the servers may well be
        there while the directory is not.
        """
        try:
            found = await self._directory.servers(self._model)
        except SwarmUnavailable as error:
            if not self.known:
                raise
            log.info("The directory does not answer: %s", error)
            found = []
        found = [record for record in found if record.numerics in KINDS]
        records = [record for record in found if self._is_allowed(record.peer_id)]
        self.untrusted, self.cut_short = len(found) - len(records), self._directory.cut_short
        self._refreshed = now = self._clock()
        named = dict.fromkeys((record.peer_id for record in records), now)
        if self.cut_short:  # those that it did not get to may be there as before
            kept = [record for record in self.known if self._may_be_there(record, named)]
            named.update((record.peer_id, self._named[record.peer_id]) for record in kept)
            records += kept
        if not records and self.known:
            return
        self._named = named
        for record in records:
            before = self.of(record.peer_id) or record
            if (before.start, before.end) != (record.start, record.end):
                self._moved(record.peer_id)
        self.known, self._by_peer = records, {one.peer_id: one for one in records}
        self.announced = {one.peer_id: block_seconds(one) for one in records if one.throughput > 0}
        self.by_numerics = {kind: [] for kind in numerics_of(records)}
        for record in records:
            self.by_numerics[record.numerics].append(record)

    def _may_be_there(self, record: ServerRecord, named: dict[str, float]) -> bool:
        """Whether a server that was known, and may not have been named now, was named not long ago."""
        return record.peer_id not in named and self._clock() - self._named[record.peer_id] < KEPT_SECONDS

    def _is_allowed(self, peer: str) -> bool:
        return (self._allowed is None or peer in self._allowed) and peer not in self._blocked

    def _read(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("The directory could not be read: %s", error)

    def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()


class Health:
    """Which peers are to be avoided or left alone, and until when."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.proven: set[str] = set()  # peers that have ever answered this client
        self._failures: dict[str, int] = defaultdict(int)  # in a row
        self._excuses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MOST_EXCUSES))
        self._avoid_until: dict[str, float] = {}
        self._rest_until: dict[str, float] = {}
        self._busy_until: dict[str, float] = {}
        self._doubted_until: dict[str, float] = {}

    def failed(self, peer: str, after: float | None = None, took: float = 0.0) -> None:
        """Prefer others for a while, longer each time in a row; for `after` seconds where the peer said so.

        It `took` so many seconds to fail. At first it may be asked again at once, should there be nobody else: it may
        be back already.
        """
        now, times = self._clock(), min(self._failures[peer], 10)  # before this one
        self._failures[peer] += 1
        first, longest = FIRST_AVOIDANCE, LONGEST_AVOIDANCE
        if peer not in self.proven:
            first, longest = STRANGERS_AVOIDANCE, STRANGERS_LONGEST
        self._avoid_until[peer] = now + min(longest, max(first, 2 * took) * 2**times)
        self._rest_until[peer] = now + (min(LONGEST_REST, FIRST_REST * 2 ** (times - 1)) if times else 0.0)
        if after is not None:
            self.leave_alone(peer, after)

    def longest_wait(self, peer: str) -> float:
        """Seconds that the peer is waited for while it shows signs of life, though there are others."""
        return LONGEST_WAIT * 2.0 ** min(self._failures[peer], 10)

    def excused(self, peer: str) -> bool:
        """Whether a refusal that blames nobody is believed once more."""
        excuses, now = self._excuses[peer], self._clock()
        often = len(excuses) == MOST_EXCUSES and now - excuses[0] < EXCUSE_SECONDS
        excuses.append(now)
        return not often

    def leave_alone(self, peer: str, seconds: float) -> None:
        """Do not ask the peer at all for so long."""
        self._avoid_until[peer] = self._rest_until[peer] = self._clock() + seconds

    def busy(self, peer: str, after: float | None) -> None:
        """The same, without any blame, of one that is only busy."""
        seconds = BUSY_SECONDS if after is None else max(SHORTEST_BUSY, after)
        self._busy_until[peer] = self._clock() + seconds

    def doubt(self, peers: Iterable[str]) -> None:
        """Prefer others to these for a while: an audit could not tell which of them is right."""
        self._doubted_until.update(dict.fromkeys(peers, self._clock() + DOUBT_SECONDS))

    def doubted(self) -> set[str]:
        """Peers that disagreed with others not long ago."""
        return self._still(self._doubted_until)

    def answered(self, peer: str) -> None:
        """The peer has done what it was asked; what was before is forgiven, but not its excuses."""
        self.proven.add(peer)
        self.forgive(peer)

    def forgive(self, peer: str) -> None:
        """Forget the peer's earlier failures."""
        for book in (self._failures, self._avoid_until, self._rest_until):
            book.pop(peer, None)

    def is_busy(self, peer: str) -> bool:
        """Whether the peer asked to be left alone until later than now."""
        return self._busy_until.get(peer, 0.0) > self._clock()

    def now(self) -> tuple[set[str], set[str], set[str]]:
        """Peers that others are preferred to, those that are not to be asked, and of these the busy ones."""
        avoided, resting, busy = map(self._still, (self._avoid_until, self._rest_until, self._busy_until))
        return avoided, resting | busy, busy

    def next_return(self) -> float:
        """Seconds until the first peer that is left alone may be asked again; 0 when there is none."""
        now = self._clock()
        moments = (*self._rest_until.values(), *self._busy_until.values())
        return min((until - now for until in moments if until > now), default=0.0)

    def _still(self, until: dict[str, float]) -> set[str]:
        """Whose time is not over; others are forgotten."""
        now = self._clock()
        for peer in [peer for peer, end in until.items() if end <= now]:
            del until[peer]
        return set(until)


def is_too_slow(announced: float, nbytes: int, seconds: float) -> bool:
    """Whether an exchange took far longer than the server `announced`, in seconds too, and its bytes explain."""
    return seconds > SLOW_FACTOR * announced + SLOW_SECONDS + nbytes / SLOW_LINE


@dataclass
class _Pace:
    average: float = 0.0  # seconds of a token in a block, of exchanges with few tokens; the newest count most
    measured: int = 0  # such exchanges
    in_a_row: int = 0  # exchanges that took far too long
    factor: float = 1.0  # how many times slower than announced, in the least slow of them
    until: float = float("-inf")  # seconds; counts as slow so long


@dataclass
class Paces:
    """How fast servers were found to be; moments and durations are passed in, in seconds."""

    _of: dict[str, _Pace] = field(default_factory=lambda: defaultdict(_Pace))

    def took(
        self, hop: Hop, tokens: int, nbytes: int, seconds: float, now: float, announced: float | None
    ) -> None:
        """Note an exchange of `tokens` (rows × tokens) and `nbytes` with a server, which has `announced` that a token
        takes so many seconds in a block, or nothing."""
        pace, work = self._of[hop.peer_id], tokens * (hop.end - hop.start)
        if tokens <= FEW_TOKENS and seconds > 0:
            pace.measured += 1
            pace.average += max(NEWEST, 1 / pace.measured) * (seconds / work - pace.average)
        if announced is None or not is_too_slow(work * announced, nbytes, seconds):
            pace.in_a_row, pace.until = 0, float("-inf")
            return
        factor = seconds / (work * announced)
        pace.factor = min(factor, pace.factor) if pace.in_a_row else factor
        pace.in_a_row += 1
        if pace.in_a_row >= SLOW_IN_A_ROW:
            pace.until = now + SLOW_MEMORY_SECONDS

    def is_slow(self, peer_id: str, now: float) -> bool:
        """Whether the peer was found slow lately."""
        return peer_id in self._of and self._of[peer_id].until > now

    def seen(self, records: Sequence[ServerRecord], now: float) -> list[ServerRecord]:
        """The records, with the throughput that is believed: within `BELIEF` of what was found."""
        return [self._believed(one, now) if one.peer_id in self._of else one for one in records]

    def _believed(self, record: ServerRecord, now: float) -> ServerRecord:
        pace, seconds = self._of[record.peer_id], block_seconds(record)
        if self.is_slow(record.peer_id, now):
            seconds *= pace.factor
        elif pace.measured >= ENOUGH:
            seconds = min(max(seconds, pace.average / BELIEF), pace.average * BELIEF)
        return msgspec.structs.replace(record, throughput=1.0 / (seconds * max(1, record.end - record.start)))


@dataclass(frozen=True)
class Finding:
    """A server whose answer is not what this client computed itself."""

    hop: Hop
    what: What
    times: float  # how many times the tolerance it is off
    right_before: float | None  # when it was last found right, seconds since 1970

    def sentence(self) -> str:
        """For the user."""
        before = self.right_before
        since = "never checked before" if before is None else f"last right at {_clock(before)}"
        return (
            f"{self.hop.peer_id} gave a wrong {self.what} for blocks {self.hop.start}:{self.hop.end} "
            f"({self.times:.1f} times the tolerance; {since}) and is avoided from now on: "
            "do again what it had a part in."
        )


def _clock(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))


class Verdicts:
    """The condemned peers of one client."""

    def __init__(self) -> None:
        self.condemned: dict[str, Finding] = {}
        self._untold: list[Finding] = []

    def condemn(self, finding: Finding) -> None:
        """Never use the peer again."""
        if finding.hop.peer_id not in self.condemned:
            self.condemned[finding.hop.peer_id] = finding
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
        return LyingServer(finding.sentence(), peer_id=finding.hop.peer_id)
