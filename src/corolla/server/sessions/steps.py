"""Several sessions of one peer take a step each (`Steps`).

Invariant: each step is checked as a `Step` is, succeeds or fails by itself, and waits for nothing but the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.block_server import BlockServer, malformed
from corolla.server.sessions.session import Client
from corolla.server.sessions.step import StepRequest, ready
from corolla.text import get_logger
from corolla.wire.failures import failure_from, meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import Failure, Outputs, Part, Steps

log = get_logger(__name__)

REASON_LENGTH = 100  # of why a part was refused: all of them share one header


class StepsRequest:
    """A `Steps`; all its parts are answered together."""

    def __init__(
        self, server: BlockServer, client: Client, message: Steps, tensors: dict[str, Tensor]
    ) -> None:
        """`hidden` [R, T, H] holds the parts' new tokens, one part's rows after the other's."""
        self._server = server
        self._peer = client.peer
        self._parts = message.parts
        self._hidden = torch.split(tensors["hidden"], [part.rows for part in message.parts])

    def check(self) -> None:
        """See `handlers.Answered`; each part is checked when it begins."""
        if len({part.name for part in self._parts}) < len(self._parts):
            raise malformed("parts", "A session takes one step at a time.")

    async def run(self) -> Packet:
        """The outputs of all parts that could be computed, and why the others could not."""
        steps: dict[str, StepRequest] = {}
        failures: dict[str, Failure] = {}
        with contextlib.ExitStack() as held:
            for part, hidden in zip(self._parts, self._hidden, strict=True):
                try:
                    steps[part.name] = self._admitted(part, hidden, held)
                except RequestRefused as refusal:
                    failures[part.name] = _short(refusal)
            outputs = dict(zip(steps, await _computed(self._server, list(steps.values())), strict=True))
        for name, output in outputs.items():
            if isinstance(output, Tensor):
                self._server.counters.inference += output.shape[0] * output.shape[1]
            else:
                steps[name].session.give_up()
                failures[name] = _short(self._refusal(output))
        whole = [
            torch.zeros_like(hidden) if part.name in failures else outputs[part.name]
            for part, hidden in zip(self._parts, self._hidden, strict=True)
        ]
        return Packet(Outputs(failures=tuple(failures.items())), {"hidden": torch.cat(whole)})

    def _admitted(self, part: Part, hidden: Tensor, held: contextlib.ExitStack) -> StepRequest:
        """The part's step, whose session takes no other, and stays, until `held` is closed.

        Raises `RequestRefused`; the session is lost then if the code says so.
        """
        session = ready(self._server.sessions.opened(self._peer, part.name))
        step = StepRequest(self._server, session, hidden, position=part.position, reserve=part.reserve)
        try:
            step.check()
            if step.group is None or not session.span.cuts.plain:
                raise RequestRefused("Send this step by itself.", code="not_batchable")
            if not step.reserve_now():
                raise RequestRefused(
                    "Send this step by itself: it needs room that is not free.",
                    code="not_batchable",
                    field="reserve",
                )
        except RequestRefused as refusal:
            if meaning(refusal).session_lost:
                session.give_up()
            raise
        held.enter_context(session.taking(step))
        held.enter_context(session.in_use())
        return step

    def _refusal(self, error: BaseException) -> RequestRefused:
        """What the client is told of a step that was begun and has failed."""
        if isinstance(error, RequestRefused):
            return error
        if isinstance(error, asyncio.CancelledError):
            return RequestRefused("The session has ended.", code="evicted")
        log.error("A step of %s failed", self._peer, exc_info=error)
        return RequestRefused(f"The server failed: {type(error).__name__}.", code="internal")


async def _computed(server: BlockServer, steps: Sequence[StepRequest]) -> list[Any]:
    """What each step gives, a tensor or its error; those whose sessions end meanwhile are cancelled."""
    try:
        server.engine.enqueue(steps)
        return await asyncio.gather(*(step.done for step in steps), return_exceptions=True)
    except BaseException:
        for step in steps:  # what their caches hold is not known
            step.session.give_up()
        raise


def _short(refusal: RequestRefused) -> Failure:
    failure = failure_from(refusal)
    return msgspec.structs.replace(failure, message=failure.message[:REASON_LENGTH])
