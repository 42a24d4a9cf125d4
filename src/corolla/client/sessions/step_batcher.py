"""Generation steps of several sessions of this client on their way to one server, in one message.

Invariant: a step gets its own outputs or its own error, as if it had been sent alone. While messages are under way
what comes meanwhile waits for the next; and a step waits a little for others that are due, since one pass of many
rows is far cheaper than many of one, for the server as for the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.errors import CorollaError, RequestRefused
from corolla.swarm.arrivals import LONGEST_PERIOD, ArrivalTracker
from corolla.swarm.channel import checked, refused
from corolla.wire.frames import Packet
from corolla.wire.messages import Outputs, Part, Steps

# Messages to a server at a time, and steps of one. Larger ones make a pass hardly cheaper, and while some are on their
# way this client is at work on the tokens of others.
UNDER_WAY = 2
TOGETHER = 8
# What a step waits at most for those of others: so long, and so much of the time from one token to the next.
GATHER_SECONDS = 0.03
GATHER_SHARE = 0.33
# Sessions that have begun apart stay apart, since each comes again when its own token is done. So once in so many
# messages, and when somebody has begun, a step waits for the others for as long as a token takes. Those that go
# together come back together, as fast as this process lets their threads, and wait for each other.
MEET_EVERY = 8


@dataclass(frozen=True)
class _Step:
    part: Part
    hidden: Tensor  # [R, 1, H]
    done: asyncio.Future[Tensor]


class StepBatcher:
    """The sessions that one client has at one server. Used on the event loop only."""

    def __init__(self, peer: str, ask: Callable[[Packet], Awaitable[Packet]]) -> None:
        """`ask` sends the server `peer` a request and gives its answer."""
        self.members: set[str] = set()  # sessions with a cache there, by their names
        self._peer, self._ask = peer, ask
        self._waiting: list[_Step] = []
        self._under_way: set[asyncio.Task[None]] = set()
        self._sending: asyncio.Handle | None = None
        self._until: float | None = None  # how long those that wait do so for others
        self._meeting: set[str] = set()  # whom they wait for whatever their pace
        self._messages = MEET_EVERY  # since steps have waited for as long as a token takes
        self._arrivals = ArrivalTracker()
        self._company: dict[str, frozenset[str]] = {}  # who went in each one's last message

    def enter(self, name: str) -> None:
        """A session of that name has a cache at the server."""
        self.members.add(name)

    def leave(self, name: str) -> None:
        """It has none any more."""
        self.members.discard(name)
        self._arrivals.forget(name)
        self._company.pop(name, None)

    def went_alone(self, name: str, tokens: int) -> None:
        """A member has a step of so many tokens that goes by itself: nobody waits for it."""
        self._company.pop(name, None)
        if tokens == 1:
            self._arrived(name)

    def _arrived(self, name: str) -> None:
        now = asyncio.get_running_loop().time()
        if name not in self._arrivals.since(now - LONGEST_PERIOD):
            self._messages = MEET_EVERY
        self._arrivals.arrived(name, now)

    async def step(self, part: Part, hidden: Tensor) -> Tensor:
        """The outputs [R, 1, H] of a member's step. Raises `RemoteError`."""
        one = _Step(part, hidden, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self._arrived(part.name)
        self._send_soon()
        return await one.done

    def close(self) -> None:
        """Give up what is under way, and what waits."""
        for task in self._under_way:
            task.cancel()
        for one in self._take_all():
            one.done.cancel()

    def _take_all(self) -> list[_Step]:
        """Those that wait, who do so no longer."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _send_soon(self) -> None:
        """Send when all are there who are about to bring a step: in this turn of the loop, or by their own pace."""
        if not self._waiting or len(self._under_way) >= UNDER_WAY:
            return
        loop = asyncio.get_running_loop()
        waiting, now = {one.part.name for one in self._waiting}, loop.time()
        if self._until is None:
            self._until = now + self._patience(now, waiting)
        if self._sending is not None:
            self._sending.cancel()
        if len(waiting) < TOGETHER and self._others_due(now, self._until, waiting):
            self._sending = loop.call_at(self._until, self._send)
        else:
            self._sending = loop.call_soon(self._send)

    def _patience(self, now: float, waiting: set[str]) -> float:
        """Seconds that those which wait do so for others at most."""
        period = self._arrivals.shortest_period(waiting)
        if self._messages >= MEET_EVERY:
            self._meeting = (self.members & self._arrivals.since(now - 2 * period)) - waiting
            if self._meeting:
                self._messages = 0
                return period
        patience = GATHER_SHARE * period
        return patience if self._missing(waiting) else min(GATHER_SECONDS, patience)

    def _others_due(self, now: float, until: float, waiting: set[str]) -> bool:
        """Whether any have not come who are waited for: for a meeting, as of the same message, or by their pace."""
        if (self._meeting - waiting) & self.members or self._missing(waiting):
            return until > now
        return self._arrivals.others_due(now, until, waiting)

    def _missing(self, waiting: set[str]) -> set[str]:
        """Those that went in the same message as one that waits, and have not come again."""
        of_those = [self._company[name] for name in waiting if name in self._company]
        gone = {name for one in of_those for name in one if self._company.get(name) is one}
        return gone - waiting

    def _send(self) -> None:
        self._sending = self._until = None
        self._meeting.clear()
        self._messages += 1
        wanted = [one for one in self._waiting if not one.done.done()]  # the rest was given up
        together, self._waiting = _alike(wanted)
        if together:
            company = frozenset(one.part.name for one in together)
            self._company |= dict.fromkeys(company & self.members, company)
            task = asyncio.create_task(self._exchange(together))
            self._under_way.add(task)
            task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._send_soon()

    async def _exchange(self, steps: list[_Step]) -> None:
        message = Steps(parts=tuple(one.part for one in steps))
        hidden = torch.cat([one.hidden for one in steps])
        try:
            answer = await self._ask(Packet(message, {"hidden": hidden}))
            checked(answer, "hidden", hidden, self._peer)
        except CorollaError as error:
            # A server that is gone or hangs is no better for those that wait; they would only notice later.
            lost = [] if isinstance(error, RequestRefused) else self._take_all()
            for one in steps + lost:
                if not one.done.done():
                    one.done.set_exception(error)
        except BaseException:  # closed, or a mistake of ours
            for one in steps:
                one.done.cancel()
            raise
        else:
            _hand_out(steps, answer, self._peer)


def _alike(steps: list[_Step]) -> tuple[list[_Step], list[_Step]]:
    """Those that can go together with the first, and the rest."""
    together: list[_Step] = []
    rest: list[_Step] = []
    for one in steps:
        first = steps[0].hidden
        fits = len(together) < TOGETHER and one.hidden.dtype == first.dtype
        fits = fits and one.hidden.shape[1:] == first.shape[1:]
        (together if fits else rest).append(one)
    return together, rest


def _hand_out(steps: list[_Step], answer: Packet, peer: str) -> None:
    assert isinstance(answer.message, Outputs)
    outputs = torch.split(answer.tensors["hidden"], [one.part.rows for one in steps])
    failures = dict(answer.message.failures)
    for one, output in zip(steps, outputs, strict=True):
        failure = failures.get(one.part.name)
        if one.done.done():
            continue
        if failure is None:
            one.done.set_result(output)
        else:
            one.done.set_exception(refused(failure, peer))
