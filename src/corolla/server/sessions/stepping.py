"""How a session takes a step: by itself (`Step`), or beside others of its peer (`Steps`).

Invariant: a session takes one step at a time, and either has taken it whole or has lost its cache. A part of
`Steps` is checked as a `Step` is, succeeds or fails by itself, and waits for nothing but the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.checks import check_hidden, check_memory, check_step, failure_from
from corolla.server.scheduler.block_server import BlockServer
from corolla.server.scheduler.tasks import in_order
from corolla.server.sessions.opening import in_use
from corolla.server.sessions.sessions import CachedSession
from corolla.server.sessions.steps import PackedStep, kind_of, pieces
from corolla.wire.failures import meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import Failure, Outputs, Part, Step, Steps

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512  # rows x tokens that are computed at once, so that others' decode steps come in between
REASON_LENGTH = 100  # of why a part was refused: all of them share one header


async def take_step(
    server: BlockServer, session: CachedSession | None, message: Step, tensors: dict[str, Tensor]
) -> Tensor:
    """The outputs [R, T, H] of a step. Raises `RequestRefused`."""
    with _stepping(session) as session:
        rows, count = _checked(server, session, message, tensors)
        room, order = max(message.reserve, message.position + count), tensors.get("rows")
        await session.reserve(rows, room, "reserve", position=message.position, order=order)
        with in_use(server, session):
            output = await _compute(server, session, message, tensors, room)
        server.counters.inference += rows * count
        return output


@contextlib.contextmanager
def _stepping(session: CachedSession | None) -> Iterator[CachedSession]:
    """The session, which takes no other step inside."""
    if session is None or session.evicted:
        raise RequestRefused("The session's cache is gone; replay it.", code="evicted")
    if session.stepping:
        raise RequestRefused("The session has not answered the step before.", code="malformed", field="name")
    session.stepping = True
    session.steps += 1
    try:
        yield session
    finally:
        session.stepping = False


def _checked(
    server: BlockServer, session: CachedSession, message: Step, tensors: dict[str, Tensor]
) -> tuple[int, int]:
    """Rows and new tokens a row of a step that can be computed here."""
    hidden = tensors["hidden"]
    rows, count = int(hidden.shape[0]), int(hidden.shape[1])
    check_hidden(hidden, session.span)
    check_step(message, tensors, session)
    check_memory(
        session.span,
        rows=rows,
        tokens=min(_width(rows), count),
        total=message.position + count,
        with_gradients=False,
        limit=server.working_bytes,
    )
    return rows, count


def _width(rows: int) -> int:
    """Tokens a row that are computed at once."""
    return max(1, PREFILL_TOKENS // rows)


async def _compute(
    server: BlockServer, session: CachedSession, message: Step, tensors: dict[str, Tensor], room: int
) -> Tensor:
    """The step's outputs [R, T, H]: packed with others' where the family allows it, else in pieces."""
    hidden = tensors["hidden"]
    arguments: dict[str, Any] = {
        "position": message.position,
        "order": tensors.get("rows"),
        "mask": tensors.get("mask"),
        "positions": tensors.get("positions"),
    }
    if session.span.packable:
        [result] = server.engine.steps(
            [PackedStep(session, hidden, **arguments, room=room)], peer=session.peer
        )
        output: Tensor = await result
        return output
    kind = kind_of(int(hidden.shape[1]))
    parts = pieces(session, hidden, **arguments, width=_width(int(hidden.shape[0])))
    work = [server.engine.submit(kind, part, peer=session.peer) for part in parts]
    return torch.cat(await in_order(work), dim=1)


async def take_steps(server: BlockServer, peer: str, message: Steps, hidden: Tensor) -> Packet:
    """The answer to steps of several sessions of a peer, with `hidden` [R, T, H] of all of them."""
    if len({part.name for part in message.parts}) < len(message.parts):
        raise RequestRefused("A session takes one step at a time.", code="malformed", field="parts")
    own = torch.split(hidden, [part.rows for part in message.parts])
    parts = [_Part(server, peer, *both) for both in zip(message.parts, own, strict=True)]
    with contextlib.ExitStack() as held:
        going = [part for part in parts if part.begins(held)]
        outputs: Sequence[Any] = []
        try:
            results = server.engine.steps([part.step for part in going], peer=peer)
            for part, result in zip(going, results, strict=True):
                part.session.computing = result
            # Those that end with their sessions meanwhile are among the results, as errors.
            outputs = await asyncio.gather(*results, return_exceptions=True)
        finally:
            for part in going[len(outputs) :]:  # given up in the middle: what these hold is not known
                part.session.give_up()
            for part in going:
                part.session.computing = None
        for part, output in zip(going, outputs, strict=True):
            part.ends(output)
    failures = tuple((part.message.name, part.failure) for part in parts if part.failure is not None)
    return Packet(Outputs(failures=failures), {"hidden": torch.cat([part.output for part in parts])})


class _Part:
    """One session's step on its way."""

    session: CachedSession
    step: PackedStep

    def __init__(self, server: BlockServer, peer: str, message: Part, hidden: Tensor) -> None:
        self.message = message
        self.failure: Failure | None = None
        self.output = hidden  # zeros in its place, as long as there is none
        self._server, self._peer, self._hidden = server, peer, hidden

    def begins(self, held: contextlib.ExitStack) -> bool:
        """Whether the step can be computed; then its session takes no other, and stays, until `held` is closed."""
        try:
            self.session = held.enter_context(
                _stepping(self._server.named.opened(self._peer, self.message.name))
            )
        except RequestRefused as refusal:
            self._fails(refusal)
            return False
        try:
            self.step = self._prepared(self.session)
        except RequestRefused as refusal:
            self._fails(refusal)
            if meaning(refusal).session_lost:
                self.session.give_up()
            return False
        held.enter_context(in_use(self._server, self.session))
        return True

    def _prepared(self, session: CachedSession) -> PackedStep:
        message = Step(position=self.message.position, reserve=self.message.reserve)
        rows, count = _checked(self._server, session, message, {"hidden": self._hidden})
        room = max(message.reserve, message.position + count)
        needed = session.pages_needed(rows, room, message.position, None)
        if not session.span.packable or needed > session.pages:
            raise RequestRefused("Send this step by itself.", code="not_batchable")
        position = message.position
        return PackedStep(
            session, self._hidden, position=position, order=None, mask=None, positions=None, room=room
        )

    def ends(self, output: Tensor | BaseException) -> None:
        """Note what the engine gave."""
        if isinstance(output, Tensor):
            self.output = output
            self._server.counters.inference += output.shape[0] * output.shape[1]
            return
        if isinstance(output, RequestRefused):
            self._fails(output)
        elif isinstance(output, asyncio.CancelledError):
            self._fails(RequestRefused("The session has ended.", code="evicted"))
        else:
            log.error("A step of %s failed", self._peer, exc_info=output)
            self._fails(RequestRefused(f"The server failed: {type(output).__name__}.", code="internal"))
        self.session.give_up()

    def _fails(self, refusal: RequestRefused) -> None:
        failure = failure_from(refusal)
        self.failure = msgspec.structs.replace(failure, message=failure.message[:REASON_LENGTH])
        self.output = torch.zeros_like(self._hidden)
