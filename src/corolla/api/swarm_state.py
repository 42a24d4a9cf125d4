"""The swarm as this client sees it: who serves what, what is missing, what has changed lately.

Invariant: it says what the directory's records say and what this client has found out; texts of others are one clean
line each. Asking costs the directory no more than one reading every few seconds, however many ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from corolla.api.partners import Partners
from corolla.api.streaming import event
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.summary import as_plain
from corolla.text import one_line

FRESH_SECONDS = 2.0
MOST_CHANGES = 50
MOST_SERVERS = 500


class SwarmState:
    """On the event loop."""

    def __init__(self, partners: Partners) -> None:
        self._connection = partners.base.model.blocks.connection
        self._name = partners.base.name
        self.ended = asyncio.Event()  # nobody is told anything any more
        self._lock = asyncio.Lock()
        self._known: dict[str, ServerRecord] | None = None
        self._changes: deque[dict[str, Any]] = deque(maxlen=MOST_CHANGES)
        self._state: dict[str, Any] = {}
        self._read = float("-inf")

    async def now(self) -> dict[str, Any]:
        """All of it as JSON. Raises what reading the directory raises."""
        async with self._lock:
            if time.monotonic() - self._read >= FRESH_SECONDS:
                records = await asyncio.to_thread(self._records)
                self._note_changes({record.peer_id: record for record in records})
                self._state = self._described(records)
                self._read = time.monotonic()
            return self._state

    async def events(self) -> AsyncGenerator[str]:
        """It again, each time that something has changed."""
        shown: dict[str, Any] | None = None
        while not self.ended.is_set():
            found = await self.now()
            if found != shown:
                shown = found
                yield event(found)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), FRESH_SECONDS)

    def _records(self) -> list[ServerRecord]:
        view = self._connection.view

        async def read() -> list[ServerRecord]:
            await view.records.renew()
            return list(view.records.known)

        found: list[ServerRecord] = self._connection.run(read())
        return found

    def _described(self, records: list[ServerRecord]) -> dict[str, Any]:
        view = self._connection.view
        ordered = sorted(records, key=lambda record: (record.start, record.end, record.peer_id))
        plain = as_plain(ordered[:MOST_SERVERS])
        for server in plain["servers"]:
            server["condemned"] = server["peer_id"] in view.verdicts.condemned
            server["used"] = server["peer_id"] in view.health.proven
        missing = as_plain(records)["models"]
        return {
            "model": one_line(self._name),
            "blocks": view.num_blocks,
            "missing": missing[0]["missing"] if missing else [[0, view.num_blocks]],
            "servers": [_clean(server) for server in plain["servers"]],
            "count": len(records),
            "changes": list(self._changes),
        }

    def _note_changes(self, now: dict[str, ServerRecord]) -> None:
        before, self._known = self._known, now
        if before is None:
            return
        for peer in sorted(before.keys() | now.keys()):
            old, new = before.get(peer), now.get(peer)
            what = "came" if old is None else "went" if new is None else ""
            if old is not None and new is not None and old.state != new.state:
                what = new.state
            if what:
                self._changes.appendleft({"at": int(time.time()), "peer_id": one_line(peer), "what": what})


def _clean(server: dict[str, Any]) -> dict[str, Any]:
    return {key: one_line(value) if isinstance(value, str) else value for key, value in server.items()}
