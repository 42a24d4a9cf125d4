"""Who serves the model, as the directory last said.

Invariant: records are no older than `REFRESH_SECONDS`, or the newest that could be had at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from corolla.client.health import Clock
from corolla.config import SwarmConfig
from corolla.errors import SwarmUnavailable
from corolla.swarm.directory.directory import Directory, ServerRecord
from corolla.swarm.directory.routing import KINDS
from corolla.text import get_logger

log = get_logger(__name__)

REFRESH_SECONDS = 10.0
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
        self.known: list[ServerRecord] = []  # those that compute in a kind of arithmetic that there is
        self.untrusted = 0  # servers of the model that the user has left out
        self.cut_short = False  # the directory was not read to its end: there may be others
        self._directory = directory
        self._model = model
        self._allowed = None if config.trust is None else frozenset(config.trust)
        self._blocked = frozenset(config.blocked)
        self._clock = clock
        self._moved = moved
        self._by_peer: dict[str, ServerRecord] = {}
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
        if self.cut_short:  # those that it did not get to may be there as before
            named = {record.peer_id for record in records}
            records += [record for record in self.known if record.peer_id not in named]
        self._refreshed = self._clock()
        if not records and self.known:
            return
        for record in records:
            before = self.of(record.peer_id) or record
            if (before.start, before.end) != (record.start, record.end):
                self._moved(record.peer_id)
        self.known, self._by_peer = records, {one.peer_id: one for one in records}

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
