"""The only retry loop of the client.

Invariant: an attempt is repeated only after what failed has been noted (the peer is avoided for a while),
and only for errors that another server, or the same one later, may not repeat. The attempt keeps what it
has already done, so a retry continues where the last one stopped.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from corolla.client.view import SwarmView
from corolla.errors import CorollaError, RemoteError, RequestRefused, SwarmUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_PATIENCE = 600.0  # seconds after its beginning at which a call that fails again gives up
LONGEST_PAUSE = 5.0
MOST_INTERNAL_ERRORS = 3  # of servers in a row for one request: then it is the request that they cannot do
FINAL_REFUSALS = {"malformed", "too_large", "out_of_order"}  # another server would say the same


class Retry:
    """Runs attempts against the swarm with patience."""

    def __init__(self, view: SwarmView, *, patience: float = DEFAULT_PATIENCE) -> None:
        self._view = view
        self._patience = patience

    async def run(self, attempt: Callable[[], Awaitable[T]], *, what: str) -> T:
        """The attempt's result.

        Raises the attempt's own error where repeating cannot help, `SwarmUnavailable` when patience ends.
        """
        started, failures, internal = time.monotonic(), 0, 0
        while True:
            try:
                return await attempt()
            except (RemoteError, SwarmUnavailable) as error:
                internal += _is_internal(error)
                if _is_final(error) or internal > MOST_INTERNAL_ERRORS:
                    raise
                failures += 1
                waited = time.monotonic() - started
                if waited > self._patience:
                    raise SwarmUnavailable(f"Gave up on {what} after {waited:.0f} s: {error}") from error
                log.warning("%s: %s; trying again", what, error)
                await self._prepare_next(error, failures)

    async def _prepare_next(self, error: CorollaError, failures: int) -> None:
        if isinstance(error, RemoteError):
            await self._view.failed(error)
            return  # another server, if there is one, can take over at once
        pause = min(LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))
        pause = max(0.05, min(pause, self._view.next_return() or pause))
        await asyncio.sleep(pause * random.uniform(0.75, 1.25))


def _is_internal(error: CorollaError) -> bool:
    return isinstance(error, RequestRefused) and error.code == "internal"


def _is_final(error: CorollaError) -> bool:
    return isinstance(error, RequestRefused) and error.code in FINAL_REFUSALS
