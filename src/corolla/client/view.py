"""What this client knows of the swarm: who serves, who failed lately, which streams lie ready.

Invariant: a route is computed from records no older than `REFRESH_SECONDS`, or the newest that could be had
at once; a server that was found slow counts as slow as it was found.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial

from corolla.client.health import Clock, Health, Verdicts
from corolla.client.sessions.step_batcher import StepBatcher
from corolla.config import SwarmConfig
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
from corolla.swarm.channel import ChannelPool
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
from corolla.text import get_logger, one_line
from corolla.wire.failures import Remedy, meaning, remedy_of
from corolla.wire.messages import PROTOCOL_NAME

log = get_logger(__name__)

REFRESH_SECONDS = 10.0
REST_SHUT_OUT = 60.0  # seconds for which a peer that does not let us in is left alone
SLOW_READ_SECONDS = 0.5  # a directory that takes longer is not waited for where older records will do


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
        self.known: list[ServerRecord] = []
        self.kinds: dict[str, str] = {}  # in what arithmetic each peer says that it computes
        self.untrusted = 0  # servers of the model that the user has left out
        self._directory = directory
        self._model = model
        self._allowed = None if config.trust is None else frozenset(config.trust)
        self._blocked = frozenset(config.blocked)
        self._clock = clock
        self._moved = moved
        self._refreshed = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def of(self, peer: str) -> ServerRecord | None:
        """The peer's record; None for one that is not in the directory."""
        return next((one for one in self.known if one.peer_id == peer), None)

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
        records = [record for record in found if self._is_allowed(record.peer_id)]
        self.untrusted = len(found) - len(records)
        self._refreshed = self._clock()
        if not records and self.known:
            return
        before = {record.peer_id: (record.start, record.end) for record in self.known}
        for record in records:
            if before.get(record.peer_id, (record.start, record.end)) != (record.start, record.end):
                self._moved(record.peer_id)
        self.known, self.kinds = records, {one.peer_id: one.numerics for one in records}

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


class SwarmView:
    """Used from the client's event loop only."""

    def __init__(
        self,
        transport: Transport,
        directory: Directory,
        config: SwarmConfig | None = None,
        *,
        model: str,
        model_name: str,
        num_blocks: int,
        introductions: Introductions | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`model` is the checkpoint's identity, `model_name` what people call it. `introductions` presents this
        client where it is not let in; `clock` gives seconds, by default the event loop's."""
        config = config or SwarmConfig()
        self.peer_id = transport.peer_id  # this client's own
        self.model, self.model_name, self.num_blocks = model, model_name, num_blocks
        self.wire = config.wire_format
        self.now: Clock = clock or (lambda: asyncio.get_running_loop().time())
        self.health = Health(self.now)
        self.records = Records(directory, model, config, self.now, self.health.forgive)
        self.channels = ChannelPool(transport, PROTOCOL_NAME, self.wire)
        self._batchers: dict[str, StepBatcher] = {}
        self.verdicts = Verdicts()
        self.lacking_bundles: dict[str, str] = {}  # see `bundles.ask_to_open`
        self._mixed = config.mixed
        self._numerics: str | None = None  # the arithmetic that was begun with
        self._introductions = introductions or Introductions(transport)
        self._shut_out: dict[str, float] = {}  # peers that refuse this client -> when it was last presented
        self._paces = Paces()

    async def route(self, start: int, end: int) -> list[Hop]:
        """Servers that together run blocks [start, end), all in the arithmetic that was begun with.

        Raises `MissingBlocks` when some are served by nobody, or only by peers that have just failed again.
        """
        await self.records.renew()
        try:
            return self._find(start, end)
        except MissingBlocks:
            await self.records.refresh()
        try:
            return self._find(start, end)
        except MissingBlocks as missing:
            raise self._explained(missing) from missing

    async def token_seconds(self, start: int, end: int) -> float:
        """About how long one token takes in blocks [start, end), from what the servers announce."""
        hops = await self.route(start, end)
        known = {record.peer_id: record for record in self.records.known}
        return sum(HOP_SECONDS + announced_seconds(known[hop.peer_id], hop, 1) for hop in hops)

    def _explained(self, missing: MissingBlocks) -> CorollaError:
        """The same, or why servers that are there cannot be used."""
        blocks = ", ".join(str(block) for block in missing.blocks)
        shut = sorted(one.peer_id for one in self.records.known if one.peer_id in self._shut_out)
        if shut:
            return NotAdmitted(
                f"No other server is up for blocks {blocks} of {self.model_name} than those that let only members "
                f"in, and peer {self.peer_id} is none (asked: {', '.join(shut)}): {INVITE_HINT}."
            )
        if self.records.untrusted:
            return MissingBlocks(
                f"The servers that you trust do not serve blocks {blocks} of {self.model_name}; there are "
                f"{self.records.untrusted} others, which your list leaves out.",
                blocks=missing.blocks,
            )
        return missing

    def _find(self, start: int, end: int) -> list[Hop]:
        avoided, resting, busy = self.health.now()
        avoided |= self.health.doubted()
        resting |= set(self.verdicts.condemned)
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

    def _find_in_one_kind(self, start: int, end: int, avoid: set[str]) -> list[Hop]:
        records = self._paces.seen(self.records.known, self.now())
        if self._mixed:
            return find_route(records, start, end, avoid=avoid)
        for kind in numerics_of(records) if self._numerics is None else [self._numerics]:
            own = [record for record in records if self.records.kinds[record.peer_id] == kind]
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
        await self.records.renew()
        avoided, resting, _ = self.health.now()
        avoided |= resting | set(self.verdicts.condemned)
        return [one for one in self.records.known if one.state == "serving" and one.peer_id not in avoided]

    def numerics_of(self, peer: str) -> str | None:
        """In what arithmetic the peer says that it computes; None for one that is not in the directory."""
        return self.records.kinds.get(peer)

    async def failed(self, error: RemoteError) -> None:
        """Draw the consequences for the peer that `error` names."""
        peer, remedy = error.peer_id, remedy_of(error)
        if peer is None:
            return
        after = error.retry_after if isinstance(error, RequestRefused) else None
        if remedy is Remedy.WAIT:
            self.health.busy(peer, after)
        elif remedy is Remedy.BE_ADMITTED:
            await self.channels.drop(peer)
            await self._present_to(peer)
        if isinstance(error, RequestRefused) and not meaning(error).blames_peer:
            return
        await self.channels.drop(peer)
        if remedy is Remedy.NEWER_RECORD:
            self.records.outdated()
        self.health.failed(peer, after)

    async def _present_to(self, peer: str) -> None:
        """Have this client let in by a peer that refused it; where that fails, leave the peer alone for a while."""
        if self.now() - self._shut_out.get(peer, float("-inf")) > REST_SHUT_OUT:
            self._shut_out[peer] = self.now()
            if await self._introductions.introduce(peer):
                return  # it may be asked again at once; should it refuse all the same, it rests
        self.health.leave_alone(peer, REST_SHUT_OUT)

    def answered(self, hop: Hop, tokens: int, nbytes: int, seconds: float) -> None:
        """The peer has answered: `tokens` is rows × tokens, `nbytes` what travelled. What was before is forgiven."""
        self._shut_out.pop(hop.peer_id, None)
        self.health.forgive(hop.peer_id)
        record = self.records.of(hop.peer_id)
        if record is not None:
            self._paces.took(record, hop, tokens, nbytes, seconds, self.now())

    def should_leave(self, hop: Hop) -> bool:
        """Whether the server was found far slower than it announced, or is doubted, and a better one is there."""
        if not (self._paces.is_slow(hop.peer_id, self.now()) or hop.peer_id in self.health.doubted()):
            return False
        try:
            return all(other.peer_id != hop.peer_id for other in self._find(hop.start, hop.end))
        except MissingBlocks:
            return False

    def batcher(self, peer: str) -> StepBatcher:
        """Where steps of this client's sessions at the peer come together."""
        if peer not in self._batchers:
            self._batchers[peer] = StepBatcher(peer, partial(self.channels.ask, peer))
        return self._batchers[peer]

    async def close(self) -> None:
        """End what goes on by itself, and the pooled streams."""
        self.records.close()
        for batcher in self._batchers.values():
            batcher.close()
        await self.channels.close()
