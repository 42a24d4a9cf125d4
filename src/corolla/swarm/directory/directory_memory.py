"""A directory for peers that share one process: the twin of the DHT's.

Invariant: like the DHT, it knows only what peers announced; a killed peer's record stays until it expires.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from corolla.swarm.directory.directory import Directory, ServerRecord


class Board:
    """The records that several `MemoryDirectory`s share; `clock` gives seconds and may be a test's own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._records: dict[tuple[str, str], tuple[ServerRecord, float]] = {}

    def put(self, record: ServerRecord, ttl: float) -> None:
        """Keep a record for `ttl` seconds in place of the peer's earlier one for this model."""
        self._records[record.model, record.peer_id] = (record, self.clock() + ttl)

    def drop(self, record: ServerRecord) -> None:
        """Forget the peer's record for this model, if there is one."""
        self._records.pop((record.model, record.peer_id), None)

    def valid(self) -> list[ServerRecord]:
        """All records that have not expired, by model and peer."""
        now = self.clock()
        return [record for _, (record, expires) in sorted(self._records.items()) if expires > now]


class MemoryDirectory(Directory):
    """One peer's access to a `Board`."""

    def __init__(self, board: Board) -> None:
        self._board = board

    async def announce(self, record: ServerRecord, ttl: float) -> None:
        self._board.put(record, ttl)

    async def withdraw(self, record: ServerRecord) -> None:
        self._board.drop(record)

    async def servers(self, model: str) -> list[ServerRecord]:
        return [record for record in self._board.valid() if record.model == model]

    async def all_servers(self) -> list[ServerRecord]:
        return self._board.valid()

    async def close(self) -> None:
        """Nothing to let go of."""
