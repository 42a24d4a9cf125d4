"""What this client knows of the swarm: who serves, who failed lately, which streams lie ready.

Invariant: a route is computed from records no older than `REFRESH_SECONDS`, or the newest that could be had
at once; a server that was found slow counts as slow as it was found.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

from cachetools import LRUCache
from torch import Tensor

from corolla.client.race import Race
from corolla.client.sent_vectors import SentVectors
from corolla.client.servers import Clock, Health, Paces, Records, Verdicts
from corolla.client.sessions.step_batcher import StepBatcher
from corolla.config import SwarmConfig
from corolla.errors import (
    CorollaError,
    MissingBlocks,
    NotAdmitted,
    PeerSilent,
    RemoteError,
    RequestRefused,
    UsageError,
)
from corolla.models.cut_layout import CutLayout, TokenLayout
from corolla.swarm.access.admission import Introductions
from corolla.swarm.access.membership import INVITE_HINT
from corolla.swarm.channel import ChannelPool, checked
from corolla.swarm.directory.directory import Directory, ServerRecord
from corolla.swarm.directory.routing import (
    HOP_SECONDS,
    Hop,
    announced_seconds,
    block_seconds,
    find_route,
    first_hops,
    uncovered,
)
from corolla.swarm.transport.base import Transport
from corolla.wire.failures import Remedy, remedy_of
from corolla.wire.frames import Packet
from corolla.wire.messages import PROTOCOL_NAME, SILENCE_SECONDS

T = TypeVar("T")

MOST_LACKING = 1024  # peers
REST_SHUT_OUT = 60.0  # seconds for which a peer that does not let us in is left alone
CURIOUS_SECONDS = 60.0  # after which a stranger that says it is so many times faster is tried
MUCH_FASTER = 1.5
# How long a stranger may show signs of life before others are given its work as well: so much of what it announced.
FAIR_FACTOR = 4.0
LEAST_FAIR_SECONDS = 8.0
MOST_FAIR_SECONDS = 120.0


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
        cuts: CutLayout | None = None,
        steps_differ: bool = False,
        introductions: Introductions | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`model` is the checkpoint's identity, `model_name` what people call it; `cuts` is what crosses the cuts
        between its blocks, None for a hidden state a token; `steps_differ` is what `models/checks/steps.py` says of
        them. `introductions` presents this client where it is not let in; `clock` gives seconds, by
        default the event loop's."""
        config = config or SwarmConfig()
        self.peer_id = transport.peer_id  # this client's own
        self.model, self.model_name, self.num_blocks = model, model_name, num_blocks
        self.cuts = cuts or CutLayout(TokenLayout(0, 1, ()), num_blocks)
        self.steps_differ = steps_differ
        self.wire = config.wire_format
        if self.wire == "int8" and self.cuts.has_whole_numbers:
            raise UsageError(
                f"Blocks of {model_name} are given token ids, or tokens' places, beside hidden states, which 8 bits "
                "would change: choose wire='float16'."
            )
        self.now: Clock = clock or (lambda: asyncio.get_running_loop().time())
        self.health = Health(self.now)
        self.records = Records(directory, model, config, self.now, self.health.forgive)
        self._heard: dict[str, float] = {}  # when each peer showed a sign of life last
        self.channels = ChannelPool(transport, PROTOCOL_NAME, self.wire, self.heard)
        self._batchers: dict[str, StepBatcher] = {}
        self.verdicts = Verdicts()
        self.sent_vectors = SentVectors()
        # See `named_prompt.ask_to_open`; whoever is forgotten is asked once more.
        self.lacking_bundles: LRUCache[str, str] = LRUCache(MOST_LACKING)
        self._mixed, self._local_blocks = config.mixed, config.local_blocks
        self.numerics: str | None = None  # the arithmetic in which all blocks have answered; None until then
        self._introductions = introductions or Introductions(transport)
        self._shut_out: dict[str, float] = {}  # peers that refuse this client -> when it was last presented
        self._paces = Paces()
        self._curious_at = 0.0  # when a stranger may be tried though others have answered
        self._disappointed = 0  # how often in a row that came to nothing

    @property
    def takes_bundles(self) -> bool:
        """Whether a prompt that a server computes by itself is what this client would send it."""
        return self.wire == "compute" and self.cuts.plain

    async def route(self, start: int, end: int) -> list[Hop]:
        """Servers that together run blocks [start, end), all in the arithmetic that was begun with.

        Raises `MissingBlocks` when some are served by nobody, or only by peers that have just failed again.
        """
        return await self._renewed(lambda: self._find(start, end))

    async def _renewed(self, find: Callable[[], list[Hop]]) -> list[Hop]:
        """What `find` finds in records that are new enough."""
        await self.records.renew()
        try:
            return find()
        except MissingBlocks:
            await self.records.refresh()
        try:
            return find()
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
        if self.records.cut_short:
            return MissingBlocks(
                f"The swarm's directory was cut short; as far as it was read, no server is up for blocks {blocks} of "
                f"{self.model_name}: wait, or try again.",
                blocks=missing.blocks,
            )
        return missing

    def _find(self, start: int, end: int) -> list[Hop]:
        return self._choose(find_route, start, end, None)[0]

    def _choose(
        self, choose: Callable[..., list[Hop]], start: int, end: int, numerics: str | None
    ) -> list[list[Hop]]:
        """What `choose` makes of those who are best asked, for each of the numerics that may be begun with.

        Peers that failed lately may be back already, and are used where there are no others.
        """
        condemned = set(self.verdicts.condemned)
        if condemned and self.numerics not in map(self.numerics_of, self.health.proven - condemned):
            self.numerics = None  # nobody but liars has ever answered in it
        avoided, resting, busy = self.health.now()
        avoided |= self.health.doubted()
        resting |= condemned
        with contextlib.suppress(MissingBlocks):
            return self._choose_among(choose, start, end, numerics, avoided | resting)
        try:
            return self._choose_among(choose, start, end, numerics, resting)
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

    def _choose_among(
        self, choose: Callable[..., list[Hop]], start: int, end: int, numerics: str | None, avoid: set[str]
    ) -> list[list[Hop]]:
        now = self.now()
        seen = partial(self._paces.seen, now=now)
        proven = {peer for peer in self.health.proven if not self._paces.is_slow(peer, now)}
        how: dict[str, Any] = {"avoid": avoid, "proven": proven}
        if self._mixed:
            return [choose(seen(self.records.known), start, end, **how)]
        begun, offered = self.numerics or numerics, self.records.by_numerics
        found = []
        for one in offered if begun is None else [begun]:
            with contextlib.suppress(MissingBlocks):
                found.append(choose(seen(offered.get(one, [])), start, end, **how))
        if found:
            return sorted(found, key=lambda hops: hops[0].peer_id not in proven)
        find_route(self.records.known, start, end, avoid=avoid)  # raises, unless only numerics are in the way
        said = "no single one" if begun is None else f"no longer {begun}, begun with,"
        raise MissingBlocks(
            f"Blocks {start}:{end} of {self.model_name} are served as {', '.join(offered)}, but {said} covers them "
            "all: wait or start such a server, or load the model with mixed=True, which is less exact.",
            blocks=list(range(start, end)),
        )

    async def first(
        self,
        start: int,
        end: int,
        work: Callable[[Hop, bool], Awaitable[T]],
        *,
        tokens: int,
        numerics: str | None = None,
        discard: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        """The result of `work` for blocks from `start` on, as far towards `end` as the server that does it goes.

        A peer that has answered before is asked alone; of strangers several may be, side by side. `tokens` (rows x
        tokens) says how much it is; `numerics` in which arithmetic, where only some of the blocks have answered yet.
        Raises as `route`, and what `work` raises; for its second argument, and `discard`, see `Race`.
        """

        def in_turns() -> list[Hop]:
            found = self._choose(first_hops, start, end, numerics)
            return [hop for hops in zip_longest(*found) for hop in hops if hop is not None]

        hops = await self._renewed(in_turns)
        newer = self._newcomer(hops)
        if newer is not None:
            hops = [newer, *(hop for hop in hops if hop is not newer)]
        elif hops[0].peer_id in self.health.proven:
            return await work(hops[0], False)
        race = Race(
            hops,
            work,
            heard=lambda peer: self._heard.get(peer, float("-inf")),
            fair=lambda hop: self._fair_seconds(hop, tokens),
            failed=self.failed,
            discard=discard,
        )
        return (await race.run())[1]

    def _newcomer(self, hops: list[Hop]) -> Hop | None:
        """Of those who may be asked, one to be tried before the first, which has answered before.

        Now and then one that announces to be much faster; the more seldom, the oftener it came to nothing.
        """
        now, first = self.now(), hops[0]
        if first.peer_id not in self.health.proven or now < self._curious_at:
            return None
        believed = {one.peer_id: block_seconds(one) for one in self._paces.seen(self.records.known, now)}
        strangers = (hop for hop in hops if hop.peer_id not in self.health.proven and hop.end == first.end)
        best = min(strangers, key=lambda hop: believed[hop.peer_id], default=None)
        if best is None or MUCH_FASTER * believed[best.peer_id] > believed[first.peer_id]:
            return None
        self._curious_at = now + CURIOUS_SECONDS * 2 ** min(self._disappointed, 6)
        self._disappointed += 1  # until it answers
        return best

    def _fair_seconds(self, hop: Hop, tokens: int) -> float:
        record = self.records.of(hop.peer_id)
        announced = 0.0 if record is None else announced_seconds(record, hop, tokens)
        return min(MOST_FAIR_SECONDS, max(LEAST_FAIR_SECONDS, FAIR_FACTOR * announced))

    def heard(self, peer: str, seconds: float) -> None:
        """The peer has shown a sign of life, so many seconds after it was asked.

        Raises `PeerSilent` when that is too long, longer each time, and others could do the work.
        """
        self._heard[peer] = self.now()
        if seconds > self.health.longest_wait(peer) and self.can_do_without(peer):
            raise PeerSilent(
                f"{peer} shows signs of life for {seconds:.0f} s, but does not answer.", peer_id=peer
            )

    def can_do_without(self, peer: str | None) -> bool:
        """Whether others are there for all that the peer serves, none of whom has failed lately."""
        record = None if peer is None else self.records.of(peer)
        if record is None or peer is None:
            return False
        avoided, resting, _ = self.health.now()
        avoid = avoided | resting | self.health.doubted() | set(self.verdicts.condemned) | {peer}
        try:
            self._choose_among(find_route, record.start, record.end, None, avoid)
        except MissingBlocks:
            return False
        return True

    def restarts_elsewhere(self, numerics: str | None, block: int, start: int, end: int) -> bool:
        """Whether what was begun in these numerics, and is stuck at a block, is better begun in others.

        That can only be before all blocks have answered in the same. `start` and `end` are those of the whole.
        """
        if self._mixed or self.numerics is not None:
            return False
        if numerics is None or self._is_offered(numerics, block, end):
            return False
        return any(self._is_offered(one, start, end) for one in self.records.by_numerics if one != numerics)

    def settle_numerics(self, numerics: str | None, start: int, end: int) -> None:
        """Blocks [start, end) have answered in these numerics: all that follows is computed in them.

        Where they are not all blocks, the others must at least be offered in it.
        """
        if self.numerics is None and numerics is not None and not self._mixed:
            rest = ((self._local_blocks, start), (end, self.num_blocks))
            if all(a >= b or self._is_offered(numerics, a, b) for a, b in rest):
                self.numerics = numerics

    def _is_offered(self, numerics: str, start: int, end: int) -> bool:
        """Whether servers that have not failed lately cover blocks [start, end) in these numerics."""
        avoided, resting, _ = self.health.now()
        offered = self.records.by_numerics.get(numerics, [])
        return not uncovered((r for r in offered if r.peer_id not in avoided | resting), start, end)

    async def usable(self) -> list[ServerRecord]:
        """The records of servers that may be asked now."""
        await self.records.renew()
        avoided, resting, _ = self.health.now()
        avoided |= resting | set(self.verdicts.condemned)
        return [one for one in self.records.known if one.state == "serving" and one.peer_id not in avoided]

    def expected_numerics(self, peer: str) -> str:
        """In what arithmetic the peer was asked to compute, whatever its record says by now."""
        return self.numerics or self.numerics_of(peer) or ""

    def numerics_of(self, peer: str) -> str | None:
        """In what arithmetic the peer says that it computes; None for one that is not in the directory."""
        record = self.records.of(peer)
        return None if record is None else record.numerics

    def leaving(self, sent: Tensor, start: int, end: int) -> Tensor:
        """A tensor of the form that leaves blocks [start, end) for what is `sent` to them; of no meaning."""
        return sent if self.cuts.plain else self.cuts.leaving(sent, start, end)

    def output_of(self, reply: Packet, sent: Tensor, hop: Hop) -> Tensor:
        """The outputs of a hop's blocks for what it was `sent`. Raises `ProtocolError` for another form."""
        return checked(reply, "hidden", self.leaving(sent, hop.start, hop.end), hop.peer_id)

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
        if remedy in (Remedy.WAIT, Remedy.BE_ADMITTED) or (
            remedy is Remedy.REPLAY and self.health.excused(peer)
        ):
            return
        if remedy is Remedy.NEWER_RECORD:
            self.records.outdated()
        self.health.failed(peer, after, SILENCE_SECONDS if isinstance(error, PeerSilent) else 0.0)
        await self.channels.drop(peer)

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
        if hop.peer_id not in self.health.proven:
            self._curious_at, self._disappointed = self.now() + CURIOUS_SECONDS, 0
        self.health.answered(hop.peer_id)
        if self.records.of(hop.peer_id) is not None:
            announced = self.records.announced.get(hop.peer_id)
            self._paces.took(hop, tokens, nbytes, seconds, self.now(), announced)

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
