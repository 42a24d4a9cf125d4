"""What this client knows of the swarm: who serves, who failed lately, which streams lie ready.

Invariant: a route is computed from records no older than `REFRESH_SECONDS`, or the newest that could be had
at once. Peers that failed lately are used only where nobody else can be, and then after a rest that grows
with each failure; a busy one is left alone as long as it asked for; a server that was found slow counts as
slow as it was found. A stream in the pool has no request open on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import partial

from corolla.client.audits.audit import Observer, Unobserved, Verdicts
from corolla.client.sessions.company import Company
from corolla.errors import (
    CorollaError,
    MissingBlocks,
    NotAdmitted,
    RemoteError,
    RequestRefused,
    SwarmUnavailable,
)
from corolla.swarm.access.admission import Introductions
from corolla.swarm.access.membership import INVITE_HINT
from corolla.swarm.channel import Channel
from corolla.swarm.directory.directory import Directory, ServerRecord
from corolla.swarm.directory.routing import (
    HOP_SECONDS,
    Hop,
    Paces,
    announced_seconds,
    find_route,
    numerics_of,
)
from corolla.swarm.transport.base import Transport
from corolla.text import one_line
from corolla.wire.compression import WireFormat
from corolla.wire.failures import Remedy, meaning, remedy_of
from corolla.wire.messages import PROTOCOL_NAME

log = logging.getLogger(__name__)

REFRESH_SECONDS = 10.0
REST_SHUT_OUT = 60.0  # seconds for which a peer that does not let us in is left alone
SLOW_READ_SECONDS = 0.5  # a directory that takes longer is not waited for where older records will do
FIRST_AVOIDANCE = 2.0  # seconds for which others are preferred; doubles with each failure in a row
LONGEST_AVOIDANCE = 60.0
FIRST_REST = 0.1  # seconds for which a peer is left alone after failing twice in a row; doubles likewise
LONGEST_REST = 5.0
DOUBT_SECONDS = 600.0  # for which others are preferred to servers that disagree
BUSY_SECONDS = 2.0  # how long a busy server is left alone that does not say how long


class SwarmView:
    """Used from the client's event loop only."""

    def __init__(
        self,
        transport: Transport,
        directory: Directory,
        *,
        model: str,
        model_name: str,
        num_blocks: int,
        wire: WireFormat = "compute",
        mixed: bool = False,
        introductions: Introductions | None = None,
        trust: Collection[str] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`mixed`: servers of different arithmetic (dtype, quantization) may work on one thing. `introductions`
        presents this client where it is not let in; `trust`: use only these peers. `clock` gives seconds; by
        default the event loop's."""
        self.transport = transport
        self.model = model
        self.model_name = model_name
        self.num_blocks = num_blocks
        self.verdicts = Verdicts()
        self.audits: Observer = Unobserved()
        self.wire = wire
        self.lacking: dict[str, str] = {}  # see `bundles.ask_to_open`
        self._mixed = mixed
        self._numerics: str | None = None  # the arithmetic that was begun with
        self._directory = directory
        self._introductions = introductions or Introductions(transport)
        self._trust = None if trust is None else frozenset(trust)
        self._untrusted = 0  # servers of the model that are left out
        self._shut_out: dict[str, float] = {}  # peers that refuse this client -> when it was last presented
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._records: list[ServerRecord] = []
        self._refreshed = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._avoid_until: dict[str, float] = {}
        self._rest_until: dict[str, float] = {}
        self._busy_until: dict[str, float] = {}
        self._doubted_until: dict[str, float] = {}
        self._paces = Paces()
        self._failures: dict[str, int] = defaultdict(int)
        self._idle: dict[str, list[Channel]] = defaultdict(list)
        self._companies: dict[str, Company] = {}

    async def route(self, start: int, end: int) -> list[Hop]:
        """Servers that together run blocks [start, end), all in the arithmetic that was begun with.

        Raises `MissingBlocks` when some are served by nobody, or only by peers that have just failed again.
        """
        if self._clock() - self._refreshed > REFRESH_SECONDS:
            await self._renew()
        try:
            return self._find(start, end)
        except MissingBlocks:
            await self.refresh()
        try:
            return self._find(start, end)
        except MissingBlocks as missing:
            raise self._explained(missing) from missing

    async def token_seconds(self, start: int, end: int) -> float:
        """About how long one token takes in blocks [start, end), from what the servers announce."""
        hops = await self.route(start, end)
        records = {record.peer_id: record for record in self._records}
        return sum(HOP_SECONDS + announced_seconds(records[hop.peer_id], hop, 1) for hop in hops)

    def _explained(self, missing: MissingBlocks) -> CorollaError:
        """The same, or why servers that are there cannot be used."""
        blocks = ", ".join(str(block) for block in missing.blocks)
        shut = sorted(record.peer_id for record in self._records if record.peer_id in self._shut_out)
        if shut:
            return NotAdmitted(
                f"No other server is up for blocks {blocks} of {self.model_name} than those that let only members "
                f"in, and peer {self.transport.peer_id} is none (asked: {', '.join(shut)}): {INVITE_HINT}."
            )
        if self._untrusted:
            return MissingBlocks(
                f"The servers that you trust do not serve blocks {blocks} of {self.model_name}; there are "
                f"{self._untrusted} others, which are not on your list.",
                blocks=missing.blocks,
            )
        return missing

    def _find(self, start: int, end: int) -> list[Hop]:
        avoided = self._still(self._avoid_until) | self._still(self._doubted_until)
        busy = self._still(self._busy_until)
        resting = busy | self._still(self._rest_until) | set(self.verdicts.condemned)
        with contextlib.suppress(MissingBlocks):
            return self._find_in_one_kind(start, end, avoided | resting)
        try:
            return self._find_in_one_kind(start, end, resting)  # a peer that failed may be back already
        except MissingBlocks as missing:
            if not resting:
                raise
            blocks = ", ".join(str(block) for block in missing.blocks)
            found = "are busy" if busy and resting == busy else "failed a moment ago"
            raise MissingBlocks(
                f"No other server is up for blocks {blocks} of {self.model_name} than those that {found}"
                f"{self.verdicts.in_words()}: start another one, or wait until they are back.",
                blocks=missing.blocks,
            ) from missing

    def _still(self, until: dict[str, float]) -> set[str]:
        now = self._clock()
        return {peer for peer, end in until.items() if end > now}

    def _find_in_one_kind(self, start: int, end: int, avoid: set[str]) -> list[Hop]:
        records = self._paces.seen(self._records, self._clock())
        if self._mixed:
            return find_route(records, start, end, avoid=avoid)
        for kind in numerics_of(records) if self._numerics is None else [self._numerics]:
            own = [record for record in records if record.numerics == kind]
            try:
                route = find_route(own, start, end, avoid=avoid)
            except MissingBlocks:
                continue
            self._numerics = kind
            return route
        find_route(records, start, end, avoid=avoid)  # raises, unless the kinds are the only trouble
        offered = ", ".join(map(one_line, numerics_of(records)))
        begun = "no single one" if self._numerics is None else f"no longer {self._numerics}, begun with,"
        raise MissingBlocks(
            f"Blocks {start}:{end} of {self.model_name} are served as {offered}, but {begun} covers them all: "
            "wait or start such a server, or load the model with mixed=True, which is less exact.",
            blocks=list(range(start, end)),
        )

    async def usable(self) -> list[ServerRecord]:
        """The records of servers that may be asked now."""
        if self._clock() - self._refreshed > REFRESH_SECONDS:
            await self._renew()
        avoided = (
            self._still(self._avoid_until) | self._still(self._rest_until) | self._still(self._busy_until)
        )
        avoided.update(self.verdicts.condemned)
        return [one for one in self._records if one.state == "serving" and one.peer_id not in avoided]

    def numerics_of(self, peer: str) -> str | None:
        """In what arithmetic the peer says that it computes; None for one that is not in the directory."""
        return next((one.numerics for one in self._records if one.peer_id == peer), None)

    async def refresh(self) -> None:
        """Ask the directory again.

        Where it does not answer, or knows nothing any more, the records at hand stay: the servers may well be
        there while the directory is not.
        """
        try:
            found = await self._directory.servers(self.model)
        except SwarmUnavailable as error:
            if not self._records:
                raise
            log.info("The directory does not answer: %s", error)
            found = []
        records = [record for record in found if self._trust is None or record.peer_id in self._trust]
        self._untrusted = len(found) - len(records)
        self._refreshed = self._clock()
        if not records and self._records:
            return
        before = {record.peer_id: (record.start, record.end) for record in self._records}
        for record in records:
            if before.get(record.peer_id, (record.start, record.end)) != (record.start, record.end):
                self._forgive(record.peer_id)  # it has come back as another server
        self._records = records

    async def _renew(self) -> None:
        """Refresh. A directory that is slow is waited for only while no record at all is known."""
        if self._reading is None:
            self._reading = asyncio.create_task(self.refresh())
            self._reading.add_done_callback(self._read)
            await asyncio.wait({self._reading}, timeout=SLOW_READ_SECONDS)
        if not self._records and self._reading is not None:
            await asyncio.shield(self._reading)

    def _read(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("The directory could not be read: %s", error)

    async def failed(self, error: RemoteError) -> None:
        """Prefer others to the peer that `error` names for a while, longer each time in a row.

        At first it may be asked again at once, should there be nobody else: it may be back already. One that is
        only busy is left alone for as long as it says, and not blamed.
        """
        peer = error.peer_id
        if peer is None:
            return
        remedy = remedy_of(error)
        after = error.retry_after if isinstance(error, RequestRefused) else None
        now = self._clock()
        if remedy is Remedy.WAIT:
            self._busy_until[peer] = now + (BUSY_SECONDS if after is None else after)
        if remedy is Remedy.BE_ADMITTED:
            await self._close_idle(peer)
            await self._present_to(peer)
        if isinstance(error, RequestRefused) and not meaning(error).blames_peer:
            return
        await self._close_idle(peer)
        if remedy is Remedy.NEWER_RECORD:
            self._refreshed = float("-inf")
        times = min(self._failures[peer], 10)  # in a row, before this one
        self._failures[peer] += 1
        self._avoid_until[peer] = now + min(LONGEST_AVOIDANCE, FIRST_AVOIDANCE * 2**times)
        self._rest_until[peer] = now + (min(LONGEST_REST, FIRST_REST * 2 ** (times - 1)) if times else 0.0)
        if after is not None:
            self._avoid_until[peer] = self._rest_until[peer] = now + after

    async def _close_idle(self, peer: str) -> None:
        for channel in self._idle.pop(peer, []):
            await channel.close()

    async def _present_to(self, peer: str) -> None:
        """Have this client let in by a peer that refused it; where that fails, leave the peer alone for a while."""
        now = self._clock()
        if now - self._shut_out.get(peer, float("-inf")) > REST_SHUT_OUT:
            self._shut_out[peer] = now
            if await self._introductions.introduce(peer):
                return  # it may be asked again at once; should it refuse all the same, it rests
        self._avoid_until[peer] = self._rest_until[peer] = now + REST_SHUT_OUT

    def succeeded(self, peer: str) -> None:
        """The peer answered: forget its earlier failures."""
        self._shut_out.pop(peer, None)
        self._forgive(peer)

    def _forgive(self, peer: str) -> None:
        self._failures.pop(peer, None)
        self._avoid_until.pop(peer, None)
        self._rest_until.pop(peer, None)

    def doubt(self, peers: Iterable[str]) -> None:
        """Prefer others to these for a while: an audit could not tell which of them is right."""
        self._doubted_until.update(dict.fromkeys(peers, self._clock() + DOUBT_SECONDS))

    def is_doubted(self, peer: str) -> bool:
        """Whether others are preferred to the peer since it disagreed with another."""
        return self._doubted_until.get(peer, 0.0) > self._clock()

    def is_busy(self, peer: str) -> bool:
        """Whether the peer asked to be left alone until later than now."""
        return self._busy_until.get(peer, 0.0) > self._clock()

    def now(self) -> float:
        """Seconds, for `took`."""
        return self._clock()

    def took(self, hop: Hop, tokens: int, nbytes: int, seconds: float) -> None:
        """Note how long an exchange took: `tokens` is rows × tokens, `nbytes` what travelled."""
        record = next((one for one in self._records if one.peer_id == hop.peer_id), None)
        if record is not None:
            self._paces.took(record, hop, tokens, nbytes, seconds, self._clock())

    def should_leave(self, hop: Hop) -> bool:
        """Whether the server was found far slower than it announced, or is doubted, and a better one is there."""
        if not (self._paces.is_slow(hop.peer_id, self._clock()) or self.is_doubted(hop.peer_id)):
            return False
        try:
            return all(other.peer_id != hop.peer_id for other in self._find(hop.start, hop.end))
        except MissingBlocks:
            return False

    def next_return(self) -> float:
        """Seconds until the first peer that is left alone may be asked again; 0 when there is none."""
        now = self._clock()
        moments = (*self._rest_until.values(), *self._busy_until.values())
        return min((until - now for until in moments if until > now), default=0.0)

    async def channel(self, peer: str) -> Channel:
        """A stream to the peer with no request open on it. Raises `PeerUnreachable`."""
        if self._idle[peer]:
            return self._idle[peer].pop()
        return Channel(await self.transport.open(peer, PROTOCOL_NAME), side="client", form=self.wire)

    def release(self, channel: Channel) -> None:
        """Give a stream back after a complete exchange."""
        self._idle[channel.peer_id].append(channel)

    def company(self, peer: str) -> Company:
        """This client's sessions at the peer."""
        if peer not in self._companies:
            self._companies[peer] = Company(partial(self.channel, peer), self.release)
        return self._companies[peer]

    async def close(self) -> None:
        """Close the pooled streams, and what comes together on them."""
        for company in self._companies.values():
            company.close()
        if self._reading is not None:
            self._reading.cancel()
        for channels in self._idle.values():
            for channel in channels:
                await channel.close()
        self._idle.clear()
