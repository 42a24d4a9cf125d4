"""The only retry loop of the client.

Invariant: an attempt is repeated only after what failed has been noted (the peer is avoided for a while),
and only for errors that another server, or the same one later, may not repeat. The attempt keeps what it
has already done, so a retry continues where the last one stopped. However many calls wait, and however
often they try, a user reads one line when waiting begins and one when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from corolla.client.view import SwarmView
from corolla.errors import CorollaError, RemoteError, RequestRefused, SwarmUnavailable
from corolla.text import get_logger
from corolla.wire.failures import Remedy, keeps_session, meaning, remedy_of
from corolla.wire.messages import SILENCE_SECONDS

log = get_logger(__name__)

T = TypeVar("T")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
UNSAID_SECONDS = 1.0  # a wait that is over sooner is nobody's business
MOST_SUSPICIONS = 3  # servers in a row that fail at one request: then it is the request that they cannot do


class _GaveUp(SwarmUnavailable):
    """Patience has ended; a call around this one does not begin again."""


@dataclass(eq=False)
class _Call:
    """One call's troubles since it last came nearer to its end."""

    what: str
    since: float  # when it began or made progress last
    reached: Any
    failures: int = 0
    waits: int = 0
    suspicions: int = 0  # of servers that failed, maybe because of the request
    evictions: int = 0
    blamed: str = ""  # the last fault of a peer, in words
    watch: asyncio.TimerHandle = field(init=False)

    def look(self, reached: Any, now: float) -> None:
        """Begin to count anew where there is progress."""
        if reached > self.reached:
            self.since, self.reached = now, reached
            self.failures = self.waits = self.suspicions = self.evictions = 0

    def note(self, error: CorollaError) -> None:
        self.failures += 1
        self.waits += isinstance(error, SwarmUnavailable)
        self.suspicions += isinstance(error, RequestRefused) and meaning(error).request_suspected
        self.evictions += remedy_of(error) is Remedy.REPLAY
        if isinstance(error, RemoteError):
            self.blamed = str(error)


@dataclass
class _Notice:
    """What the user is told about waiting, for all calls of a client together."""

    calls: set[_Call] = field(default_factory=set)
    began: float = 0.0

    def waiting(self, call: _Call, why: str, began: float, patience: float) -> None:
        if not self.calls:
            self.began = began
            log.warning("Waiting up to %.0f s to go on with %s: %s", patience, call.what, why)
        self.calls.add(call)

    def over(self, call: _Call, now: float, *, well: bool) -> None:
        if call not in self.calls:
            return
        self.calls.remove(call)
        if not self.calls and well:
            log.warning("Going on after %.0f s of waiting.", now - self.began)


class Retry:
    """Runs attempts against the swarm with patience."""

    def __init__(self, view: SwarmView, *, patience: float) -> None:
        """`patience`: seconds without any progress after which a call gives up."""
        self._view = view
        self._patience = patience
        self._notice = _Notice()
        self.causes: Counter[str] = Counter()  # why attempts were repeated, since the client's start

    async def run(
        self, attempt: Callable[[], Awaitable[T]], *, what: str, done: Callable[[], Any] = lambda: 0
    ) -> T:
        """The attempt's result; `done()` says how far it has come, as something that only grows.

        Raises the attempt's own error where repeating cannot help, `SwarmUnavailable` when there was no
        progress for as long as patience goes.
        """
        clock = asyncio.get_running_loop().time
        call = _Call(what, clock(), done())
        well = False
        try:
            while True:
                try:
                    async with self._patiently(call, done):
                        result = await attempt()
                    well = True
                    return result
                except (RemoteError, SwarmUnavailable) as error:
                    call.look(done(), clock())
                    call.note(error)
                    if self._is_final(call, error):
                        raise
                    waited = clock() - call.since
                    if waited >= self._patience:
                        raise _GaveUp(_give_up_message(call, waited, error)) from error
                    log.info("%s: %s; trying again", what, error)
                    self.causes[cause_of(error)] += 1
                    if isinstance(error, RemoteError):
                        await self._view.failed(error)
                    await self._wait(call, error, clock)
        finally:
            self._notice.over(call, clock(), well=well)

    @contextlib.asynccontextmanager
    async def _patiently(self, call: _Call, done: Callable[[], Any]) -> AsyncIterator[None]:
        """Ends an attempt that comes no further for as long as patience goes, whatever its server says meanwhile."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._look(call, done, limit)
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise SwarmUnavailable("A server shows signs of life, but does not answer.") from None
        finally:
            call.watch.cancel()

    def _look(self, call: _Call, done: Callable[[], Any], limit: asyncio.Timeout) -> None:
        """Whether there is progress: now, and again when patience would end without any."""
        loop = asyncio.get_running_loop()
        call.look(done(), loop.time())
        # What has begun has the time of one try; and errors that come at the last moment say more than this one.
        until = call.since + max(self._patience, SILENCE_SECONDS) + FIRST_PAUSE
        if loop.time() < until:
            call.watch = loop.call_at(until, self._look, call, done, limit)
        else:
            limit.reschedule(loop.time())

    async def _wait(self, call: _Call, error: CorollaError, clock: Callable[[], float]) -> None:
        """Nothing where another server, if there is one, can take over at once.

        One silent server that another stands in for is not worth a line; several one after the other are.
        """
        pause, now = self._pause(call, error), clock()
        left = max(0.0, call.since + self._patience - now)
        if (pause or call.failures > 1) and now + pause - call.since > UNSAID_SECONDS:
            self._notice.waiting(call, str(error), call.since, left)
        if pause:
            await asyncio.sleep(min(pause, left))

    def _is_final(self, call: _Call, error: CorollaError) -> bool:
        """Whether repeating cannot help. What one server says is not believed where others can be asked.

        But that it is too large, which leaves a session as it is, from one that has answered before.
        """
        if not isinstance(error, RequestRefused):
            return isinstance(error, _GaveUp)
        if meaning(error).final and keeps_session(error) and error.peer_id in self._view.health.proven:
            return True
        suspect = meaning(error).final or call.suspicions > MOST_SUSPICIONS
        return suspect and not self._view.can_do_without(error.peer_id)

    def _pause(self, call: _Call, error: CorollaError) -> float:
        if isinstance(error, SwarmUnavailable):
            # No longer than until a server may be asked again, since it may be the only one.
            back = self._view.health.next_return()
            pause = backoff(call.waits)
            return pause if not back else max(0.01, min(pause, back * random.uniform(1.0, 1.1)))
        if error_names_nobody(error):
            return backoff(call.failures)
        if remedy_of(error) is Remedy.REPLAY and call.evictions > 1:
            # A server that is so short of room must not be replayed in a circle.
            return backoff(call.evictions)
        return 0.0


def cause_of(error: CorollaError) -> str:
    """A short name for why an attempt is repeated: the kind of error, or the refusal's code."""
    if isinstance(error, RequestRefused):
        return f"refused_{error.code}"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()


def backoff(failures: int) -> float:
    """Seconds to pause after so many failures in a row, with jitter: clients must not come back in step."""
    return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 10)) * random.uniform(0.75, 1.25))


def error_names_nobody(error: CorollaError) -> bool:
    """Whether a peer failed that cannot be avoided, because it is not known which."""
    return isinstance(error, RemoteError) and error.peer_id is None


def _give_up_message(call: _Call, waited: float, error: CorollaError) -> str:
    blamed = f" The last fault of a server was: {call.blamed}" if call.blamed not in ("", str(error)) else ""
    return f"Gave up on {call.what} after {waited:.0f} s: {error}{blamed}"
