"""What this client knows of the swarm: who serves, who failed lately, which streams lie ready.

Invariant: a route is computed from records no older than `REFRESH_SECONDS`, without peers that are being
avoided; a stream in the pool has no request open on it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable

from corolla.errors import MissingBlocks, RemoteError, RequestRefused
from corolla.swarm.channel import Channel
from corolla.swarm.directory import Directory, ServerRecord
from corolla.swarm.routing import Hop, find_route, numerics_of
from corolla.swarm.transport.base import Transport
from corolla.wire.compression import WireFormat
from corolla.wire.messages import PROTOCOL_NAME

log = logging.getLogger(__name__)

REFRESH_SECONDS = 10.0
FIRST_AVOIDANCE = 2.0  # seconds; doubles with each failure in a row
LONGEST_AVOIDANCE = 60.0


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`mixed`: servers of different arithmetic (dtype, quantization) may work on one thing."""
        self.transport = transport
        self.model = model
        self.model_name = model_name
        self.num_blocks = num_blocks
        self._wire = wire
        self._mixed = mixed
        self._numerics: str | None = None  # the arithmetic that was begun with
        self._directory = directory
        self._clock = clock
        self._records: list[ServerRecord] = []
        self._refreshed = float("-inf")
        self._avoid_until: dict[str, float] = {}
        self._failures: dict[str, int] = defaultdict(int)
        self._idle: dict[str, list[Channel]] = defaultdict(list)

    async def route(self, start: int, end: int) -> list[Hop]:
        """Servers that together run blocks [start, end), all in the arithmetic that was begun with.

        Raises `MissingBlocks` when some are served by nobody, or only by peers that are being avoided.
        """
        if self._clock() - self._refreshed > REFRESH_SECONDS:
            await self.refresh()
        try:
            return self._find(start, end)
        except MissingBlocks:
            await self.refresh()
            return self._find(start, end)

    def _find(self, start: int, end: int) -> list[Hop]:
        now = self._clock()
        avoided = {peer for peer, until in self._avoid_until.items() if until > now}
        try:
            return self._find_in_one_kind(start, end, avoided)
        except MissingBlocks as missing:
            if not avoided:
                raise
            blocks = ", ".join(str(block) for block in missing.blocks)
            raise MissingBlocks(
                f"No other server is up for blocks {blocks} of {self.model_name} than those that failed "
                "a moment ago: start another one, or wait until they are back.",
                blocks=missing.blocks,
            ) from missing

    def _find_in_one_kind(self, start: int, end: int, avoid: set[str]) -> list[Hop]:
        if self._mixed:
            return find_route(self._records, start, end, avoid=avoid)
        for kind in numerics_of(self._records) if self._numerics is None else [self._numerics]:
            own = [record for record in self._records if record.numerics == kind]
            try:
                route = find_route(own, start, end, avoid=avoid)
            except MissingBlocks:
                continue
            self._numerics = kind
            return route
        find_route(self._records, start, end, avoid=avoid)  # raises, unless the kinds are the only trouble
        offered = ", ".join(numerics_of(self._records))
        begun = "no single one" if self._numerics is None else f"no longer {self._numerics}, begun with,"
        raise MissingBlocks(
            f"Blocks {start}:{end} of {self.model_name} are served as {offered}, but {begun} covers them all: "
            "wait or start such a server, or load the model with mixed=True, which is less exact.",
            blocks=list(range(start, end)),
        )

    async def refresh(self) -> None:
        """Ask the directory again."""
        self._records = await self._directory.servers(self.model)
        self._refreshed = self._clock()

    async def failed(self, error: RemoteError) -> None:
        """Avoid the peer that `error` names for a while, longer each time in a row."""
        peer = error.peer_id
        if peer is None:
            return
        for channel in self._idle.pop(peer, []):
            await channel.close()
        if isinstance(error, RequestRefused) and error.code == "evicted":
            return  # the server is well; only the session has to be replayed
        self._failures[peer] += 1
        pause = min(LONGEST_AVOIDANCE, FIRST_AVOIDANCE * 2 ** (self._failures[peer] - 1))
        if isinstance(error, RequestRefused) and error.retry_after is not None:
            pause = error.retry_after
        self._avoid_until[peer] = self._clock() + pause

    def succeeded(self, peer: str) -> None:
        """The peer answered: forget its earlier failures."""
        self._failures.pop(peer, None)
        self._avoid_until.pop(peer, None)

    def next_return(self) -> float:
        """Seconds until the first avoided peer may be tried again; 0 when none is avoided."""
        now = self._clock()
        return min((until - now for until in self._avoid_until.values() if until > now), default=0.0)

    async def channel(self, peer: str) -> Channel:
        """A stream to the peer with no request open on it. Raises `PeerUnreachable`."""
        if self._idle[peer]:
            return self._idle[peer].pop()
        return Channel(await self.transport.open(peer, PROTOCOL_NAME), side="client", form=self._wire)

    def release(self, channel: Channel) -> None:
        """Give a stream back after a complete exchange."""
        self._idle[channel.peer_id].append(channel)

    async def close(self) -> None:
        """Close the pooled streams."""
        for channels in self._idle.values():
            for channel in channels:
                await channel.close()
        self._idle.clear()
